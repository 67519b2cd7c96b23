"""Public result tables: the over-training testbed, the OLMo ladder, Chinchilla's points, observed benchmark scores.

Reach for them to see how far off a law is where the truth is known, before trusting it on runs of your own. Each
takes the path of files as their repositories hold them.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from downriver.core.errors import InputError
from downriver.core.table import read_table
from downriver.forecast.fit import Array
from downriver.forecast.readers import read_json
from downriver.forecast.table import Path_, RunTable

if TYPE_CHECKING:
    import polars as pl

# The 17 tasks that the over-training paper averages (scaling/constants.py of mlfoundations/scaling).
SEVENTEEN = (
    "bigbench_operators",
    "pubmed_qa_labeled",
    "hellaswag_zeroshot",
    "boolq",
    "arc_easy",
    "coqa",
    "bigbench_dyck_languages",
    "lambada_openai",
    "bigbench_novel_concepts",
    "winograd",
    "bigbench_cs_algorithms",
    "commonsense_qa",
    "bigbench_qa_wikidata",
    "hellaswag",
    "copa",
    "squad",
    "piqa",
)

# Parameters of the ladder's models without their input embedding, as the ladder counts them (src/scaling of
# allenai/OLMo-ladder; that of 3B follows from its 20 tokens a parameter).
LADDER = {
    "190M": 190_354_176,
    "370M": 371_262_464,
    "760M": 758_220_288,
    "1B": 1_279_395_840,
    "3B": 3_169_537_280,
}
TARGETS = {"7B-4T": ("peteish7_eval_anneal", 6_887_575_552), "13B-5T": ("peteish13_eval_final", 13_202_396_160)}
# MMLU is the mean of its four parts, weighted by their numbers of questions (src/scaling/utils.py there).
MMLU = {"stem": 0.215, "humanities": 0.335, "social_sciences": 0.219, "other": 0.231}
BPB, SOFT, SCORE = "eval/downstream_bpb/", "eval/downstream_soft_log/", "eval/downstream/"


def testbed(folder: Path_) -> RunTable:
    """See ``RunTable.from_testbed``."""
    folder = Path(folder)
    files = sorted((folder / "models").glob("*.json"))
    if not files:
        raise InputError(f"{folder} holds no models/*.json: the testbed's exp_data folder is expected")
    rows = []
    for file in files:
        model = read_json(file)
        scores = read_json(folder / "evals" / f"evaluation_{file.stem}_heavy.json")
        try:
            settings, accuracy = model["hyperparameters"], scores["eval_metrics"]["icl"]
            losses = {_evaluation(r["val_data"][0]): float(r["loss"]) for r in model["results"]}
            rows.append((settings["params"], settings["tokens"], losses, accuracy, model["dataset_name"], file.stem))
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(f"{file} is not a model file of the testbed: {error!r}") from error
    sets = sorted(rows[0][2], key=lambda name: (name != "c4_val", name))
    tasks = {f"error_{task}": np.array([1 - r[3][task] for r in rows]) for task in rows[0][3]}
    averages = {
        "avg_error": np.mean(list(tasks.values()), axis=0),
        "avg_subset_error": np.mean([tasks[f"error_{task}"] for task in SEVENTEEN], axis=0),
    }
    return RunTable(
        np.array([r[0] for r in rows], dtype=np.float64),
        np.array([r[1] for r in rows], dtype=np.float64),
        {name: np.array([r[2][name] for r in rows]) for name in sets},
        averages | tasks,
        [r[4] for r in rows],
        [r[5] for r in rows],
    )


def olmo_ladder(folder: Path_, last: int = 5, checkpoints: bool = False) -> RunTable:
    """See ``RunTable.from_olmo_ladder``."""
    folder = Path(folder)
    found = [(file, *run) for file in sorted(folder.glob("*.csv")) if (run := _ladder_run(file))]
    if not found:
        raise InputError(f"{folder} holds no run of the ladder such as 190M-1xC.csv")
    if not last >= 1:
        raise InputError(f"last is {last!r}: at least 1 checkpoint is averaged")
    parts = []
    for file, group, N in found:
        frame = read_table(file)
        D = _ladder_tokens(file, frame)
        losses, metrics = _ladder_columns(file, frame)
        values = np.stack([*losses.values(), *metrics.values()])
        if not checkpoints:
            D, values = D[-1:], values[:, -last:].mean(axis=1, keepdims=True)
        parts.append((np.full(len(D), float(N)), D, values, group, file.stem, list(losses), list(metrics)))
    names = parts[0][5:]
    if odd := [part[4] for part in parts if part[5:] != names]:
        raise InputError(f"{folder}: {odd[0]}.csv has other tasks than {parts[0][4]}.csv")
    stacked = np.concatenate([part[2] for part in parts], axis=1)
    return RunTable(
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        dict(zip(names[0], stacked, strict=False)),
        dict(zip(names[1], stacked[len(names[0]) :], strict=True)),
        [part[3] for part in parts for _ in part[1]],
        [_ladder_name(part[4]) for part in parts for _ in part[1]],
    )


def chinchilla(path: Path_) -> RunTable:
    """See ``RunTable.from_chinchilla``."""
    frame = read_table(path, numeric=["Model Size", "Training FLOP", "loss"])
    N = frame["Model Size"].to_numpy()
    return RunTable(N, frame["Training FLOP"].to_numpy() / (6 * N), {"loss": frame["loss"].to_numpy()})


def obs_scaling(path: Path_) -> RunTable:
    """See ``RunTable.from_obs_scaling``."""
    import polars as pl

    names = ("Model Size (B)", "Pretraining Data Size (T)")
    frame = read_table(path, columns=["Model", "Model Family", *names])
    known = frame.drop_nulls(names)
    if not known.height:
        raise InputError(f"{path}: no model has both {names[0]!r} and {names[1]!r}")
    skipped = frame.height - known.height
    notes = [f"{skipped} of {frame.height} models have no published size or tokens and are left out"] if skipped else []
    scores = [n for n in frame.columns[frame.columns.index(names[1]) + 1 :] if not n.startswith("FLOPs")]
    columns = {n: known[n].cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy() for n in [*names, *scores]}
    for name in scores:
        if not ((columns[name] >= 0) & (columns[name] <= 1) | np.isnan(columns[name])).all():
            raise InputError(f"{path}, column {name!r}: scores between 0 and 1 are expected")
    return RunTable(
        columns[names[0]] * 1e9,
        columns[names[1]] * 1e12,
        {},
        {f"error_{name}": 1 - columns[name] for name in scores},
        known["Model Family"].to_list(),
        known["Model"].to_list(),
        notes,
    )


def _evaluation(path: str) -> str:
    """The testbed names an evaluation by its folder, and the German one by its file."""
    place = Path(path)
    return place.stem if place.parent.name == "de-en" else place.parent.name


def _ladder_run(file: Path) -> tuple[str, int] | None:
    """Group and parameters of a file of the ladder; none for runs that the ladder's own fit leaves aside."""
    if match := re.fullmatch(r"(\d+[MB])-[\d.]+xC(-rerun)?", file.stem):
        return (match[1], LADDER[match[1]]) if match[1] in LADDER and not match[2] else None
    return next(((group, N) for group, (stem, N) in TARGETS.items() if file.stem == stem), None)


def _ladder_name(stem: str) -> str:
    return next((group for group, (file, _) in TARGETS.items() if file == stem), stem)


def _ladder_tokens(file: Path, frame: "pl.DataFrame") -> Array:
    if "throughput/total_tokens" in frame.columns:
        return read_table(file, numeric=["throughput/total_tokens"])["throughput/total_tokens"].to_numpy()
    checked = read_table(file, numeric=["_step", "batch_size_in_tokens"])
    return checked["_step"].to_numpy() * checked["batch_size_in_tokens"].to_numpy()


def _ladder_columns(file: Path, frame: "pl.DataFrame") -> tuple[dict[str, Array], dict[str, Array]]:
    """Losses (texts, then bits per byte and -log p of each task) and errors of every checkpoint of one file."""
    texts = [n for n in frame.columns if n.startswith("eval/") and n.endswith("/CrossEntropyLoss")]
    tasks = [n.removeprefix(BPB).removesuffix("_bpb") for n in frame.columns if n.startswith(BPB)]
    if not texts or not tasks:
        raise InputError(f"{file} is not a run of the ladder: columns {BPB}... are expected")
    scores = {t: next((n for n in frame.columns if re.fullmatch(f"{SCORE}{t}_(len_norm|acc)", n)), None) for t in tasks}
    if missing := [t for t, n in scores.items() if n is None or f"{SOFT}{t}_soft_log" not in frame.columns]:
        raise InputError(f"{file}: no accuracy or no soft loss of task {missing[0]!r}")
    wanted = [*texts, *(f"{BPB}{t}_bpb" for t in tasks), *(f"{SOFT}{t}_soft_log" for t in tasks)]
    values: Any = read_table(file, numeric=[*wanted, *(n for n in scores.values() if n)])

    def task(prefix: str, suffix: str) -> dict[str, Array]:
        columns = {t: values[f"{prefix}{t}{suffix}"].to_numpy() for t in tasks}
        return _with_mmlu(columns)

    losses = {n.split("/")[1].removesuffix("-validation"): values[n].to_numpy() for n in texts}
    losses |= {f"bpb_{t}": v for t, v in task(BPB, "_bpb").items()}
    losses |= {f"soft_{t}": -v for t, v in task(SOFT, "_soft_log").items()}
    errors = _with_mmlu({t: 1 - values[n].to_numpy() for t, n in scores.items() if n})
    return losses, {f"error_{t}": v for t, v in errors.items()}


def _with_mmlu(columns: dict[str, Array]) -> dict[str, Array]:
    """Short names; the parts of MMLU as one task a split."""
    found: dict[str, Array] = {}
    for name, values in columns.items():
        short = name.removesuffix("_rc_5shot")
        part = next((p for p in MMLU if short.startswith(f"mmlu_{p}_")), None)
        if part:
            whole = f"mmlu_{short.removeprefix(f'mmlu_{part}_')}"
            found[whole] = found.get(whole, np.zeros(len(values))) + MMLU[part] * values
        else:
            found[short] = values
    return found
