"""The compiled TIES against the tensor operations that it stands for."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from downriver.core.compiled import WORTHWHILE, compiled
from downriver.core.errors import InputError
from downriver.merge import Ties, merge, ties
from downriver.merge.method import Known

pytest.importorskip("numba", reason="the extra fast is not installed")
SIZE = WORTHWHILE + 1000  # no whole number of pieces


@pytest.fixture(scope="module")
def blocks():
    """A base and three models; some entries at the base, some that cancel, some that are equal."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(SIZE, generator=rng).mul(64).round().div(64)
    models = [base + torch.randn(SIZE, generator=rng).mul(8).round().div(64) for _ in range(3)]
    models[1][: SIZE // 4] = base[: SIZE // 4] - (models[0] - base)[: SIZE // 4]
    models[2][: SIZE // 8] = base[: SIZE // 8]
    return base, models


def both(method, base, models, known):
    """By the compiled loop and by tensor operations."""
    assert method._kernel(base, models) is not None
    fast = method.delta(base, models, known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ties, "_kernel", lambda *_: None)
        return fast, method.delta(base, models, known)


@pytest.mark.parametrize("cuts", [(0.1, 0.2, 0.05), (0.0, 0.0, 0.0), (math.inf, 0.125, 0.125)])
@pytest.mark.parametrize("majority", [1, -1, 0])
@pytest.mark.parametrize("settings", [{}, {"agg": "sum"}, {"majority_zero": "positive"}])
def test_bit_for_bit_what_tensor_operations_give(blocks, cuts, majority, settings):
    (delta, tally), (expected, counted) = both(Ties(**settings), *blocks, Known(cuts, majority=majority))
    assert delta.dtype == torch.float64
    assert torch.equal(delta, expected)
    assert delta.abs().sum() > 0
    for field in dataclasses.fields(tally):
        ours, theirs = (np.asarray(getattr(t, field.name)) for t in (tally, counted))
        if field.name == "squares":
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        else:
            assert (ours == theirs).all(), field.name
    assert counted.cancelled > 0 or cuts[0] == math.inf


def test_weights_agree_up_to_rounding(blocks):
    known = Known((0.1, 0.1, 0.1), majority=1)
    (delta, tally), (expected, counted) = both(Ties(weights=(0.3, 1.7, 0.0)), *blocks, known)
    torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-12)
    assert tally.agreeing == pytest.approx(counted.agreeing, rel=1e-3)


def test_other_settings_types_and_small_blocks_take_tensor_operations(blocks):
    base, models = blocks
    for method in (Ties(compat="mergekit"), Ties(elect="count"), Ties(agg="max"), Ties(last_gives_signs=True)):
        assert method._kernel(base, models) is None
    assert Ties()._kernel(base.double(), models) is None
    assert Ties()._kernel(base[:1000], [m[:1000] for m in models]) is None


def test_whole_merges_are_equal_with_and_without(blocks, tmp_path, monkeypatch):
    base, models = ({"w": blocks[0].view(4, -1)}, [{"w": m.view(4, -1)} for m in blocks[1]])
    fast = ties(models, base)["w"]
    monkeypatch.setattr(Ties, "_kernel", lambda *_: None)
    monkeypatch.setattr("downriver.nn.select.compiled", lambda module: None)
    assert torch.equal(fast, ties(models, base)["w"])
    assert not torch.equal(fast, base["w"])


def test_values_that_are_not_finite_are_refused_all_the_same(blocks, tmp_path):
    base, models = blocks
    broken = models[1].clone()
    broken[WORTHWHILE + 500] = math.nan
    with pytest.raises(InputError, match="'w' holds values that are not finite"):
        merge([{"w": models[0]}, {"w": broken}], {"w": base}, Ties(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_numba_there_is_none(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    assert compiled.__wrapped__("downriver.merge.ties_kernel") is None
