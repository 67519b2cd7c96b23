"""Fisher merging: average models weighted, entry by entry, by how sharply each one's predictions depend on the entry.

Reach for it when models of one base were trained on different tasks and some data of each are at hand. Matena and
Raffel, "Merging Models with Fisher-Weighted Averaging" (2022). ``diagonal_fisher`` measures the weights.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from downriver.core.errors import InputError
from downriver.core.seeds import generator
from downriver.merge.engine import combine
from downriver.merge.method import Known, Method, Tally, per_model, square, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.stores import Source, module_state
from downriver.models.model import Model
from downriver.tasks.task import Task

T = TypeVar("T")


def fisher(
    models: Sequence[Source],
    base: T,
    *,
    fishers: Sequence[Source],
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = Σ wt·Ft⊙θt / Σ wt·Ft.

    Parameters
    ----------
    models, base
        As in ``average``: the base gives the form of the result and what is not merged.
    fishers
        For each model the diagonal of its Fisher information, a state dict (of ``diagonal_fisher``), folder or file
        with the model's tensors.
    weights
        wt; equal by default.
    floor
        The least value of an entry of Ft (1e-6), so that entries nobody needs are plainly averaged.
    include, exclude, on_mismatch, out
        As in ``merge``.

    Raises
    ------
    InputError
        Not one Fisher a model; other tensors than the models'; a negative weight or a floor that is not positive.

    Example
    -------
    >>> a, b = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0])}
    >>> sharp, flat = {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}
    >>> fisher([a, b], a, fishers=[sharp, flat])
    {'w': tensor([1.5000, 2.0000])}
    """
    if len(fishers) != len(models):
        raise InputError(f"fishers has {len(fishers)} entries for {len(models)} models: one a model is expected")
    method = Fisher(weights=weights, floor=floor)
    every = [*models, *fishers]
    return combine(every, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class Fisher(Method):
    """Fisher merging for ``merge``, whose ``models`` are the models and then, in their order, their Fishers."""

    floor: float = 1e-6

    name: ClassVar[str] = "fisher"

    def check(self, models: int) -> None:
        if models % 2:
            raise InputError(f"fisher: {models} models and Fishers together, one Fisher a model is expected")
        if self.weights is not None:
            per_model("fisher: weights", self.weights, models // 2)
            if min(self.weights) < 0 or sum(self.weights) == 0:
                raise InputError(f"fisher: weights are {self.weights}, none negative and one positive is expected")
        if not self.floor > 0:
            raise InputError(f"fisher: floor is {self.floor}, a positive number is expected")

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        count = len(models) // 2
        total = torch.zeros_like(base, dtype=torch.float64)
        divisor = torch.zeros_like(total)
        squares = [0.0] * len(models)
        for i in range(count):
            importance = models[count + i].double().clamp_min(self.floor) * self.weight(i)
            total.addcmul_(importance, models[i].double())
            divisor.add_(importance)
            squares[i] = square(task_vector(models[i], base))
        return total.div_(divisor).sub_(base), Tally.plain(squares)


def diagonal_fisher(
    model: Model, task: Task, *, split: str = "train", examples: int = 256, seed: int = 0
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a model on a task: mean squares of the gradients of single examples.

    Labels are the task's own (the empirical Fisher). Rows are drawn without repetition. Gives one tensor for each of
    the model's parameters, float32, under the name that it has on disk; what learns nothing from the task is 0.

    Raises ``InputError`` for a missing split and a model without a head for the task.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})
    >>> task = Task("mood", "text-classification", {"train": rows}, ("text",), "label")
    >>> found = diagonal_fisher(small("text-encoder", "nano").with_head(task), task)
    >>> bool(found["downriver_head.weight"].sum() > 0)
    True
    """
    rows, collate = task.rows(split), model.collate(task)
    chosen = generator("diagonal_fisher", seed).permutation(len(rows))[:examples]
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    training = model.training
    model.eval()
    try:
        for row in tqdm(chosen.tolist(), desc="Fisher", leave=False, delay=2):
            batch = {name: value.to(model.device) for name, value in collate([rows[row]]).items()}
            model.zero_grad(set_to_none=True)
            model(**batch)["loss"].backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.double().square()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    return module_state(model, {name: (total / len(chosen)).float() for name, total in sums.items()})
