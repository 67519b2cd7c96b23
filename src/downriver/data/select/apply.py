"""Copy chosen documents out of shards: unchanged, in constant memory, a file a shard, resumable.

Reach for ``Selection.apply``; this is what it runs.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from downriver.core.errors import InputError, require, unknown
from downriver.core.io import atomic_write, canonical, fingerprint
from downriver.data.documents import SUFFIXES, Layout, Shard, shards

MANIFEST = "selection.json"
GROUP = 10_000  # rows written to Parquet at once

Keep = Callable[[int, str], bool]


def apply(
    ids: Sequence[str],
    places: Mapping[str, np.ndarray] | None,
    source: Any,
    out: Path,
    *,
    like: Layout = "jsonl",
    text: str = "text",
    id: str = "id",
) -> list[Path]:
    """Write the documents with these ids to ``out``, and give the files. With ``places`` (rows by shard) a document
    must also stand where it stood when it was scored, so that of two with one id the right one is taken.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "chosen"
    >>> rows = [{"id": "a", "text": "one", "year": 1996}, {"id": "b", "text": "two", "year": 1997}]
    >>> [path] = apply(["b"], None, rows, out)
    >>> path.read_text()
    '{"id": "b", "text": "two", "year": 1997}\\n'
    """
    if like not in SUFFIXES:
        raise unknown("layout", like, SUFFIXES)
    found = shards(source, text=text, id=id)
    names = [shard.name if isinstance(shard.source, Path) else f"{shard.name}.{like}" for shard in found]
    manifest = {
        "chosen": fingerprint(sorted(ids)),
        "shards": [{"name": name, "stamp": shard.stamp} for name, shard in zip(names, found, strict=True)],
    }
    _begin(out, manifest)
    if all((out / name).is_file() for name in names) and not any((out / f"{name}.ids").is_file() for name in names):
        return [out / name for name in names]  # finished before
    wanted = set(ids)
    if places is not None and not places.keys() <= {shard.name for shard in found}:
        places = None  # the source is cut into other shards than it was
    missing = set(wanted)
    for shard, name in zip(found, names, strict=True):
        path = out / name
        rows = None if places is None else set(places.get(shard.name, np.arange(0)).tolist())
        listed = path.with_name(path.name + ".ids")
        if not path.is_file() or not listed.is_file():
            taken: list[str] = []
            _copy(shard, path, _keeper(wanted, rows, taken), like)
            with atomic_write(listed, "w") as file:
                json.dump(taken, file)
        missing -= set(json.loads(listed.read_text(encoding="utf-8")))
    if missing:
        raise InputError(f"{len(missing)} chosen ids are not in the source, {min(missing)!r} the first")
    for name in names:
        (out / f"{name}.ids").unlink()
    return [out / name for name in names]


def _begin(out: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the folder is empty or holds this very selection; clear what a killed run left half-written."""
    at = out / MANIFEST
    if at.is_file():
        if at.read_text(encoding="utf-8") != canonical(manifest):
            raise InputError(f"{out} holds another selection, or its source has changed: choose another folder")
    elif out.exists() and (not out.is_dir() or any(p for p in out.iterdir() if not p.name.endswith(".part"))):
        raise InputError(f"{out} exists already and holds no selection: choose another folder")
    for part in list(out.rglob(".*.part")):
        part.unlink()
    if not at.is_file():
        with atomic_write(at, "w") as file:
            file.write(canonical(manifest))


def _keeper(wanted: set[str], rows: set[int] | None, taken: list[str]) -> Keep:
    def keep(row: int, name: str) -> bool:
        chosen = name in wanted if rows is None else row in rows
        if chosen and name not in wanted:
            raise InputError(f"row {row} has the id {name!r} now: the source is not the one that was scored")
        if chosen:
            taken.append(name)
        return chosen

    return keep


def _copy(shard: Shard, path: Path, keep: Keep, like: Layout) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(shard.source, Path) and shard.source.suffix == ".parquet":
        _copy_parquet(shard, path, keep)
        return
    with atomic_write(path) as file:
        if not isinstance(shard.source, Path):
            _write_rows(file, [dict(r) for i, r in enumerate(shard.source) if keep(i, _name(r, shard, i))], like)
            return
        layout = next(s for s in SUFFIXES if path.name.endswith(f".{s}"))
        file.writelines(_packed(_chosen_lines(shard, keep), layout))


def _chosen_lines(shard: Shard, keep: Keep) -> Iterator[bytes]:
    for row, line in enumerate(_raw_lines(shard.source)):
        try:
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            continue  # set aside when it was scored
        if isinstance(record, Mapping) and keep(row, _name(record, shard, row)):
            yield line if line.endswith(b"\n") else line + b"\n"


def _name(record: Mapping[str, Any], shard: Shard, row: int) -> str:
    name = record.get(shard.id)
    return f"{shard.name}/{row}" if name is None else str(name)


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file as they are; of a file that is cut off, those before the cut."""
    broken: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.open(file))
        elif path.suffix == ".zst":
            zstandard = require("zstandard", "data")
            broken = (*broken, zstandard.ZstdError)
            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        try:
            yield from file
        except broken:
            return


def _packed(lines: Iterable[bytes], layout: str) -> Iterator[bytes]:
    if layout == "jsonl":
        yield from lines
        return
    pack: Any = (
        zlib.compressobj(6, wbits=31)
        if layout == "jsonl.gz"
        else require("zstandard", "data").ZstdCompressor(level=3).compressobj()
    )
    for line in lines:
        yield pack.compress(line)
    yield pack.flush()


def _write_rows(file: IO[bytes], rows: list[dict[str, Any]], like: Layout) -> None:
    if like == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")
    else:
        lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        file.writelines(_packed(lines, like))


def _copy_parquet(shard: Shard, path: Path, keep: Keep) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard.source) as source, atomic_write(path) as file:
        schema = source.schema_arrow
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            held: list[Any] = []
            row = 0
            for batch in source.iter_batches(batch_size=1024):
                ids = batch.column(shard.id).to_pylist() if shard.id in schema.names else [None] * len(batch)
                places = range(row, row + len(batch))
                names = [f"{shard.name}/{i}" if n is None else str(n) for i, n in zip(places, ids, strict=True)]
                chosen = [keep(i, name) for i, name in zip(places, names, strict=True)]
                held.append(batch.filter(pa.array(chosen, pa.bool_())))
                row += len(batch)
                if sum(map(len, held)) >= GROUP:
                    writer.write_table(pa.Table.from_batches(held, schema))
                    held = []
            writer.write_table(pa.Table.from_batches(held, schema))
