"""Let a model with thresholds on its gates skip neurons when it decodes: the half of CATS that saves time.

Reach for it after ``compress.cats`` (or ``models.load`` of what that saved), before ``generate``. It changes how the
model computes and nothing that is saved. Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large
Language Models" (2024).
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.models.model import Model
from downriver.models.surgery import gated_mlps
from downriver.nn.sparse_mlp import TOKENS, Kernel, kernel_for, sparse_gated_mlp
from downriver.nn.thresholded import CATSActivation

ACTIVATION = "downriver_activation"


def sparse_decoding(model: Model | nn.Module, on: bool = True) -> list[str]:
    """Switch it on or off, in place; the names of the blocks that skip neurons.

    Without gradients and for at most four tokens at once (decoding; longer inputs compute densely), W_up and W_down are
    read where some gate is not zero: by Triton on a GPU, by numba for float32 on a CPU (``downriver[fast]``), densely
    elsewhere. W_down is stored transposed for it, in the same memory. Blocks of experts, with biases, and with adapters
    on these projections stay as they are: merge adapters first.

    Raises ``InputError`` where no block has a threshold, or none of those that have can skip.

    >>> from downriver.models import small
    >>> from downriver.models.surgery import set_thresholds
    >>> lm = small("causal-lm", "nano")
    >>> set_thresholds(lm.backbone, [0.1, 0.1])
    >>> sparse_decoding(lm)
    ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    backbone = model.backbone if isinstance(model, Model) else model
    found: list[tuple[str, Any, str]] = [
        (name, block, attribute)
        for name, block, attribute in gated_mlps(backbone)
        if isinstance(getattr(block, attribute), CATSActivation)
    ]
    if not found:
        raise InputError(f"a {type(backbone).__name__} without thresholds: what compress.cats gives is expected")
    changed = [(name, block, attribute) for name, block, attribute in found if _plain(block)]
    if not changed:
        name, block, _ = found[0]
        raise InputError(f"block {name!r} ({type(block).__name__}): plain projections without biases are expected")
    for _, block, attribute in changed:
        weight = block.down_proj.weight
        kind: Any = type(block)
        if on and not issubclass(kind, _Skipping):
            block.__class__ = _skipping(kind)
            setattr(block, ACTIVATION, attribute)
            weight.data = weight.data.T.contiguous().T
        elif not on and issubclass(kind, _Skipping):
            block.__class__ = kind.__mro__[2]
            delattr(block, ACTIVATION)
            weight.data = weight.data.contiguous()
    return [name for name, _, _ in changed] if on else []


class _Skipping(nn.Module):
    """What comes before a block's own class."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        down_t: Tensor = self.down_proj.weight.T  # type: ignore[union-attr,assignment]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        kernel = self._kernel(x, down_t)
        if kernel is None:
            return super().forward(hidden_states, *arguments, **named)
        block: Any = self
        activation = getattr(block, getattr(block, ACTIVATION))
        if hasattr(block, "gate_up_proj"):
            gate, up = block.gate_up_proj.weight.chunk(2)
            a = activation(x @ gate.T)
        else:
            a, up = activation(block.gate_proj(x)), block.up_proj.weight
        return sparse_gated_mlp(x, a, up, down_t, kernel).view_as(hidden_states)

    def _kernel(self, x: Tensor, down_t: Tensor) -> Kernel | None:
        if self.training or torch.is_grad_enabled() or len(x) > TOKENS or not down_t.is_contiguous():
            return None
        return kernel_for(down_t) if x.dtype == down_t.dtype else None


@functools.cache
def _skipping(kind: type) -> type:
    return type(kind.__name__, (_Skipping, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _plain(block: nn.Module) -> bool:
    """Whether the projections that are to be skipped are plain linear layers without biases."""
    names = ("gate_up_proj", "down_proj") if hasattr(block, "gate_up_proj") else ("up_proj", "down_proj")
    parts = [getattr(block, name) for name in names]
    return all(type(part) is nn.Linear and part.bias is None for part in parts)
