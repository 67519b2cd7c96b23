"""Streams of documents: read JSON lines and Parquet in constant memory, set broken records aside, write shards whole.

Reach for it wherever a folder of text comes in or goes out. The layout is that of datatrove: ``text``, ``id``,
``metadata``; a folder that it wrote can be read here, and the other way round.
"""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from downriver.core.errors import InputError, require, unknown
from downriver.core.io import atomic_write

Document = Mapping[str, Any]
"""``text`` and ``id`` (strings), ``metadata`` (a mapping), and whatever else the source had."""

Layout = Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
SUFFIXES: tuple[Layout, ...] = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
ROWS = 10_000
"""Documents a shard, where a source is no file."""
CHUNK = 1 << 16  # compressed bytes read at once


@dataclass(frozen=True)
class Quarantined:
    """A record that was set aside. ``record`` counts from 1 (the line of a JSON lines file); 0 is the file itself."""

    file: str
    record: int
    reason: str
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.file}, record {self.record}: {self.reason}" if self.record else f"{self.file}: {self.reason}"


Report = Callable[[Quarantined], None]


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read by itself: a file, or a range of rows. It can be sent to another process.

    ``name`` tells it apart within its source and stays the same from run to run.
    """

    name: str
    source: Any  # a Path, or rows that can be iterated again
    text: str = "text"
    id: str = "id"

    @property
    def stamp(self) -> str | None:
        """What changes when the file is written again (size and time of change) or read otherwise; ``None`` for rows in
        memory.
        """
        if not isinstance(self.source, Path):
            return None
        state = self.source.stat()
        return f"{state.st_size}:{state.st_mtime_ns}:{self.text}:{self.id}"

    def documents(self, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every good document with its row (from 0); what is broken goes to ``report``, and the reading goes on.

        A record without an id is called ``<shard>/<row>``.
        """
        place = str(self.source) if isinstance(self.source, Path) else self.name
        for row, record in self._records(place, report):
            try:
                yield row, _document(record, self.text, self.id, f"{self.name}/{row}")
            except InputError as error:
                known = record.get(self.id) if isinstance(record, Mapping) else None
                report(Quarantined(place, row + 1, str(error), None if known is None else str(known)))

    def _records(self, place: str, report: Report) -> Iterator[tuple[int, Any]]:
        if not isinstance(self.source, Path):
            yield from enumerate(self.source)
        elif self.source.suffix == ".parquet":
            yield from _parquet(self.source, self.text, report)
        else:
            yield from _json_lines(self.source, report)


def read_documents(
    source: Any,
    *,
    text: str = "text",
    id: str = "id",
    quarantine: "list[Quarantined] | str | os.PathLike[str] | None" = None,
    unique: bool = False,
) -> Iterator[dict[str, Any]]:
    """Read the documents of a source one after the other; memory does not grow with the source.

    Parameters
    ----------
    source
        A file, a folder (read whole, in the order of the paths), a pattern like ``data/*.jsonl.zst`` or a list of
        files: ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``, ``.parquet``. Or a ``datasets.Dataset``, or any iterable of
        mappings.
    text, id
        The columns that hold the text and the id; they come back as ``text`` and ``id``. Documents without an id get
        ``<shard>/<row>``. ``metadata`` is there always, the other columns are kept.
    quarantine
        Where broken records go: broken UTF-8 or JSON, no text or an empty one, a compressed file that ends too early.
        A list takes ``Quarantined`` items, a path becomes a JSON lines file; the reading goes on. ``None``: the first
        broken record is an ``InputError``.
    unique
        Refuse ids that were there before, in the same way, naming both places. This takes about 100 bytes of memory
        a document.

    >>> list(read_documents([{"text": "a river", "id": 7, "url": "x"}]))
    [{'text': 'a river', 'id': '7', 'metadata': {}, 'url': 'x'}]
    >>> broken = []
    >>> [d["id"] for d in read_documents([{"text": "a"}, {"txt": "b"}, {"text": " "}], quarantine=broken)]
    ['rows-000000000/0']
    >>> [str(problem) for problem in broken]  # doctest: +NORMALIZE_WHITESPACE
    ["rows-000000000, record 2: no text: the column 'text' is expected (there are: txt)",
     'rows-000000000, record 3: the text is empty']
    """
    problems = quarantine if isinstance(quarantine, list) else []

    def report(problem: Quarantined) -> None:
        if quarantine is None:
            raise InputError(str(problem))
        problems.append(problem)

    seen: dict[bytes, tuple[str, int]] = {}
    try:
        for shard in _shards(source, text, id, once=True):
            for row, document in shard.documents(report):
                if unique:
                    key = hashlib.blake2b(document["id"].encode(), digest_size=8).digest()
                    if key in seen:
                        report(again(shard, row, document["id"], *seen[key]))
                        continue
                    seen[key] = (shard.name, row)
                yield document
    finally:
        if quarantine is not None and not isinstance(quarantine, list):
            write_quarantine(quarantine, problems)


def shards(source: Any, *, text: str = "text", id: str = "id") -> list[Shard]:
    """The parts of a source that can be read by themselves: its files, or ranges of 10 000 rows.

    ``source`` is as for ``read_documents``, but nothing that can be iterated only once.

    >>> [shard.name for shard in shards([{"text": "a"}] * 10_001)]
    ['rows-000000000', 'rows-000010000']
    """
    return list(_shards(source, text, id, once=False))


def write_documents(
    folder: str | os.PathLike[str],
    documents: Iterable[Document],
    *,
    like: Layout = "jsonl.zst",
    shard_rows: int = 100_000,
) -> list[Path]:
    """Write documents to ``folder/part-00000.<like>`` and so on; every file appears whole or not at all.

    Equal documents give equal bytes. ``jsonl.zst`` needs zstandard. Returns the files in order.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> [path.name for path in write_documents(folder, [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}],
    ...                                        like="jsonl", shard_rows=1)]
    ['part-00000.jsonl', 'part-00001.jsonl']
    >>> [document["text"] for document in read_documents(folder)]
    ['one', 'two']
    """
    if like not in SUFFIXES:
        raise unknown("layout", like, SUFFIXES)
    if shard_rows < 1:
        raise InputError(f"shard_rows is {shard_rows}: at least 1 is expected")
    rest = iter(documents)
    paths: list[Path] = []
    while part := list(itertools.islice(rest, shard_rows)) if like == "parquet" else _ahead(rest, shard_rows):
        paths.append(Path(folder) / f"part-{len(paths):05d}.{like}")
        with atomic_write(paths[-1]) as file:
            _write(file, part, like)
    return paths


def content_hash(text: str) -> str:
    """Sixteen hexadecimal digits of a text's content (blake2b of its UTF-8).

    >>> content_hash("a river")
    'cbcdd9d3c5e26ca2'
    """
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def again(shard: Shard, row: int, name: str, first_shard: str, first_row: int) -> Quarantined:
    """The problem of an id that was there before."""
    place = str(shard.source) if isinstance(shard.source, Path) else shard.name
    return Quarantined(place, row + 1, f"id {name!r} was there before: {first_shard}, record {first_row + 1}", name)


def write_quarantine(path: str | os.PathLike[str], problems: Iterable[Quarantined]) -> None:
    """Write what was set aside as JSON lines: file, record, reason, id."""
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)


def _shards(source: Any, text: str, id: str, *, once: bool) -> Iterator[Shard]:
    if isinstance(source, str | os.PathLike):
        yield from _file_shards([Path(source)], text, id, str(source))
    elif isinstance(source, Sequence) and source and all(isinstance(item, str | os.PathLike) for item in source):
        yield from _file_shards([Path(item) for item in source], text, id, "the list of files")
    elif hasattr(source, "select") and hasattr(source, "column_names"):  # a datasets.Dataset
        if text not in source.column_names:
            raise unknown("column for the text", text, source.column_names)
        for start in range(0, len(source), ROWS):
            rows = source.select(range(start, min(start + ROWS, len(source))))
            yield Shard(f"rows-{start:09d}", rows, text, id)
    elif isinstance(source, Sequence):
        for start in range(0, len(source), ROWS):
            yield Shard(f"rows-{start:09d}", source[start : start + ROWS], text, id)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        if not once:
            raise InputError(
                f"a {type(source).__name__} can be read only once: files, a list or a datasets.Dataset are expected"
                " (write_documents makes files of it)"
            )
        rest = iter(source)
        for start in itertools.count(0, ROWS):
            if not (part := list(itertools.islice(rest, ROWS))):
                return
            yield Shard(f"rows-{start:09d}", part, text, id)
    else:
        raise InputError(f"a {type(source).__name__} is no source of documents: files, a dataset or rows are expected")


def _file_shards(paths: list[Path], text: str, id: str, called: str) -> Iterator[Shard]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path) and _layout(p))
            if not found:
                raise InputError(f"{path} holds no documents: files ending in {', '.join(SUFFIXES)} are expected")
            files += found
        elif path.is_file():
            if not _layout(path):
                raise InputError(f"{path}: a file ending in {', '.join(SUFFIXES)} is expected")
            files.append(path)
        elif set(str(path)) & set("*?["):
            plain = next(i for i, part in enumerate(path.parts) if set(part) & set("*?["))
            matches = Path(*path.parts[:plain]).glob("/".join(path.parts[plain:]))
            files += sorted(p for p in matches if p.is_file() and _layout(p))
        else:
            raise InputError(f"{path} is not there: a file, a folder or a pattern is expected")
    if not files:
        raise InputError(f"{called} names no file ending in {', '.join(SUFFIXES)}")
    files = list(dict.fromkeys(files))
    top = Path(os.path.commonpath([file.parent.absolute() for file in files]))
    for file in files:
        yield Shard(file.absolute().relative_to(top).as_posix(), file, text, id)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _layout(path: Path) -> Layout | None:
    return next((like for like in SUFFIXES if path.name.endswith(f".{like}")), None)


def _document(record: Any, text: str, id: str, default: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise InputError(f"an object with {text!r} is expected, not {type(record).__name__}")
    if record.get(text) is None:
        raise InputError(f"no text: the column {text!r} is expected (there are: {', '.join(record) or 'none'})")
    value, name, metadata = record[text], record.get(id), record.get("metadata")
    if not isinstance(value, str):
        raise InputError(f"the text is of type {type(value).__name__}: a string is expected")
    if not value or value.isspace():
        raise InputError("the text is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError("the text holds half a surrogate pair, which no UTF-8 can be") from None
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except json.JSONDecodeError:
            raise InputError("metadata is a string that is no JSON") from None
    if not isinstance(metadata, Mapping | None):
        raise InputError(f"metadata is of type {type(metadata).__name__}: an object is expected")
    rest = {key: item for key, item in record.items() if key not in (text, id, "text", "id", "metadata")}
    return {"text": value, "id": default if name is None else str(name), "metadata": dict(metadata or {})} | rest


def _json_lines(path: Path, report: Report) -> Iterator[tuple[int, Any]]:
    row = 0
    try:
        for row, line in enumerate(_lines(path)):
            if not line.strip():
                continue
            try:
                yield row, json.loads(line)
            except UnicodeDecodeError as error:
                report(Quarantined(str(path), row + 1, f"broken UTF-8 at byte {error.start} of the line"))
            except (json.JSONDecodeError, RecursionError) as error:
                report(Quarantined(str(path), row + 1, f"broken JSON: {error}"))
    except _Broken as error:
        report(Quarantined(str(path), row + 1, f"{error}: nothing can be read from here on"))


class _Broken(Exception):
    """A compressed file that ends too early or holds what its format does not allow; says after how many lines."""


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed; ``_Broken`` behind the last whole one."""
    with path.open("rb") as file:
        if path.suffix == ".jsonl":
            yield from file
            return
        rest = b""
        for chunk in _decompressed(file, path.suffix):
            if isinstance(chunk, _Broken):
                yield b""  # the line that is not whole: it is the record named
                raise chunk
            *whole, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else (rest + chunk,)
            yield from whole
        if rest:
            yield rest


def _decompressed(file: IO[bytes], suffix: str) -> "Iterator[bytes | _Broken]":
    """The bytes of a file of gzip members or zstandard frames, and last of all what is wrong with it, if anything."""
    if suffix == ".gz":
        new: Callable[[], Any] = lambda: zlib.decompressobj(wbits=31)  # noqa: E731
        errors: tuple[type[Exception], ...] = (zlib.error,)
    else:
        zstandard = require("zstandard", "data")
        new, errors = lambda: zstandard.ZstdDecompressor().decompressobj(), (zstandard.ZstdError,)
    stream = new()
    try:
        while chunk := file.read(CHUNK):
            while chunk:
                if stream.eof:
                    stream = new()
                yield stream.decompress(chunk)
                chunk = stream.unused_data if stream.eof else b""
    except errors as error:
        yield _Broken(f"broken {suffix[1:]} data ({error})")
        return
    if not stream.eof:
        yield _Broken(f"the {suffix[1:]} file ends too early")


def _parquet(path: Path, text: str, report: Report) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            if text not in file.schema_arrow.names:
                raise unknown(f"column of {path} for the text", text, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                try:
                    rows: Iterable[Any] = batch.to_pylist()
                except UnicodeDecodeError:
                    rows = range(len(batch))
                for record in rows:
                    try:
                        yield row, batch.slice(record, 1).to_pylist()[0] if isinstance(record, int) else record
                    except UnicodeDecodeError as error:
                        report(Quarantined(str(path), row + 1, f"broken UTF-8 at byte {error.start} of a column"))
                    row += 1
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        report(
            Quarantined(str(path), row + 1 if row else 0, f"broken Parquet, nothing can be read from here on: {why}")
        )


def _ahead(rest: Iterator[Document], limit: int) -> Iterator[Document] | None:
    """The next ``limit`` documents as an iterator, or ``None`` when there are no more."""
    first = next(rest, None)
    return None if first is None else itertools.chain([first], itertools.islice(rest, limit - 1))


def _write(file: IO[bytes], documents: Iterable[Document], like: Layout) -> None:
    if like == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [dict(document) for document in documents]
        if not any(row.get("metadata") for row in rows):  # Parquet has no object without members
            rows = [{key: value for key, value in row.items() if key != "metadata"} for row in rows]
        try:
            pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")
        except pa.ArrowException as error:
            raise InputError(f"the documents do not fit into one Parquet table: {str(error).splitlines()[0]}") from None
        return
    lines = (json.dumps(document, ensure_ascii=False).encode() + b"\n" for document in documents)
    if like == "jsonl":
        file.writelines(lines)
    elif like == "jsonl.gz":
        pack = zlib.compressobj(6, wbits=31)
        file.writelines(pack.compress(line) for line in lines)
        file.write(pack.flush())
    else:
        pack = require("zstandard", "data").ZstdCompressor(level=3).compressobj()
        file.writelines(pack.compress(line) for line in lines)
        file.write(pack.flush())
