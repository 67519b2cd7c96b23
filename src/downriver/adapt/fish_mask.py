"""FISH masks: train the half percent of the weights that a model's predictions depend on most.

Reach for it when a task may keep a sparse patch of the very weights (no adapter, no added work at inference), or when
workers exchange few entries. Sung, Nair and Raffel 2021. The Fisher information is the empirical one, with the labels
of the data, as in most of the paper's experiments.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from downriver.adapt.heads import HeadStart, ready
from downriver.adapt.lora import merge_adapter
from downriver.adapt.subnetwork import train_subnetwork
from downriver.core import Budget, InputError, charge, count_flops, generator
from downriver.models.model import Model
from downriver.nn.sparse_patch import SparseMask
from downriver.tasks.task import Task


@dataclass(frozen=True)
class FishMaskConfig:
    """``keep``: the share of the backbone's entries that learn (the paper's 0.5 %); ``samples`` rows to choose by (its
    1024)."""

    keep: float = 0.005
    samples: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep is {self.keep}: a share above 0, at most 1 is expected")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}: at least 1 is expected")


def fish_mask(
    model: Model,
    task: Task,
    keep: float = 0.005,
    *,
    samples: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> SparseMask:
    """The entries of the backbone with the largest Σₙ (∂ log p(yₙ | xₙ) / ∂θ)², one row n at a time.

    Parameters
    ----------
    model
        With a head for the task where the task needs one.
    keep
        The share of the backbone's entries to take.
    samples, seed
        So many rows of the train split, in a random order.

    Charges examples and FLOPs. Raises ``InputError`` for a share outside (0, 1].

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["the river runs to the sea"] * 8})
    >>> task = Task("river", "language-modelling", {"train": rows}, ("text",), None)
    >>> mask = fish_mask(small("causal-lm", "nano"), task, 0.01, samples=4)
    >>> round(mask.share, 3)
    0.01
    """
    settings = FishMaskConfig(keep, samples)
    rows, collate = task.rows("train"), model.collate(task)
    chosen = generator("fish mask", seed).permutation(len(rows))[: settings.samples].tolist()
    weights = dict(model.backbone.named_parameters())
    squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

    def step(row: Any) -> None:
        batch = {name: value.to(model.device) for name, value in collate([row]).items()}
        loss = model(**batch)["loss"]
        for square, grad in zip(
            squares.values(), torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True
        ):
            if grad is not None:
                square.add_(grad.float().square())

    before, training = [p.requires_grad for p in model.parameters()], model.training
    model.requires_grad_(False).eval()
    model.backbone.requires_grad_(True)
    try:
        flops = count_flops(lambda: step(rows[chosen[0]]))
        for index in tqdm(chosen[1:], desc="Fisher", disable=not progress, delay=2):
            step(rows[index])
    finally:
        model.train(training)
        for parameter, asked in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(asked)
    charge(examples=len(chosen), flops=flops * len(chosen))
    total = sum(weight.numel() for weight in weights.values())
    return SparseMask.top(squares, max(1, round(settings.keep * total)), total)


def train_fish_mask(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    keep: float = 0.005,
    samples: int = 1024,
    head: HeadStart = "probe",
    learning_rate: float = 3e-4,
    batch_size: int = 16,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    **settings: Any,
) -> Model:
    """Choose a mask by the task and train its entries, and the head; every other entry stays bit by bit.

    ``keep`` and ``samples`` as in ``fish_mask``, whose rows are not part of the budget but are charged; the rest as in
    ``fine_tune``. An adapter that the model carries is merged into its weights first.
    """
    if hasattr(model.backbone, "merge_and_unload"):
        model = merge_adapter(model)
    model, left = ready(model, task, Budget.parse(budget), head=head, batch_size=batch_size, seed=seed)
    mask = fish_mask(model, task, keep, samples=samples, seed=seed)
    heads = {f"head.{name}": torch.arange(p.numel()) for name, p in model.head.named_parameters()} if model.head else {}
    both = SparseMask({**mask.indices, **heads}, mask.total + sum(len(places) for places in heads.values()))
    more = {"batch_size": batch_size, "seed": seed, "checkpoints": checkpoints, **settings}
    return train_subnetwork(model, task, left, mask=both, learning_rate=learning_rate, **more)
