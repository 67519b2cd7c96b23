"""Documents: every layout, broken records set aside by name and number, constant memory, atomic shards."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from downriver.core.errors import InputError
from downriver.data.documents import (
    SUFFIXES,
    Quarantined,
    content_hash,
    read_documents,
    shards,
    write_documents,
)

ROWS = [
    {"text": "a river runs", "id": "a", "metadata": {"url": "x"}},
    {"text": "über the sea", "id": "b", "metadata": {"url": "y"}},
]


def _lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("like", SUFFIXES)
def test_every_layout_gives_back_what_was_written(tmp_path: Path, like: str) -> None:
    rows = [{"text": f"text {i} é", "id": str(i), "metadata": {"n": i}, "lang": "en"} for i in range(25)]
    paths = write_documents(tmp_path / "out", rows, like=like, shard_rows=10)
    assert [p.name for p in paths] == [f"part-{i:05d}.{like}" for i in range(3)]
    assert list(read_documents(tmp_path / "out")) == rows
    assert list(read_documents(paths)) == rows
    assert list(read_documents(str(tmp_path / "o*" / f"*.{like}"))) == rows
    first = [p.read_bytes() for p in paths]
    write_documents(tmp_path / "again", iter(rows), like=like, shard_rows=10)
    assert first == [p.read_bytes() for p in sorted((tmp_path / "again").iterdir())]
    assert list(tmp_path.rglob("*.part")) == []


def test_datasets_lists_and_generators_are_sources() -> None:
    whole = datasets.Dataset.from_list(ROWS)
    assert list(read_documents(whole)) == ROWS == list(read_documents(ROWS)) == list(read_documents(iter(ROWS)))
    assert [len(list(s.documents(lambda _: None))) for s in shards(whole)] == [2]
    with pytest.raises(InputError, match="read only once"):
        shards(iter(ROWS))
    with pytest.raises(InputError, match="did you mean 'text'"):
        list(read_documents(whole, text="txt"))
    with pytest.raises(InputError, match="no source of documents"):
        list(read_documents(7))


def test_columns_are_renamed_and_others_kept() -> None:
    got = list(read_documents([{"body": "one", "key": 3, "text": "old", "lang": "de"}], text="body", id="key"))
    assert got == [{"text": "one", "id": "3", "metadata": {}, "lang": "de"}]


def test_a_generator_is_read_as_it_is_used() -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield {"text": "x", "id": read}

    stream = read_documents(endless())
    for _ in range(25_000):
        next(stream)
    assert read <= 40_000


def test_what_is_broken_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        _lines(ROWS[:1])
        + b'{"text": "bad \xff byte", "id": "u"}\n'
        + b'{"text": "cut\n'
        + b"\n"
        + b'{"txt": "x", "id": "m"}\n[1]\n{"text": 5}\n{"text": " \\n"}\n{"text": "\\ud800"}\n'
        + b'{"text": "x", "metadata": 3}\n'
        + _lines(ROWS[1:])
    )
    found: list[Quarantined] = []
    assert list(read_documents(tmp_path, quarantine=found)) == ROWS
    assert [(q.record, q.reason.split(":")[0]) for q in found] == [
        (2, "broken UTF-8 at byte 14 of the line"),
        (3, "broken JSON"),
        (5, "no text"),
        (6, "an object with 'text' is expected, not list"),
        (7, "the text is of type int"),
        (8, "the text is empty"),
        (9, "the text holds half a surrogate pair, which no UTF-8 can be"),
        (10, "metadata is of type int"),
    ]
    assert found[2].id == "m" and all(q.file == str(file) for q in found)
    with pytest.raises(InputError, match=r"a\.jsonl, record 2: broken UTF-8 at byte 14"):
        list(read_documents(file))
    list(read_documents(file, quarantine=tmp_path / "aside.json"))
    written = [json.loads(line) for line in (tmp_path / "aside.json").read_text().splitlines()]
    assert [Quarantined(**w) for w in written] == found


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_truncated_or_corrupt_archive_is_read_as_far_as_it_goes(tmp_path: Path, pack) -> None:
    rows = [{"text": f"{content_hash(str(i))} " * 20, "id": str(i)} for i in range(2000)]
    suffix = "gz" if pack is gzip.compress else "zst"
    packed = pack(_lines(rows))
    whole, cut, bad = (tmp_path / f"{name}.jsonl.{suffix}" for name in ("c", "a", "b"))
    whole.write_bytes(pack(_lines(rows[:1])) + pack(_lines(rows[1:3])))  # two members, two frames
    cut.write_bytes(packed[: len(packed) * 3 // 4])
    bad.write_bytes(b"nothing of the kind")
    found: list[Quarantined] = []
    got = [d["id"] for d in read_documents(tmp_path, quarantine=found)]
    n = len(got) - 3
    assert 100 < n < 2000 and got == [str(i) for i in (*range(n), 0, 1, 2)]
    assert [(Path(q.file).name, q.record) for q in found] == [(cut.name, n + 1), (bad.name, 1)]
    assert "ends too early" in found[0].reason and "broken" in found[1].reason


def test_broken_parquet_is_set_aside(tmp_path: Path) -> None:
    write_documents(tmp_path, ROWS, like="parquet")
    (tmp_path / "z.parquet").write_bytes((tmp_path / "part-00000.parquet").read_bytes()[:-20])
    raw = pa.table({"text": pa.array([b"good", b"\xff\xfe"], pa.binary())})
    pq.write_table(raw.set_column(0, "text", raw["text"].cast(pa.string(), safe=False)), tmp_path / "y.parquet")
    found: list[Quarantined] = []
    assert [d["text"] for d in read_documents(tmp_path, quarantine=found)] == ["a river runs", "über the sea", "good"]
    assert [(Path(q.file).name, q.record) for q in found] == [("y.parquet", 2), ("z.parquet", 0)]
    with pytest.raises(InputError, match=r"column of .*part-00000\.parquet for the text 'body'"):
        list(read_documents(tmp_path / "part-00000.parquet", text="body"))


def test_ids_that_come_again_name_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(ROWS))
    (tmp_path / "b.jsonl").write_bytes(_lines(ROWS[1:]))
    found: list[Quarantined] = []
    assert list(read_documents(tmp_path, quarantine=found, unique=True)) == ROWS
    (problem,) = found
    assert problem.file.endswith("b.jsonl") and problem.record == 1 and problem.id == "b"
    assert problem.reason == "id 'b' was there before: a.jsonl, record 2"
    with pytest.raises(InputError, match="id 'b' was there before"):
        list(read_documents(tmp_path, unique=True))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source, why in (
        (tmp_path / "no.jsonl", "is not there"),
        (tmp_path, "holds no documents"),
        (str(tmp_path / "*.jsonl"), "names no file"),
    ):
        with pytest.raises(InputError, match=why):
            list(read_documents(source))
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match="a file ending in jsonl"):
        list(read_documents(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="unknown layout 'json'"):
        write_documents(tmp_path, ROWS, like="json")  # type: ignore[arg-type]
    (tmp_path / "half.parquet").write_bytes(b"")


def test_a_writer_that_breaks_leaves_whole_shards_only(tmp_path: Path) -> None:
    def rows():
        yield from ROWS
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_documents(tmp_path, rows(), shard_rows=1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["part-00000.jsonl.zst", "part-00001.jsonl.zst"]


def test_datatrove_reads_and_writes_the_same_files(tmp_path: Path) -> None:
    for peer in ("datatrove", "orjson"):
        pytest.importorskip(peer)
    from datatrove.data import Document
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    write_documents(tmp_path / "ours", ROWS, like="jsonl.gz")
    theirs = list(JsonlReader(str(tmp_path / "ours")).run())
    assert [(d.text, d.id, d.metadata["url"]) for d in theirs] == [
        (r["text"], r["id"], r["metadata"]["url"]) for r in ROWS
    ]
    with JsonlWriter(str(tmp_path / "theirs")) as writer:
        for row in ROWS:
            writer.write(Document(**row))
    assert list(read_documents(tmp_path / "theirs")) == ROWS
