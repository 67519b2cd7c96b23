"""A folder of lm-evaluation-harness output: ``results_*.json`` and, with ``--log_samples``, ``samples_*.jsonl``.

Reach for it when your models have been evaluated already: their errors, and the loss on the right answers of each task,
become a table of runs that laws are fitted to.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.forecast.fit import Array
from downriver.forecast.readers import read_json, read_sizes, size_of
from downriver.forecast.table import Path_, RunTable, mixed_conventions

SCORES = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "mcc")  # which of a task's metrics is its accuracy
# metrics that are a loss, and what makes them nats (per byte, word or token)
LOSSES = {
    "bits_per_byte": lambda v: v * math.log(2),
    "byte_perplexity": math.log,
    "word_perplexity": math.log,
    "perplexity": math.log,
}


@dataclass(frozen=True)
class Items:
    """One task's items, in the order of their ids: was each right (0 to 1), and bits per byte of its right answer.

    ``bits`` is NaN for items that are not multiple choice.
    """

    task: str
    ids: tuple[str, ...]
    score: Array
    bits: Array


def lm_eval(folder: Path_, sizes: Any = None, *, loss: str | None = None, metric: str | None = None) -> RunTable:
    """See ``RunTable.from_lm_eval``."""
    folder = Path(folder)
    models = _models(folder)
    given = {} if sizes is None else read_sizes(sizes)
    runs = [_run(name, files, given, loss, metric) for name, files in models.items()]
    shared = set.intersection(*(set(run["errors"]) for run in runs))
    tasks = sorted(set().union(*(run["errors"] for run in runs)))
    if not tasks:
        raise InputError(f"{folder}: no task with one of the metrics {', '.join(SCORES)}: name one, metric=...")
    notes = []
    if left := sorted(set(tasks) - shared):
        notes.append(f"the mean error leaves out what not every model was tested on: {', '.join(left)}")
    errors = {f"error_{t}": np.array([run["errors"].get(t, np.nan) for run in runs]) for t in tasks}
    mean = {"error": np.mean([errors[f"error_{t}"] for t in sorted(shared)], axis=0)} if shared else {}
    losses: dict[str, Array] = {}
    if all("loss" in run for run in runs):
        losses["loss"] = np.array([run["loss"] for run in runs])
    elif some := [name for name, run in zip(models, runs, strict=True) if "loss" in run]:
        raise InputError(f"{folder}: only some models have a loss ({', '.join(some)}): all or none are expected")
    by_task = [run["bits"] for run in runs]
    both = sorted(set.intersection(*(set(bits) for bits in by_task)))
    if both:
        bits = {t: np.array([b[t] for b in by_task]) for t in both}
        if not losses:
            notes.append(f"no loss on text: the loss is bits per byte of the right answers, mean of {len(bits)} tasks")
        losses = {"loss": np.mean(list(bits.values()), axis=0)} | losses | {f"bpb_{t}": v for t, v in bits.items()}
    if not losses:
        raise InputError(
            f"{folder}: no loss for its models: give one in the column 'loss' of the sizes, run a perplexity task such "
            "as wikitext (loss='wikitext/bits_per_byte'), or evaluate with --log_samples"
        )
    for name, run in zip(models, runs, strict=True):
        if "params" not in run or "tokens" not in run:
            raise InputError(f"{name}: sizes with its params and tokens are expected (model, params, tokens)")
    N = np.array([run["params"] for run in runs])
    counted = np.array([run["counted"] for run in runs], dtype=np.float64)
    notes += mixed_conventions(N, counted)
    D = np.array([run["tokens"] for run in runs])
    return RunTable(N, D, losses, mean | errors, names=list(models), notes=notes)


def items(path: Path_) -> Items:
    """The items of one ``samples_<task>_<date>.jsonl``, as ``--log_samples`` writes it.

    The score is the item's ``acc_norm``, else ``acc``, ``exact_match`` or the first metric that it names. Bits per byte
    are those of the right answer under the model: what the ladder calls the task's loss.
    """
    path = Path(path)
    task = re.sub(r"_\d{4}-\d\d-\d\dT[\d.-]+$", "", path.stem.removeprefix("samples_"))
    rows = {}
    for number, row in sample_lines(path):
        try:
            names = [n for n in (*SCORES, *row.get("metrics", ())) if n in row]
            score = float(row[names[0]]) if names else math.nan
            rows[str(row["doc_id"])] = (score, _bits(row))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{path}, line {number} is not a sample of lm-eval: {error!r}") from error
    if not rows:
        raise InputError(f"{path} is empty")
    ids = sorted(rows, key=lambda i: (len(i), i))
    found = np.array([rows[i] for i in ids], dtype=np.float64)
    return Items(task, tuple(ids), found[:, 0], found[:, 1])


def _models(folder: Path) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
    """The results files of each model, oldest first: of two results for one task the later counts."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("results*.json"), key=lambda f: f.name)
    if not files:
        raise InputError(f"{folder} holds no results*.json: lm-eval writes them with --output_path")
    models: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
            raise InputError(f"{file} is not a results file of lm-eval: an object with 'results' is expected")
        name = content.get("model_name") or file.parent.name
        models.setdefault(str(name), []).append((file, content))
    return dict(sorted(models.items()))


def _run(
    name: str,
    files: list[tuple[Path, dict[str, Any]]],
    given: dict[str, dict[str, float]],
    loss: str | None,
    metric: str | None,
) -> dict[str, Any]:
    run: dict[str, Any] = {"errors": {}, "bits": {}, "counted": math.nan}
    found: dict[str, float] = {}
    for file, content in files:
        if counted := (content.get("config") or {}).get("model_num_parameters"):
            run["counted"] = run["params"] = float(counted)
        groups = content.get("group_subtasks") or {}
        parts = {part for group, listed in groups.items() if _has_score(content, group) for part in listed}
        for task, values in content["results"].items():
            if not isinstance(values, dict):
                raise InputError(f"{file}: results of {task!r} are not an object of metrics")
            numbers = {k.partition(",")[0]: v for k, v in values.items() if isinstance(v, int | float)}
            found |= {f"{task}/{k}": float(v) for k, v in numbers.items() if "_stderr" not in k}
            if task not in parts and (score := _score(task, numbers, metric)) is not None:
                run["errors"][task] = 1 - score
    for samples in sorted({s for file, _ in files for s in file.parent.glob("samples_*.jsonl")}, key=lambda s: s.name):
        one = items(samples)
        if np.isfinite(one.bits).all():
            run["bits"][one.task] = float(one.bits.mean())
    if given:
        size = size_of([name, name.rsplit("/", 1)[-1], name.replace("/", "__")], given)
        run |= size
    if loss is not None:
        if loss not in found:
            raise unknown(f"loss of {name}", loss, found)
        run["loss"] = LOSSES.get(loss.rpartition("/")[2], float)(found[loss])
    elif "loss" not in run:
        perplexities = [k for k in found if k.rpartition("/")[2] == "bits_per_byte"]
        if len(perplexities) == 1:
            run["loss"] = LOSSES["bits_per_byte"](found[perplexities[0]])
    return run


def _has_score(content: dict[str, Any], group: str) -> bool:
    values = content["results"].get(group)
    return isinstance(values, dict) and any(isinstance(v, float) for v in values.values())


def _score(task: str, numbers: dict[str, float], metric: str | None) -> float | None:
    name = metric if metric is not None else next((n for n in SCORES if n in numbers), None)
    if name is None or name not in numbers:
        return None
    if not 0 <= numbers[name] <= 1:
        raise InputError(f"task {task!r}: its {name} is {numbers[name]}, a fraction is expected")
    return float(numbers[name])


def sample_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with the numbers of their lines, from 1; ``InputError`` names a line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: an object is expected")
        yield number, row


def _bits(row: dict[str, Any]) -> float:
    """Bits per byte of the right answer of a multiple-choice item, NaN for other items.

    A choice's request is its context and its text (``gen_args_i``: ``arg_0``, ``arg_1``), its response the text's log
    probability in nats and whether it was the likeliest.
    """
    requests, responses = row["arguments"], row["resps"]
    texts = [
        r["arg_1"] for _, r in sorted(requests.items(), key=lambda r: int(r[0].rpartition("_")[2])) if "arg_1" in r
    ]
    if len(texts) < 2 or len(texts) != len(responses) or not all(isinstance(t, str) for t in texts):
        return math.nan
    target = str(row["target"]).strip()
    # lm-eval writes the number of the right choice, or, for tasks whose target is words, its text
    right = int(target) if target.isdigit() else [text.strip() for text in texts].index(target)
    log_p = float(responses[right][0][0])
    return -log_p / math.log(2) / max(len(texts[right].encode()), 1)
