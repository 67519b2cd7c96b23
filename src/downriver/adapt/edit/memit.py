"""MEMIT: many facts at once, spread over the MLP projections of several layers.

Reach for it to write more than a handful of facts. Meng et al., "Mass-Editing Memory in a Transformer" (2023). The
defaults are the authors' for GPT-2-XL, whose layers are 13 to 17 (GPT-J: 3 to 8, Llama-2-7B: 4 to 8).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from downriver.adapt.edit.projections import projection
from downriver.adapt.edit.requests import Fact, encode
from downriver.adapt.edit.rome import UnstableEdit, covariance_of
from downriver.adapt.edit.values import optimise, read, templates
from downriver.core.errors import InputError
from downriver.models.model import Model


@dataclass(frozen=True, kw_only=True)
class Memit:
    """Settings of MEMIT.

    Parameters
    ----------
    layers
        The blocks' numbers, or the projections' names, from the first to the last; δ is sought at the last block.
    covariance
        C = E[kkᵀ] of every projection's keys, by its name, as ``key_covariance`` gives it.
    weight
        λ = weight · C keeps what the layers knew: 20 000.
    contexts
        As in ``Rome``; by default the model writes five prefixes of ten tokens. The prompt alone and the mean over the
        prefixes count half each in a key.
    steps, learning_rate, kl, decay, clamp, seed
        As in ``Rome``; the clamp is 0.75 of the hidden state's norm.
    """

    layers: Sequence[int | str]
    covariance: Mapping[str, Tensor]
    weight: float = 20_000.0
    contexts: Sequence[str] | None = None
    steps: int = 20
    learning_rate: float = 0.5
    kl: float = 0.0625
    decay: float = 0.5
    clamp: float = 0.75
    seed: int = 0


def memit(lm: Model, facts: Sequence[Fact], settings: Memit) -> list[float]:
    """Write all facts; the losses of their values."""
    if not settings.layers or not settings.weight > 0:
        raise InputError("memit: at least one layer and a positive weight are expected")
    places = [projection(lm.backbone, layer) for layer in settings.layers]
    covariances = [covariance_of(place, settings.covariance).double() for place in places]
    contexts = templates(lm, settings.contexts, ((10, 5),), settings.seed)
    last = places[-1].block
    values = [optimise(lm, fact, last, contexts, settings) for fact in facts]
    z = torch.stack([value.v0 + value.delta for value in values], dim=1).double()  # (d, facts)
    bare = encode(lm, facts, with_target=False)
    prefixed = [encode(lm, [fact.within(c) for c in contexts], with_target=False) for fact in facts]
    for number, (place, covariance) in enumerate(zip(places, covariances, strict=True)):
        keys = []
        for batch in prefixed:
            found = read(lm, batch, place.module)[0]
            keys.append(found[0] if len(found) == 1 else (found[0] + found[1:].mean(dim=0)) / 2)
        K = torch.stack(keys, dim=1)  # (keys, facts)
        R = (z - read(lm, bare, last)[1].T) / (len(places) - number)  # what is missing, shared with the layers to come
        try:
            # ΔW = R Kᵀ (λC + KKᵀ)⁻¹
            change = torch.linalg.solve(settings.weight * covariance.to(K) + K @ K.T, K @ R.T).T
        except torch.linalg.LinAlgError:
            raise InputError(f"the covariance of {place.name} is singular: give key_covariance more texts") from None
        if not bool(torch.isfinite(change).all()):
            raise UnstableEdit(f"{place.name}: the update is not finite; nothing was written")
        place.add(change)
    return [value.loss for value in values]
