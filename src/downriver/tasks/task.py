"""A downstream task: its splits, what goes in, what must come out, and how it is scored.

Reach for it through ``tasks.load``; build it by hand from ``datasets.Dataset`` splits when they are in memory already.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator

Kind = Literal[
    "text-classification",
    "text-regression",
    "text-similarity",
    "language-modelling",
    "image-classification",
    "tabular-classification",
    "tabular-regression",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS = ("train", "validation", "test")
DEFAULT_METRICS = {
    "classification": ("accuracy", "macro_f1", "loss", "ece"),
    "regression": ("rmse", "r2", "spearman"),
    "similarity": ("spearman",),
    "modelling": ("loss", "bits_per_byte"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Splits of one data set, checked once, so that no method has to check them again.

    ``splits`` maps any of ``train``, ``validation`` and ``test`` to a ``datasets.Dataset``; ``inputs`` names the
    columns that a model reads: ``("text",)``, ``("text_a", "text_b")`` for similarity, ``("image",)``, or the feature
    columns of a table, each a number or a vector of one length. ``target`` is the label column: class ids ``0..K-1``
    for classification, finite numbers for regression and similarity, ``None`` for language modelling, where ``group``
    may name the column of the domain. ``labels`` defaults to the ids themselves and ``metrics`` to those usual for
    the kind. ``notes`` say in words what was inferred or split on the way.

    Raises ``InputError`` naming the split and the column: empty split, missing column, empty cells, a class id out of
    range, one class only, text or non-finite numbers where numbers belong.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": ["good", "bad", "fine", "poor"], "label": [1, 0, 1, 0]})
    >>> task = Task("mood", "text-classification", {"train": rows}, ("text",), "label", labels=("neg", "pos"))
    >>> task.targets("train").tolist(), task.metrics[0]
    ([1, 0, 1, 0], 'accuracy')
    >>> len(task.sample("train", 2, seed=0).rows("train"))
    2
    """

    name: str
    kind: Kind
    splits: Mapping[str, datasets.Dataset]
    inputs: tuple[str, ...]
    target: str | None
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    group: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("task kind", self.kind, KINDS)
        if not self.splits:
            raise InputError(f"task {self.name!r} has no split: at least one of {', '.join(SPLITS)} is expected")
        for split in self.splits:
            if split not in SPLITS:
                raise unknown(f"split of task {self.name!r}", split, SPLITS)
        for field in ("inputs", "labels", "metrics", "notes"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        object.__setattr__(self, "splits", {s: self.splits[s] for s in SPLITS if s in self.splits})
        if not self.metrics:
            object.__setattr__(self, "metrics", DEFAULT_METRICS[self.kind.split("-")[1]])
        expected = {"text-similarity": 2, "tabular-classification": None, "tabular-regression": None}.get(self.kind, 1)
        if not self.inputs or (expected and len(self.inputs) != expected):
            raise InputError(
                f"task {self.name!r}: {self.kind} takes {expected or 'some'} input column(s), not {self.inputs}"
            )
        if (self.target is None) != (self.kind == "language-modelling"):
            raise InputError(f"task {self.name!r}: {self.kind} with target column {self.target!r}")
        for split, rows in self.splits.items():
            self._check(split, rows)
        if self.classification:
            self._check_classes()

    @property
    def classification(self) -> bool:
        """Whether the target is a class id."""
        return self.kind.endswith("classification")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twenty hexadecimal digits of the content: kind, columns, labels, metrics, every value, but not the name."""
        digest = hashlib.sha256(
            repr((self.kind, self.inputs, self.target, self.labels, self.metrics, self.group)).encode()
        )
        for split, rows in self.splits.items():
            digest.update(f"{split}:{len(rows)}".encode())
            digest.update(_hash(rows, self._columns))
        return digest.hexdigest()[:20]

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split; an unknown split is an ``InputError`` that lists those there are."""
        if split not in self.splits:
            raise unknown(f"split of task {self.name!r}", split, self.splits)
        return self.splits[split]

    def targets(self, split: str) -> np.ndarray:
        """The target of every row of a split: int64 class ids, or float64 values."""
        if self.target is None:
            raise InputError(f"task {self.name!r} is language modelling: it has no target")
        return values(self.rows(split), self.target).astype(np.int64 if self.classification else np.float64)

    def texts(self, split: str) -> list[str]:
        """The text of every row of a split (two texts of a row are joined by a line break)."""
        if not self.kind.startswith(("text", "language")):
            raise InputError(f"task {self.name!r} is {self.kind}: it has no text")
        columns = [column(self.rows(split), name).to_pylist() for name in self.inputs]
        return ["\n".join(parts) for parts in zip(*columns, strict=True)]

    def subset(self, split: str, indices: Iterable[int]) -> "Task":
        """The same task with ``split`` cut to these rows, in this order; the other splits stay as they are."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        n = len(self.rows(split))
        if chosen.size and (chosen.min() < 0 or chosen.max() >= n):
            raise InputError(f"task {self.name!r}: a row index lies outside the {n} rows of {split}")
        return dataclasses.replace(self, splits={**self.splits, split: self.rows(split).select(chosen)})

    def sample(self, split: str, n: int, *, seed: int, stratify: bool = True) -> "Task":
        """``split`` cut to ``n`` rows, in their old order; classes (or domains) keep their shares when ``stratify``.

        With one ``seed`` a smaller sample is contained in every larger one, and every class is met as soon as ``n``
        is at least the number of classes.
        """
        total = len(self.rows(split))
        if not 1 <= n <= total:
            raise InputError(f"task {self.name!r}: a sample of {n} rows from {split}, which has {total}")
        order = stratified_order(self._strata(split, stratify), generator("sample", self.name, split, seed))
        return self.subset(split, np.sort(order[:n]))

    def only(self, labels: Sequence[str | int]) -> "Task":
        """The rows of these classes, given by name or id, numbered anew in the given order, in every split."""
        if not self.classification:
            raise InputError(f"task {self.name!r} is {self.kind}: it has no classes")
        for label in labels:
            if label not in self.labels and not (isinstance(label, int) and 0 <= label < len(self.labels)):
                raise unknown(f"label of task {self.name!r}", label, self.labels)
        ids = [self.labels.index(label) if isinstance(label, str) else label for label in labels]
        if len(set(ids)) != len(ids):
            raise InputError(f"task {self.name!r}: a label is named twice among {list(labels)}")
        new = np.full(len(self.labels), -1)
        new[ids] = np.arange(len(ids))
        splits = {}
        for split, rows in self.splits.items():
            renumbered = new[self.targets(split)]
            splits[split] = with_column(rows, str(self.target), renumbered).select(np.flatnonzero(renumbered >= 0))
        return dataclasses.replace(self, splits=splits, labels=tuple(self.labels[i] for i in ids))

    def halves(self, split: str, seed: int) -> tuple["Task", "Task"]:
        """Two tasks whose ``split`` are disjoint halves of this one's, each with the same shares of the classes."""
        strata = self._strata(split, True)
        order = stratified_order(strata, generator("halves", self.name, split, seed))
        rank = np.empty(len(order), dtype=np.int64)
        for turn, stratum in enumerate(np.unique(strata)):  # an odd class gives its extra row to the halves by turns
            members = order[strata[order] == stratum]
            rank[members] = np.arange(len(members)) + turn
        first, second = (np.flatnonzero(rank % 2 == side) for side in (0, 1))
        return self.subset(split, first), self.subset(split, second)

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*self.inputs, *(name for name in (self.target, self.group) if name))

    def _strata(self, split: str, stratify: bool) -> np.ndarray:
        if stratify and self.classification:
            return self.targets(split)
        if stratify and self.group:
            return np.unique(values(self.rows(split), self.group), return_inverse=True)[1]
        return np.zeros(len(self.rows(split)), dtype=np.int64)

    def _check(self, split: str, rows: datasets.Dataset) -> None:
        where = f"task {self.name!r}, split {split!r}"
        if not isinstance(rows, datasets.Dataset):
            raise InputError(f"{where}: a datasets.Dataset is expected, not {type(rows).__name__}")
        if len(rows) == 0:
            raise InputError(f"{where} is empty")
        for name in self._columns:
            if name not in rows.column_names:
                raise unknown(f"column of {where}", name, rows.column_names)
        if self.kind.startswith("image"):
            feature = rows.features[self.inputs[0]]
            if not isinstance(feature, datasets.Image | datasets.Array2D | datasets.Array3D):
                raise InputError(f"{where}, column {self.inputs[0]!r}: images are expected, not {feature}")
        table = arrow(rows, self._columns)
        for name in self._columns:
            self._check_column(f"{where}, column {name!r}", name, table.column(name))

    def _check_column(self, where: str, name: str, cells: pa.ChunkedArray) -> None:
        if cells.null_count:
            first = pc.index(pc.is_null(cells), True).as_py() + 1
            raise InputError(f"{where}: {cells.null_count} empty cell(s), the first in row {first}")
        if name in self.inputs and self.kind.startswith(("text", "language")):
            if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
                raise InputError(f"{where}: text is expected, not {cells.type}")
        elif name in self.inputs and pa.types.is_nested(cells.type) and self.kind.startswith("tabular"):
            self._check_vectors(where, cells)
        elif name == self.target or (name in self.inputs and self.kind.startswith("tabular")):
            self._check_numbers(where, cells, ids=name == self.target and self.classification)

    def _check_numbers(self, where: str, cells: pa.ChunkedArray, ids: bool) -> None:
        whole = pa.types.is_integer(cells.type)
        if ids and not whole:
            raise InputError(f"{where}: class ids 0, 1, 2, ... are expected, not {cells.type}")
        if not (whole or pa.types.is_floating(cells.type)):
            raise InputError(f"{where}: numbers are expected, not {cells.type}")
        found = cells.to_numpy()
        bad = (found < 0) | (found >= (len(self.labels) or np.inf)) if ids else ~np.isfinite(found)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            expected = f"a class id from 0 to {len(self.labels) - 1}" if ids and self.labels else "a finite number"
            expected = "a class id from 0 up" if ids and not self.labels else expected
            raise InputError(f"{where}, row {row + 1}: {found[row]} where {expected} is expected")

    def _check_vectors(self, where: str, cells: pa.ChunkedArray) -> None:
        if not (pa.types.is_list(cells.type) or pa.types.is_fixed_size_list(cells.type)):
            raise InputError(f"{where}: numbers or vectors are expected, not {cells.type}")
        lengths = pc.unique(pc.list_value_length(cells)).to_pylist()
        if len(lengths) > 1:
            raise InputError(f"{where}: vectors of one length are expected, not of {min(lengths)} to {max(lengths)}")
        self._check_numbers(
            f"{where}, its vectors' {lengths[0]} numbers laid end to end", pc.list_flatten(cells), False
        )

    def _check_classes(self) -> None:
        met = {split: np.unique(self.targets(split)) for split in self.splits}
        if not self.labels:
            classes = 1 + max(int(ids.max()) for ids in met.values())
            object.__setattr__(self, "labels", tuple(str(i) for i in range(classes)))
        split = "train" if "train" in met else max(met, key=lambda s: len(met[s]))
        if len(met[split]) < 2:
            only = self.labels[int(met[split][0])]
            raise InputError(
                f"task {self.name!r}, split {split!r}, column {self.target!r}: one class only ({only!r}), "
                "two at least are expected"
            )


def column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """One column as Arrow holds it, without decoding images."""
    return arrow(rows, [name]).column(0)


def arrow(rows: datasets.Dataset, names: Sequence[str]) -> pa.Table:
    """Some columns as an Arrow table, without decoding images."""
    return rows.select_columns(list(dict.fromkeys(names))).with_format("arrow")[:]


def values(rows: datasets.Dataset, name: str) -> np.ndarray:
    """One column of numbers or words as a numpy array."""
    return np.asarray(column(rows, name).to_numpy())


def stratified_order(strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of the rows in which every prefix holds each stratum in its share; first of all one row of each.

    >>> strata = np.array([0] * 90 + [1] * 10)
    >>> order = stratified_order(strata, np.random.default_rng(0))
    >>> np.bincount(strata[order[:50]]).tolist()
    [45, 5]
    """
    shuffled = rng.permutation(len(strata))
    key = np.empty(len(strata))
    for stratum in np.unique(strata):
        members = shuffled[strata[shuffled] == stratum]
        key[members] = (np.arange(len(members)) + 0.5) / len(members)
        key[members[0]] = 0.0
    return shuffled[np.argsort(key[shuffled], kind="stable")]


def with_column(rows: datasets.Dataset, name: str, numbers: np.ndarray) -> datasets.Dataset:
    """The rows with one column replaced by whole numbers."""
    table = rows.with_format("arrow")[:]
    table = table.set_column(table.column_names.index(name), name, pa.array(numbers, pa.int64()))
    features = datasets.Features({**rows.features, name: datasets.Value("int64")})
    return datasets.Dataset(table.replace_schema_metadata(None), info=datasets.DatasetInfo(features=features))


def _hash(rows: datasets.Dataset, names: Sequence[str]) -> bytes:
    """The sha256 of the values of some columns, however they are stored; image files that a row points to are read."""
    digests = {name: hashlib.sha256() for name in names}
    for batch in rows.select_columns(list(digests)).with_format("arrow").iter(1024):
        for name, digest in digests.items():
            for value in batch.column(name).to_pylist():
                digest.update(repr(_image_bytes(value)).encode("utf-8", "surrogatepass") + b"\0")
    return b"".join(digest.digest() for digest in digests.values())


def _image_bytes(value: Any) -> Any:
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
        return value["bytes"] or Path(value["path"]).read_bytes()
    return value
