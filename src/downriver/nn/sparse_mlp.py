"""The sparse half of a gated feed-forward block for a few tokens: neurons whose gate is zero are never read.

    y = Σ_{i: a_i ≠ 0} a_i ⟨W_up[i], x⟩ W_down[:, i]

Reach for ``models.sparse_decoding`` to put it into a model. Lee et al., "CATS: Contextually-Aware Thresholding for
Sparsity in Large Language Models" (2024), section on the kernel.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from downriver.core.compiled import compiled

Kernel = Literal["triton", "numba"]
TOKENS = 4
"""At most so many at once: the neurons that any of them needs soon are nearly all."""


def kernel_for(like: Tensor) -> Kernel | None:
    """What can compute it for weights of this device and type: Triton on a GPU, numba for float32 on a CPU.

    >>> kernel_for(torch.zeros(1, dtype=torch.bfloat16)) is None
    True
    """
    if like.is_cuda:
        return "triton" if _triton() else None
    numba = like.device.type == "cpu" and like.dtype == torch.float32 and compiled("downriver.nn.sparse_mlp_numba")
    return "numba" if numba else None


def sparse_gated_mlp(x: Tensor, a: Tensor, up: Tensor, down_t: Tensor, kernel: Kernel | None = None) -> Tensor:
    """y (tokens, d) from inputs (tokens, d), gates a (tokens, m), W_up (m, d) and W_down transposed (m, d), contiguous.

    ``kernel`` None computes densely, on any device and with gradients.

    >>> x, a, up, down_t = torch.randn(2, 6), torch.randn(2, 8).clamp(min=0), torch.randn(8, 6), torch.randn(8, 6)
    >>> torch.allclose(sparse_gated_mlp(x, a, up, down_t), (a * (x @ up.T)) @ down_t, atol=1e-5)
    True
    """
    if kernel == "triton":
        from downriver.nn.sparse_mlp_triton import gated_mlp

        return gated_mlp(x, a, up, down_t)
    if kernel == "numba":
        from downriver.nn.sparse_mlp_numba import gated_mlp as on_cpu

        return on_cpu(x, a, up, down_t)
    return (a * F.linear(x, up)) @ down_t


def _triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
