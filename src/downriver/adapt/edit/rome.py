"""ROME and consistent ROME: one fact at a time, by a change of rank one to one MLP projection.

Reach for ``c_rome``; ``rome`` is there to be compared with, and breaks models where the subject begins the text. Meng
et al., "Locating and Editing Factual Associations in GPT" (2022); the consistent keys are those of Yang et al. (2024).
Departures: an edit whose denominator nearly vanishes is refused before anything is written (``smallest=0`` allows it).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from downriver.adapt.edit.projections import Projection, projection
from downriver.adapt.edit.requests import Fact, encode
from downriver.adapt.edit.values import optimise, read, templates
from downriver.core.errors import DownriverError, InputError
from downriver.models.model import Model


class UnstableEdit(DownriverError):
    """The update of an edit would be huge, because the key that it is divided by hardly lies in its direction."""


@dataclass(frozen=True, kw_only=True)
class Rome:
    """Settings of ROME; the defaults are the authors' for GPT-2-XL, whose layer is 17 (GPT-J: 5).

    Parameters
    ----------
    layer
        The block's number, or the projection's name (see ``projections``).
    contexts
        Texts with one ``{}`` in which the prompt is put, beside the prompt alone. By default the model writes twenty
        prefixes itself: ten of five tokens and ten of ten.
    covariance
        C = E[kkᵀ] of the projection's keys, by its name, as ``key_covariance`` gives it. Without it (the default of the
        authors of the collapse paper) u is k̄ itself.
    steps, learning_rate, kl, decay, clamp
        Of the search for the value: Adam, NLL + kl · KL + decay · ‖δ‖/‖v0‖², ‖δ‖ ≤ clamp · ‖v0‖.
    smallest
        Refuse an edit when |k·u| / |k̄·u|, the denominator as a share of consistent ROME's, is below this. Ours.
    seed
        Of the prefixes.
    """

    layer: int | str
    contexts: Sequence[str] | None = None
    covariance: Mapping[str, Tensor] | None = None
    steps: int = 20
    learning_rate: float = 0.5
    kl: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0
    smallest: float = 0.1
    seed: int = 0

    @property
    def layers(self) -> tuple[int | str, ...]:
        return (self.layer,)


def rome(lm: Model, facts: Sequence[Fact], settings: Rome, consistent: bool) -> tuple[list[float], list[float]]:
    """Write the facts one after another; the denominators k·u and the losses of the values."""
    at = projection(lm.backbone, settings.layer)
    contexts = templates(lm, settings.contexts, ((5, 10), (10, 10)), settings.seed)
    denominators, losses = [], []
    for fact in facts:
        keys, values = read(lm, encode(lm, [fact.within(c) for c in contexts], with_target=False), at.module)
        mean = keys.mean(dim=0)  # k̄
        u = direction(at, mean, settings.covariance)
        key, current = (mean, values.mean(dim=0)) if consistent else (keys[0], values[0])
        denominator = float(key @ u)
        share = abs(denominator) / abs(float(mean @ u))
        if not share >= settings.smallest:
            raise UnstableEdit(
                f"{fact.subject!r}: the key of the bare prompt has only {share:.2g} of the averaged key in the edit's "
                f"direction (k·u = {denominator:.3g}), so the update would be {1 / max(share, 1e-30):.3g} times as "
                "large as with consistent keys; nothing was written: use method='c_rome'"
            )
        value = optimise(lm, fact, at.module, contexts, settings)
        change = rank_one(u, key, (value.v0 + value.delta).double() - current)
        if not bool(torch.isfinite(change).all()):
            raise UnstableEdit(f"{fact.subject!r}: the update is not finite; nothing was written")
        at.add(change)
        denominators.append(denominator)
        losses.append(value.loss)
    return denominators, losses


def direction(at: Projection, mean: Tensor, covariance: Mapping[str, Tensor] | None) -> Tensor:
    """u = C⁻¹k̄ / ‖C⁻¹k̄‖, or k̄ / ‖k̄‖ without C."""
    u = mean
    if covariance is not None:
        factor, failed = torch.linalg.cholesky_ex(covariance_of(at, covariance).to(mean))
        if failed:
            raise InputError(f"the covariance of {at.name} is singular: more texts than its {at.width} keys are needed")
        u = torch.cholesky_solve(mean[:, None], factor)[:, 0]
    return u / u.norm()


def covariance_of(at: Projection, covariance: Mapping[str, Tensor]) -> Tensor:
    """The C of a projection, checked."""
    if at.name not in covariance:
        raise InputError(f"covariance has none of {at.name}, only of {', '.join(covariance) or 'nothing'}")
    found = covariance[at.name]
    if found.shape != (at.width, at.width) or not bool(torch.isfinite(found).all()):
        raise InputError(
            f"the covariance of {at.name} has the shape {tuple(found.shape)}: finite numbers of shape "
            f"({at.width}, {at.width}) are expected"
        )
    return found


def rank_one(u: Tensor, key: Tensor, residual: Tensor) -> Tensor:
    """ΔW (out, in) = (residual / (key·u)) uᵀ, so that ΔW key = residual.

    >>> change = rank_one(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 5.0]), torch.tensor([4.0]))
    >>> change @ torch.tensor([2.0, 5.0])
    tensor([4.])
    """
    return torch.outer(residual / (key @ u), u)
