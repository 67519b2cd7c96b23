"""Parameter-efficient methods under equal conditions: same base, rows, budget and layers, each at its own best rate.

Reach for it before a method is chosen for many tasks: its ledger is what ``adapt.read_ledger`` and ``adapt.advise``
read. Harness of «Parameter-Efficient Fine-Tuning for Foundation Models» (2025), after the pitfalls of peft's public
comparison: rates are chosen on the validation split, sizes are matched by trained parameters, and forgetting is held
against the base as it was before anything was added to it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from downriver.adapt.bitfit import bias_names
from downriver.adapt.heads import HeadStart
from downriver.adapt.lora import merge_adapter
from downriver.adapt.peft_catalogue import known, method
from downriver.adapt.peft_tuning import FULL, Sweep, sweep
from downriver.core import Budget, Cost, InputError, Measurement, metered, unknown
from downriver.evaluate.evaluate import evaluate
from downriver.evaluate.predict import predict
from downriver.evaluate.retention import retention
from downriver.models.load import load
from downriver.models.model import Model
from downriver.study.block import Arm, shared
from downriver.study.claims import Claim
from downriver.study.study import Study
from downriver.tasks.task import Task

BEST = "best PEFT"
METHODS = (FULL, "bitfit", "bottleneck", "dora", "ia3", "lora")


def compare_peft(
    name: str,
    model: Callable[[int], Model] | str,
    task: Callable[[int], Task] | Task,
    methods: Sequence[str] = METHODS,
    *,
    budget: Budget | str,
    retained: Callable[[int], Task] | Task | None = None,
    share: float | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    learning_rates: Mapping[str, Sequence[float]] | None = None,
    head: HeadStart = "probe",
    batch_size: int = 16,
    seeds: int = 3,
    claims: Sequence[Claim] = (),
    title: str = "",
    version: str = "1",
) -> Study:
    """A study whose arms are methods of ``adapt.catalogue()``, or ``full``; with two of the former also «best PEFT».

    Parameters
    ----------
    model, task
        What ``models.load`` takes, and a task with train, validation and test splits; or functions of the seed that
        make them.
    budget
        Of the tuning with one learning rate.
    retained
        A task of what the base knew, texts as a rule: forgetting is measured on its test split, or on its validation
        split where it has no other.
    share
        Methods train at most this share of the base's parameters (the head apart): their sizes are chosen to fit. A
        method without a size, or with one in ``settings``, keeps its own.
    settings
        By method, as in ``adapt.peft``.
    learning_rates
        By method, two or more. Default: the three of ``adapt.peft``.
    head, batch_size
        As in ``adapt.peft``.
    seeds, claims, title, version
        As in ``study``.

    Measures the task's metrics; ``forgetting``, the loss (or what ``retention`` takes) on ``retained`` that was added;
    ``parameters`` trained, the head apart, and ``trained share``, the head included; ``disk``, bytes of the trained
    entries and the head; ``memory``, the peak in bytes; ``seconds`` with one rate and ``step seconds``, validation
    included; ``validation loss``; ``learning rate``; ``rate spread``, the validation loss of the worst rate less that
    of the best (missing where one diverged); ``merge error``, the largest change of a score by merging, where the
    method merges. «best PEFT» is the method with the lowest validation loss of each seed.

    Raises ``InputError`` for an unknown method, a single learning rate, and a share outside (0, 1].

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> splits = dict.fromkeys(("train", "validation", "test"), rows)
    >>> task = Task("letters", "text-classification", splits, ("text",), "label", ("a", "z"), ("accuracy",))
    >>> study = compare_peft("letters", "small:text-encoder:nano:0", task, ["full", "ia3"], budget="8 examples",
    ...     batch_size=4, seeds=1)
    >>> [arm.name for arm in study.arms()]  # study.run(folder) runs what the folder lacks
    ['full', 'ia3']
    """
    given, rates = settings or {}, learning_rates or {}
    for each in (*methods, *given, *rates):
        if each != FULL and each not in known():
            raise unknown("PEFT method", each, [FULL, *known()])
    for each, tried in rates.items():
        if len(tried) < 2:
            raise InputError(f"learning_rates of {each}: at least two are expected, the best of which is taken")
    if share is not None and not 0 < share <= 1:
        raise InputError(f"share is {share}: above 0, at most 1 is expected")

    def body(seed: int, spent: Budget | None, scale: str) -> Iterator[Arm]:
        @shared
        def base() -> Model:
            return load(model) if isinstance(model, str) else model(seed)

        @shared
        def rows() -> Task:
            return task if isinstance(task, Task) else task(seed)

        @shared
        def tuned(chosen: str) -> tuple[Sweep, Cost]:
            own = dict(given.get(chosen, {}))
            free = chosen != FULL and known()[chosen].size and known()[chosen].size not in own
            limit = share * _entries(base()) if share is not None and free else None
            start, seen = base(), rows()  # made before the clock starts
            with metered() as meter:
                found = sweep(
                    start,
                    seen,
                    spent or Budget.parse(budget),
                    tuner=chosen,
                    budget_params=limit,
                    learning_rates=rates.get(chosen),
                    settings=own,
                    head=head,
                    batch_size=batch_size,
                    seed=seed,
                )
            return found, meter.cost

        @shared
        def best() -> str:
            return min(peft, key=lambda chosen: min(tuned(chosen)[0].losses.values()))

        def measured(arm: str) -> list[Measurement]:
            chosen = best() if arm == BEST else arm
            found, cost = tuned(chosen)
            scores = evaluate(found.model, rows())
            forgot = [] if retained is None else forgetting(base(), found.model, retained, seed)
            return [*scores, *forgot, *properties(base(), rows(), chosen, found, cost, batch_size)]

        peft = [each for each in methods if each != FULL]
        for arm in [*methods, *([BEST] if len(peft) > 1 else [])]:
            yield Arm(arm, functools.partial(measured, arm))

    return Study(
        name=name,
        function=body,
        claims=tuple(claims),
        seeds=seeds,
        budget=Budget.parse(budget),
        title=title,
        version=version,
        parameters={
            "model": model if isinstance(model, str) else None,
            "tasks": [each.fingerprint if isinstance(each, Task) else None for each in (task, retained)],
            "share": share,
            "settings": {each: {key: str(value) for key, value in own.items()} for each, own in given.items()},
            "learning_rates": {each: list(tried) for each, tried in rates.items()},
            "head": head,
            "batch_size": batch_size,
        },
    )


def forgetting(before: Model, after: Model, retained: Callable[[int], Task] | Task, seed: int = 0) -> list[Measurement]:
    """How much worse a model does what it could do before: loss added, or score lost."""
    task = retained if isinstance(retained, Task) else retained(seed)
    split = "test" if "test" in task.splits else "validation"
    change = next(row for row in retention(before, after, task, split) if row.metric == "retention_change")
    lost = change.value if change.direction == "lower" else -change.value
    return [Measurement("forgetting", lost, task.name, change.unit, "lower")]


def properties(base: Model, task: Task, chosen: str, found: Sweep, cost: Cost, batch_size: int) -> list[Measurement]:
    """What a method takes beside its score."""
    model, losses = found.model, list(found.losses.values())
    total, steps = _entries(base), cost.examples / batch_size
    count = total if chosen == FULL else method(chosen).parameters(base, found.config)
    heads = 0 if model.head is None else _entries(model.head)
    spread = max(losses) - min(losses)
    rows = [
        Measurement("parameters", count, direction="lower"),
        Measurement("trained share", (count + heads) / total, direction="lower"),
        Measurement("disk", len(save(kept(chosen, base, model))), unit="bytes", direction="lower"),
        Measurement("memory", cost.peak_memory, unit="bytes", direction="lower"),
        Measurement("seconds", cost.seconds / len(losses), unit="s", direction="lower"),
        Measurement("step seconds", cost.seconds / steps, unit="s", direction="lower"),
        Measurement("validation loss", min(losses), task.name, direction="lower"),
        Measurement("learning rate", found.rate, direction="none"),
        Measurement("rate spread", spread if math.isfinite(spread) else math.nan, task.name, direction="lower"),
    ]
    if chosen != FULL and known()[chosen].peft_type and known()[chosen].mergeable:
        apart, merged = (predict(each, task, "test").scores for each in (model, merge_adapter(model)))
        rows.append(Measurement("merge error", float(abs(apart - merged).max()), task.name, direction="lower"))
    return rows


def kept(chosen: str, base: Model, model: Model) -> dict[str, Tensor]:
    """What must be kept of a tuned model beside its base: the adapter, the changed entries or all weights; the head."""
    weights = dict(model.backbone.named_parameters())
    if chosen == "bitfit":
        learnt: dict[str, Tensor] = {name: weights[name] for name in bias_names(model.backbone)}
    elif chosen == "fish_mask":
        learnt = {}
        for name, old in base.backbone.named_parameters():
            places = (old != weights[name]).reshape(-1).nonzero()[:, 0]
            learnt[f"{name}.indices"] = places.to(torch.int32)
            learnt[f"{name}.values"] = weights[name].reshape(-1)[places]
    else:
        learnt = {name: weight for name, weight in weights.items() if chosen == FULL or weight.requires_grad}
    heads = {} if model.head is None else {f"head.{name}": weight for name, weight in model.head.named_parameters()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in {**learnt, **heads}.items()}


def _entries(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
