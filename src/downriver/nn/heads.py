"""Task heads: what stands between pooled features and logits."""

from torch import nn

from downriver.core.errors import InputError


def linear_head(width: int, outputs: int) -> nn.Linear:
    """A fresh linear head, ``width`` features to ``outputs`` logits, in torch's own initialisation (uniform ±1/√width).

    >>> linear_head(384, 20)
    Linear(in_features=384, out_features=20, bias=True)
    """
    if width < 1 or outputs < 1:
        raise InputError(f"a head from {width} features to {outputs} outputs: at least one of each is expected")
    return nn.Linear(width, outputs)
