import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downriver.core.compiled import WORTHWHILE
from downriver.core.errors import InputError
from downriver.merge import kth_magnitude, quantile
from downriver.nn.select import THREE_PASSES, TWO_PASSES, RadixSelect

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 1.0, -1.0, 3.4028235e38, math.inf, -math.inf]
NUMBERS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False))


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(NUMBERS, min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    digits=st.sampled_from([TWO_PASSES, THREE_PASSES]),
    data=st.data(),
)
def test_every_rank_is_bit_for_bit_that_of_kthvalue_however_chunked(values, cuts, digits, data):
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    bounds = sorted({min(c, len(x)) for c in cuts} | {0, len(x)})
    chunks = [x[a:b] for a, b in itertools.pairwise(bounds)]
    expected = torch.kthvalue(x.abs(), k).values.item()
    assert bits(kth_magnitude(chunks, k, digits)) == bits(expected)
    assert bits(kth_magnitude(lambda: iter(chunks), k, digits)) == bits(expected)


@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e37])
@pytest.mark.parametrize("digits", [TWO_PASSES, THREE_PASSES])
def test_a_large_tensor_with_many_equal_values(scale, digits):
    x = torch.randn(200_001, generator=torch.Generator().manual_seed(0)).mul(50).round().mul(scale)
    for k in (1, 2, 100_000, 160_001, 200_000, 200_001):
        assert kth_magnitude(x.split(7_777), k, digits) == torch.kthvalue(x.abs(), k).values.item()


def test_the_chunks_may_have_any_shape_and_layout():
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    assert kth_magnitude([x.T, x[:, ::2]], 777) == torch.cat([x.flatten(), x[:, ::2].flatten()]).abs().kthvalue(777)[0]


def test_infinity_is_the_largest_magnitude():
    x = torch.tensor([-math.inf, 1.0, -2.0])
    assert [kth_magnitude(x, k) for k in (1, 2, 3)] == [1.0, 2.0, math.inf]


def test_counting_changes_nothing_and_counts_of_parts_add_up():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    select = RadixSelect(500)
    whole = select.counts(x)
    assert torch.equal(whole, select.counts(x))
    assert torch.equal(whole, select.counts(x[:300]) + select.counts(x[300:]))
    assert select.passes_left == 2 and whole.sum() == 1000


@settings(max_examples=60, deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=40), p=st.floats(0, 1))
def test_quantile_is_the_least_magnitude_that_covers_the_share(values, p):
    found = quantile(torch.tensor(values, dtype=torch.float32), p)
    sizes = np.sort(np.abs(np.array(values, dtype=np.float32)))
    assert found == sizes[max(1, math.ceil(p * len(sizes))) - 1]


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_rank_that_does_not_exist_is_refused(k):
    with pytest.raises(InputError, match=f"rank {k} of 3 values"):
        kth_magnitude(torch.ones(3), k)


def test_other_types_no_values_and_shares_beyond_one_are_refused():
    with pytest.raises(InputError, match="float64"):
        kth_magnitude(torch.ones(3, dtype=torch.float64), 1)
    with pytest.raises(InputError, match="no values"):
        kth_magnitude([], 1)
    with pytest.raises(InputError, match="rank 1 of 0"):
        kth_magnitude(torch.ones(0), 1)
    with pytest.raises(InputError, match=r"1\.5.*share"):
        quantile(torch.ones(3), 1.5)


@pytest.mark.parametrize("digits", [TWO_PASSES, THREE_PASSES])
def test_compiled_counts_are_those_of_tensor_operations(digits, monkeypatch):
    pytest.importorskip("numba", reason="the extra fast is not installed")
    x = torch.randn(WORTHWHILE + 3, generator=torch.Generator().manual_seed(3)) * 1e-3
    x[:8] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan, 1.0])
    select = RadixSelect(len(x) // 3, digits)
    while select.passes_left:
        fast = select.counts(x)
        with monkeypatch.context() as patch:
            patch.setattr("downriver.nn.select.compiled", lambda module: None)
            assert torch.equal(fast, select.counts(x))
        select.narrow(fast)
    assert bits(select.value) == bits(x[~x.isnan()].abs().sort().values[len(x) // 3 - 1].item())
