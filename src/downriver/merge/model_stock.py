"""Model Stock: how far to go from the base to the mean of fine-tuned models, from the angles between them.

Reach for it with two or more fine-tunings of one base on one task, without validation data: nothing is to be tuned.
Jang et al., "Model Stock: All we need is just a few fine-tuned models" (2024), tensor by tensor, or filter by filter.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.engine import combine
from downriver.merge.method import Known, Method, Tally, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.stores import Source

T = TypeVar("T")
TINY = 1e-6


def model_stock(
    models: Sequence[Source],
    base: T,
    *,
    filter_wise: bool = False,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = θ0 + t·mean(τt), t = N cos θ / (1 + (N − 1) cos θ), with cos θ the mean cosine between task vectors.

    Parameters
    ----------
    models, base
        At least two models and the one they were fine-tuned from, as in ``ties``.
    filter_wise
        An angle and a t for every row (output filter) of a tensor rather than for the tensor; vectors are one row.
    include, exclude, on_mismatch, out
        As in ``merge``.

    Raises
    ------
    InputError
        Fewer than two models.

    Example
    -------
    >>> base = {"w": torch.zeros(2)}
    >>> model_stock([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}], base)  # they share nothing
    {'w': tensor([0., 0.])}
    >>> model_stock([{"w": torch.tensor([1.0, 0.0])}] * 2, base)
    {'w': tensor([1., 0.])}
    """
    method = ModelStock(filter_wise=filter_wise)
    return combine(models, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class ModelStock(Method):
    """Model Stock for ``merge``."""

    filter_wise: bool = False

    name: ClassVar[str] = "model_stock"
    per_tensor: ClassVar[tuple[str, ...]] = ()

    @property
    def whole_rows(self) -> bool:
        return self.filter_wise

    @property
    def needs_sums(self) -> bool:
        return not self.filter_wise

    def check(self, models: int) -> None:
        super().check(models)
        if models < 2:
            raise InputError("model_stock: one model, two at least are expected besides the base")
        if self.weights is not None or self.lam != 1:
            raise InputError("model_stock takes neither weights nor lam: the angles between the models decide")

    def measure(self, base: Tensor, models: Sequence[Tensor], known: Known) -> np.ndarray:
        """Inner products of all task vectors, (models, models)."""
        return _products(models, base, base.numel())[0]

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        total = torch.zeros_like(base, dtype=torch.float64)
        for model in models:
            total.add_(model)
        total.sub_(base, alpha=len(models))
        squares = [float(torch.linalg.vector_norm(task_vector(m, base), dtype=torch.float64)) ** 2 for m in models]
        products = _products(models, base, known.row) if known.sums is None else known.sums[None]
        share = torch.from_numpy(_share(products) / len(models)).to(total.device)
        return total.view(len(share), -1).mul_(share[:, None]).view(-1), Tally.plain(squares)


def _products(models: Sequence[Tensor], base: Tensor, row: int) -> np.ndarray:
    """Inner products of all task vectors, row by row: (rows, models, models)."""
    taus = torch.stack([task_vector(model, base).view(-1, row) for model in models], 1).double()
    return (taus @ taus.mT).cpu().numpy()


def _share(products: np.ndarray) -> np.ndarray:
    """t of each row; 0 where the models pull so far apart that no finite estimate exists."""
    n, norms = products.shape[1], np.sqrt(products.diagonal(axis1=1, axis2=2))
    cosines = [
        np.clip(products[:, i, j] / np.maximum(norms[:, i] * norms[:, j], TINY), -1, 1)
        for i, j in combinations(range(n), 2)
    ]
    cosine = np.mean(cosines, axis=0)
    below = 1 + (n - 1) * cosine
    return np.divide(n * cosine, below, out=np.zeros_like(below), where=np.abs(below) >= TINY)
