"""``downriver advise``: public runs, files and ledgers of one's own, as text and as JSON, bad input."""

import json
import sys
from pathlib import Path

import pytest

from downriver.cli import main
from downriver.core import Measurement
from downriver.study.ledger import Ledger


@pytest.fixture
def downriver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in an empty folder: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["downriver", "advise", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), *capsys.readouterr()

    return run


def write(folder: Path, name: str, score: float, memory: float, forgetting: float | None = None) -> None:
    """A run in the form of peft's files."""
    folder.mkdir(exist_ok=True)
    info = {"peft_config": {"peft_type": "LORA"}, "total_time": 5.0, "train_config": {"model_id": "m"}}
    train = {"status": "success", "num_trainable_params": 10, "accelerator_memory_max": memory, "file_size": 100}
    train["metrics"] = [{"test accuracy": score, "forgetting": forgetting}]
    (folder / f"{name}.json").write_text(json.dumps({"run_info": info, "train_info": train}))


def test_public_runs(downriver, shared_data) -> None:
    folder = str(shared_data("peft_method_comparison"))
    code, out, _ = downriver(
        folder, "--benchmark", "Llama-3.2-3B", "--max-memory", "24GB", "--for", "forgetting", "--merge"
    )
    assert code == 0
    first, *rest = out.splitlines()
    assert first.startswith("MetaMathQA, meta-llama/Llama-3.2-3B: ") and "score and forgetting" in first
    assert len(rest) > 2 and "the highest score" in rest[0] and "lily" not in out  # which does not merge


def test_files_of_ones_own(downriver, tmp_path: Path) -> None:
    write(tmp_path / "files", "small", 0.5, 2e9)
    write(tmp_path / "files", "big", 0.6, 5e9)
    write(tmp_path / "files", "poor", 0.4, 5e9)
    code, out, _ = downriver("files")
    assert code == 0 and out.splitlines()[0].startswith("files, m: 2 runs that no other beats")
    assert "big (lora): the highest score (0.6)" in out and "poor" not in out
    code, out, _ = downriver("files", "--max-memory", "3GB", "--json")
    said = json.loads(out)
    assert [row["run"] for row in said["chosen"]] == ["small"] and len(said["left_out"]) == 2
    assert said["chosen"][0]["forgetting"] is None
    code, _, errors = downriver()
    assert code == 2 and "nothing to compare" in errors


def test_a_ledger_of_ones_own(downriver, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs")
    for arm, score, lost in (("lora", 0.8, 0.2), ("full", 0.7, 0.5)):
        rows = [
            Measurement("accuracy", score, "t", study="mine", arm=arm),
            Measurement("retained loss", lost, "t", study="mine", arm=arm, direction="lower"),
        ]
        ledger.write("mine", arm, rows)
    given = ("--ledger", "runs", "--metric", "accuracy", "--forgetting", "retained loss", "--for", "forgetting")
    code, out, _ = downriver(*given)
    assert code == 0 and out.splitlines() == [
        "mine, t: 1 runs that no other beats on score and forgetting",
        "  lora (lora): the highest score (0.8); the lowest forgetting (0.2)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no JSON files"),
        (["--ledger", "runs"], "--metric names the one that is the score"),
        (["files", "--max-memory", "lots"], "size 'lots'"),
        (["files", "--for", "speed"], "unknown objective 'speed'"),
        (["files", "--benchmark", "GPT-9"], "unknown benchmark 'GPT-9'"),
    ],
)
def test_bad_input_is_one_line(downriver, tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path / "files", "small", 0.5, 2e9)
    code, out, err = downriver(*arguments)
    assert code == 2 and not out and message in err and err.strip().count("\n") == 0
