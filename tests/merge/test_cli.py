"""``downriver merge`` from a file to a folder that loads."""

import json
from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from downriver.cli import merge as command
from downriver.core.errors import InputError
from downriver.merge import ties

outer = typer.Typer()
outer.add_typer(command.app, name="merge")
outer.command("other")(lambda: None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for i, model in enumerate(("base", "a", "b")):
        (tmp_path / model).mkdir()
        torch.manual_seed(i)
        save_file({"w": torch.randn(50, 30), "b": torch.randn(30)}, tmp_path / model / "model.safetensors")
    file = tmp_path / "run.yaml"
    models = [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}]
    file.write_text(yaml.safe_dump({"merge_method": "ties", "base_model": "base", "models": models}))
    return file


@pytest.mark.parametrize("word", [[], ["run"]])
def test_merge(config: Path, word: list[str]) -> None:
    out = config.parent / "out"
    found = CliRunner().invoke(outer, ["merge", *word, str(config), str(out), "--max-memory", "2MiB"])
    assert found.exit_code == 0, found.output
    assert "ties: 2 tensors merged" in found.output
    base, a, b = (load_file(config.parent / m / "model.safetensors") for m in ("base", "a", "b"))
    expected, merged = ties([a, b], base, density=[0.5, 0.2]), load_file(out / "model.safetensors")
    assert all(torch.equal(merged[n], expected[n]) for n in expected)


def test_inspect_writes_nothing(config: Path) -> None:
    before = sorted(config.parent.iterdir())
    found = CliRunner().invoke(outer, ["merge", "inspect", str(config), "--json"])
    assert found.exit_code == 0, found.output
    total = json.loads(found.output)[-1]
    assert total["elements"] == 1530 and total["kept_0"] == pytest.approx(0.5, abs=1e-2)
    assert sorted(config.parent.iterdir()) == before


def test_json_and_overwrite(config: Path) -> None:
    arguments = ["merge", str(config), str(config.parent / "out"), "--json", "--shard-size", "4kB"]
    assert json.loads(CliRunner().invoke(outer, arguments).output)["tensors"][0]["elements"] in (30, 1500)
    again = CliRunner().invoke(outer, arguments)
    assert isinstance(again.exception, InputError) and "exists already" in str(again.exception)
    assert CliRunner().invoke(outer, [*arguments, "--overwrite"]).exit_code == 0


def test_help_names_both_commands() -> None:
    found = CliRunner().invoke(outer, ["merge", "--help"])
    assert found.exit_code == 0 and "inspect" in found.output and "run" in found.output


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 2**30), ("500 MB", 5 * 10**8), ("64", 64), ("1.5kib", 1536), ("2G", 2 * 10**9), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert command._size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1 XB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        command._size(text)
