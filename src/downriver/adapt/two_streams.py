"""Training on two streams, few labelled rows and many unlabelled ones, with any loss over a batch of both.

Reach for it to build a semi-supervised method. It is a loop of its own and not ``fine_tune``: there one stream holds
whole batches of a task, here every step draws two batches of unequal size whose row numbers find the teachers' targets,
and students may be plain modules on tensors.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.adapt.multi_teacher import Examples, encode
from downriver.core import Budget, DownriverError, InputError, charge, count_flops, generator, seeded, unknown
from downriver.models.model import Model
from downriver.training.engine import accelerator
from downriver.training.trainer import Batch, tokens_in

Optimizer = Literal["adam", "sgd"]


@dataclass(frozen=True)
class Draw:
    """The rows of one step, by number."""

    labelled: list[int]
    unlabelled: list[int]


Loss = Callable[[Draw], tuple[dict[str, Tensor], Sequence[Mapping[str, Tensor]]]]
"""The parts of a step's loss by name (``loss`` is what is minimised), and the batches that the student read."""


@dataclass(frozen=True)
class Recipe:
    """How the student is trained: rows a step (``ratio`` unlabelled rows for a labelled one), optimiser, peak rate.

    ``adam`` is AdamW with torch's settings, ``sgd`` has Nesterov momentum 0.9; the rate falls to nothing as a cosine.
    """

    batch_size: int = 16
    ratio: int = 5
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, right, expected in [
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("ratio", self.ratio, self.ratio >= 1, "at least 1"),
            ("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "a positive number"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more"),
        ]:
            if not right:
                raise InputError(f"{name} is {value}: {expected} is expected")
        if self.optimizer not in ("adam", "sgd"):
            raise unknown("optimizer", self.optimizer, ("adam", "sgd"))


def train(
    student: Model,
    extra: nn.Module,
    rows: tuple[Examples, Examples | None],
    loss: Loss,
    budget: Budget,
    recipe: Recipe,
    *,
    validation: Examples | None = None,
) -> list[dict[str, float]]:
    """Train a student, and what ``extra`` adds to it, in place, until the budget is spent; a log of the loss comes
    back.

    ``rows`` are the labelled and the unlabelled ones; each stream visits its rows in a new random order every epoch
    and every batch is full. An example is a visit to a row of either. With ``validation`` the cross-entropy on it is
    measured ten times at equal distances, and the student gets the weights that had the lowest. Order and dropout
    depend on the seed alone. Charges examples, tokens, FLOPs (those of the first step for every one) and parameters.
    """
    few, many = rows
    device = accelerator()
    student.to(device).train()
    extra.to(device).train()
    parameters = [p for p in (*student.parameters(), *extra.parameters()) if p.requires_grad]
    if not parameters:
        raise InputError("no parameter of the student is to be trained: all were frozen before")
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        )
    labelled, unlabelled = _visits(len(few), "labelled", recipe.seed), _visits(len(many or ()), "other", recipe.seed)
    drawn = recipe.batch_size * (1 + (recipe.ratio if many is not None else 0))
    history: list[dict[str, float]] = []
    best, kept = math.inf, None
    done, tokens, flops, steps, share = 0, 0, 0.0, None, 0.0
    started = time.perf_counter()

    def step() -> None:
        nonlocal tokens
        ids = list(islice(labelled, recipe.batch_size))
        parts, read = loss(Draw(ids, list(islice(unlabelled, drawn - recipe.batch_size))))
        value = parts["loss"].item()
        if not math.isfinite(value):
            raise DownriverError(
                f"the loss is {value} at step {done + 1}: lower the learning rate, or look at the data"
            )
        optimizer.zero_grad()
        parts["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.step()
        tokens += sum(tokens_in(batch) for batch in read)
        history.append({"step": done + 1} | {name: part.item() for name, part in parts.items()})

    with seeded("two streams", recipe.seed):
        while share < 1:
            if done:
                step()
            else:
                flops = count_flops(step)
                steps = budget.steps(drawn, tokens_per_step=tokens, flops_per_step=flops)
            done += 1
            before, spent = share, time.perf_counter() - started
            share = done / steps if steps else spent * (1 + 1 / done) / budget.amount
            if validation is not None and (share >= 1 or int(10 * share) > int(10 * before)):
                history[-1]["validation loss"] = held = cross_entropy(student, validation)
                if held < best:
                    best, kept = held, copy.deepcopy(student.state_dict())
    if kept is not None:
        student.load_state_dict(kept)
    charge(
        examples=done * drawn,
        tokens=tokens,
        flops=flops * done,
        parameters=sum(p.numel() for p in student.parameters()),
        trained_parameters=sum(p.numel() for p in parameters),
    )
    student.zero_grad(set_to_none=True)
    return history


def forward(student: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Features (n, d) and logits (n, C) of a student with a head."""
    features = student.features(**batch)
    if student.head is None:
        raise InputError("the student has no head: model.with_head(task) gives it one, or Model(backbone, head=...)")
    return features, student.head(features)


@torch.no_grad()
def cross_entropy(student: Model, examples: Examples, batch_size: int = 64) -> float:
    """The mean cross-entropy on labelled rows, in evaluation mode."""
    training = student.training
    student.eval()
    total = 0.0
    targets = examples.targets
    assert targets is not None
    for start in range(0, len(examples), batch_size):
        indices = range(start, min(start + batch_size, len(examples)))
        logits = forward(student, encode(student, examples.take(indices), examples.view))[1]
        total += F.cross_entropy(logits.float(), targets[list(indices)].to(logits.device), reduction="sum").item()
    student.train(training)
    return total / len(examples)


def _visits(n: int, stream: str, seed: int) -> Iterator[int]:
    """Row numbers without end: each once in a random order, then each once more in another."""
    epoch = 0
    while n:
        yield from generator("visits", stream, seed, epoch).permutation(n).tolist()
        epoch += 1
