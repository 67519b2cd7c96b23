"""TIES: trim the small changes, elect one sign for every parameter, and average only the values that agree with it.

Reach for it to fuse models that were fine-tuned from one base on different tasks, without training. Yadav et al.,
"Resolving Interference When Merging Models" (2023). Departures: sums are made in float64, so that a lone untrimmed
model comes back as it was and the order of the models does not matter; ``density=1`` keeps everything (the authors'
code has no such case); model weights are ours. The authors' σ and norm-fraction trimming is not offered.
"""

import functools
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from downriver.core.compiled import WORTHWHILE, compiled
from downriver.core.errors import InputError, unknown
from downriver.merge.engine import combine
from downriver.merge.method import Known, Method, Rank, Tally, added, per_model, square, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.stores import Source

T = TypeVar("T")
Scope = Literal["model", "tensor"]
Elect = Literal["mass", "count", "normmass", "normfrac"]
Aggregate = Literal["mean", "sum", "max"]
Majority = Literal["global", "positive"]
Compat = Literal["mergekit", "peft"]


def ties(
    models: Sequence[Source],
    base: T,
    *,
    density: float | Sequence[float] = 0.2,
    lam: float = 1.0,
    scope: Scope = "model",
    elect: Elect = "mass",
    agg: Aggregate = "mean",
    weights: Sequence[float] | None = None,
    majority_zero: Majority = "global",
    compat: Compat | None = None,
    signs: Source | None = None,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """Merge models by TIES: θm = θ0 + λ·τm, with τt = θt − θ0 trimmed, sign-elected and averaged over those that agree.

    Parameters
    ----------
    models
        Models fine-tuned from ``base``: state dicts, modules, ``Model`` objects, checkpoint folders, hub ids, or
        (base, LoRA adapter folder). For IA3 vectors, whose ancestor is 1, give a base of ones.
    base
        θ0; also gives whatever is not merged, and the form of the result.
    density
        Share of entries kept by trimming, in (0, 1]; one value, or one a model. 0.2, the paper's, keeps the 20 % that
        are largest in magnitude (it does not drop 20 %).
    lam
        λ; 1, the paper's for want of a validation set. With one: ``search_lambda`` from 0.8 to 2.5.
    scope
        Rank magnitudes over the whole model (``"model"``, the paper's) or in each tensor alone (``"tensor"``). With
        several densities, entries of tensors with the same density are ranked together.
    elect
        γ, the sign of an entry: that of the sum of trimmed values (``"mass"``, the paper's), of the vote count
        (``"count"``), of the sum of squares over each model's squared norm (``"normmass"``), or of the model with the
        largest such share (``"normfrac"``).
    agg
        Of the agreeing values take the ``"mean"`` (the paper's), ``"sum"`` or ``"max"`` magnitude.
    weights
        One number a model, none negative; votes, means and sums are weighted by them. Equal by default.
    majority_zero
        The sign where votes cancel exactly: that of Σ γ over all entries (``"global"``, the paper's) or plus.
    compat
        The arithmetic of ``"mergekit"`` or ``"peft"`` instead: magnitudes ranked in each tensor alone, int(density·n)
        entries kept, votes that cancel count as plus, sums in the models' own type. mergekit lets weighted values (of
        any sign) vote and divides by the weights that agree, peft lets unweighted values vote and divides by how many
        agree. Of entries with equal magnitude at the cut, all are kept (the libraries keep some).
    signs
        A further model whose task vector gives γ and nothing else, such as a short multitask fine-tune (the paper's
        oracle).
    include, exclude, on_mismatch
        As in ``merge``.
    out
        The folder to be written when ``base`` is a folder or hub id.

    Returns
    -------
    What ``base`` is: a state dict, a module (a copy with the merged weights), or the path ``out``.

    Raises
    ------
    InputError
        No model; names or shapes that differ from the base's (all are listed); a parameter out of range.

    Example
    -------
    >>> base = {"w": torch.zeros(5)}
    >>> a = {"w": torch.tensor([3.0, 0.1, 1.0, 0.0, -0.5])}
    >>> b = {"w": torch.tensor([-1.0, 0.2, 2.0, 0.0, 4.0])}
    >>> ties([a, b], base, density=0.4)  # 3 wins over -1, 4 over -0.5; 1 and 2 agree
    {'w': tensor([3.0000, 0.0000, 1.5000, 0.0000, 4.0000])}
    """
    method = Ties(
        density=density,
        lam=lam,
        scope=scope,
        elect=elect,
        agg=agg,
        weights=weights,
        majority_zero=majority_zero,
        compat=compat,
        last_gives_signs=signs is not None,
    )
    every = [*models, signs] if signs is not None else models
    return combine(every, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    """TIES for ``merge``; parameters as in ``ties``. ``last_gives_signs``: the last model is the ``signs`` of
    ``ties``."""

    density: float | Sequence[float] = 0.2
    scope: Scope = "model"
    elect: Elect = "mass"
    agg: Aggregate = "mean"
    majority_zero: Majority = "global"
    compat: Compat | None = None
    last_gives_signs: bool = False

    name: ClassVar[str] = "ties"
    per_tensor: ClassVar[tuple[str, ...]] = ("density", "weights", "lam")

    @property
    def needs_norms(self) -> bool:
        return self.elect in ("normmass", "normfrac")

    @property
    def own_dtype(self) -> bool:
        return self.compat is not None

    def check(self, models: int) -> None:
        choices = {"scope": Scope, "elect": Elect, "agg": Aggregate, "majority_zero": Majority}
        for parameter, allowed in choices.items():
            if getattr(self, parameter) not in get_args(allowed):
                raise unknown(f"ties: {parameter}", getattr(self, parameter), get_args(allowed))
        if self.compat not in (None, *get_args(Compat)):
            raise unknown("ties: compat", self.compat, get_args(Compat))
        models -= self.last_gives_signs
        if models < 1:
            raise InputError("ties: no models to merge besides the one that gives signs")
        super().check(models)
        if isinstance(self.density, Sequence):
            per_model("ties: density", self.density, models)
        for i in range(models):
            if not 0 < self._density(i) <= 1:
                raise InputError(f"ties: density is {self._density(i)}, a share in (0, 1] is expected: 0.2 keeps 20 %")
        if self.compat is None and any(self.weight(i) < 0 for i in range(models)):
            raise InputError(f"ties: weights are {self.weights}, none may be negative")
        offered = {"mergekit": (("mass",), ("mean", "sum")), "peft": (("mass", "count"), ("mean",))}
        if self.compat is not None:
            elect, agg = offered[self.compat]
            if self.elect not in elect or self.agg not in agg or self.last_gives_signs:
                raise InputError(f"ties: {self.compat} has no elect={self.elect!r} with agg={self.agg!r}, nor signs")

    def group(self, tensor: str) -> Hashable:
        return tensor if self.compat is not None or self.scope == "tensor" else self.density

    def ranks(self, models: int, size: int) -> list[Rank]:
        ranks: list[Rank] = [self._rank(self._density(i), size) for i in range(models - self.last_gives_signs)]
        return [*ranks, None] if self.last_gives_signs else ranks

    def _rank(self, density: float, size: int) -> int | None:
        if density >= 1:
            return None
        kept = int(density * size)
        if self.compat is None:
            return size - kept  # {|τ| ≥ kthvalue(d − int(k·d))}: int(k·d) + 1 entries, and those of equal magnitude
        return size - (max(1, kept) if self.compat == "mergekit" else kept) + 1

    def trimmed(self, tau: Tensor, cut: float) -> Tensor:
        if cut == 0:
            return tau
        if self.own_dtype:
            return tau * (tau.abs() >= cut)
        return hardshrink(tau, float(np.nextafter(np.float32(cut), np.float32(0))))  # |τ| > the float32 before the cut

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        if kernel := self._kernel(base, models):
            weights = [self.weight(i) for i in range(len(models))]
            majority = 1 if self.majority_zero == "positive" else known.majority
            return kernel.fused(base, models, known.cuts, weights, majority, self.agg == "mean")
        tally = Tally.plain([0.0] * len(models))
        hats = []
        for i, model in enumerate(models):
            tau = task_vector(model, base)
            tally.squares[i] = square(tau)
            hats.append(
                self.trimmed(tau, known.cuts[i])
            )  # 1. trim: τ̂t is τt where its magnitude reaches the cut, else 0
        # 2. elect: γ, one sign an entry
        if self.last_gives_signs:
            gamma = hats.pop().sign().float()
        elif self.compat is None:
            gamma = self._votes(hats, known.norms).sign().float()
        else:
            hats = (
                [hat * hat.new_tensor(self.weight(i)) for i, hat in enumerate(hats)]
                if self.compat == "mergekit"
                else hats
            )
            gamma = torch.where(added([hat.sign() for hat in hats] if self.elect == "count" else hats) >= 0, 1.0, -1.0)
        present = torch.zeros_like(gamma)  # how many models keep an entry
        for i, hat in enumerate(hats):
            kept = hat.sign().abs_().float()
            tally.kept[i] = float(kept.sum())
            present.add_(kept)
        touched = present.sign()
        tally.balance = float(gamma.sum())
        tally.touched = float(touched.sum())
        tally.cancelled = tally.touched - float(touched.mul_(gamma).abs_().sum())
        if tally.cancelled and (sign := 1 if self.majority_zero == "positive" else known.majority):
            gamma.add_(1 - gamma.abs(), alpha=sign)
        # 3. disjoint merge: over At, the models whose trimmed value has the elected sign
        agree = []
        for hat in hats:
            agree.append((hat * gamma).sign_().clamp_min_(0))
            tally.agreeing += float(agree[-1].sum())
            present.sub_(agree[-1])
        tally.conflicts = float(present.sign_().sum())
        if self.compat is None:
            return self._merged(base, models, hats, gamma, agree), tally
        return self._library_merged(hats, agree), tally

    def _kernel(self, base: Tensor, models: Sequence[Tensor]) -> ModuleType | None:
        """The paper's arithmetic in one pass, for large float32 blocks on a CPU."""
        paper = self.compat is None and self.elect == "mass" and self.agg != "max" and not self.last_gives_signs
        fits = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (base, *models))
        return compiled("downriver.merge.ties_kernel") if paper and fits and base.numel() >= WORTHWHILE else None

    def _votes(self, hats: Sequence[Tensor], norms: Sequence[float]) -> Tensor:
        """The sum whose sign is elected, in float64."""
        votes = torch.zeros_like(hats[0], dtype=torch.float64)
        for i, hat in enumerate(hats):
            if self.elect == "mass":
                votes.add_(hat, alpha=self.weight(i))
            elif self.elect == "count":
                votes.add_(hat.sign(), alpha=self.weight(i))
            else:  # sign(τ̂) · τ̂² / ‖τ̂t‖²
                share = (hat.double() * hat.abs()).mul_(self.weight(i) / (norms[i] ** 2 or 1.0))
                votes = (
                    votes + share if self.elect == "normmass" else torch.where(share.abs() > votes.abs(), share, votes)
                )
        return votes

    def _merged(
        self, base: Tensor, models: Sequence[Tensor], hats: Sequence[Tensor], gamma: Tensor, agree: Sequence[Tensor]
    ) -> Tensor:
        """τm = Σ wt·τt / Σ wt over At, as (Σ wt·θt − (Σ wt)·θ0) / Σ wt, so that nothing is lost in τt = θt − θ0."""
        if self.agg == "max":
            sizes = [(hat * gamma).clamp_min_(0) * self.weight(i) for i, hat in enumerate(hats)]
            return functools.reduce(torch.maximum, sizes).double() * gamma
        weights = [self.weight(i) for i in range(len(hats))]
        total = torch.zeros_like(base, dtype=torch.float64)
        weight = torch.zeros_like(total)
        for model, a, w in zip(models, agree, weights, strict=False):
            total.add_(a * model, alpha=w)
            weight.add_(a, alpha=w)
        total.addcmul_(weight, base.double(), value=-1)
        return (
            total.div_(weight.clamp_min_(min((w for w in weights if w), default=1.0))) if self.agg == "mean" else total
        )

    def _library_merged(self, hats: Sequence[Tensor], agree: Sequence[Tensor]) -> Tensor:
        """Σ wt·τ̂t over At, divided by Σ wt over At (mergekit; 0 counts as 1) or by how many agree (peft)."""
        masks = [a.to(hats[0].dtype) for a in agree]
        weights = [hats[0].new_tensor(self.weight(i)) for i in range(len(hats))]
        if self.compat == "peft":
            return added([hat * w * a for hat, w, a in zip(hats, weights, masks, strict=True)]) / added(masks).clamp(
                min=1
            )
        mixed = added([hat * a for hat, a in zip(hats, masks, strict=True)])  # weighted before they voted
        if self.agg == "sum":
            return mixed
        divisor = added([w * a for w, a in zip(weights, masks, strict=True)])
        return mixed / torch.where(divisor == 0, torch.ones_like(divisor), divisor)

    def majority(self, total: Tally) -> int:
        if self.compat is not None or self.majority_zero != "global" or not total.cancelled:
            return 0
        return int(np.sign(total.balance))

    def _density(self, model: int) -> float:
        return float(self.density[model]) if isinstance(self.density, Sequence) else self.density
