"""DELLA: drop entries of task vectors at random, small ones more often, then elect signs and add up what agrees.

Reach for it where DARE's blind dropping costs too much: within each row of a weight, entries are ranked by magnitude
and the probability of being kept rises with the rank. Deep et al., "DELLA-Merging: Reducing Interference in Model
Merging through Magnitude-Based Sampling" (2024). A vector is one row; tensors of more dimensions are rows of all that
share the first index. Ties of magnitude are ranked by place.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.dare import uniform
from downriver.merge.engine import combine
from downriver.merge.method import Known
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.sparsified import Consensus, Rescale, Sparsified
from downriver.merge.stores import Source

T = TypeVar("T")


def della(
    models: Sequence[Source],
    base: T,
    *,
    density: float | Sequence[float] = 0.5,
    epsilon: float = 0.15,
    consensus: Consensus = "ties",
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = True,
    rescale: Rescale = "probability",
    seed: int = 0,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = θ0 + λ·τm, τm from entries kept with probabilities from density − ε (smallest of a row) to density + ε.

    Parameters
    ----------
    models, base
        Models and the one they were fine-tuned from, as in ``ties``.
    density
        Mean probability of being kept; half by default.
    epsilon
        ε, half the distance between the probabilities of a row's smallest and largest entry; density ± ε must lie
        between 0 and 1. mergekit's default.
    consensus
        ``ties`` as in the paper, or ``linear``.
    weights, lam, normalize
        As in ``dare``; of the values that agree the weighted mean is taken.
    rescale
        ``probability``: each kept entry is divided by its own probability, the paper's; ``l1`` is mergekit's.
    seed, include, exclude, on_mismatch, out
        As in ``dare``.

    Raises
    ------
    InputError
        As ``dare``; density ± ε out of range; a memory bound in which a row has no room.

    Example
    -------
    >>> base, a = {"w": torch.zeros(1, 10_000)}, {"w": torch.linspace(0, 1, 10_000)[None]}
    >>> kept = della([a], base, density=0.5, epsilon=0.4)["w"][0] > 0
    >>> bool(kept[:1000].float().mean() < 0.25), bool(kept[-1000:].float().mean() > 0.75)
    (True, True)
    """
    method = Della(
        density=density,
        epsilon=epsilon,
        consensus=consensus,
        weights=weights,
        lam=lam,
        normalize=normalize,
        rescale=rescale,
        seed=seed,
    )
    return combine(models, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class Della(Sparsified):
    """DELLA for ``merge``; parameters as in ``della``. The draws are ours with ``compat``, too."""

    density: float | Sequence[float] = 0.5
    epsilon: float | Sequence[float] = 0.15
    consensus: Consensus = "ties"
    normalize: bool = True
    rescale: Rescale = "probability"
    seed: int = 0

    name: ClassVar[str] = "della"
    per_tensor: ClassVar[tuple[str, ...]] = ("density", "epsilon", "weights", "lam")
    rescales: ClassVar[tuple[Rescale, ...]] = ("probability", "l1", None)

    @property
    def whole_rows(self) -> bool:
        return True

    def check(self, models: int) -> None:
        super().check(models)
        for i in range(models):
            density, epsilon = self.share(i), self._epsilon(i)
            if density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
                raise InputError(
                    f"della: epsilon is {epsilon} and density {density}: density ± epsilon must lie between 0 and 1"
                )

    def sparse(self, tau: Tensor, model: int, known: Known) -> Tensor:
        density, epsilon = self.share(model), self._epsilon(model)
        if density >= 1:
            return tau
        rows = tau.abs().view(-1, known.row)
        order = rows.argsort(dim=1, stable=True)
        places = torch.arange(known.row, dtype=torch.float64, device=tau.device).expand_as(rows)
        ranks = torch.empty_like(places).scatter_(1, order, places)  # 0 for the smallest of its row
        share = ranks / (known.row - 1) if known.row > 1 else torch.full_like(ranks, 0.5)
        probability = (density - epsilon + 2 * epsilon * share).view(tau.shape)
        kept = tau * (uniform(tau, self.seed, known, model, "della") < probability)
        return (kept / probability).to(tau.dtype) if self.rescale == "probability" else kept

    def _epsilon(self, model: int) -> float:
        return float(self.epsilon[model]) if isinstance(self.epsilon, Sequence) else self.epsilon
