"""The built-in study: five ways to make a pretrained encoder sort posts, and a forecast held against the truth.

A real encoder (all-MiniLM-L6-v2) is to send posts of 20 newsgroups to one of five computing desks. Part one compares a
linear probe, LoRA, full fine-tuning and two merges of models fine-tuned on halves of the data, under one budget:
accuracy, calibration, cost, and what the encoder could do before (find the second half of a post from the first). Part
two measures the probe on small training sets, fits the learning-curve law, and compares its forecast for the full set
with what the full set really gave.
"""

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from downriver.core import Budget, Measurement, generator
from downriver.study.block import Arm, shared
from downriver.study.claims import below, better, keeps
from downriver.study.study import Result, study

DESKS = (
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
)
TITLE = "A small pretrained encoder sorts posts: the ways to adapt it, and what more labels would buy"
ENCODER, LENGTH = "all-MiniLM-L6-v2", 32
"""32 tokens hold a post's subject and first line."""


@dataclass(frozen=True)
class Scale:
    """How many posts: to train and test the arms, from other groups for retention, on the learning curve."""

    train: int
    test: int
    other: int
    sizes: tuple[int, ...]
    curve_train: int
    curve_test: int


SCALES = {
    "small": Scale(160, 160, 40, (30, 60, 120, 240, 480), 1440, 400),  # below five minutes on two cores
    "tiny": Scale(64, 40, 12, (20, 40, 80), 160, 60),  # a minute, to see that it runs
}


@study(
    "quickstart",
    title="Sorting posts with a small encoder: probe, LoRA, full fine-tuning or a merge?",
    claims=[
        better("full fine-tuning", than="linear probe", on="accuracy"),
        keeps("LoRA", than="full fine-tuning", on="accuracy", within=0.02),
        better("TIES of two halves", than="average of two halves", on="accuracy"),
        keeps("TIES of two halves", than="full fine-tuning", on="accuracy", within=0.02),
        better("LoRA", than="full fine-tuning", on="retention"),
    ],
    seeds=5,
    budget="160 examples",
    parameters={"encoder": ENCODER, "desks": DESKS, "tokens": LENGTH},
)
def quickstart(seed: int, budget: Budget, scale: str) -> Iterator[Arm]:
    """Every arm sees as many examples; the two halves of a merge get half of them each, so that no merge costs more."""
    from downriver.adapt import full, linear_probe, lora, merge_adapter
    from downriver.evaluate import evaluate, retention
    from downriver.merge import average, ties

    size = SCALES[scale]

    @shared
    def desks() -> Any:
        return posts(DESKS).sample("train", size.train, seed=seed).sample("test", size.test, seed=seed)

    @shared
    def elsewhere() -> Any:
        groups = [name for name in newsgroups().labels if name not in DESKS]
        return posts(tuple(groups)).sample("test", size.other, seed=seed)

    @shared
    def probed() -> Any:
        return linear_probe(encoder(), desks(), budget, seed=seed)

    @shared
    def halves() -> Any:
        start = linear_probe(encoder(), desks(), budget.share(1 / 4), seed=seed)
        parts, share = desks().halves("train", seed), budget.share(3 / 8)
        return start, [full(start, part, share, head="keep", seed=seed) for part in parts]

    def measured(model: Any) -> list[Measurement]:
        return [*evaluate(model, desks()), *retention(encoder(), model, elsewhere())]

    def merged(method: Any) -> list[Measurement]:
        start, tuned = halves()
        return measured(method(tuned, start))

    yield Arm("linear probe", lambda: measured(probed()))
    yield Arm("LoRA", lambda: measured(merge_adapter(lora(encoder(), desks(), budget, seed=seed))))
    yield Arm("full fine-tuning", lambda: measured(full(encoder(), desks(), budget, seed=seed)))
    yield Arm("average of two halves", lambda: merged(average))
    yield Arm("TIES of two halves", lambda: merged(ties))


@study(
    "quickstart-curve",
    title="What would more labels buy? A forecast from small training sets",
    claims=[below("forecast", on="relative error of the forecast", value=0.1)],
    seeds=5,
    parameters={"encoder": ENCODER, "desks": DESKS, "tokens": LENGTH},
)
def curve(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """The linear probe on nested, growing training sets up to the full one, and the law's forecast of the last."""
    import torch

    from downriver.adapt import linear_probe
    from downriver.evaluate import evaluate
    from downriver.forecast import LearningCurve
    from downriver.models import load

    size = SCALES[scale]

    @shared
    def error(n: int | None) -> float:
        features = features_of_posts(scale)
        order = generator("quickstart-curve", seed).permutation(len(features.rows("train")))
        task = features.subset("train", order[:n])
        probe = linear_probe(load(torch.nn.Identity()), task, Budget(len(order[:n]), "examples"), seed=seed)
        return 1.0 - evaluate(probe, task, metrics=["accuracy"])[0].value

    def forecast() -> dict[str, float]:
        errors = np.array([error(n) for n in size.sizes])
        with warnings.catch_warnings():  # a floor at 0 is no surprise on small sets, and the page says it of the mean
            warnings.simplefilter("ignore", RuntimeWarning)
            law = LearningCurve().fit(np.array(size.sizes), errors)
        predicted = law.predict(len(features_of_posts(scale).rows("train")))
        return {"error": predicted, "relative error of the forecast": abs(predicted - error(None)) / error(None)}

    lower: dict[str, Any] = {"error": "lower", "relative error of the forecast": "lower"}

    def measured(n: int | None) -> dict[str, float]:
        return {"error": error(n)}

    for n in size.sizes:
        yield Arm(f"{n} posts", functools.partial(measured, n), directions=lower)
    yield Arm("all posts", functools.partial(measured, None), directions=lower)
    yield Arm("forecast", forecast, directions=lower)


def run(
    folder: str | Path = "downriver-runs",
    executor: str = "processes",
    workers: int | None = None,
    fresh: bool = False,
    seeds: int | None = None,
    scale: str = "small",
    progress: bool = True,
) -> tuple[list[Result], Any]:
    """Run both parts; give back their results, and the forecast over all seeds beside what the full set gave."""
    compare = replace(quickstart, scale=scale, budget=Budget(SCALES[scale].train, "examples"))
    compared = compare.run(folder, executor, workers, fresh, seeds, progress)
    # one process, so that the features of the posts are computed once
    measured = replace(curve, scale=scale).run(folder, "serial", None, fresh, seeds, progress)
    return [compared, measured], None if measured.failures else forecast_of(measured)


def forecast_of(result: Result) -> Any:
    """The learning-curve law fitted to the mean errors of the small sets, beside the mean error of the full one."""
    from downriver.forecast import LearningCurve, backtest

    rows = result.rows().filter(metric="error")
    error = {arm: rows.filter(arm=arm)["value"].mean() for arm in result.arms}
    sizes = SCALES[result.study.scale].sizes
    n = [*sizes, len(features_of_posts(result.study.scale).rows("train"))]
    return backtest(
        LearningCurve(), (np.array(n), np.array([*(error[f"{k} posts"] for k in sizes), error["all posts"]]))
    )


@functools.cache
def newsgroups() -> Any:
    from downriver.tasks import load

    return load("20newsgroups")


def posts(groups: tuple[str, ...]) -> Any:
    return newsgroups().only(groups)


@functools.cache
def encoder() -> Any:
    from downriver.models import load

    return load(ENCODER, max_length=LENGTH)


@functools.cache
def features_of_posts(scale: str) -> Any:
    """The task of the desks on the encoder's features, computed once and kept in downriver's cache."""
    from datasets import Dataset

    from downriver.models.features import extract
    from downriver.tasks import Task

    size = SCALES[scale]
    task = posts(DESKS).sample("train", size.curve_train, seed=0).sample("test", size.curve_test, seed=0)
    splits = {}
    for split, rows in task.splits.items():
        x = extract(encoder(), rows, task, cache=True)
        splits[split] = Dataset.from_dict({"features": x, "target": task.targets(split)})
    return Task("desks", "tabular-classification", splits, ("features",), "target", labels=task.labels)
