"""Train a few entries of a model and leave all others as they are, bit by bit.

Reach for it with a mask found early in a run, or in a run with another seed (``merge.subnetwork``): Mukherjee et al.
(2025) report that the subnetwork of a reinforcement-learning run, trained alone, recovers it. Gradients are masked, and
after each step of the optimiser every other entry is put back, so that weight decay and momentum cannot move it. The
optimiser still keeps state for all entries. ``train_subnetwork`` trains on a task; ``subnetwork_only`` is for trainers
of transformers and trl, and loops of your own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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
        As in ``subnetwork_only``.
    learning_rate, settings
        As in ``fine_tune``.

    Raises ``InputError`` as ``subnetwork_only``.

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
    trained = set(_masks(copied, mask))
    with subnetwork_only(copied, mask):
        return fine_tune(
            copied,
            task,
            budget,
            learning_rate=learning_rate,
            trainable=trained.__contains__,
            in_place=True,
            **settings,
        )


@contextmanager
def subnetwork_only(model: nn.Module, mask: SparseMask) -> Iterator[None]:
    """Within the block training changes the mask's entries of the model alone, whichever optimiser does it.

    Optimisers are torch's, or derived from ``torch.optim.Optimizer``, so ``Trainer.train()`` may stand in the block.
    Afterwards the model's parameters ask for gradients as they did before.

    Parameters
    ----------
    mask
        Entries by the names that ``merge`` and checkpoints have (``model.layers.0.…``) or by the module's own
        (``backbone.model.layers.0.…``, ``head.weight``).

    Raises ``InputError`` for a mask that is empty, names no parameter of the model, or has entries beyond one's end.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> before = layer.weight.detach().clone()
    >>> optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    >>> with subnetwork_only(layer, SparseMask({"weight": torch.tensor([1])}, 2)):
    ...     for _ in range(2):
    ...         layer(torch.ones(1, 2)).sum().backward()
    ...         optimiser.step()
    >>> (layer.weight == before).tolist()
    [[True, False]]
    """
    masks, parameters = _masks(model, mask), dict(model.named_parameters())
    learned = {name: p.requires_grad for name, p in parameters.items()}
    kept = {name: parameters[name].detach().clone() for name in masks}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in masks)

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for name, own in masks.items():
            value = parameters[name]
            value.copy_(torch.where(own.to(value.device), value, kept[name].to(value.device)))

    hooks: list[Any] = [
        parameters[name].register_hook(lambda grad, own=own: grad * own.to(grad.device)) for name, own in masks.items()
    ]
    hooks.append(register_optimizer_step_post_hook(put_back))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(learned[name])


def _masks(model: nn.Module, mask: SparseMask) -> dict[str, Tensor]:
    """Truth values by the model's own names."""
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for stored, places in mask.indices.items():
        name = stored if stored in parameters else f"backbone.{stored}"
        name = name if name in parameters else stored.replace("downriver_head.", "head.")
        if name not in parameters:
            raise InputError(f"mask: {stored!r} is no parameter of the model")
        shape = parameters[name].shape
        if len(places) and int(places.max()) >= shape.numel():
            raise InputError(f"mask: {stored!r} has an entry {int(places.max())}, the model's is of {shape.numel()}")
        masks[name] = mask.dense(stored, shape)
    if not masks:
        raise InputError("mask is empty: at least one entry is expected")
    return masks
