"""DARE: drop most entries of every task vector at random and scale up the rest, before task vectors are added.

Reach for it when models of one base are to be added and their task vectors are small and redundant, as those of
supervised fine-tuning are. Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
Free Lunch" (2023). Which entries stay depends on seed, tensor, model and place alone: not on blocks or threads.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from downriver.core.seeds import derive_seed
from downriver.merge.engine import combine
from downriver.merge.method import Known
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.sparsified import Consensus, Rescale, Sparsified
from downriver.merge.stores import Source

T = TypeVar("T")


def dare(
    models: Sequence[Source],
    base: T,
    *,
    density: float | Sequence[float] = 0.5,
    consensus: Consensus = "linear",
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "probability",
    seed: int = 0,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = θ0 + λ·Σ wt·mt⊙τt/density, where each entry of the mask mt is 1 with probability ``density``.

    Parameters
    ----------
    models, base
        Models and the one they were fine-tuned from, as in ``ties``.
    density
        1 − p of the paper, which tries drop rates p of 0.1 to 0.9 (and 0.99 for single models); half by default.
    consensus
        ``linear`` as task arithmetic, ``ties`` with elected signs.
    weights, lam
        wt (1 by default) and λ.
    normalize
        Divide by the weights; off by default.
    rescale
        ``probability``: each kept entry is divided by the density, the paper's; ``l1``: each tensor keeps its L1 norm,
        mergekit's; ``None``: as they are.
    seed
        Of the masks.
    include, exclude, on_mismatch, out
        As in ``merge``.

    Raises
    ------
    InputError
        As ``ties``; a density out of range.

    Example
    -------
    >>> base, a = {"w": torch.zeros(10_000)}, {"w": torch.ones(10_000)}
    >>> merged = dare([a], base, density=0.25)["w"]
    >>> sorted(set(merged.tolist())), round(float(merged.mean()), 1)
    ([0.0, 4.0], 1.0)
    """
    method = Dare(
        density=density,
        consensus=consensus,
        weights=weights,
        lam=lam,
        normalize=normalize,
        rescale=rescale,
        seed=seed,
    )
    return combine(models, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class Dare(Sparsified):
    """DARE for ``merge``; parameters as in ``dare``. The masks are ours with ``compat``, too."""

    density: float | Sequence[float] = 0.5
    rescale: Rescale = "probability"
    seed: int = 0

    name: ClassVar[str] = "dare"
    rescales: ClassVar[tuple[Rescale, ...]] = ("probability", "l1", None)

    def sparse(self, tau: Tensor, model: int, known: Known) -> Tensor:
        density = self.share(model)
        if density >= 1:
            return tau
        draws = uniform(tau, self.seed, known, model)
        kept = tau * (draws < density)
        return kept / density if self.rescale == "probability" else kept


def uniform(like: Tensor, seed: int, known: Known, model: int, what: Literal["dare", "della"] = "dare") -> Tensor:
    """Uniform numbers in [0, 1) for one block, the same ones whatever the blocks are."""
    bits = np.random.Philox(derive_seed(what, seed, known.tensor, model))
    skip = known.start % 4  # a step of Philox gives four numbers
    bits.advance(known.start // 4)
    draws = np.random.Generator(bits).random(skip + like.numel())[skip:]
    return torch.from_numpy(draws).to(like.device).view(like.shape)
