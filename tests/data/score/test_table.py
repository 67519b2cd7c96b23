"""The table: same bytes from every executor, nothing scored twice, changes noticed, broken and double records named."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import cloudpickle
import datasets
import numpy as np
import polars as pl
import pytest

from downriver.core.cost import charge, metered
from downriver.core.errors import DownriverError, InputError
from downriver.data.documents import content_hash, write_documents
from downriver.data.score import RuleScorer, Scorer, ScoreTable

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


class Length:
    """Characters and words of a text, and how many documents it was asked about."""

    name, columns = "length", ("characters", "words")

    def __init__(self, fingerprint: str = "1") -> None:
        self.fingerprint = fingerprint
        self.asked: list[str] = []

    def score(self, batch: Sequence) -> np.ndarray:
        self.asked += [document["id"] for document in batch]
        charge(flops=10.0 * len(batch))
        return np.array([[len(d["text"]), len(d["text"].split())] for d in batch])


def _rows(n: int, start: int = 0) -> list[dict]:
    return [{"id": f"d{i}", "text": f"text number {i} " * (1 + i % 4), "metadata": {}} for i in range(start, start + n)]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "parts").rglob("*.parquet"))}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_documents(tmp_path / "source", _rows(50), like="jsonl", shard_rows=10)
    return tmp_path / "source"


def test_scores_come_back_in_the_order_of_the_documents(tmp_path: Path, source: Path) -> None:
    assert isinstance(Length(), Scorer) and isinstance(RuleScorer.c4(), Scorer)
    table = ScoreTable(tmp_path / "table")
    with metered() as meter:
        added = table.add("size", Length(), source, executor="serial")
    assert (added.parts, added.parts_kept, added.documents, added.documents_kept) == (5, 0, 50, 0)
    assert added.cost.flops == meter.cost.flops == 500.0 and added.quarantined == ()
    table.add("words", RuleScorer.redpajama(), source, executor="serial")
    assert table.columns[:3] == ["size_characters", "size_words", "words_word_count"]
    frame = table.frame(["words_word_count", "size_words"]).collect()
    assert frame.columns == ["id", "hash", "shard", "row", "words_word_count", "size_words"]
    assert frame["id"].to_list() == [f"d{i}" for i in range(50)]
    assert frame["shard"].to_list() == [f"part-{i // 10:05d}.jsonl" for i in range(50)]
    assert frame["row"].to_list() == [i % 10 for i in range(50)]
    assert frame["hash"][7] == content_hash("text number 7 " * 4)
    assert frame["size_words"].to_list() == frame["words_word_count"].to_list() == [3 * (1 + i % 4) for i in range(50)]
    assert isinstance(table.frame(), pl.LazyFrame) and table.frame().collect().shape == (50, 4 + 2 + 13)
    size = table.cost.row(0, named=True)
    assert size["documents"] == 50 and size["flops"] == 500.0 and size["seconds"] > 0
    assert size["bytes"] == sum(len(row["text"]) for row in _rows(50))


def test_nothing_is_scored_twice_and_changes_are_noticed(tmp_path: Path, source: Path) -> None:
    table, scorer = ScoreTable(tmp_path / "table"), Length()
    table.add("size", scorer, source, executor="serial")
    scorer.asked.clear()
    again = table.add("size", scorer, source, executor="serial")
    assert scorer.asked == [] and (again.parts, again.documents, again.documents_kept) == (0, 0, 50)
    before = _bytes(tmp_path / "table")

    rows = _rows(10, start=20)  # one document changed, one gone, one new, in the third shard
    rows[4]["text"] = "another text"
    rows[9] = {"id": "new", "text": "new text", "metadata": {}}
    (source / "part-00002.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "part-00003.jsonl").touch()  # written again, but the same
    third = table.add("size", scorer, source, executor="serial")
    assert scorer.asked == ["d24", "new"] and (third.parts, third.documents, third.documents_kept) == (1, 2, 48)
    assert table.frame().collect().filter(id="d24")["size_words"].item() == 2
    changed = [name for name, content in _bytes(tmp_path / "table").items() if before[name] != content]
    assert len(changed) == 1 and "part-00002" in changed[0]
    fresh = ScoreTable(tmp_path / "fresh")
    fresh.add("size", Length(), source, executor="serial")
    assert _bytes(tmp_path / "fresh") == _bytes(tmp_path / "table")

    for file in source.iterdir():  # the same files, read otherwise
        file.write_text(file.read_text().replace('"metadata": {}', '"metadata": {}, "short": "x"'))
    table.add("size", scorer, source, executor="serial")
    assert table.add("size", scorer, source, executor="serial", text="short").documents == 50
    assert table.add("size", scorer, source, executor="serial").documents == 50
    scorer.asked.clear()
    other = Length(fingerprint="2")
    assert table.add("size", other, source, executor="serial").documents == 50  # another scorer, the same name
    assert table.add("size", scorer, source, executor="serial").documents == 0  # the first one's parts are still there
    (source / "part-00004.jsonl").unlink()
    assert table.add("size", scorer, source, executor="serial").documents_kept == 40
    assert table.frame().collect().height == 40


def test_rows_in_memory_are_compared_by_content(tmp_path: Path) -> None:
    table, scorer, rows = ScoreTable(tmp_path), Length(), _rows(20)
    table.add("size", scorer, datasets.Dataset.from_list(rows), executor="serial")
    rows[3]["text"] = "changed"
    assert table.add("size", scorer, rows, executor="serial").documents == 1
    assert scorer.asked[20:] == ["d3"]


def test_executors_give_the_same_bytes(tmp_path: Path, source: Path) -> None:
    written = {}
    for executor, workers in (("serial", None), ("processes", 2)):
        table = ScoreTable(tmp_path / executor)
        table.add("rules", RuleScorer.gopher(), source, executor=executor, workers=workers)
        written[executor] = _bytes(tmp_path / executor)
        assert (tmp_path / executor / "table.json").read_bytes() == (tmp_path / "serial" / "table.json").read_bytes()
    assert written["serial"] == written["processes"] and len(written["serial"]) == 5


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("ray")
    for executor in ("serial", "ray"):
        ScoreTable(tmp_path / executor).add("rules", RuleScorer.gopher(), source, executor=executor, workers=2)
    assert _bytes(tmp_path / "ray") == _bytes(tmp_path / "serial")

    class Broken(Length):
        def score(self, batch: Sequence) -> np.ndarray:
            raise InputError("this document is not for me")

    with pytest.raises(InputError, match="not for me"):
        ScoreTable(tmp_path / "broken").add("size", Broken(), source, executor="ray", workers=2)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, source: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        import numpy as np
        from downriver.data.score import ScoreTable

        class Slow:
            name, columns, fingerprint = "slow", ("length",), "1"

            def score(self, batch):
                with open(sys.argv[3], "a") as log:
                    log.writelines(d["id"] + "\\n" for d in batch)
                time.sleep(0.3)
                return np.array([len(d["text"]) for d in batch])

        print(ScoreTable(sys.argv[1]).add("slow", Slow(), sys.argv[2], executor="serial").documents)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), str(source)]
    run = subprocess.Popen([*command, str(tmp_path / "first.log")])
    parts = tmp_path / "killed" / "parts"
    deadline = time.monotonic() + 60
    while len(list(parts.rglob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    finished = len(list(parts.rglob("*.parquet")))
    assert 2 <= finished < 5 and not (tmp_path / "killed" / "table.json").exists()
    resumed = subprocess.run([*command, str(tmp_path / "second.log")], capture_output=True, text=True, check=True)
    assert int(resumed.stdout) == 50 - 10 * finished
    assert not set((tmp_path / "second.log").read_text().split()) & {f"d{i}" for i in range(10 * finished)}

    class Slow(Length):
        name, columns = "slow", ("length",)

        def score(self, batch: Sequence) -> np.ndarray:
            return super().score(batch)[:, 0]

    ScoreTable(tmp_path / "whole").add("slow", Slow(), source, executor="serial")
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
    assert (tmp_path / "killed" / "table.json").read_bytes() == (tmp_path / "whole" / "table.json").read_bytes()


def test_broken_records_and_double_ids_are_set_aside(tmp_path: Path, source: Path) -> None:
    with (source / "part-00001.jsonl").open("ab") as file:
        file.write(b'{"id": "bad", "text": "\xff"}\n{"id": "d3", "text": "again"}\n{"id": "d3", "text": "and again"}\n')
    (source / "z.jsonl.gz").write_bytes(b"\x1f\x8b")
    table = ScoreTable(tmp_path / "table")
    added = table.add("size", Length(), source, executor="serial")
    assert added.documents == 52
    said = [str(problem).replace(f"{source}/", "") for problem in added.quarantined]
    assert said == [
        "part-00001.jsonl, record 11: broken UTF-8 at byte 23 of the line",
        "z.jsonl.gz, record 1: the gz file ends too early: nothing can be read from here on",
        "part-00001.jsonl, record 12: id 'd3' was there before: part-00000.jsonl, record 4",
        "part-00001.jsonl, record 13: id 'd3' was there before: part-00000.jsonl, record 4",
    ]
    written = [json.loads(line) for line in (tmp_path / "table" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["record"] for row in written] == [11, 1, 12, 13] and len(table.quarantined) == 4
    frame = table.frame().collect()
    assert frame.height == 50 and frame["id"].is_unique().all()
    assert frame["id"].to_list() == [f"d{i}" for i in range(50)]
    assert frame.filter(id="d3")["size_characters"].item() == len(_rows(4)[3]["text"])
    table.add("rules", RuleScorer.c4(), source, executor="serial")
    assert table.frame(["rules_broken", "size_words"]).collect().height == 50


def test_scores_that_could_not_be_made_are_null(tmp_path: Path) -> None:
    class Some(Length):
        columns = ("points",)

        def score(self, batch: Sequence) -> np.ndarray:
            return np.array([np.nan if d["id"] == "d1" else 2.0 for d in batch])

    table = ScoreTable(tmp_path)
    table.add("points", Some(), _rows(3), executor="serial")
    assert table.frame().collect()["points"].to_list() == [2.0, None, 2.0]
    assert table.add("points", Some(), _rows(3), executor="serial").documents == 0


def test_what_cannot_be_is_refused(tmp_path: Path, source: Path) -> None:
    table = ScoreTable(tmp_path / "table")
    with pytest.raises(InputError, match="holds no scores yet"):
        table.frame()
    with pytest.raises(InputError, match="unknown executor 'process': did you mean 'processes'"):
        table.add("size", Length(), source, executor="process")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="workers is 0"):
        table.add("size", Length(), source, workers=0)
    with pytest.raises(InputError, match="'a/b' cannot name a score"):
        table.add("a/b", Length(), source)
    assert not (tmp_path / "table").exists()

    class Wrong(Length):
        def score(self, batch: Sequence) -> np.ndarray:
            return np.zeros(len(batch))

    with pytest.raises(InputError, match=r"gave an array of shape \(10,\) for 10 documents: \(10, 2\) is expected"):
        table.add("size", Wrong(), source, executor="serial")
    table.add("size", Length(), source, executor="serial")
    with pytest.raises(InputError, match="did you mean 'size_words'"):
        table.frame(["size_word"])

    class Words(Length):
        columns = ("words",)

    with pytest.raises(InputError, match=r"column 'size_words' of .* comes from 'size'"):
        table.add("size_words", Words(), source)
    table.add("more", Length(), _rows(3), executor="serial")
    with pytest.raises(InputError, match="'more' and 'size' scored different documents"):
        table.frame()
    assert table.frame(["size_words"]).collect().height == 50
    with pytest.raises(InputError, match=r"no document that can be scored.*record 1: no text"):
        table.add("none", Length(), [{"body": "x"}], executor="serial")
    with pytest.raises(InputError, match="the source has no documents"):
        table.add("none", Length(), [])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        ScoreTable(tmp_path / "file")
    with pytest.raises(InputError, match="is no score table"):
        ScoreTable(source)


def test_a_dead_worker_is_said(tmp_path: Path, source: Path) -> None:
    class Dying(Length):
        def score(self, batch: Sequence) -> np.ndarray:
            os._exit(9)

    with pytest.raises(DownriverError, match="a worker process died"):
        ScoreTable(tmp_path / "table").add("size", Dying(), source, executor="processes", workers=2)


def test_only_losses_read_alike_are_comparable(tmp_path: Path) -> None:
    table = ScoreTable(tmp_path)
    for name, reads in (("a", "one"), ("b", "one"), ("c", "two")):
        scorer = Length()
        scorer.reads = reads  # type: ignore[attr-defined]
        table.add(name, scorer, _rows(2), executor="serial")
    table.comparable("a_words", "b_words")
    with pytest.raises(InputError, match=r"'a_words' and 'c_words' .* cannot be compared"):
        table.comparable("a_words", "c_words")
