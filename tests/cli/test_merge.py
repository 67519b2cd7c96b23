"""``downriver merge`` on real checkpoints: from a YAML file to a folder that transformers loads."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel

from downriver import models
from downriver.cli import main
from downriver.merge import ties


@pytest.fixture
def downriver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in an empty folder: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["downriver", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two perturbed copies of it, and a file that merges them."""
    found = tmp_path_factory.mktemp("merge")
    models.small("text-encoder", "nano").save(found / "base")
    for seed, name in enumerate(("a", "b")):
        model = models.small("text-encoder", "nano")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
        model.save(found / name)
    entries = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b"}]
    config = {"merge_method": "ties", "base_model": "base", "models": entries, "parameters": {"density": 0.3}}
    (found / "run.yaml").write_text(yaml.safe_dump(config))
    return found


def test_the_merged_folder_loads_and_is_the_merge_in_memory(folder: Path, tmp_path: Path, downriver) -> None:
    code, out, err = downriver(
        "merge", str(folder / "run.yaml"), "out", "--max-memory", "16MiB", "--shard-size", "50kB"
    )
    assert code == 0, err
    assert "distance from the base" in out and "ties: " in out and "MB read" in out
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    base, a, b = (
        AutoModel.from_pretrained(folder / m, add_pooling_layer=False).state_dict() for m in ("base", "a", "b")
    )
    expected = ties([a, b], base, density=0.3, weights=[0.5, 1.0])
    merged = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[n], expected[n]) for n in expected)
    assert any(not torch.equal(merged[n], base[n]) for n in base)


def test_the_word_run_may_be_said(folder: Path, tmp_path: Path, downriver) -> None:
    code, _, err = downriver("merge", "run", str(folder / "run.yaml"), "out")
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_json_and_overwrite(folder: Path, tmp_path: Path, downriver) -> None:
    arguments = ["merge", str(folder / "run.yaml"), "out", "--json"]
    code, out, err = downriver(*arguments)
    assert code == 0, err
    assert sum(tensor["elements"] for tensor in json.loads(out)["tensors"]) > 10_000
    assert downriver(*arguments)[0] == 2
    assert downriver(*arguments, "--overwrite")[0] == 0


def test_inspect_tells_the_conflicts(folder: Path, tmp_path: Path, downriver) -> None:
    code, out, err = downriver("merge", "inspect", str(folder / "run.yaml"))
    assert code == 0, err
    assert "density (0.3, 0.3) over the whole model" in out and "opposite signs" in out
    total = json.loads(downriver("merge", "inspect", str(folder / "run.yaml"), "--json")[1])[-1]
    assert total["elements"] > 10_000 and total["kept_0"] == pytest.approx(0.3, abs=1e-2)
    assert list(tmp_path.iterdir()) == []


def test_help_names_both_commands(downriver) -> None:
    code, out, _ = downriver("merge", "--help")
    assert code == 0 and "inspect" in out and "run" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "taken"], "taken exists already"),
        (["RUN", "out", "--max-memory", "lots"], "size 'lots'"),
        (["RUN", "out", "--max-memory", "10B"], "too small"),
        (["RUN", "out", "--shard-size", "0"], "size '0'"),
        (["RUN", "out", "--device", "cudda"], "device 'cudda'"),
        (["none.yaml", "out"], "none.yaml"),
        (["inspect", "none.yaml"], "none.yaml"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, downriver, arguments: list[str], message: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("kept")
    code, _, err = downriver("merge", *(str(folder / "run.yaml") if a == "RUN" else a for a in arguments))
    assert code == 2
    assert message in err and err.strip().count("\n") == 0
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "mine.txt"]
