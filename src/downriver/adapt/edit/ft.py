"""Fine-tuning as an edit: Adam on one MLP projection until the target follows, within ±ε of the old weights.

The baseline of Yang et al., "The Butterfly Effect of Model Editing" (2024). Departure: a target of several tokens gets
the mean loss over them, where the authors' code reads the last prompt token only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from downriver.adapt.edit.projections import projection
from downriver.adapt.edit.requests import Fact, encode
from downriver.core.errors import InputError
from downriver.models.model import Model

ENOUGH = 1e-2
"""The loss at which an edit is done."""


@dataclass(frozen=True, kw_only=True)
class Ft:
    """Settings of the fine-tuning edit; the defaults are the authors' for GPT-2-XL, whose layer is 0.

    ``layer`` is the block's number or the projection's name, ``steps`` the passes over the requests at most (25), in
    batches of ``batch_size`` (3), and ``epsilon`` how far any weight may go (5e-4); ``None`` lets it go anywhere.
    """

    layer: int | str
    steps: int = 25
    learning_rate: float = 5e-4
    epsilon: float | None = 5e-4
    batch_size: int = 3

    @property
    def layers(self) -> tuple[int | str, ...]:
        return (self.layer,)


def ft(lm: Model, facts: Sequence[Fact], settings: Ft) -> list[float]:
    """Train the projection, its bias too where it has one, on the facts; the mean loss of the last pass."""
    if settings.steps < 1 or settings.batch_size < 1 or not settings.learning_rate > 0:
        raise InputError("ft: at least one step, a batch size of at least 1 and a positive learning_rate are expected")
    if settings.epsilon is not None and not settings.epsilon > 0:
        raise InputError(f"ft: epsilon is {settings.epsilon}: a positive number, or None for no bound, is expected")
    module: nn.Module = projection(lm.backbone, settings.layer).module
    learning = list(module.parameters())
    before = [p.detach().clone() for p in learning]
    batches = [encode(lm, facts[i : i + settings.batch_size]) for i in range(0, len(facts), settings.batch_size)]
    optimiser, backbone = torch.optim.Adam(learning, lr=settings.learning_rate), lm.backbone
    mean = float("nan")
    try:
        for parameter in learning:
            parameter.requires_grad_(True)
        for _ in range(settings.steps):
            losses = []
            for batch in batches:
                with torch.enable_grad():
                    loss = _loss(backbone, batch)
                    if loss.item() >= ENOUGH:
                        optimiser.zero_grad()
                        loss.backward()
                        optimiser.step()
                losses.append(loss.item() * len(batch.ids))
                _clamp(learning, before, settings.epsilon)
            mean = sum(losses) / len(facts)
            if mean < ENOUGH:
                break
    finally:
        for parameter in learning:
            parameter.grad = None
            parameter.requires_grad_(False)
    return [mean]


def _loss(backbone: Any, batch: Any) -> torch.Tensor:
    logits, said = backbone(**batch.inputs).logits[:, :-1], batch.target[:, 1:]
    nll = F.cross_entropy(logits.transpose(1, 2).float(), batch.ids[:, 1:], reduction="none")
    return ((nll * said).sum(dim=1) / said.sum(dim=1)).mean()


def _clamp(learning: Sequence[torch.Tensor], before: Sequence[torch.Tensor], epsilon: float | None) -> None:
    if epsilon is None:
        return
    with torch.no_grad():
        for now, old in zip(learning, before, strict=True):
            now.copy_(now.clamp(old - epsilon, old + epsilon))
