"""``downriver merge patch``: apply, show and revert a patch of a checkpoint folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from downriver.cli.merge import app
from downriver.core.errors import InputError
from downriver.nn.sparse_patch import SparseMask, SparsePatch


def test_apply_show_revert(tmp_path):
    old, new = {"w": torch.zeros(4, 4), "v": torch.ones(3)}, {"w": torch.eye(4), "v": torch.ones(3)}
    (tmp_path / "model").mkdir()
    save_file(old, tmp_path / "model" / "model.safetensors")
    patch = SparsePatch.between(old, new, SparseMask.top({"w": new["w"]}, 4, total=19), {"method": "test"})
    file = str(patch.save(tmp_path / "patch.safetensors"))

    def run(*arguments: str) -> str:
        found = CliRunner().invoke(app, ["patch", *arguments], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.stdout

    run("apply", str(tmp_path / "model"), file, str(tmp_path / "patched"))
    assert torch.equal(load_file(tmp_path / "patched" / "model.safetensors")["w"], new["w"])
    said = json.loads(run("show", file, "--json"))
    assert said == {"about": {"method": "test"}, "entries": {"w": 4}, "count": 4, "share": 4 / 19}
    assert "of 19 entries (21.0526%)" in run("show", file)
    run("revert", str(tmp_path / "patched"), file, str(tmp_path / "back"))
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["w"], old["w"])
    with pytest.raises(InputError, match="before the patch"):
        run("apply", str(tmp_path / "patched"), file, str(tmp_path / "twice"))
    assert not (tmp_path / "twice").exists()
