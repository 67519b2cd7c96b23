"""Paper 55: linear attention in a small language model, trained to give softmax's weights, against older maps.

The paper converts GPT-2, BERT and Llama-2. Here a Llama of four layers learns the sources of Python's standard library,
byte by byte; then its attention is exchanged. What counts is the distance of the weights from softmax, the perplexity
on files that were not trained on right after the exchange, and the one after some further training of everything.
T2R's map starts as ReLU, so the two differ after training only.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import polars as pl

from downriver.compress import attention_fidelity, hedgehog
from downriver.core import Budget, InputError, Measurement
from downriver.evaluate.evaluate import evaluate
from downriver.models import Model, small
from downriver.models.linear_attention import convert
from downriver.reproductions.paper import Paper
from downriver.reproductions.python_sources import python_sources
from downriver.study import Arm, below, better, shared, study
from downriver.tasks.task import Task
from downriver.training.engine import clone, fine_tune

paper = Paper(
    number=55,
    slug="hedgehog",
    title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    date="2024-02",
    room="compress",
    claim="A small feature map trained to mimic softmax weights gives linear attention almost the quality of softmax, "
    "and more than earlier linear attentions have.",
)

SCALES = {"small": ("tiny", 400, 150, 100), "tiny": ("nano", 15, 5, 5)}  # model; steps: before, of maps, afterwards
BATCH, CHARACTERS = 16, 128
KL, AFTER, TUNED, RATIO = "KL to softmax", "perplexity after the exchange", "perplexity, tuned", "tuned over softmax"


@study(
    "hedgehog",
    title="Softmax exchanged for linear attention in a small model of Python sources",
    claims=[
        better("hedgehog", than="elu", on=KL),
        better("hedgehog", than="relu", on=KL),
        better("hedgehog", than="elu", on=AFTER),
        better("hedgehog", than="relu", on=AFTER),
        better("hedgehog", than="elu", on=TUNED),
        better("hedgehog", than="t2r", on=TUNED),
        below("hedgehog", on=RATIO, value=1.10),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the files, the model and the order of the texts."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    size, steps, mimicry, further = SCALES[scale]
    settings: Any = {"learning_rate": 1e-3, "batch_size": BATCH, "schedule": "cosine", "seed": seed}

    @shared
    def task() -> Task:
        return python_sources("hedgehog", seed, texts=(steps + further) * BATCH, characters=CHARACTERS)

    @shared
    def softmax() -> Model:
        return fine_tune(small("causal-lm", size, seed), task(), f"{steps} steps", **settings)

    @shared
    def tuned_softmax() -> float:
        return perplexity(fine_tune(softmax(), task(), f"{further} steps", **settings), task())

    def measured(name: str) -> list[Measurement]:
        if name == "softmax":
            return [lower(AFTER, perplexity(softmax(), task())), lower(TUNED, tuned_softmax())]
        if name == "hedgehog":
            linear = hedgehog(softmax(), task(), f"{mimicry} steps", batch_size=BATCH, seed=seed)
        else:
            linear = clone(softmax())
            convert(linear.backbone, name.removesuffix(", untrained"))
        table = attention_fidelity(linear, task(), progress=False)
        tuned = perplexity(fine_tune(linear, task(), f"{further} steps", **settings), task())
        return [
            lower(KL, mean(table["kl"])),
            lower("entropy over softmax's", mean(table["entropy"] / table["entropy_softmax"])),
            Measurement("monotonicity", mean(table["monotonicity"])),
            lower(AFTER, perplexity(linear, task())),
            lower(TUNED, tuned),
            lower(RATIO, tuned / tuned_softmax()),
        ]

    for name in ("softmax", "hedgehog", "hedgehog, untrained", "t2r", "relu", "elu"):
        yield Arm(name, functools.partial(measured, name))


def mean(layers: pl.Series) -> float:
    """Over layers."""
    return float(layers.to_numpy().mean())


def lower(metric: str, value: float) -> Measurement:
    """A measurement of which less is better."""
    return Measurement(metric, value, direction="lower")


def perplexity(model: Model, task: Task) -> float:
    """On the held-out files."""
    return math.exp(next(row.value for row in evaluate(model, task, split="validation") if row.metric == "loss"))


studies = (reproduction,)
