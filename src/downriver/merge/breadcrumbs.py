"""Model Breadcrumbs: of every task vector drop the largest outliers and the many small entries, and add up the middle.

Reach for it when single weights of a fine-tuned model moved very far. Davari and Belilovsky, "Model Breadcrumbs:
Scaling Multi-Task Model Merging with Sparse Masks" (2023). Entries are ranked in each tensor alone, as in the paper.
Of entries with equal magnitude at a cut all are kept.
"""

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.engine import combine
from downriver.merge.method import Known, Rank, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.sparsified import Consensus, Rescale, Sparsified
from downriver.merge.stores import Source

T = TypeVar("T")


def breadcrumbs(
    models: Sequence[Source],
    base: T,
    *,
    density: float | Sequence[float] = 0.9,
    gamma: float | Sequence[float] = 0.01,
    consensus: Consensus = "linear",
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = False,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = θ0 + λ·Σ wt·τ̂t, with each tensor's largest share ``gamma`` and all but ``density`` of the rest at zero.

    Parameters
    ----------
    models, base
        Models and the one they were fine-tuned from, as in ``ties``.
    density
        Share of a tensor's entries that is kept; 0.9 with ``gamma`` 0.01 are what mergekit's users usually set, not the
        paper's.
    gamma
        Share of the entries, the largest ones, that is dropped; fewer where ``density`` would not be reached.
    lam
        λ; search it where there are validation data (``search_lambda``).
    consensus, weights, normalize
        As in ``dare``.
    include, exclude, on_mismatch, out
        As in ``merge``.

    Raises
    ------
    InputError
        As ``ties``; density or gamma out of range.

    Example
    -------
    >>> base, a = {"w": torch.zeros(5)}, {"w": torch.tensor([9.0, 0.1, -2.0, 0.2, 3.0])}
    >>> breadcrumbs([a], base, density=0.4, gamma=0.2, lam=1.0)
    {'w': tensor([ 0.,  0., -2.,  0.,  3.])}
    """
    method = Breadcrumbs(
        density=density, gamma=gamma, consensus=consensus, weights=weights, lam=lam, normalize=normalize
    )
    return combine(models, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Sparsified):
    """Model Breadcrumbs for ``merge``; parameters as in ``breadcrumbs``."""

    density: float | Sequence[float] = 0.9
    gamma: float | Sequence[float] = 0.01
    lam: float = 1.0
    rescale: Rescale = None

    name: ClassVar[str] = "breadcrumbs"
    per_tensor: ClassVar[tuple[str, ...]] = ("density", "gamma", "weights", "lam")

    def check(self, models: int) -> None:
        super().check(models)
        for i in range(models):
            if not 0 <= self._gamma(i) < 1:
                raise InputError(f"breadcrumbs: gamma is {self._gamma(i)}, a share in [0, 1) is expected")

    def group(self, tensor: str) -> Hashable:
        return tensor

    def ranks(self, models: int, size: int) -> list[Rank]:
        """For each model the smallest and the largest rank that is kept."""
        found: list[Rank] = []
        for i in range(models):
            kept, top = int(self.share(i) * size), int(self._gamma(i) * size)
            below = max(0, size - kept - top)
            found += [None, None] if self.share(i) >= 1 else [below + 1 if kept else size + 1, max(1, below + kept)]
        return found

    def ranked(self, base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
        return [tau for model in models for tau in [task_vector(model, base)] * 2]

    def sparse(self, tau: Tensor, model: int, known: Known) -> Tensor:
        if self.share(model) >= 1:
            return tau
        low, high = known.cuts[2 * model : 2 * model + 2]
        if math.isinf(low):
            return torch.zeros_like(tau)
        size = tau.abs()
        return tau * ((size >= low) & (size <= high))

    def _gamma(self, model: int) -> float:
        return float(self.gamma[model]) if isinstance(self.gamma, Sequence) else self.gamma
