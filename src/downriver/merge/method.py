"""What a merging method is: a rule on blocks of tensors, and what has to be known of whole models beforehand.

Reach for it to write a method of your own: subclass ``Method``, give ``delta``, and the engine streams it.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from downriver.core.errors import InputError

Rank = int | Callable[[int], int] | None


@dataclass(frozen=True)
class Known:
    """What must be known of whole models before a block can be merged.

    ``cuts``: the magnitude at each rank that the method asks for, for most the smallest that each model keeps (0:
    nothing is trimmed); ``norms``: L2 norms of the trimmed task vectors; ``majority``: the sign for entries where votes
    cancel (0: not known, they stay at the base); ``sums``: what the method measures, summed over the tensor.
    ``tensor``, ``row`` and ``start`` say which block it is: the tensor's name, the elements of one of its rows, and the
    first element.
    """

    cuts: tuple[float, ...]
    norms: tuple[float, ...] = ()
    majority: int = 0
    sums: np.ndarray | None = None
    tensor: str = ""
    row: int = 1
    start: int = 0


@dataclass
class Tally:
    """Counts over blocks: entries that each model keeps, squared norms, and how signs agree (where they are
    elected)."""

    kept: np.ndarray
    squares: np.ndarray
    merged: float = 0.0
    touched: float = 0.0  # entries that some model keeps
    conflicts: float = 0.0  # entries where a kept value is against the elected sign
    agreeing: float = 0.0  # kept values that have the elected sign
    cancelled: float = 0.0  # entries that some model keeps and whose votes cancel exactly
    balance: float = 0.0  # sum of the elected signs

    @classmethod
    def plain(cls, squares: Sequence[float]) -> "Tally":
        """That of a method that trims nothing and elects no sign."""
        return cls(np.zeros(len(squares)), np.array(squares))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclass(frozen=True, kw_only=True)
class Method:
    """A merging method: a rule on tensors, and what the engine has to find out for it beforehand.

    Parameters
    ----------
    weights
        One number a model; equal by default.
    lam
        λ, how far to go from the base along the merged task vector.
    """

    weights: Sequence[float] | None = None
    lam: float = 1.0

    name: ClassVar[str]
    per_tensor: ClassVar[tuple[str, ...]] = ("weights", "lam")
    """Parameters that may differ from tensor to tensor."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if isinstance(value := getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(value))

    @property
    def whole_rows(self) -> bool:
        """Whether a block must hold whole rows of its tensor."""
        return False

    @property
    def needs_norms(self) -> bool:
        """Whether ``Known.norms`` is used."""
        return False

    @property
    def needs_sums(self) -> bool:
        """Whether ``Known.sums`` is used, and ``measure`` is to be called on every block beforehand."""
        return False

    @property
    def own_dtype(self) -> bool:
        """Whether arithmetic is done in the models' own type rather than in float32 and float64."""
        return False

    def group(self, tensor: str) -> Hashable:
        """Tensors with equal groups are ranked together by magnitude."""
        return tensor

    def ranks(self, models: int, size: int) -> list[Rank]:
        """For each of the vectors ``ranked`` the rank of the magnitude to be known among ``size``, or a function that
        gives it from the number of values; ``None`` is not looked for (its cut is 0), and a rank beyond the number of
        values is infinite."""
        return [None] * models

    def ranked(self, base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
        """The vectors of one block whose magnitudes are ranked: by default each model's task vector."""
        return [task_vector(model, base) for model in models]

    def measure(self, base: Tensor, models: Sequence[Tensor], known: Known) -> np.ndarray:
        """Numbers of one block that are added up over its tensor and given back as ``Known.sums``."""
        raise NotImplementedError

    def trimmed(self, tau: Tensor, cut: float) -> Tensor:
        """τ with the entries below the cut set to zero."""
        return tau

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        """The merged task vector τm of one block, so that the merged block is ``base + lam · τm``, and its counts."""
        raise NotImplementedError

    def majority(self, total: Tally) -> int:
        """After all blocks: the sign that entries with cancelling votes should have had; 0 leaves them as they are."""
        return 0

    def weight(self, model: int) -> float:
        """The weight of one model."""
        return 1.0 if self.weights is None else float(self.weights[model])

    def check(self, models: int) -> None:
        """Raise ``InputError`` where a parameter does not fit so many models."""
        if not math.isfinite(self.lam):
            raise InputError(f"{self.name}: lam is {self.lam}, a finite number is expected")
        if self.weights is not None:
            per_model(f"{self.name}: weights", self.weights, models)


def per_model(what: str, values: Sequence[float], models: int) -> None:
    """Refuse a list that has not one finite number a model."""
    if len(values) != models:
        raise InputError(f"{what} has {len(values)} values for {models} models: one a model is expected")
    if not all(math.isfinite(v) for v in values):
        raise InputError(f"{what} is {list(values)}: finite numbers are expected")


def task_vector(model: Tensor, base: Tensor) -> Tensor:
    """τ = θt − θ0, in float32 where it was calculated in float64."""
    tau = model - base
    return tau.float() if tau.dtype == torch.float64 else tau


def square(x: Tensor, dtype: torch.dtype | None = None) -> float:
    """‖x‖²."""
    return float(torch.linalg.vector_norm(x, dtype=dtype)) ** 2


def added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one type, added up in float32 at least as ``torch.sum`` does."""
    total = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32), copy=True)
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total.to(tensors[0].dtype)
