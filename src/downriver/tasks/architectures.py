"""Published tables of architectures with what each one reaches: NAS-Bench-Graph, 26 206 graph networks on 9 data sets.

Reach for it to try a predictor of architectures on real scores. Qin et al. 2022, «NAS-Bench-Graph»; the packaged table
(asset ``nas-bench-graph``) is a pickle, which is read here without running anything that a pickle may name: only
containers, numbers and texts are made, and the one numpy number type that the file uses is decoded by this module.
"""

import os
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from downriver.core.errors import InputError

OPERATIONS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")
WIRINGS = (
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 1, 1),
    (0, 0, 1, 2),
    (0, 0, 1, 3),
    (0, 1, 1, 1),
    (0, 1, 1, 2),
    (0, 1, 2, 2),
    (0, 1, 2, 3),
)
"""Where each of the four operations takes its input from: 0 is the cell's input, i the i-th operation."""


@dataclass(frozen=True)
class Architectures:
    """n architectures, sorted by key, and what was measured of each.

    ``links`` (n, 4) and ``operations`` (n, 4), indices into ``OPERATIONS``; ``score`` (n,) on the test set and
    ``validation`` (n,), fractions; ``latency`` in seconds; ``params`` in millions.
    """

    keys: np.ndarray
    links: np.ndarray
    operations: np.ndarray
    score: np.ndarray
    validation: np.ndarray
    latency: np.ndarray
    params: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def nas_bench_graph(path: str | os.PathLike[str]) -> Architectures:
    """Read one ``.bench`` file of the asset ``nas-bench-graph``, such as ``cora.bench``.

    Raises ``InputError`` for a file that is not there, is no such table, or names anything to be run.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "two.bench"
    >>> row = {"valid_perf": 0.8, "perf": 0.7, "latency": 0.01, "para": 0.1}
    >>> _ = file.write_bytes(pickle.dumps({0: row, 81234: row}))
    >>> table = nas_bench_graph(file)
    >>> table.links[1].tolist(), [OPERATIONS[i] for i in table.operations[1]]
    ([0, 1, 2, 3], ['gcn', 'gin', 'cheb', 'sage'])
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} does not exist: a .bench table of nas-bench-graph is expected")
    try:
        with file.open("rb") as stream:
            table = _NumbersOnly(stream).load()
        keys = np.array(sorted(table), np.int64)
        columns = [[float(table[int(k)][c]) for k in keys] for c in ("perf", "valid_perf", "latency", "para")]
        score, validation, latency, params = map(np.array, columns)
        digits = keys[:, None] // 10 ** np.arange(4, -1, -1) % 10  # the wiring, then the four operations
        if keys.max() >= 90_000 or keys.min() < 0 or (digits == 9).any() or not np.isfinite(score).all():
            raise ValueError("a key or a score out of range")
    except InputError:
        raise
    except Exception as error:  # whatever a broken or foreign pickle leads to
        raise InputError(f"{file} is no table of nas-bench-graph ({error})") from None
    return Architectures(keys, np.array(WIRINGS)[digits[:, 0]], digits[:, 1:], score, validation, latency, params)


class _NumbersOnly(pickle.Unpickler):
    """Makes containers, numbers and texts; of the names a pickle may call, numpy's float64 alone, decoded here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _Float64
        if name == "scalar" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _scalar
        raise InputError(f"a table of numbers must not name {module}.{name}: the file is not read")


class _Float64:
    """Stands for numpy's dtype of 64-bit floats, the only one accepted."""

    def __init__(self, kind: str, *flags: bool) -> None:
        if kind != "f8":
            raise ValueError(f"number type {kind!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise ValueError(f"byte order {state[1]!r}")


def _scalar(kind: _Float64, data: bytes) -> float:
    if not isinstance(kind, _Float64):
        raise ValueError("a number without its type")
    return float(struct.unpack("<d", data)[0])
