"""Tasks of lm-evaluation-harness run on one of our causal language models.

Reach for it to score a model on a public benchmark, or on a task of your own written as the harness's YAML file.
Gao et al., "The language model evaluation harness", https://github.com/EleutherAI/lm-evaluation-harness
"""

import os
from collections.abc import Sequence
from typing import Any

from downriver.core.errors import InputError, require, unknown
from downriver.core.measurement import Cost, Direction, Measurement, current_versions
from downriver.core.seeds import seeded


def lm_eval(
    model: Any,
    tasks: str | Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Measurement]:
    """Run harness tasks on a ``Model`` of kind ``causal-lm``; needs ``pip install 'downriver[lm-eval]'``.

    ``include_path`` is a folder of YAML tasks, which are looked up before the harness's own; with local data files it
    works without a network. ``fewshot`` and ``limit`` (examples a task) are the task's own when not given.

    Every metric of every task (and group) gives a measurement named as the harness names it (``acc``, or
    ``exact_match/strict-match`` behind a filter) and, where the harness estimates it, one named ``<metric>_stderr``.
    Their versions hold those of the harness (``lm_eval``) and of the task (``task``) besides ours. Random states are
    given back.

    Raises ``InputError`` for an unknown task (with the nearest) or another kind of model, ``MissingExtra`` without the
    harness.

    >>> from downriver.models import small
    >>> lm_eval(small("mlp", "nano"), "arc_easy")
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: lm_eval: a causal-lm model is expected, not module
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise InputError("lm_eval: at least one task is expected")
    if getattr(model, "kind", None) != "causal-lm":
        raise InputError(f"lm_eval: a causal-lm model is expected, not {getattr(model, 'kind', type(model).__name__)}")
    evaluator = require("lm_eval.evaluator", "lm-eval")
    huggingface = require("lm_eval.models.huggingface", "lm-eval")
    manager = require("lm_eval.tasks", "lm-eval").TaskManager
    known = manager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(known.all_tasks):
        known = manager(include_path=include_path)
    for name in names:
        if name not in known.all_tasks:
            raise unknown("lm-eval task", name, known.all_tasks)
    wrapped = huggingface.HFLM(
        pretrained=model.backbone, tokenizer=model.processor, batch_size=batch_size, max_length=model.max_length
    )
    with seeded("lm_eval", seed) as derived:
        found = evaluator.simple_evaluate(
            wrapped,
            tasks=names,
            task_manager=known,
            num_fewshot=fewshot,
            limit=limit,
            log_samples=False,
            random_seed=derived,
            numpy_random_seed=derived,
            torch_random_seed=derived,
            fewshot_random_seed=derived,
        )
    cost = Cost(parameters=sum(p.numel() for p in model.parameters()))
    return [measurement for task in found["results"] for measurement in _measurements(found, task, cost)]


def _measurements(found: dict[str, Any], task: str, cost: Cost) -> list[Measurement]:
    made_by = dict(current_versions()) | {
        "lm_eval": str(found["lm_eval_version"]),
        "task": str(found["versions"].get(task)),
    }
    measurements = []
    for key, value in found["results"][task].items():
        name, comma, filtered = key.partition(",")
        if not comma or not isinstance(value, int | float):  # name, alias, sample_len; stderr "N/A"
            continue
        metric = name.removesuffix("_stderr")
        better = found["higher_is_better"].get(task, {}).get(metric)
        direction: Direction = "none" if better is None or name != metric else "higher" if better else "lower"
        label = name if filtered == "none" else f"{name}/{filtered}"
        measurements.append(Measurement(label, value, task, "", direction, cost=cost, versions=made_by))
    return measurements
