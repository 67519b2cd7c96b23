"""Tasks from the user's own CSV, TSV, JSONL or Parquet files.

Reach for it with one file, of which a part is held out as test, or with a file a split.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import polars as pl

from downriver.core.errors import InputError
from downriver.core.table import read_table
from downriver.tasks.columns import from_columns
from downriver.tasks.task import Kind, Task


def from_files(
    train: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    validation: str | os.PathLike[str] | None = None,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    image: str | None = None,
    features: Sequence[str] | None = None,
    group: str | None = None,
    kind: Kind | None = None,
    name: str | None = None,
    metrics: Sequence[str] = (),
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Task:
    """A task from files with named columns: ``text`` (or two of them), ``image`` (paths), or numeric ``features``.

    What is not said is inferred, and then said in ``Task.notes``: the kind from the label column, the features of a
    table (all its numeric columns), and, with ``train`` alone, a stratified ``test`` of ``test_fraction`` of the rows
    chosen by ``seed`` (see ``from_columns``). ``name`` defaults to the name of the first file. Image paths count from
    the folder of their file.

    Raises ``InputError`` naming the file, column, row and value that are not as expected.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "films.csv"
    >>> _ = file.write_text("review,stars\\n" + "".join(f"film number {i},{i % 2}\\n" for i in range(20)))
    >>> task = from_files(file, text="review", label="stars")
    >>> task.name, task.kind, {split: len(rows) for split, rows in task.splits.items()}
    ('films', 'text-classification', {'train': 16, 'test': 4})
    """
    paths = {"train": train, "validation": validation, "test": test}
    given = {split: Path(path) for split, path in paths.items() if path is not None}
    if not given:
        raise InputError("from_files: a file for at least one of train, validation and test is expected")
    texts = [text] if isinstance(text, str) else list(text or ())
    numeric = [*(features or ()), *([label] if label and kind and not kind.endswith("classification") else ())]
    others = [c for c in (label, image, group) if c]
    splits = {}
    for split, path in given.items():
        table = read_table(path, others, numeric=numeric, text=[*texts, *([image] if image else ())])
        if image:
            table = table.with_columns(_existing(path, table[image]))
        rows = datasets.Dataset.from_polars(table)
        splits[split] = rows.cast_column(image, datasets.Image()) if image else rows
    return from_columns(
        splits,
        name=name or next(iter(given.values())).stem,
        text=text,
        image=image,
        features=features,
        label=label,
        group=group,
        kind=kind,
        metrics=metrics,
        test_fraction=test_fraction,
        seed=seed,
    )


def _existing(path: Path, cells: pl.Series) -> pl.Series:
    files = [path.parent / cell for cell in cells]
    for row, file in enumerate(files, start=1):
        if not file.is_file():
            raise InputError(f"{path}, column {cells.name!r}, row {row}: there is no image file {file}")
    return pl.Series(cells.name, [str(file.resolve()) for file in files])
