"""Patches on checkpoints: blocks, tied tensors, what loads afterwards, and what is refused."""

import pytest
import torch

from downriver.core.errors import InputError
from downriver.merge import open_store, patch_checkpoint
from downriver.models import load, small
from downriver.nn.sparse_patch import SparseMask, SparsePatch


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("old", "new")):
        small("causal-lm", "nano", seed).save(tmp_path / name)
    return tmp_path


def states(folder):
    found = {}
    for which in ("old", "new"):
        store = open_store(folder / which)
        found[which] = {n: store.read(n, 0, store.tensors.read(n).numel()).view(store.shape(n)) for n in store.names()}
    return found["old"], found["new"]


def test_applied_and_taken_back_on_disk(folders):
    old, new = states(folders)
    mask = SparseMask.top({name: new[name] - old[name] for name in old if "layers" in name}, 300)
    patch = SparsePatch.between(old, new, mask, {"method": "test"})
    file = patch.save(folders / "patch.safetensors")
    patch_checkpoint(folders / "old", file, folders / "patched", shard_size=100_000)
    expected = patch.apply(old)
    found = open_store(folders / "patched")
    assert all(torch.equal(found.read(n, 0, v.numel()), v.flatten()) for n, v in expected.items())
    assert len(list((folders / "patched").glob("*.safetensors"))) > 1
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(load(folders / "patched").backbone(ids).logits, load(folders / "old").backbone(ids).logits)
    patch_checkpoint(folders / "patched", patch, folders / "back", revert=True)
    back = open_store(folders / "back")
    assert all(torch.equal(back.read(n, 0, v.numel()), v.flatten()) for n, v in old.items())


def test_tied_tensors_are_changed_together(tmp_path):
    shared = torch.randn(6, 4)
    old = {"embed_tokens.weight": shared, "lm_head.weight": shared, "w": torch.randn(3)}
    new = {name: value + 1 for name, value in old.items()}
    patch = SparsePatch.between(old, new, SparseMask({"lm_head.weight": torch.tensor([5])}, 27))
    found = open_store(patch_checkpoint(old, patch, tmp_path / "out"))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert found.read(name, 5, 6) == new["lm_head.weight"].flatten()[5]


def test_what_is_refused_leaves_nothing(folders):
    old, new = states(folders)
    patch = SparsePatch.between(old, new, SparseMask.top({n: new[n] - old[n] for n in new}, 10))
    with pytest.raises(InputError, match="has not the values that it had before the patch"):
        patch_checkpoint(folders / "new", patch, folders / "out")
    with pytest.raises(InputError, match="lacks"):
        patch_checkpoint({"w": torch.zeros(2)}, patch, folders / "out")
    assert not (folders / "out").exists() and not list(folders.glob(".out*"))
