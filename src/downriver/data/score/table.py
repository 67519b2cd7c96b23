"""A table of scores on disk: one Parquet part a shard and scorer, filled by processes or a Ray cluster, resumable.

Reach for it before choosing data: score once, select often. Parts are keyed by document id, content hash and the
scorer's fingerprint, so that nothing is scored twice and nothing old is taken for new.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from downriver.core.assets import locked
from downriver.core.cost import charge, metered
from downriver.core.errors import DownriverError, InputError, require, unknown
from downriver.core.io import atomic_write, fingerprint
from downriver.core.measurement import Cost
from downriver.data.documents import Document, Quarantined, Shard, again, content_hash, shards, write_quarantine
from downriver.data.score.scorer import Scorer

Executor = Literal["serial", "processes", "ray"]
KEYS = ("id", "hash", "shard", "row")
BATCH, BATCH_CHARS = 4096, 1 << 23
"""A scorer gets so many documents at once, or fewer when their texts are this long together."""
MANIFEST = "table.json"
COSTS = ("seconds", "documents", "bytes", "flops")
SAME = ("shards", "documents")  # entries that agree in these are about the same documents


@dataclass(frozen=True)
class Added:
    """What ``ScoreTable.add`` did: how many parts and documents it scored now and found scored already, what that
    cost (of this call), and the records that were set aside."""

    parts: int
    parts_kept: int
    documents: int
    documents_kept: int
    cost: Cost
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True)
class _Part:
    """One shard under one scorer: the work that is handed to an executor."""

    shard: Shard
    path: Path
    scorer: str  # the fingerprint
    columns: tuple[str, ...]


class ScoreTable:
    """Scores of documents, kept in a folder.

    A shard that is finished is never scored again: a killed run goes on where it was, another scorer adds columns, and
    of a shard that was written anew only the documents that changed are scored. Equal documents and scorers give equal
    bytes, whatever executor made them and however often the run was killed (the losses of a model may differ in the
    last digits where a document was scored in other company, as after a change of its shard).

    Raises ``InputError`` when the folder holds something else.

    >>> import tempfile
    >>> from downriver.data.score import RuleScorer
    >>> table = ScoreTable(tempfile.mkdtemp())
    >>> added = table.add("rules", RuleScorer.redpajama(), [{"id": "a", "text": "A river runs. It is long."}])
    >>> table.frame(["rules_word_count", "rules_num_sentences"]).collect().row(0)
    ('a', '...', 'rows-000000000', 0, 6.0, 2.0)
    >>> table.add("rules", RuleScorer.redpajama(), [{"id": "a", "text": "A river runs. It is long."}]).documents
    0
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file: a folder for the score table is expected")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / MANIFEST).is_file():
            known = {MANIFEST, "parts", "duplicates"}
            if strange := sorted(p.name for p in self.folder.iterdir() if p.name not in known and p.name[0] != "."):
                raise InputError(f"{self.folder} is no score table: it holds {strange[0]} and no {MANIFEST}")

    @property
    def columns(self) -> list[str]:
        """The score columns, in the order in which they were added."""
        return [column for entry in self._manifest().values() for column in entry["columns"]]

    @property
    def quarantined(self) -> list[Quarantined]:
        """The records that no scorer saw, and the documents whose id had come before."""
        problems: dict[Quarantined, None] = {}
        for name, entry in self._manifest().items():
            for path in self._paths(name, entry):
                problems |= dict.fromkeys(_side(path)["quarantined"])
            problems |= dict.fromkeys(self._twice(entry))
        return list(problems)

    @property
    def cost(self) -> pl.DataFrame:
        """A row a scorer: what its parts cost altogether (seconds of all workers, documents, bytes of text, FLOPs)."""
        rows = []
        for name, entry in self._manifest().items():
            sides = [_side(path)["cost"] for path in self._paths(name, entry)]
            total = {key: sum(side[key] for side in sides) for key in COSTS}
            rows.append({"scorer": name, "fingerprint": entry["fingerprint"], **total})
        schema = {"scorer": pl.String, "fingerprint": pl.String, "seconds": pl.Float64, "documents": pl.Int64}
        return pl.DataFrame(rows, schema=schema | {"bytes": pl.Int64, "flops": pl.Float64})

    def add(
        self,
        name: str,
        scorer: Scorer,
        source: Any,
        *,
        executor: Executor | None = None,
        workers: int | None = None,
        text: str = "text",
        id: str = "id",
        progress: bool = True,
    ) -> Added:
        """Score every document of a source under a name, which becomes the column (``<name>_<column>`` if several).

        Parameters
        ----------
        source
            As for ``documents.shards``: files are the shards, which are the units of work and of resumption.
        executor
            ``processes`` (a pool on this machine, the default), ``serial`` (here; the default for scorers that hold a
            model) or ``ray`` (Ray Data on the running cluster, or a local one; every machine must see the folder).
        workers
            How many at once; the cores, or what the cluster has.
        progress
            A bar on a terminal, on stderr.

        Broken records are set aside (``quarantined``, and ``quarantine.jsonl`` in the folder), and so are documents
        whose id came before, which ``frame`` leaves out. Raises ``InputError`` when not a single document is good, when
        a column has the name already, and for a scorer that gives a wrong shape.
        """
        found = shards(source, text=text, id=id)
        if not getattr(scorer, "fitted", True):  # DSIR without raw texts: the source is the pool
            aside: list[Quarantined] = []
            pool: Any = scorer
            pool.fit(document["text"] for shard in found for _, document in shard.documents(aside.append))
        parts = self._plan(name, scorer, found)
        if executor is None:
            executor = getattr(scorer, "executor", "processes")
        if executor not in EXECUTORS:
            raise unknown("executor", executor, EXECUTORS)
        if workers is not None and workers < 1:
            raise InputError(f"workers is {workers}: at least 1 is expected")
        todo = [part for part in parts if not _fresh(part)]
        reports = []
        with _bar(name, len(parts), len(parts) - len(todo), progress) as advance:
            for report in EXECUTORS[executor](todo, scorer, workers) if todo else ():
                reports.append(report)
                advance(sum(each["scored"] + each["kept"] for each in reports))
        heads = [pq.read_metadata(part.path) for part in parts]
        documents = sum(head.num_rows for head in heads)
        problems = [problem for part in parts for problem in _side(part.path)["quarantined"]]
        if documents == 0:
            why = f": {problems[0]}" if problems else ""
            raise InputError(f"the source has no document that can be scored{why}")
        self._record(name, scorer, parts, heads)
        write_quarantine(self.folder / "quarantine.jsonl", self.quarantined)
        cost = Cost(seconds=sum(r["seconds"] for r in reports), flops=sum(r["flops"] for r in reports))
        charge(flops=cost.flops)
        parts_scored, scored = sum(r["scored"] > 0 for r in reports), sum(r["scored"] for r in reports)
        problems += self._twice(self._manifest()[name])
        return Added(parts_scored, len(parts) - parts_scored, scored, documents - scored, cost, tuple(problems))

    def frame(self, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        """The scores in the order of the documents: ``id``, ``hash``, ``shard`` (its name), ``row`` (of the shard,
        from 0), and a column a score; a score that could not be made is null.

        Raises ``InputError`` for an unknown column, and when two scorers have seen different documents.
        """
        manifest = self._manifest()
        if not manifest:
            raise InputError(f"{self.folder} holds no scores yet: add a scorer first")
        wanted = self.columns if columns is None else list(columns)
        for column in wanted:
            if column not in self.columns:
                raise unknown(f"column of {self.folder}", column, self.columns)
        used = {name: e for name, e in manifest.items() if columns is None or set(e["columns"]) & set(wanted)}
        used = used or dict(list(manifest.items())[:1])
        (first, entry), *others = used.items()
        for other, theirs in others:
            if any(theirs[key] != entry[key] for key in SAME):
                raise InputError(
                    f"{self.folder}: {other!r} and {first!r} scored different documents: add both from one source"
                )
        scans = [
            pl.scan_parquet(self._paths(name, each), glob=False).select(
                *(KEYS if name == first else ()), *(c for c in each["columns"] if c in wanted)
            )
            for name, each in used.items()
        ]
        frame = pl.concat(scans, how="horizontal") if len(scans) > 1 else scans[0]
        if pq.read_metadata(gone := self._duplicates_of(entry)).num_rows:
            frame = frame.join(pl.scan_parquet(gone), on=["shard", "row"], how="anti", maintain_order="left")
        return frame.select(*KEYS, *wanted)

    def comparable(self, *columns: str) -> None:
        """Raise ``InputError`` unless the columns may be subtracted from one another: losses must be of the same
        tokenizer, context and reduction.
        """
        reads = {}
        for column in columns:
            if column not in self.columns:
                raise unknown(f"column of {self.folder}", column, self.columns)
            reads[column] = next(e["reads"] for e in self._manifest().values() if column in e["columns"])
        if different := [column for column in columns if reads[column] != reads[columns[0]]]:
            raise InputError(
                f"columns {columns[0]!r} and {different[0]!r} of {self.folder} cannot be compared: their scorers differ"
                " in tokenizer, context or reduction"
            )

    def _plan(self, name: str, scorer: Scorer, found: list[Shard]) -> list[_Part]:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise InputError(f"{name!r} cannot name a score: letters, digits and _ . + - are expected")
        columns = (name,) if len(scorer.columns) == 1 else tuple(f"{name}_{column}" for column in scorer.columns)
        taken = {c: other for other, e in self._manifest().items() if other != name for c in e["columns"]}
        if clash := sorted(set(columns) & set(taken)):
            raise InputError(
                f"column {clash[0]!r} of {self.folder} comes from {taken[clash[0]]!r}: choose another name"
            )
        if not found:
            raise InputError("the source has no documents")
        key = fingerprint(scorer.fingerprint, columns)
        folder = self._folder(name, key)
        return [_Part(shard, folder / f"{quote(shard.name, safe='')}.parquet", key, columns) for shard in found]

    def _record(self, name: str, scorer: Scorer, parts: list[_Part], heads: list[Any]) -> None:
        digests = [head.metadata[b"documents"].decode() for head in heads]
        entry: dict[str, Any] = {
            "scorer": scorer.name,
            "fingerprint": parts[0].scorer,
            "columns": list(parts[0].columns),
            "reads": getattr(scorer, "reads", None),
            "shards": [part.shard.name for part in parts],
            "documents": fingerprint(digests),
        }
        if not (path := self._duplicates_of(entry)).is_file():
            with atomic_write(path) as file:
                _duplicates(parts).write_parquet(file)
        with locked(self.folder / MANIFEST), atomic_write(self.folder / MANIFEST, "w") as file:
            json.dump(self._manifest() | {name: entry}, file, indent=1, ensure_ascii=False)

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not the index of a score table: {error}") from None

    def _duplicates_of(self, entry: Mapping[str, Any]) -> Path:
        """The file with the rows whose id had come before; one for all scorers of the same documents."""
        return self.folder / "duplicates" / f"{fingerprint(*(entry[key] for key in SAME))}.parquet"

    def _twice(self, entry: Mapping[str, Any]) -> list[Quarantined]:
        fields = ("file", "record", "reason", "id")
        return [Quarantined(**row) for row in pl.read_parquet(self._duplicates_of(entry)).select(fields).to_dicts()]

    def _folder(self, name: str, key: str) -> Path:
        return self.folder / "parts" / f"{name}-{key[:12]}"

    def _paths(self, name: str, entry: Mapping[str, Any]) -> list[Path]:
        folder = self._folder(name, entry["fingerprint"])
        return [folder / f"{quote(shard, safe='')}.parquet" for shard in entry["shards"]]


def _fresh(part: _Part) -> bool:
    """Whether a part is there, and its file is as it was when the part was made."""
    stamp = part.shard.stamp
    return part.path.is_file() and stamp is not None and _side(part.path)["stamp"] == stamp


def _side(path: Path) -> dict[str, Any]:
    """What is known about a part beside its scores: what it cost, what was set aside, what its file looked like."""
    side = path.with_suffix(".json")
    found: dict[str, Any] = {"stamp": None, "quarantined": [], "cost": dict.fromkeys(COSTS, 0)}
    if side.is_file():
        found = json.loads(side.read_text(encoding="utf-8"))
    return found | {"quarantined": [Quarantined(**problem) for problem in found["quarantined"]]}


def _score(part: _Part, scorer: Scorer) -> dict[str, Any]:
    """Score what is not scored yet of one shard, and write the part; the same bytes whoever does it."""
    started, stamp, old = time.perf_counter(), part.shard.stamp, _side(part.path)
    known, before, digest = _known(part)
    problems: list[Quarantined] = []
    keys: list[tuple[str, str, int]] = []
    scores: list[np.ndarray] = []
    scored = size = 0
    with metered(outer=False) as meter:
        for batch in _batches(part.shard.documents(problems.append)):
            here = [(document["id"], content_hash(document["text"]), row) for row, document in batch]
            places = np.array([known.get(key[:2], -1) for key in here])
            new = [document for (_, document), place in zip(batch, places, strict=True) if place < 0]
            values = np.empty((len(batch), len(part.columns)))
            values[places >= 0] = before[places[places >= 0]]
            if new:
                values[places < 0] = _checked(scorer, new, len(part.columns))
            keys += here
            scores.append(values)
            scored += len(new)
            size += sum(len(document["text"].encode()) for document in new)
    if scored or digest != fingerprint(keys):
        _write_part(part, keys, np.concatenate(scores) if scores else np.empty((0, len(part.columns))))
    spent = {"seconds": time.perf_counter() - started, "documents": scored, "bytes": size, "flops": meter.cost.flops}
    side = {
        "stamp": stamp,
        "cost": {key: old["cost"][key] + spent[key] for key in COSTS},
        "quarantined": [asdict(problem) for problem in problems],
    }
    with atomic_write(part.path.with_suffix(".json"), "w") as file:
        json.dump(side, file, ensure_ascii=False)
    return {"scored": scored, "kept": len(keys) - scored, "seconds": spent["seconds"], "flops": spent["flops"]}


def _known(part: _Part) -> tuple[dict[tuple[str, str], int], np.ndarray, str]:
    """The documents that the part on disk has scores for, these scores, and the fingerprint of its documents."""
    if not part.path.is_file():
        return {}, np.empty((0, len(part.columns))), ""
    table = pq.read_table(part.path)
    keys = zip(table["id"].to_pylist(), table["hash"].to_pylist(), strict=True)
    values = np.stack([table[column].to_numpy() for column in part.columns], axis=1)
    return {key: place for place, key in enumerate(keys)}, values, table.schema.metadata[b"documents"].decode()


def _batches(documents: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch: list[tuple[int, Document]] = []
    characters = 0
    for row, document in documents:
        batch.append((row, document))
        characters += len(document["text"])
        if len(batch) == BATCH or characters >= BATCH_CHARS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _checked(scorer: Scorer, documents: Sequence[Document], k: int) -> np.ndarray:
    values = np.asarray(scorer.score(documents))
    if values.shape not in {(len(documents), k), (len(documents),) if k == 1 else None}:
        raise InputError(
            f"scorer {scorer.name!r} gave an array of shape {values.shape} for {len(documents)} documents:"
            f" ({len(documents)}, {k}) is expected"
        )
    return values.reshape(len(documents), k).astype(np.float64)


def _write_part(part: _Part, keys: list[tuple[str, str, int]], values: np.ndarray) -> None:
    ids, hashes, rows = ([key[place] for key in keys] for place in range(3))
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "hash": pa.array(hashes, pa.string()),
            "shard": pa.array([part.shard.name] * len(keys), pa.string()),
            "row": pa.array(rows, pa.int64()),
        }
        | {column: pa.array(values[:, k], from_pandas=True) for k, column in enumerate(part.columns)}
    ).replace_schema_metadata({"scorer": part.scorer, "documents": fingerprint(keys)})
    with atomic_write(part.path) as file:
        pq.write_table(table, file, compression="zstd")


def _duplicates(parts: list[_Part]) -> pl.DataFrame:
    """The rows whose id came before, in the order of the documents, with the problems that say so.

    Ids are compared by 64-bit hashes first, so that memory holds 8 bytes a document and the suspects.
    """
    scan = pl.scan_parquet([part.path for part in parts], glob=False)
    hashes = np.sort(scan.select(pl.col("id").hash()).collect(engine="streaming").to_series().to_numpy())
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    shard_of = {part.shard.name: part.shard for part in parts}
    first: dict[str, tuple[str, int]] = {}
    found = []
    if len(twice):
        suspects = scan.select("id", "shard", "row").filter(pl.col("id").hash().is_in(twice)).collect()
        for name, shard, row in suspects.iter_rows():
            if name in first:
                found.append({"shard": shard, "row": row} | asdict(again(shard_of[shard], row, name, *first[name])))
            else:
                first[name] = (shard, row)
    schema = {"shard": pl.String, "row": pl.Int64, "file": pl.String, "record": pl.Int64, "reason": pl.String}
    return pl.DataFrame(found, schema=schema | {"id": pl.String})


def _serial(parts: Sequence[_Part], scorer: Scorer, workers: int | None) -> Iterator[dict[str, Any]]:
    """Score the parts one after the other in this process."""
    for part in parts:
        yield _score(part, scorer)


def _processes(parts: Sequence[_Part], scorer: Scorer, workers: int | None) -> Iterator[dict[str, Any]]:
    """Score the parts in a pool of spawned processes that share the cores."""
    import cloudpickle

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = min(workers or cores, len(parts))
    if size == 1:
        yield from _serial(parts, scorer, 1)
        return
    payload, queue = cloudpickle.dumps(scorer), list(reversed(parts))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(size, mp_context=context, initializer=_start, initargs=(payload,))
    flying: set[Future[dict[str, Any]]] = set()
    try:
        while queue or flying:
            with _spawning(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(max(1, cores // size)))):
                while queue and len(flying) < 2 * size:
                    flying.add(pool.submit(_score_there, cloudpickle.dumps(queue.pop())))
            ready, flying = wait(flying, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
    except BrokenProcessPool:
        raise DownriverError(
            "a worker process died (out of memory?): the parts that are finished are kept; run it again, with fewer"
            " workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ray(parts: Sequence[_Part], scorer: Scorer, workers: int | None) -> Iterator[dict[str, Any]]:
    """Score the parts with Ray Data: on the cluster that is running, or a local one for the time being."""
    import cloudpickle

    ray, data = require("ray", "ray"), require("ray.data", "ray")
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, logging_level="warning")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        data.DataContext.get_current().enable_progress_bars = False
        size = min(workers or max(1, int(ray.cluster_resources().get("CPU", 1))), len(parts))
        rows = [{"part": cloudpickle.dumps(part)} for part in parts]
        reports = data.from_items(rows, override_num_blocks=len(rows)).map(
            _RayWorker, fn_constructor_args=(cloudpickle.dumps(scorer),), compute=data.ActorPoolStrategy(size=size)
        )
        for report in reports.iter_rows():
            if report["error"]:
                raise DownriverError(report["error"]) if not report["input"] else InputError(report["error"])
            yield report
    except ray.exceptions.RayError as error:
        raise DownriverError(f"Ray could not score the shards: {str(error).splitlines()[0]}") from error
    finally:
        if own:
            ray.shutdown()


class _RayWorker:
    """An actor that holds a scorer and scores the parts it is given; what is wrong with the input it says in a row."""

    def __init__(self, scorer: bytes) -> None:
        self.scorer = pickle.loads(scorer)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return _score(pickle.loads(row["part"]), self.scorer) | {"error": "", "input": False}
        except DownriverError as error:
            none = {"scored": 0, "kept": 0, "seconds": 0.0, "flops": 0.0}
            return none | {"error": str(error), "input": isinstance(error, InputError)}


EXECUTORS: dict[str, Callable[[Sequence[_Part], Scorer, int | None], Iterator[dict[str, Any]]]] = {
    "serial": _serial,
    "processes": _processes,
    "ray": _ray,
}

_held: list[Any] = []  # the scorer of a worker process: its pickle until the first part comes


def _start(payload: bytes) -> None:
    """Begin a worker's life: it ends with its parent, which alone answers to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _held.append(payload)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _score_there(part: bytes) -> dict[str, Any]:
    if isinstance(_held[0], bytes):
        try:
            _held[0] = pickle.loads(_held[0])
        except ImportError as error:
            raise DownriverError(f"a worker process cannot load the scorer: {error}") from error
    return _score(pickle.loads(part), _held[0])


@contextlib.contextmanager
def _spawning(**environment: str) -> Iterator[None]:
    """What a worker finds at its start: its share of the cores, and no script to import again."""
    main, before = sys.modules["__main__"], {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _bar(name: str, total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over the shards on stderr where that is a terminal; call it when one is finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards, {task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(name, total=total, completed=done, documents=0)
        yield lambda documents: bar.update(task, advance=1, documents=documents)
