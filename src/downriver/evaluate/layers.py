"""Hidden states layer by layer: what each layer of a transformers model makes of rows, pooled to one vector a row.

Reach for it to follow a geometry, an alignment or a probe through the depth of a model; ``models.features.extract``
gives the last layer alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.models.features import Inputs, batches, inference
from downriver.models.model import Model, TaskLike


def layer_features(
    model: Model,
    rows: Sequence[Any],
    task: TaskLike | None = None,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
) -> dict[int, np.ndarray]:
    """The hidden states of some layers, each (n, d) float32: the mean over real tokens, or over the image.

    ``rows`` are rows of a task, or without a task a list of texts. Layer 0 is the embedding, the last the output;
    negative numbers count from the end, and all layers are taken by default. Raises ``InputError`` for a model that
    has no hidden states to show, and for a layer that is not there.

    >>> from downriver.models import small
    >>> found = layer_features(small("text-encoder", "nano"), ["a river", "the sea"], layers=[0, -1])
    >>> {layer: z.shape for layer, z in found.items()}
    {0: (2, 32), 2: (2, 32)}
    """
    if len(rows) == 0:
        raise InputError("hidden states of no rows: at least one is expected")
    if model.kind == "module":
        raise InputError(
            f"{model.source or 'the module'} has no hidden states to show: a transformers model is expected"
        )
    if task is None:
        rows, task = [{"text": text} for text in rows], Inputs()
    view = Inputs(
        task.inputs, "text-classification" if task.kind.startswith(("text", "lang")) else task.kind, task.name
    )
    collate, found = model.collate(view), dict[int, np.ndarray]()
    backbone: Any = model.backbone
    with inference(model):
        for indices in batches(rows, view, batch_size):
            batch = {k: v.to(model.device) for k, v in collate([rows[i] for i in indices]).items()}
            states = backbone(**batch, output_hidden_states=True).hidden_states
            for layer in _numbers(layers, len(states)):
                pooled = _pooled(states[layer], batch.get("attention_mask")).float().cpu().numpy()
                found.setdefault(layer, np.empty((len(rows), pooled.shape[1]), dtype=np.float32))[indices] = pooled
    return found


def _numbers(layers: Sequence[int] | None, total: int) -> list[int]:
    wanted = range(total) if layers is None else layers
    for layer in wanted:
        if not -total <= layer < total:
            raise InputError(f"layer {layer}: from 0 to {total - 1} are there (negative numbers count from the end)")
    return [layer % total for layer in wanted]


def _pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if hidden.ndim == 4:  # feature maps (n, d, h, w)
        return hidden.mean(dim=(2, 3))
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weight).sum(dim=1) / torch.clamp(weight.sum(dim=1), min=1e-9)
