"""``downriver data select``: from scores to shards, with copies left out and an audit."""

import json

import polars as pl
import pytest
from typer.testing import CliRunner

from downriver.cli.data import app
from downriver.core.errors import InputError
from downriver.data.documents import read_documents, write_documents
from downriver.data.score import RuleScorer, ScoreTable


def test_from_scores_to_shards(tmp_path):
    texts = [" ".join(f"word{i * j % 97}" for j in range(1, 20 + i)) for i in range(1, 41)]
    rows = [{"id": f"d{i:02d}", "text": text} for i, text in enumerate([*texts, texts[39]])]
    write_documents(tmp_path / "in", rows, like="jsonl", shard_rows=15)
    ScoreTable(tmp_path / "table").add(
        "rules", RuleScorer.redpajama(), tmp_path / "in", executor="serial", progress=False
    )
    asked = [str(tmp_path / "in"), "-t", str(tmp_path / "table"), "--by", "rules_word_count", "-k", "5", "--dedup"]
    files = ["-o", str(tmp_path / "out"), "--audit", str(tmp_path / "audit.parquet"), "--json"]
    found = CliRunner().invoke(app, ["select", *asked, *files], catch_exceptions=False)
    said = json.loads(found.stdout)
    assert found.exit_code == 0 and said["documents"] == 41 and said["chosen"] == 5
    assert said["dropped"] == {"below the threshold": 35, "duplicate": 1}
    assert [d["id"] for d in read_documents(tmp_path / "out")] == ["d35", "d36", "d37", "d38", "d39"]
    audit = pl.read_parquet(tmp_path / "audit.parquet")
    assert audit.filter(id="d40")["reason"].item() == "duplicate of d39"
    with pytest.raises(InputError, match=r"unknown column of .* 'sparkle'"):
        CliRunner().invoke(
            app,
            ["select", str(tmp_path / "in"), "-t", str(tmp_path / "table"), "--by", "sparkle", "-k", "5", *files],
            catch_exceptions=False,
        )


def test_quotas_by_group(tmp_path):
    rows = [{"id": f"d{i:02d}", "text": " ".join(["word"] * (i + 1))} for i in range(30)]
    write_documents(tmp_path / "in", rows, like="jsonl", shard_rows=10)
    table = ScoreTable(tmp_path / "table")
    table.add("rules", RuleScorer.redpajama(), tmp_path / "in", executor="serial", progress=False)
    first, second, _ = sorted(set(table.frame(["rules_word_count"]).collect()["shard"]))
    asked = ["select", str(tmp_path / "in"), "-t", str(tmp_path / "table"), "--by", "rules_word_count", "--json"]
    quotas = ["--per-group", "shard", "--quota", f"{first}=2", "--quota", f"{second}=1"]
    found = CliRunner().invoke(app, [*asked, *quotas, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert json.loads(found.stdout)["chosen"] == 3
    assert [d["id"] for d in read_documents(tmp_path / "out")] == ["d08", "d09", "d19"]
    with pytest.raises(InputError, match="--quota 'x': GROUP=N"):
        CliRunner().invoke(app, [*asked, "--quota", "x", "-o", str(tmp_path / "o")], catch_exceptions=False)
