"""Paper 16: a threshold on the gates of a small language model against ReLU and against dropping at random.

The paper thresholds Mistral-7B and Llama-2-7B. Here a Llama of four layers learns the sources of Python's standard
library, byte by byte. Half, or seven tenths, of the gate values are set to zero by CATS, all negative pre-activations
by ReLU, and as many values as CATS drops at random. Then thresholds and ReLU are tuned a little further by LoRA. What
counts is the perplexity on files that were not trained on.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from downriver.adapt import lora
from downriver.compress import cats, gate_sparsity
from downriver.core import Budget, InputError, Measurement
from downriver.evaluate.evaluate import evaluate
from downriver.models import Model, small
from downriver.models.surgery import gated_mlps
from downriver.reproductions.paper import Paper
from downriver.reproductions.python_sources import python_sources
from downriver.study import Arm, below, better, shared, study
from downriver.tasks.task import Task
from downriver.training.engine import clone, fine_tune

paper = Paper(
    number=16,
    slug="cats",
    title="CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
    date="2024-04",
    room="compress",
    claim="A threshold read off each layer's own gate activations makes half of them zero at almost no loss, without "
    "tuning, and with less loss than replacing the activation by ReLU.",
)

SCALES = {"small": ("tiny", 250, 30), "tiny": ("nano", 15, 3)}  # model, steps of training, steps of LoRA
BATCH, CHARACTERS = 16, 120


class RandomDrop(nn.Module):
    """An activation of which a random share is zero, drawn anew for every value."""

    def __init__(self, activation: nn.Module, share: float, seed: int) -> None:
        super().__init__()
        self.activation, self.share = activation, share
        self.rng = torch.Generator().manual_seed(seed)

    def forward(self, z: Tensor) -> Tensor:
        """Zero where the draw is below the share."""
        a = self.activation(z)
        return a * (torch.rand(a.shape, generator=self.rng) >= self.share)


@study(
    "cats",
    title="Half of the gates at zero, in a small model of Python sources",
    claims=[
        better("CATS 0.5", than="ReLU", on="perplexity"),
        better("CATS 0.5", than="random 0.5", on="perplexity"),
        better("CATS 0.7", than="random 0.7", on="perplexity"),
        below("CATS 0.5", on="perplexity over the dense model's", value=1.05),
        better("CATS 0.5, tuned", than="ReLU, tuned", on="perplexity"),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the files, the model and the order of the texts."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    size, steps, tuning = SCALES[scale]

    @shared
    def task() -> Task:
        return python_sources("cats", seed, texts=steps * BATCH, characters=CHARACTERS)

    @shared
    def dense() -> Model:
        settings: Any = {"learning_rate": 1e-3, "batch_size": BATCH, "schedule": "cosine", "seed": seed}
        return fine_tune(small("causal-lm", size, seed), task(), f"{steps} steps", **settings)

    @shared
    def made(name: str) -> Model:
        kind, _, rest = name.partition(" ")
        if name.endswith(", tuned"):
            settings: Any = {"rank": 8, "learning_rate": 1e-3, "batch_size": BATCH, "seed": seed}
            return lora(made(name.removesuffix(", tuned")), task(), f"{tuning} steps", **settings)
        if kind == "CATS":
            return cats(dense(), task(), sparsity=float(rest), tokens=50_000, seed=seed, progress=False)
        if kind == "dense":
            return dense()
        model = clone(dense())
        for number, (_, block, attribute) in enumerate(gated_mlps(model.backbone)):
            plain = getattr(block, attribute)
            drop = RandomDrop(plain, float(rest), 100 * seed + number) if kind == "random" else nn.ReLU()
            setattr(block, attribute, drop)
        return model

    def measured(name: str) -> list[Measurement]:
        perplexity, reference = (loss(made(which), task()) for which in (name, "dense"))
        rows = [
            Measurement("perplexity", perplexity, direction="lower"),
            Measurement("perplexity over the dense model's", perplexity / reference, direction="lower"),
        ]
        if name.startswith("CATS") and "tuned" not in name:
            report = gate_sparsity(made(name), task(), progress=False)
            rows.append(Measurement("sparsity", report.sparsity))
            rows.append(Measurement("traffic", report.traffic, direction="lower"))
        return rows

    arms = ("dense", "CATS 0.5", "CATS 0.7", "ReLU", "random 0.5", "random 0.7", "CATS 0.5, tuned", "ReLU, tuned")
    for name in arms:
        yield Arm(name, functools.partial(measured, name))


def loss(model: Model, task: Task) -> float:
    """Perplexity on the held-out files."""
    return math.exp(next(row.value for row in evaluate(model, task, split="validation") if row.metric == "loss"))


studies = (reproduction,)
