"""SCE: select the entries on which models differ most, weight models by their squares, erase minority signs.

Reach for it when several specialists of one base are fused tensor by tensor without any weights to tune. Wan et al.,
"FuseChat: Knowledge Fusion of Chat Models" (2024). Selection is by variance over the models, in each tensor alone; of
entries with equal variance at the cut all are kept.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.engine import combine
from downriver.merge.method import Known, Method, Rank, Tally, square, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.stores import Source

T = TypeVar("T")


def sce(
    models: Sequence[Source],
    base: T,
    *,
    select_topk: float = 0.1,
    lam: float = 1.0,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = θ0 + λ·Σ ηt·τ̂t / Σ ηt over the models whose sign is the elected one, ηt the mean square of τ̂t.

    Parameters
    ----------
    models, base
        Models and the one they were fine-tuned from, as in ``ties``.
    select_topk
        Share of each tensor's entries, those with the largest variance over the models, that is merged; the others stay
        at the base. 10 % by default; 1 selects all (mergekit's default).
    lam
        λ, 1 by default.
    include, exclude, on_mismatch, out
        As in ``merge``.

    Raises
    ------
    InputError
        A share out of range.

    Example
    -------
    >>> base = {"w": torch.zeros(2)}
    >>> sce([{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}], base, select_topk=0.5)
    {'w': tensor([2., 0.])}
    """
    method = Sce(select_topk=select_topk, lam=lam)
    return combine(models, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class Sce(Method):
    """SCE for ``merge``; parameters as in ``sce``."""

    select_topk: float = 0.1

    name: ClassVar[str] = "sce"
    per_tensor: ClassVar[tuple[str, ...]] = ("select_topk", "lam")

    @property
    def needs_sums(self) -> bool:
        return True

    def check(self, models: int) -> None:
        super().check(models)
        if self.weights is not None:
            raise InputError("sce takes no weights: the squares of the task vectors decide")
        if not 0 <= self.select_topk <= 1:
            raise InputError(f"sce: select_topk is {self.select_topk}, a share from 0 to 1 is expected")

    def group(self, tensor: str) -> Hashable:
        return tensor

    def ranks(self, models: int, size: int) -> list[Rank]:
        if self.select_topk >= 1:
            return [None]
        rank: Callable[[int], int] = lambda nonzero: nonzero - int(nonzero * self.select_topk) + 1  # noqa: E731
        return [rank]

    def ranked(self, base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
        variance = _variance(_vectors(base, models))
        return [variance[variance != 0]]

    def measure(self, base: Tensor, models: Sequence[Tensor], known: Known) -> np.ndarray:
        """Σ τ̂² of every model."""
        return self._selected(base, models, known).double().square().flatten(1).sum(1).cpu().numpy()

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        assert known.sums is not None
        hats = self._selected(base, models, known)  # 1. select
        tally = Tally.plain([square(task_vector(model, base)) for model in models])
        present = hats != 0
        tally.kept = present.flatten(1).sum(1).double().cpu().numpy()
        total = known.sums.sum()  # 2. calculate: ηt
        eta = known.sums / total if total > 0 else np.full(len(models), 1 / len(models))
        gamma = torch.where(hats.sum(0) >= 0, 1.0, -1.0)  # 3. erase what is against the sign of the sum
        agree = hats.sign() == gamma
        tally.touched = float(present.any(0).sum())
        tally.agreeing = float(agree.sum())
        tally.conflicts = float((present & ~agree).any(0).sum())
        weights = torch.as_tensor(eta, device=hats.device).view(-1, *[1] * base.dim()) * agree
        return (hats * weights).sum(0) / weights.sum(0).clamp_min(1e-6), tally

    def _selected(self, base: Tensor, models: Sequence[Tensor], known: Known) -> Tensor:
        taus = _vectors(base, models)
        if self.select_topk >= 1:
            return taus
        variance = _variance(taus)
        return taus * ((variance >= known.cuts[0]) & (variance != 0))


def _vectors(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    return torch.stack([task_vector(model, base) for model in models])


def _variance(taus: Tensor) -> Tensor:
    """Over the models, (models, ...) to (...), in float32."""
    return taus.float().var(dim=0, unbiased=False)
