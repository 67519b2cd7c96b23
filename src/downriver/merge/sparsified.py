"""What DARE, DELLA and Breadcrumbs share: task vectors made sparse, then added up or put to a vote of signs.

Reach for one of these methods; a sparse method of your own subclasses ``Sparsified`` and gives ``sparse``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from downriver.core.errors import InputError, unknown
from downriver.merge.method import Known, Method, Tally, added, per_model, square, task_vector

Consensus = Literal["linear", "ties"]
Rescale = Literal["probability", "l1"] | None


@dataclass(frozen=True, kw_only=True)
class Sparsified(Method):
    """τm of task vectors of which only some entries are kept.

    Parameters
    ----------
    density
        Share of the entries that is kept, in (0, 1]; one value, or one a model.
    consensus
        ``linear`` adds up wt·τ̂t, as task arithmetic does; ``ties`` elects the sign of that sum and averages the values
        that have it, weighted by wt.
    normalize
        For ``linear``: divide by Σ wt. For ``ties``: divide by the weights that agree (off: only add them up).
    rescale
        What makes up for the entries that are gone: ``probability`` divides by the probability of being kept, ``l1``
        multiplies so that each tensor keeps its L1 norm (mergekit's), ``None`` does nothing.
    compat
        ``mergekit``: sums in the models' own type, and votes that cancel count as plus.
    """

    density: float | Sequence[float] = 1.0
    consensus: Consensus = "linear"
    normalize: bool = False
    rescale: Rescale = None
    compat: Literal["mergekit"] | None = None

    per_tensor: ClassVar[tuple[str, ...]] = ("density", "weights", "lam")
    rescales: ClassVar[tuple[Rescale, ...]] = ("l1", None)
    """What ``rescale`` may be."""

    def sparse(self, tau: Tensor, model: int, known: Known) -> Tensor:
        """τ̂: one model's task vector with the entries to be dropped at zero, and the kept ones over their probability
        where that is how they are rescaled."""
        raise NotImplementedError

    @property
    def needs_sums(self) -> bool:
        return self.rescale == "l1"

    @property
    def own_dtype(self) -> bool:
        return self.compat is not None

    def check(self, models: int) -> None:
        super().check(models)
        if self.consensus not in get_args(Consensus):
            raise unknown(f"{self.name}: consensus", self.consensus, get_args(Consensus))
        if self.rescale not in self.rescales:
            raise unknown(f"{self.name}: rescale", self.rescale, [r for r in self.rescales if r])
        if self.compat not in (None, "mergekit"):
            raise unknown(f"{self.name}: compat", self.compat, ["mergekit"])
        if isinstance(self.density, Sequence):
            per_model(f"{self.name}: density", self.density, models)
        for i in range(models):
            if not 0 < self.share(i) <= 1:
                raise InputError(
                    f"{self.name}: density is {self.share(i)}, a share in (0, 1] is expected: 0.2 keeps 20 %"
                )

    def share(self, model: int) -> float:
        """The share of one model's entries that is kept."""
        return float(self.density[model]) if isinstance(self.density, Sequence) else self.density

    def measure(self, base: Tensor, models: Sequence[Tensor], known: Known) -> np.ndarray:
        """Σ|τ| and Σ|τ̂| of every model, (2, models)."""
        taus = [task_vector(model, base) for model in models]
        hats = [self.sparse(tau, i, known) for i, tau in enumerate(taus)]
        return np.array([[float(x.double().abs().sum()) for x in vectors] for vectors in (taus, hats)])

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        tally = Tally.plain([0.0] * len(models))
        hats = []
        for i, model in enumerate(models):
            tau = task_vector(model, base)
            tally.squares[i] = square(tau)
            hat = self.sparse(tau, i, known)
            tally.kept[i] = float(hat.count_nonzero())
            if known.sums is not None and known.sums[:, i].min() >= 1e-7:
                hat = hat * (known.sums[0, i] / known.sums[1, i])
            hats.append(hat)
        weights = [self.weight(i) for i in range(len(models))]
        if self.compat is None:
            weighted = [hat.double() * w for hat, w in zip(hats, weights, strict=True)]
        else:
            weighted = [hat * hat.new_tensor(w) for hat, w in zip(hats, weights, strict=True)]
        if self.consensus == "linear":
            total = added(weighted)
            if self.normalize and abs(sum(weights)) >= 1e-8:
                total = total / sum(weights)
            return total, tally
        votes = added(weighted)
        gamma = votes.sign() if self.compat is None else torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
        agree = [(x * gamma > 0).to(votes.dtype) for x in weighted]
        self._count(tally, hats, gamma, agree)
        total = added([x * a for x, a in zip(weighted, agree, strict=True)])
        if self.normalize:
            divisor = added([a * a.new_tensor(w) for a, w in zip(agree, weights, strict=True)])
            total = total / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
        return total, tally

    def _count(self, tally: Tally, hats: Sequence[Tensor], gamma: Tensor, agree: Sequence[Tensor]) -> None:
        present = torch.stack([hat != 0 for hat in hats])
        agreeing = torch.stack([a > 0 for a in agree])
        tally.touched = float(present.any(0).sum())
        tally.agreeing = float(agreeing.sum())
        tally.conflicts = float((present & ~agreeing).any(0).sum())
        tally.cancelled = float((present.any(0) & (gamma == 0)).sum())
