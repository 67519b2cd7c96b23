"""How often each model gets each item right: the features by which items of a benchmark are grouped.

Reach for it to turn ``samples_*.jsonl`` of lm-evaluation-harness (``--log_samples``), one file a model, a model's own
sampled answers, or the likelihoods of answer options, into the pass rates that ``CODPredictor`` is fitted to.

A multiple-choice item has a soft pass rate, the probability of the right option among the options: greedy 0 or 1 would
throw most items together. A generated answer needs many samples an item (lm-eval's ``repeats``; the paper takes 100).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from downriver.core.errors import InputError
from downriver.forecast.fit import Array
from downriver.forecast.readers.lm_eval import sample_lines
from downriver.forecast.table import Path_

METRICS = ("exact_match", "pass@1", "acc", "f1")  # of a generated answer that was not sampled more than once


@dataclass(frozen=True)
class Difficulty:
    """Pass rates (items, models) and the items' ids; ``chance`` is what guessing gives, NaN where it is unknown."""

    ids: tuple[str, ...]
    rates: Array
    chance: Array


def difficulty_features(samples: Sequence[Path_], *, check: Callable[[str, str], float] | None = None) -> Difficulty:
    """Read one ``samples_*.jsonl`` a model, in the order of their compute; items are matched by ``doc_id``.

    ``check(response, target)`` says how right one generated response is (0 to 1), by default whether the two are the
    same but for white space; an item with a single response has lm-eval's own metric. Raises ``InputError`` for a line
    that is not a sample, and for models that were tested on different items.

    >>> import json, pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "samples_quiz.jsonl"
    >>> row = {"doc_id": 0, "target": "1", "arguments": {f"gen_args_{i}": {"arg_0": "2+2=", "arg_1": t}
    ...        for i, t in enumerate([" 3", " 4"])}, "resps": [[["-2.0", "False"]], [["-1.0", "True"]]]}
    >>> _ = file.write_text(json.dumps(row))
    >>> found = difficulty_features([file, file])
    >>> found.rates.round(3).tolist(), found.chance.tolist()
    ([[0.731, 0.731]], [0.5])
    """
    if not samples:
        raise InputError("samples: at least one file is expected")
    tables = [_read(Path(path), check or _same) for path in samples]
    ids = sorted(tables[0], key=lambda i: (len(i), i))
    for path, table in zip(samples, tables, strict=True):
        if odd := sorted(set(ids) ^ set(table)):
            raise InputError(f"{path} and {samples[0]} differ in {len(odd)} items, such as doc_id {odd[0]}")
    rates = np.array([[table[i][0] for table in tables] for i in ids])
    return Difficulty(tuple(ids), rates, np.array([tables[0][i][1] for i in ids]))


def option_pass_rates(log_likelihoods: Sequence[Any], right: Sequence[int]) -> Array:
    """Soft pass rates (n,) from the log likelihoods of each item's options (ragged is fine) and the right option.

    >>> option_pass_rates([[0.0, 0.0], [np.log(3), 0.0, 0.0]], [1, 0]).round(6).tolist()
    [0.5, 0.6]
    """
    if len(log_likelihoods) != len(right):
        raise InputError(f"{len(log_likelihoods)} items and {len(right)} right options: one for each is expected")
    found = []
    for number, (row, k) in enumerate(zip(log_likelihoods, right, strict=True)):
        values = np.asarray(row, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2 or np.isnan(values).any() or not np.isfinite(values.max()):
            raise InputError(f"item {number}: at least two log likelihoods are expected, not {row!r:.80}")
        if not 0 <= k < len(values):
            raise InputError(f"item {number}: right option {k} of {len(values)}")
        p = np.exp(values - values.max())
        found.append(float(p[k] / p.sum()))
    return np.array(found)


def sampled_pass_rates(
    model: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    tokenizer: Any = None,
    check: Callable[[str, str], float] | None = None,
    n_samples: int = 100,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 100,
    seed: int = 0,
) -> Array:
    """Pass rates (n,) of one model: the mean of ``check`` over sampled continuations of each prompt.

    ``model`` is a causal ``Model`` or a transformers one with its ``tokenizer``; it answers by its own ``generate``,
    ``batch_size`` samples at a time, from the whole distribution at ``temperature``. ``check`` is as in
    ``difficulty_features``; 100 samples are the paper's. Raises ``InputError`` for a model of another kind, lists of
    different lengths, and numbers out of range.

    >>> from downriver.models import small
    >>> lm = small("causal-lm", "nano")
    >>> settings = {"check": lambda said, target: 1.0, "n_samples": 2, "max_new_tokens": 1}
    >>> sampled_pass_rates(lm, ["a", "b"], ["", ""], **settings).tolist()
    [1.0, 1.0]
    """
    import torch

    from downriver.core.seeds import seeded
    from downriver.models.language import language_model

    if len(prompts) != len(targets) or not prompts:
        raise InputError(f"{len(prompts)} prompts and {len(targets)} targets: one each, at least one, are expected")
    if min(n_samples, max_new_tokens, batch_size) < 1 or not 0 < temperature < math.inf:
        raise InputError(
            f"n_samples {n_samples}, max_new_tokens {max_new_tokens}, batch_size {batch_size}, temperature"
            f" {temperature}: positive numbers are expected"
        )
    lm, check = language_model(model, tokenizer), check or _same
    words: Any = lm.processor
    backbone: Any = lm.backbone
    pad = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    rates, training = [], lm.training
    lm.eval()
    with seeded("pass rates", seed), torch.no_grad():
        for prompt, target in zip(prompts, targets, strict=True):
            ids = words(prompt, return_tensors="pt")["input_ids"].to(lm.device)
            said: list[str] = []
            while len(said) < n_samples:
                count = min(batch_size, n_samples - len(said))
                out = backbone.generate(
                    ids, attention_mask=torch.ones_like(ids), num_return_sequences=count, pad_token_id=pad, **how
                )
                said += words.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            rates.append(float(np.mean([check(answer, target) for answer in said])))
    lm.train(training)
    if min(rates) < 0 or max(rates) > 1:
        raise InputError("check: numbers from 0 to 1 are expected of it")
    return np.array(rates)


def _same(response: str, target: str) -> float:
    """Whether two answers are the same but for white space about them."""
    return float(response.strip() == target.strip())


def _read(path: Path, check: Callable[[str, str], float]) -> dict[str, tuple[float, float]]:
    """Pass rate and chance of each item of a file."""
    found = {}
    for number, row in sample_lines(path):
        try:
            rate, chance = _rate(row, check)
            name = str(row["doc_id"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{path}, line {number} is not a sample of lm-eval: {error!r}") from error
        if name in found:
            raise InputError(f"{path}, line {number}: doc_id {name} is there twice (two filters? keep one)")
        if not 0 <= rate <= 1:
            raise InputError(f"{path}, line {number}: a pass rate of {rate}, a number from 0 to 1 is expected")
        found[name] = rate, chance
    if not found:
        raise InputError(f"{path} is empty")
    return found


def _rate(row: dict[str, Any], check: Callable[[str, str], float]) -> tuple[float, float]:
    requests, responses, target = row["arguments"], row["resps"], str(row["target"])
    order = sorted(requests, key=lambda name: int(name.rpartition("_")[2]))
    options = [requests[name].get("arg_1") for name in order]
    if len(options) > 1 and len(options) == len(responses) and all(isinstance(o, str) for o in options):
        same = [i for i, option in enumerate(options) if option.strip() == target.strip()]
        right = same[0] if same else int(target)
        return float(option_pass_rates([[float(r[0][0]) for r in responses]], [right])[0]), 1 / len(options)
    (answers,) = responses
    if len(answers) == 1 and (known := [row[m] for m in METRICS if m in row]):
        return float(known[0]), math.nan
    return float(np.mean([check(str(answer), target) for answer in answers])), math.nan
