"""Train a few entries of a model and leave all others as they are, bit by bit.

Reach for it with a mask found early in a run, or in a run with another seed (``merge.subnetwork``): Mukherjee et al.
(2025) report that the subnetwork of a reinforcement-learning run, trained alone, recovers it. Gradients are masked, and
after each step of the optimiser every other entry is put back, so that weight decay and momentum cannot move it. The
optimiser still keeps state for all entries.
"""

from typing import Any

import torch
from transformers import TrainerCallback

from downriver.core import Budget, InputError
from downriver.models.model import Model
from downriver.nn.sparse_patch import SparseMask
from downriver.tasks.task import Task
from downriver.training import TokenRows, fine_tune
from downriver.training.engine import clone


def train_subnetwork(
    model: Model,
    task: Task | TokenRows,
    budget: Budget | str,
    *,
    mask: SparseMask,
    learning_rate: float,
    **settings: Any,
) -> Model:
    """Train a copy of the model where the mask allows.

    Parameters
    ----------
    model, task, budget
        As in ``fine_tune``; the model must be ready for the task (``with_head``).
    mask
        Entries by the names that ``merge`` and checkpoints have (``model.layers.0.…``) or by the module's own
        (``backbone.model.layers.0.…``, ``head.weight``).
    learning_rate, settings
        As in ``fine_tune``.

    Raises ``InputError`` for a mask that is empty, or names no parameter of the model.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["the river runs to the sea"] * 8})
    >>> task = Task("river", "language-modelling", {"train": rows}, ("text",), None)
    >>> model = small("causal-lm", "nano")
    >>> name = "model.layers.0.mlp.up_proj.weight"
    >>> one = SparseMask({name: torch.tensor([5])}, sum(p.numel() for p in model.parameters()))
    >>> tuned = train_subnetwork(model, task, "8 examples", mask=one, learning_rate=1e-2, batch_size=4)
    >>> changed = [(a != b).sum().item() for a, b in zip(model.parameters(), tuned.parameters(), strict=True)]
    >>> sum(changed)
    1
    """
    copied = clone(model)
    parameters = dict(copied.named_parameters())
    masks: dict[str, torch.Tensor] = {}
    for stored in mask.indices:
        name = stored if stored in parameters else f"backbone.{stored}"
        name = name if name in parameters else stored.replace("downriver_head.", "head.")
        if name not in parameters:
            raise InputError(f"mask: {stored!r} is no parameter of the model")
        masks[name] = mask.dense(stored, parameters[name].shape)
    if not masks:
        raise InputError("mask is empty: at least one entry is expected")
    hooks = [
        parameters[name].register_hook(lambda grad, own=own: grad * own.to(grad.device)) for name, own in masks.items()
    ]
    try:
        return fine_tune(
            copied,
            task,
            budget,
            learning_rate=learning_rate,
            trainable=masks.__contains__,
            callbacks=[*settings.pop("callbacks", ()), _Kept(copied, masks)],
            in_place=True,
            **settings,
        )
    finally:
        for hook in hooks:
            hook.remove()


class _Kept(TrainerCallback):
    """After every step of the optimiser the entries outside the masks are what they were."""

    def __init__(self, model: Model, masks: dict[str, torch.Tensor]) -> None:
        self.parameters = dict(model.named_parameters())
        self.masks = masks
        self.before = {name: self.parameters[name].detach().clone() for name in masks}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Put them back."""
        with torch.no_grad():
            for name, own in self.masks.items():
                value = self.parameters[name]
                value.copy_(torch.where(own.to(value.device), value, self.before[name].to(value.device)))
