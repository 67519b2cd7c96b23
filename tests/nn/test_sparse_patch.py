import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from downriver.core.errors import InputError
from downriver.nn.sparse_patch import SparseMask, SparsePatch


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(9, 7, generator=g).to(dtype), "b": torch.randn(13, generator=g).to(dtype)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 76), st.integers(0, 1000), st.booleans())
def test_top_is_that_of_one_long_vector(k, seed, coarse):
    values = state(seed)
    if coarse:  # many equal magnitudes
        values = {name: value.round() for name, value in values.items()}
    mask = SparseMask.top(values, k)
    flat = torch.cat([value.flatten() for value in values.values()]).abs()
    found = torch.cat([mask.dense(name, value.shape).flatten() for name, value in values.items()])
    assert mask.count == int(found.sum()) == k
    assert torch.equal(flat[found].sort().values, flat.topk(k).values.sort().values)


def test_sets():
    dense = {name: value > 0 for name, value in state(0).items()}
    mask, rest = SparseMask.of(dense), SparseMask.of({name: ~value for name, value in dense.items()})
    assert mask.union(rest).count == mask.total == 76 and mask.intersection(rest).count == 0
    assert mask.overlap(mask).of_first == 1 and mask.overlap(rest).of_second == 0
    other = SparseMask.of({name: value > 0 for name, value in state(1).items()})
    both = sum(int((dense[n] & (v > 0)).sum()) for n, v in state(1).items())
    found = mask.overlap(other)
    assert found.of_first == both / mask.count and found.of_second == both / other.count
    assert found.chance_of_first == other.count / 76
    with pytest.raises(InputError, match="76 and 5 entries"):
        mask.union(SparseMask({}, 5))


@pytest.mark.parametrize("share", [0.3, 0.001])
def test_a_saved_mask_is_the_same_and_small(tmp_path, share):
    g = torch.Generator().manual_seed(0)
    dense = {"a": torch.rand(300, 70, generator=g) < share, "b": torch.rand(5000, generator=g) < share}
    mask = SparseMask.of(dense, total=10**6)
    loaded = SparseMask.load(mask.save(tmp_path / "mask.safetensors"))
    assert loaded.total == 10**6 and set(loaded.indices) == set(mask.indices)
    for name, places in mask.indices.items():
        assert torch.equal(loaded.indices[name], places) and loaded.indices[name].dtype == torch.int64
    assert (tmp_path / "mask.safetensors").stat().st_size < 26000 / 8 + 600  # a bit an entry at most
    with pytest.raises(InputError, match="is no mask"):
        old = state(0)
        SparseMask.load(SparsePatch.between(old, state(1), SparseMask.top(old, 5)).save(tmp_path / "p.safetensors"))
    (tmp_path / "x").write_text("mask")
    with pytest.raises(InputError, match="cannot be read as a mask"):
        SparseMask.load(tmp_path / "x")


def test_independent_masks_overlap_by_chance():
    first, second = (
        SparseMask.of({"w": torch.rand(300, 300, generator=torch.Generator().manual_seed(seed)) < share})
        for seed, share in ((0, 0.2), (1, 0.1))
    )
    found = first.overlap(second)
    assert abs(found.of_first - found.chance_of_first) < 3 * (0.1 * 0.9 / first.count) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_loaded_applied_and_taken_back(tmp_path, dtype):
    old, new = state(0, dtype), state(1, dtype)
    old["a"][0, 0] = -0.0
    mask = SparseMask.top({name: (new[name] - old[name]).float() for name in old}, 20)
    patch = SparsePatch.between(old, new, mask, {"method": "test", "rate": 0.1})
    loaded = SparsePatch.load(patch.save(tmp_path / "p.safetensors"))
    assert loaded.about == {"method": "test", "rate": 0.1} and loaded.mask.total == 76
    changed = loaded.apply(old)
    for name in old:
        where = mask.dense(name, old[name].shape)
        assert torch.equal(changed[name], torch.where(where, new[name], old[name]))
        assert torch.equal(loaded.revert(changed)[name].view(torch.uint8), old[name].view(torch.uint8))
    assert (tmp_path / "p.safetensors").stat().st_size < 2000
    with pytest.raises(InputError, match="has not the values that it had before"):
        loaded.apply(changed)
    with pytest.raises(InputError, match="has not the values that it had after"):
        loaded.revert(old)


def test_what_is_refused(tmp_path):
    old, new = state(0), state(1)
    patch = SparsePatch.between(old, new, SparseMask.top(new, 5))
    with pytest.raises(InputError, match="tensor 'a' is missing"):
        patch.apply({"b": old["b"]})
    with pytest.raises(InputError, match=r"shape \(9, 7\) is expected"):
        patch.apply(old | {"a": old["a"].T})
    with pytest.raises(InputError, match="k is 0 of 76"):
        SparseMask.top(old, 0)
    save_file(old, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights\.safetensors is no patch"):
        SparsePatch.load(tmp_path / "weights.safetensors")
    (tmp_path / "torn").write_bytes((patch.save(tmp_path / "whole")).read_bytes()[:100])
    with pytest.raises(InputError, match="torn cannot be read"):
        SparsePatch.load(tmp_path / "torn")
    with pytest.raises(InputError, match="none cannot be read"):
        SparsePatch.load(tmp_path / "none")
