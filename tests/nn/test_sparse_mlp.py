"""Sparse products equal the dense one and read exactly the rows that are used."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from downriver.nn.sparse_mlp import kernel_for, sparse_gated_mlp

SHAPES = [(1, 300, 70), (4, 256, 160), (3, 40, 33)]


def case(tokens, width, neurons, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, a = torch.randn(tokens, width, generator=rng), torch.randn(tokens, neurons, generator=rng)
    up, down_t = (torch.randn(neurons, width, generator=rng) / width**0.5 for _ in range(2))
    return x, torch.where(a.abs() > 1, a, 0.0), up, down_t


def poisoned(a, weight):
    """Rows that no token uses hold NaN: one that is read is seen in the result."""
    return torch.where((a == 0).all(0)[:, None], torch.nan, weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_numba_equals_the_dense_product_and_reads_used_rows_only(shape, threads):
    pytest.importorskip("numba", reason="the extra fast is not installed")
    x, a, up, down_t = case(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert kernel_for(up) == "numba"
        found = sparse_gated_mlp(x, a, poisoned(a, up), poisoned(a, down_t), "numba")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, sparse_gated_mlp(x, a, up, down_t), rtol=1e-5, atol=1e-5)
    assert poisoned(a, up).isnan().any()
    assert not sparse_gated_mlp(x, torch.zeros_like(a), poisoned(a, up) * torch.nan, down_t, "numba").any()


TRITON = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from test_sparse_mlp import SHAPES, case, poisoned
    from downriver.nn.sparse_mlp import sparse_gated_mlp
    for shape, dtype, near in ((SHAPES[2], torch.float32, 1e-5), ((2, 260, 20), torch.bfloat16, 2e-2)):
        x, a, up, down_t = (tensor.to(dtype) for tensor in case(*shape))
        found = sparse_gated_mlp(x, a, poisoned(a, up), poisoned(a, down_t), "triton")
        expected = sparse_gated_mlp(x.float(), a.float(), up.float(), down_t.float())
        assert found.dtype == dtype and found.shape == x.shape
        torch.testing.assert_close(found.float(), expected, rtol=near, atol=near)
    print("equal")
"""


def test_triton_equals_the_dense_product_and_reads_used_rows_only():
    """In Triton's interpreter, which runs the kernels' own code without a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    folder = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", dedent(TRITON), folder],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_triton_on_a_gpu():
    pytest.importorskip("triton", reason="triton is not installed")
    for shape in SHAPES:
        x, a, up, down_t = (tensor.cuda() for tensor in case(*shape))
        assert kernel_for(up) == "triton"
        found = sparse_gated_mlp(x, a, poisoned(a, up), poisoned(a, down_t), "triton")
        torch.testing.assert_close(found, sparse_gated_mlp(x, a, up, down_t), rtol=1e-4, atol=1e-4)


def test_other_types_compute_densely():
    assert kernel_for(torch.zeros(2, dtype=torch.float16)) is None
    assert kernel_for(torch.zeros(2, dtype=torch.float64)) is None
