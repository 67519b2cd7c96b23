"""The k best of any number of scores, exactly, in memory that does not grow with their number.

Reach for it when a table of scores is larger than memory: one pass over a ``.npy`` file or Parquet. What is held is the
k best so far and one portion; a score below the k-th best so far is never looked at again.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.data.select.rules import keys

PORTION = 1 << 20
"""Scores read at once."""


@dataclass(frozen=True)
class Best:
    """The chosen ``rows`` (k,) ascending, counted from 0 over all files, their ``scores`` (k,), the lowest of them
    (``threshold``), and of how many (``seen``)."""

    rows: np.ndarray
    scores: np.ndarray
    threshold: float
    seen: int


def best_rows(source: Any, k: int, *, column: str = "score", id: str = "id", portion: int = PORTION) -> Best:
    """The rows with the k highest scores.

    ``source`` is a ``.npy`` file of one dimension, a Parquet file or a folder of them (the numbers of ``column``), or
    an array. Equal scores are told apart by a hash of ``id`` where the file has that column, so that the order of rows
    has no part in it, and else by a hash of the row. State: k scores, hashes and rows (twice at most) and a portion.

    Raises ``InputError`` for fewer than k scores, for NaN (naming the row) and for files of another kind.

    >>> best = best_rows(np.array([0.1, 0.9, 0.5, 0.7]), 2)
    >>> best.rows.tolist(), best.threshold
    ([1, 3], 0.7)
    """
    if k < 1 or portion < 1:
        raise InputError(f"k is {k} and portion {portion}: at least 1 is expected")
    held = _Held(k)
    seen = 0
    for scores, ids in _portions(source, column, id, portion):
        if np.isnan(scores).any():
            raise InputError(f"row {seen + int(np.isnan(scores).argmax())} of the scores is NaN: a number is expected")
        near = np.flatnonzero(scores >= held.floor)
        rows = near + seen
        ties = _mixed(rows) if ids is None else keys([ids[i] for i in near.tolist()])
        held.add(scores[near], ties, rows)
        seen += len(scores)
    if seen < k:
        raise InputError(f"k is {k} and there are {seen} scores: a budget within the pool is expected")
    held.shrink()
    order = np.argsort(held.rows)
    return Best(held.rows[order], held.scores[order], held.floor, seen)


def top_rows(scores: np.ndarray, k: int, ids: Sequence[str]) -> np.ndarray:
    """The rows of the k highest of the scores in memory, ascending; ties by a hash of the id, as in ``best_rows``.

    >>> top_rows(np.array([1.0, 2.0, 2.0]), 1, ["a", "b", "c"]).tolist()
    [1]
    """
    if k >= len(scores):
        return np.arange(len(scores))
    if k == 0:
        return np.arange(0)
    floor = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, tied = np.flatnonzero(scores > floor), np.flatnonzero(scores == floor)
    if len(above) + len(tied) > k:
        tied = tied[np.argsort(keys([ids[i] for i in tied.tolist()]), kind="stable")[: k - len(above)]]
    return np.sort(np.concatenate([above, tied]))


class _Held:
    """The best so far. ``floor`` is the lowest score that can still be among them."""

    def __init__(self, k: int) -> None:
        self.k, self.floor, self.waiting = k, -np.inf, 0
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.scores, self.ties, self.rows = np.empty(0), np.empty(0, np.uint64), np.empty(0, np.int64)

    def add(self, *part: np.ndarray) -> None:
        self.parts.append(part)  # type: ignore[arg-type]
        self.waiting += len(part[0])
        if self.waiting >= self.k:
            self.shrink()

    def shrink(self) -> None:
        parts = [(self.scores, self.ties, self.rows), *self.parts]
        scores, ties, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.parts, self.waiting = [], 0
        if len(scores) > self.k:
            floor = np.partition(scores, len(scores) - self.k)[len(scores) - self.k]
            above, tied = np.flatnonzero(scores > floor), np.flatnonzero(scores == floor)
            tied = tied[np.argsort(ties[tied], kind="stable")[: self.k - len(above)]]
            kept = np.concatenate([above, tied])
            scores, ties, rows = scores[kept], ties[kept], rows[kept]
        self.scores, self.ties, self.rows = scores, ties, rows
        if len(scores) == self.k:
            self.floor = float(scores.min())


def _portions(source: Any, column: str, id: str, portion: int) -> Iterator[tuple[np.ndarray, Sequence[str] | None]]:
    if isinstance(source, np.ndarray):
        for start in range(0, len(source), portion):
            yield source[start : start + portion], None
        return
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a {type(source).__name__} holds no scores to read: a file, a folder or an array is expected")
    path = Path(source)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"{path}: a .npy file, or Parquet files, are expected")
    for file in files:
        if file.suffix == ".npy":
            yield from ((scores, None) for scores in _npy(file, portion))
        elif file.suffix == ".parquet":
            yield from _parquet(file, column, id, portion)
        else:
            raise InputError(f"{file}: a file ending in .npy or .parquet is expected")


def _npy(path: Path, portion: int) -> Iterator[np.ndarray]:
    with path.open("rb") as file:  # read, not mapped: mapped pages count as memory of the process
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError as error:
            raise InputError(f"{path} is no .npy file: {error}") from None
        if len(shape) != 1 or dtype.kind not in "fiu":
            raise InputError(f"{path} has shape {shape} of {dtype}: one dimension of numbers is expected")
        left = shape[0]
        while left:
            scores = np.fromfile(file, dtype, min(portion, left))
            if len(scores) == 0:
                raise InputError(f"{path} ends {left} scores too early")
            left -= len(scores)
            yield scores


def _parquet(path: Path, column: str, id: str, portion: int) -> Iterator[tuple[np.ndarray, Sequence[str] | None]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise unknown(f"column of {path}", column, names)
        wanted = [column, *([id] if id in names else [])]
        for batch in file.iter_batches(batch_size=portion, columns=wanted):
            scores = batch.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
            yield scores, _Ids(batch.column(id)) if id in names else None


class _Ids(Sequence[str]):
    """An Arrow column of ids, of which only those that are asked for become strings."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, place: Any) -> Any:
        return str(self.column[int(place)].as_py())


def _mixed(rows: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers (the finaliser of splitmix64)."""
    z = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
