"""From the raw columns of a table to a task: what kind it is, which class has which id, what is held out for the test.

``from_files`` and ``from_datasets`` both end here; reach for ``from_columns`` when the splits are in memory.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.tasks.leakage import row_keys
from downriver.tasks.task import KINDS, Kind, Task, column, with_column

MOST_INTEGER_CLASSES = 50
log = logging.getLogger(__name__)


def from_columns(
    splits: Mapping[str, datasets.Dataset],
    *,
    name: str,
    text: str | Sequence[str] | None = None,
    image: str | None = None,
    features: Sequence[str] | None = None,
    label: str | None = None,
    group: str | None = None,
    kind: Kind | None = None,
    metrics: Sequence[str] = (),
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Task:
    """A task from splits whose labels may still be words.

    The input is ``text`` (one column, or two for similarity), an ``image`` column, or numeric ``features`` (all numeric
    columns but the label when nothing is named). ``kind`` is inferred where it is not given: no label means language
    modelling; words, booleans and few whole numbers (at most 50, each met twice on average) mean classes; other numbers
    mean regression, or similarity between two texts. Classes are numbered in sorted order of what ``train`` holds.

    With ``train`` alone, ``test_fraction`` of each class is held out as ``test`` by ``seed``; rows with equal inputs
    stay on one side. What was inferred or held out is said in ``Task.notes`` and logged.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"body": [f"mail {i}" for i in range(10)], "box": ["in", "out"] * 5})
    >>> task = from_columns({"train": rows}, name="mail", text="body", label="box")
    >>> task.kind, task.labels, len(task.rows("train")), len(task.rows("test"))
    ('text-classification', ('in', 'out'), 8, 2)
    >>> print(*task.notes, sep="\\n")
    kind text-classification was inferred: column 'box' holds 2 different values
    20% of train (2 of 10 rows) was held out as test with seed 0
    """
    if not splits:
        raise InputError(f"task {name!r} has no split: at least one of train, validation, test is expected")
    if kind is not None and kind not in KINDS:
        raise unknown("task kind", kind, KINDS)
    if sum(given is not None for given in (text, image, features)) > 1:
        raise InputError(f"task {name!r}: one of text, image and features is expected, not several")
    notes: list[str] = []
    for split, rows in splits.items():
        if len(rows) == 0:
            raise InputError(f"task {name!r}, split {split!r} is empty")
    first = next(iter(splits.values()))
    inputs = _inputs(first, text, image, features, label)
    for split, rows in splits.items():
        for wanted in (*inputs, *(c for c in (label, group) if c)):
            if wanted not in rows.column_names:
                raise unknown(f"column of task {name!r}, split {split!r}", wanted, rows.column_names)
    if kind is None:
        kind, why = _infer(first, inputs, text, image, label)
        notes.append(f"kind {kind} was inferred: {why}")
    kept = dict.fromkeys((*inputs, *(c for c in (label, group) if c)))
    found = {split: rows.select_columns(list(kept)) for split, rows in splits.items()}
    labels: tuple[str, ...] = ()
    if kind.endswith("classification") and label is not None:
        found, labels = _number_classes(found, label, name)
    if set(found) == {"train"} and test_fraction > 0:
        found, note = _hold_out(found["train"], inputs, label if labels else group, test_fraction, seed, name)
        notes.append(note)
    for note in notes:
        log.info("task %s: %s", name, note)
    return Task(name, kind, found, inputs, label, labels, tuple(metrics), group, tuple(notes))


def _inputs(
    rows: datasets.Dataset,
    text: str | Sequence[str] | None,
    image: str | None,
    features: Sequence[str] | None,
    label: str | None,
) -> tuple[str, ...]:
    if text is not None:
        return (text,) if isinstance(text, str) else tuple(text)
    if image is not None:
        return (image,)
    if features is not None:
        return tuple(features)
    numeric = [n for n in rows.column_names if n != label and _is_number(rows.data.schema.field(n).type)]
    if not numeric:
        raise InputError(
            f"no input is named and no column but the label is numeric (columns: {', '.join(rows.column_names)})"
        )
    return tuple(numeric)


def _infer(
    rows: datasets.Dataset, inputs: tuple[str, ...], text: Any, image: str | None, label: str | None
) -> tuple[Kind, str]:
    if label is None:
        if text is None:
            raise InputError("no label column is named: only a text column alone (language modelling) does without")
        return "language-modelling", "a text column and no label"
    if image is not None:
        return "image-classification", f"column {image!r} holds images"
    cells = column(rows, label)
    distinct = len(cells.unique())
    few = pa.types.is_integer(cells.type) and distinct <= min(MOST_INTEGER_CLASSES, len(rows) / 2)
    named = isinstance(rows.features[label], datasets.ClassLabel)
    if text is not None and len(inputs) == 2:
        return "text-similarity", "two text columns and a label"
    form = "tabular" if text is None else "text"
    if named or few or not _is_number(cells.type):
        return f"{form}-classification", f"column {label!r} holds {distinct} different values"  # type: ignore[return-value]
    return f"{form}-regression", f"column {label!r} holds numbers, {distinct} different ones"  # type: ignore[return-value]


def _number_classes(
    splits: dict[str, datasets.Dataset], label: str, name: str
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    feature = next(iter(splits.values())).features[label]
    if isinstance(feature, datasets.ClassLabel):
        return splits, tuple(feature.names)
    cells = {split: column(rows, label).to_pylist() for split, rows in splits.items()}
    for split, found in cells.items():
        for row, cell in enumerate(found, start=1):
            if cell is None or (isinstance(cell, float) and not cell.is_integer()):
                raise InputError(
                    f"task {name!r}, split {split!r}, column {label!r}, row {row}: {cell} where a class is expected"
                )
    source = "train" if "train" in cells else next(iter(cells))
    known = cells["train"] if "train" in cells else [cell for found in cells.values() for cell in found]
    if len({isinstance(cell, str) for cell in known}) > 1:
        raise InputError(f"task {name!r}, column {label!r}: words and numbers are mixed")
    classes = sorted(set(known))
    number = {value: i for i, value in enumerate(classes)}
    numbered = {}
    for split, found in cells.items():
        for row, cell in enumerate(found, start=1):
            if cell not in number:
                where = f"task {name!r}, split {split!r}, column {label!r}, row {row}"
                raise InputError(f"{where}: class {cell!r} is met in no row of {source}")
        numbered[split] = with_column(splits[split], label, np.array([number[cell] for cell in found]))
    return numbered, tuple(str(int(c)) if isinstance(c, float) else str(c) for c in classes)


def _hold_out(
    rows: datasets.Dataset, inputs: tuple[str, ...], by: str | None, fraction: float, seed: int, name: str
) -> tuple[dict[str, datasets.Dataset], str]:
    if not 0 < fraction < 1:
        raise InputError(f"test_fraction {fraction}: a share between 0 and 1 is expected")
    strata = np.zeros(len(rows), dtype=np.int64)
    if by is not None:
        strata = np.unique(np.asarray(column(rows, by).to_pylist()), return_inverse=True)[1]
    held = grouped_split(strata, row_keys(rows, inputs), fraction, generator("hold out", name, seed))
    if not held.any() or held.all():
        raise InputError(f"task {name!r}: {len(rows)} rows are too few to hold out {fraction:.0%} as test")
    note = f"{fraction:.0%} of train ({int(held.sum())} of {len(rows)} rows) was held out as test with seed {seed}"
    return {"train": rows.select(np.flatnonzero(~held)), "test": rows.select(np.flatnonzero(held))}, note


def grouped_split(strata: np.ndarray, groups: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which rows are held out: ``fraction`` of each stratum, whole groups only; a stratum of one group stays in.

    A group counts to the stratum of its first row.

    >>> held = grouped_split(np.zeros(6, int), np.array([0, 0, 1, 1, 2, 2]), 0.3, np.random.default_rng(0))
    >>> held.reshape(3, 2).all(axis=1).sum(), held.sum()
    (np.int64(1), np.int64(2))
    """
    _, first, group, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    order = rng.permutation(len(first))
    held = np.zeros(len(first), dtype=bool)
    for stratum in np.unique(strata):
        members = order[strata[first[order]] == stratum]
        wanted = max(1, round(fraction * int(sizes[members].sum())))
        if len(members) > 1:  # groups in random order, up to the one that fills the share, never the last one
            held[members[:-1][np.cumsum(sizes[members])[:-1] - sizes[members][:-1] < wanted]] = True
    return held[group]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
