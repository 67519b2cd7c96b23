"""The ledger: one Parquet file a finished cell, written once and whole, read in place by DuckDB.

A cell's file is named by the fingerprint of what was asked, so the same question is never answered twice. The ledger
is a folder, local or of any fsspec file system::

    cells/<study>/<key>.parquet       what the cell measured; its metadata hold a checksum of the rows
    failures/<study>/<key>.json       the traceback of a cell that failed, until it succeeds
    quarantine/<study>/<key>.parquet  cell files that were truncated or edited, set aside
"""

import contextlib
import glob
import hashlib
import io
import json
import logging
import posixpath
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from downriver.core.errors import DownriverError, InputError
from downriver.core.io import atomic_write, canonical
from downriver.core.measurement import Measurement

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

SCHEMA: dict[str, pa.DataType] = {
    **{name: pa.string() for name in ("study", "arm")},
    "seed": pa.int64(),
    **{name: pa.string() for name in ("task", "metric")},
    "value": pa.float64(),
    **{name: pa.string() for name in ("unit", "direction")},
    **{name: pa.int64() for name in ("parameters", "trained_parameters", "examples", "tokens")},
    **{name: pa.float64() for name in ("flops", "seconds")},
    "peak_memory": pa.int64(),
    **{f"{name}_version": pa.string() for name in ("downriver", "torch", "transformers", "python")},
    "device": pa.string(),
    "other_versions": pa.string(),
    "cell": pa.string(),
}
CHECKSUM = "downriver.sha256"


@dataclass(frozen=True)
class Failure:
    """A cell that failed: what it was, the error in one line, the whole traceback, and when (seconds of the epoch)."""

    study: str
    arm: str
    seed: int
    error: str
    traceback: str
    at: float


class Ledger:
    """The finished cells below ``root``, a local folder or an fsspec URL (``s3://bucket/runs``, ``memory://runs``).

    >>> ledger = Ledger("memory://ledger-example")
    >>> ledger.write("demo", "k1", [Measurement("accuracy", 0.9, study="demo", arm="a")])
    >>> ledger.rows("demo")["value"].to_list()
    [0.9]
    >>> ledger.query("select arm, avg(value) as mean from measurements group by arm").to_dicts()
    [{'arm': 'a', 'mean': 0.9}]
    """

    def __init__(self, root: str | Path) -> None:
        from fsspec.core import url_to_fs

        self.root = str(root)
        self.files, self.path = url_to_fs(self.root)
        self.protocol = self.files.protocol if isinstance(self.files.protocol, str) else self.files.protocol[0]
        self.local = self.protocol in ("file", "local")
        if self.local and Path(self.path).exists() and not Path(self.path).is_dir():
            raise InputError(f"{self.root} is a file: a folder is expected for the ledger")

    def __reduce__(self) -> tuple[type["Ledger"], tuple[str]]:
        return Ledger, (self.path if self.local else self.root,)

    def finished(self, study: str) -> set[str]:
        """The keys of a study's cell files, whole or not: one listing, nothing is opened."""
        return {name.removesuffix(".parquet") for name in self._names("cells", study) if name.endswith(".parquet")}

    def read(self, study: str, key: str) -> pa.Table | None:
        """A cell's rows, or None where it is not finished; a truncated or edited file is set aside first."""
        path = self._at("cells", study, f"{key}.parquet")
        try:
            content = self.files.cat_file(path)
        except FileNotFoundError:
            return None
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            table = file.read(use_threads=False).replace_schema_metadata()
            stated = (file.metadata.metadata or {}).get(CHECKSUM.encode(), b"").decode()
            if stated != _checksum(table.to_pylist()):
                raise ValueError("its rows do not match their checksum")
        except (pa.ArrowException, OSError, ValueError) as error:
            self._set_aside(study, key, error)
            return None
        return table

    def write(self, study: str, key: str, rows: Sequence[Measurement]) -> None:
        """Write a finished cell, whole or not at all, and forget that it ever failed."""
        content = _encode(key, rows)
        self._put(content, "cells", study, f"{key}.parquet")
        self._remove("failures", study, f"{key}.json")

    def forget(self, study: str, keys: Iterable[str]) -> None:
        """Remove cells and their failures, so that they are asked afresh."""
        for key in keys:
            self._remove("cells", study, f"{key}.parquet")
            self._remove("failures", study, f"{key}.json")

    def write_failure(self, key: str, failure: Failure) -> None:
        """Record that a cell failed."""
        self._put(json.dumps(asdict(failure), indent=1).encode(), "failures", failure.study, f"{key}.json")

    def failures(self, study: str) -> dict[str, Failure]:
        """The recorded failures of a study, by key."""
        found = {}
        for name in self._names("failures", study):
            if name.endswith(".json"):
                with contextlib.suppress(FileNotFoundError):  # it succeeded meanwhile
                    text = self.files.cat_file(self._at("failures", study, name))
                    found[name.removesuffix(".json")] = Failure(**json.loads(text))
        return found

    def failure(self, study: str, key: str) -> Failure | None:
        """The recorded failure of one cell, if there is one."""
        try:
            return Failure(**json.loads(self.files.cat_file(self._at("failures", study, f"{key}.json"))))
        except FileNotFoundError:
            return None

    def rows(self, study: str | None = None) -> pl.DataFrame:
        """All rows of one study, or of all of them."""
        return self._ask("select * from measurements", {}, study)

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """Ask the view ``measurements``, which reads the cell files in place, in DuckDB's SQL.

        A file that is not Parquet any more is set aside first. One that was edited is found out by a study that needs
        it, not here.
        """
        return self._ask(sql, dict(parameters or {}))

    def check(self) -> list[str]:
        """Verify every cell file; the names, ``<study>/<key>``, of those that had to be set aside."""
        cells = [(study, key) for study in self._names("cells") for key in self.finished(study)]
        return [f"{study}/{key}" for study, key in cells if self.read(study, key) is None]

    def connect(self, study: str | None = None) -> "duckdb.DuckDBPyConnection":
        """A DuckDB connection of its own with the view ``measurements`` over the cell files (of one study)."""
        import duckdb

        connection = duckdb.connect()
        if not self.local:
            connection.register_filesystem(self.files)
        if any(self.finished(name) for name in ([study] if study else self._names("cells"))):
            place = posixpath.join(glob.escape(self.path), "cells", study or "*", "*.parquet")
            place = (place if self.local else f"{self.protocol}://{place.lstrip('/')}").replace("'", "''")
            source = f"read_parquet('{place}', hive_partitioning = false)"
        else:
            source = "nothing_yet"
            connection.register(source, pa.table({n: pa.array([], t) for n, t in SCHEMA.items()}))
        connection.execute(f"create view measurements as select * from {source}")
        return connection

    def _ask(self, sql: str, parameters: dict[str, Any], study: str | None = None) -> pl.DataFrame:
        import duckdb

        try:
            with self.connect(study) as connection:
                answer = connection.sql(sql, params=parameters)
                return pl.DataFrame(None if answer is None else answer.to_arrow_table())
        except duckdb.Error as error:
            if self.check():
                return self._ask(sql, parameters, study)
            raise InputError(f"the query on {self.root} cannot be answered: {error}") from error

    @contextlib.contextmanager
    def lock(self, study: str, seed: int) -> Iterator[bool]:
        """Try to claim one seed of a study; gives False at once where another process holds it.

        The lock is one byte of a file in a local ledger and dies with its process. An object store has no locks: there
        two processes may do the same cell twice, and the second writes the same file again.
        """
        if not self.local:
            yield True
            return
        import fcntl

        place = Path(self._at("locks", f"{study}.lock"))
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, seed)
            except (BlockingIOError, PermissionError):  # what a lock held elsewhere looks like
                yield False
                return
            except OSError as error:
                raise DownriverError(f"{place} cannot be locked, which a shared ledger needs: {error}") from error
            yield True

    def _at(self, *parts: str) -> str:
        return posixpath.join(self.path, *parts)

    def _names(self, *parts: str) -> list[str]:
        try:
            listed = self.files.ls(self._at(*parts), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(name for entry in listed if not (name := posixpath.basename(entry.rstrip("/"))).startswith("."))

    def _put(self, content: bytes, *parts: str) -> None:
        path = self._at(*parts)
        try:
            if self.local:
                with atomic_write(path) as file:
                    file.write(content)
            else:
                self.files.pipe_file(path, content)
        except OSError as error:
            raise DownriverError(f"{path} cannot be written: {error}") from error

    def _remove(self, *parts: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self._at(*parts))

    def _set_aside(self, study: str, key: str, why: Exception) -> None:
        source = self._at("cells", study, f"{key}.parquet")
        aside = self._at("quarantine", study, f"{key}-{time.time_ns()}.parquet")
        log.warning("%s is not what was written (%s): set aside as %s, the cell runs again", source, why, aside)
        self.files.makedirs(posixpath.dirname(aside), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was first
            self.files.mv(source, aside)


def _encode(key: str, rows: Sequence[Measurement]) -> bytes:
    plain = []
    for row in rows:
        stated = row.to_row() | {"cell": key}
        others = {name: stated.pop(name) for name in list(stated) if name not in SCHEMA}
        plain.append(stated | {"other_versions": canonical(others) if others else None})
    try:
        table = pa.Table.from_pylist(plain, schema=pa.schema(SCHEMA))
    except pa.ArrowException as error:
        raise DownriverError(f"cell {key} cannot be stored: {error}") from error
    sink = io.BytesIO()
    large = len(rows) > 100  # most cells are a few rows, which packing only makes larger and slower
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd" if large else "none",
        use_dictionary=large,
        write_statistics=False,  # these and Arrow's own schema take longer to read than the rows
        store_schema=False,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({CHECKSUM: _checksum(table.to_pylist())})
    return sink.getvalue()


def _checksum(rows: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(canonical(list(rows)).encode()).hexdigest()
