"""The sparse half of a gated feed-forward block on a GPU: masked loads leave out the rows whose gate is 0.

Two launches: products of W_up with the token, row by row, times the gate; then the sum of W_down's rows, in ``SPLIT``
parts that are added up afterwards, so that equal inputs give equal outputs. Sums are in float32. Blocks are not tuned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, SPLIT = 16, 256, 16


def gated_mlp(x: Tensor, a: Tensor, up: Tensor, down_t: Tensor) -> Tensor:
    """As ``sparse_gated_mlp``."""
    (tokens, width), neurons = x.shape, len(up)
    x, a, up, down_t = (tensor.contiguous() for tensor in (x, a, up, down_t))
    v = torch.empty(tokens, neurons, device=x.device, dtype=torch.float32)
    _up[(triton.cdiv(neurons, ROWS), tokens)](x, a, up, v, neurons, width, R=ROWS, C=COLUMNS)
    parts = torch.empty(SPLIT, tokens, width, device=x.device, dtype=torch.float32)
    share = triton.cdiv(neurons, SPLIT)
    _down[(triton.cdiv(width, COLUMNS), tokens, SPLIT)](
        a, v, down_t, parts, neurons, width, share, triton.cdiv(share, ROWS), R=ROWS, C=COLUMNS
    )
    return parts.sum(0).to(x.dtype)


@triton.jit
def _up(x, a, weight, v, neurons, width, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """v[token, i] = a_i ⟨W_up[i], x⟩ for R neurons of one token."""
    token = tl.program_id(1)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    gate = tl.load(a + token * neurons + rows, mask=rows < neurons, other=0.0).to(tl.float32)
    used = gate != 0
    total = tl.zeros((R,), tl.float32)
    for start in range(0, width, C):
        columns = start + tl.arange(0, C)
        inside = columns < width
        values = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        block = tl.load(weight + at, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(block * values[None, :], axis=1)
    tl.store(v + token * neurons + rows, gate * total, mask=rows < neurons)


@triton.jit
def _down(a, v, weight, parts, neurons, width, share, steps, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """One part of Σ v[token, i] W_down[:, i] for C outputs of one token."""
    token, part = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * C + tl.arange(0, C)
    inside = columns < width
    total = tl.zeros((C,), tl.float32)
    for step in range(0, steps):
        rows = part * share + step * R + tl.arange(0, R)
        mine = (rows < (part + 1) * share) & (rows < neurons)
        used = mine & (tl.load(a + token * neurons + rows, mask=mine, other=0.0) != 0)
        factor = tl.load(v + token * neurons + rows, mask=used, other=0.0)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        block = tl.load(weight + at, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(block * factor[:, None], axis=0)
    tokens = tl.num_programs(1)
    tl.store(parts + (part * tokens + token) * width + columns, total, mask=inside)
