"""``downriver data score``: tables filled bit by bit, broken records and the exit code, bad input."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from downriver.cli import app
from downriver.core.errors import InputError
from downriver.data.documents import write_documents
from downriver.data.score import ScoreTable
from downriver.models import small

ROWS = [{"id": f"d{i}", "text": f"The river number {i} runs to the bad sea."} for i in range(6)]


def _run(*arguments: object):
    return CliRunner().invoke(app, ["data", "score", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_documents(tmp_path / "source", ROWS, like="jsonl", shard_rows=3)
    return tmp_path / "source"


def test_a_table_is_filled_bit_by_bit(tmp_path: Path, source: Path) -> None:
    small("causal-lm", "nano").save(tmp_path / "lm")
    (tmp_path / "words.txt").write_text("bad\nworse\n")
    write_documents(tmp_path / "target", ROWS[:1], like="jsonl")
    table = tmp_path / "table"
    first = _run(
        source, "-t", table, "-w", "redpajama", "-w", f"mean=lexicon:{tmp_path / 'words.txt'}", "--executor", "serial"
    )
    assert first.exit_code == 0, first.output
    assert "redpajama: 6 documents scored" in first.output and "columns mean" in first.output
    asked = ("-w", "redpajama", "-w", f"lm=loss:{tmp_path / 'lm'}", "-w", f"dsir:{tmp_path / 'target'}", "-w", "pii")
    second = _run(source, "-t", table, *asked, "--executor", "serial", "--json")
    assert second.exit_code == 0, second.output
    said = json.loads(second.stdout)
    assert [(s["name"], s["documents"], s["documents_kept"]) for s in said["scorers"]] == [
        ("redpajama", 0, 6),
        ("lm", 6, 0),
        ("dsir", 6, 0),
        ("pii", 6, 0),
    ]
    assert said["scorers"][1]["flops"] > 0 and said["quarantined"] == []
    frame = ScoreTable(table).frame(["mean", "lm", "dsir", "pii"]).collect()
    assert frame["id"].to_list() == [row["id"] for row in ROWS]
    assert frame["mean"].to_list() == [1 / 9] * 6 and frame["lm"].null_count() == 0
    assert frame["dsir"].arg_max() == 0


def test_broken_records_make_exit_code_one(tmp_path: Path, source: Path) -> None:
    with (source / "part-00001.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff"}\n{"id": "d0", "text": "again"}\n')
    found = _run(source, "-t", tmp_path / "table", "-w", "c4", "--executor", "serial")
    assert found.exit_code == 1 and "c4: 7 documents scored" in found.stdout
    assert "part-00001.jsonl, record 4: broken UTF-8" in found.stderr
    assert "id 'd0' was there before: part-00000.jsonl, record 1" in found.stderr
    assert "2 records set aside" in found.stderr
    assert len((tmp_path / "table" / "quarantine.jsonl").read_text().splitlines()) == 2
    again = _run(source, "-t", tmp_path / "table", "-w", "c4", "--json")
    assert again.exit_code == 1 and len(json.loads(again.stdout)["quarantined"]) == 2


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["-w", "gofer"], "unknown kind of scorer 'gofer': did you mean 'gopher'"),
        (["-w", "loss"], "--with loss: loss:ARGUMENT, with a model, is expected"),
        (["-w", "c4:x"], "--with c4:x: c4 alone, is expected"),
        (["-w", "c4", "-w", "c4"], "two scorers have the same name"),
        (["-w", "rubric:reasoning"], "needs the model that is asked: --judge"),
        (["-w", "lexicon:none.txt"], "none.txt is not there"),
        (["-w", "loss:nowhere/at-all/here"], "no folder nowhere/at-all/here"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, source: Path, asked: list[str], why: str) -> None:
    found = _run(source, "-t", tmp_path / "table", *asked)
    assert isinstance(found.exception, InputError) and why in str(found.exception)
    assert not (tmp_path / "table").exists()
