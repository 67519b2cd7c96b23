"""Tables that users bring (CSV, TSV, JSONL, Parquet), read whole and refused with the column, the row and the value.

Reach for it wherever named columns of a file are needed: runs for a law, rows of a task.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from downriver.core.errors import InputError, unknown

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


def read_table(
    path: str | os.PathLike[str],
    columns: Sequence[str] = (),
    *,
    numeric: Sequence[str] = (),
    text: Sequence[str] = (),
) -> pl.DataFrame:
    """Read a table: ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``, ``.json`` (a list of objects), ``.parquet``.

    All columns come back. Those in ``columns``, ``numeric`` and ``text`` must be there; ``numeric`` ones become
    ``Float64`` and must hold a finite number in every row, ``text`` ones become ``String`` and must be filled in
    every row.

    Raises ``InputError`` naming the file and, where it applies, the column (with the nearest one that exists), the row
    (counted from 1, the header not counted) and the value.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "runs.csv"
    >>> _ = file.write_text("params,loss\\n1e6,3.5\\n2e6,nan\\n")
    >>> read_table(file, numeric=["params"]).height
    2
    >>> read_table(file, numeric=["loss"])
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: .../runs.csv, column 'loss', row 2: 'nan' where a finite number is expected
    """
    file = Path(path)
    table = _read(file, text)
    needed = dict.fromkeys((*columns, *numeric, *text))
    for name in needed:
        if name not in table.columns:
            raise unknown(f"column of {file}", name, table.columns)
    if table.height == 0:
        raise InputError(f"{file} is empty: a header alone, no row")
    return table.with_columns(
        *(_numbers(file, table[name]) for name in dict.fromkeys(numeric)),
        *(_words(file, table[name]) for name in dict.fromkeys(text) if name not in numeric),
    )


def _read(file: Path, text: Sequence[str]) -> pl.DataFrame:
    if not file.is_file():
        raise InputError(f"{file} is not there: a table ({', '.join(FORMATS)}) is expected")
    if file.suffix.lower() not in FORMATS:
        raise InputError(f"{file}: a table ending in {', '.join(FORMATS)} is expected")
    if file.stat().st_size == 0:
        raise InputError(f"{file} is empty")
    as_text = dict.fromkeys(text, pl.String)  # keeps '007' and '1e3' as they are written
    try:
        match file.suffix.lower():
            case ".csv":
                return pl.read_csv(file, infer_schema_length=None, schema_overrides=as_text)
            case ".tsv":
                return pl.read_csv(file, separator="\t", infer_schema_length=None, schema_overrides=as_text)
            case ".json":
                return pl.read_json(file, infer_schema_length=None)
            case ".parquet":
                return pl.read_parquet(file)
            case _:
                return _read_lines(file)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{file} cannot be read as {file.suffix[1:].lower()}: {why}") from error


def _read_lines(file: Path) -> pl.DataFrame:
    try:
        return pl.read_ndjson(file, infer_schema_length=None)
    except (
        pl.exceptions.PolarsError
    ):  # NaN, cells of unequal types, or a broken line: python's slower parser tells which
        rows = []
        for number, line in enumerate(file.read_text("utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number} is not JSON: {error.msg}") from error
            if not isinstance(rows[-1], dict):
                raise InputError(f"{file}, line {number}: an object with named columns is expected") from None
        return pl.from_dicts(rows, infer_schema_length=None, strict=False)


def _numbers(file: Path, cells: pl.Series) -> pl.Series:
    numbers = cells.cast(pl.Float64, strict=False) if cells.dtype.is_numeric() or cells.dtype == pl.String else None
    if numbers is None:
        raise InputError(f"{file}, column {cells.name!r}: numbers are expected, not {cells.dtype}")
    bad = ~numbers.is_finite().fill_null(False)
    if bad.any():
        row = bad.arg_max() or 0
        shown = "an empty cell" if cells[row] is None else repr(str(cells[row]))
        raise InputError(f"{file}, column {cells.name!r}, row {row + 1}: {shown} where a finite number is expected")
    return numbers


def _words(file: Path, cells: pl.Series) -> pl.Series:
    if cells.null_count():
        row = cells.is_null().arg_max() or 0
        raise InputError(f"{file}, column {cells.name!r}, row {row + 1}: an empty cell where text is expected")
    if cells.dtype.is_nested() or cells.dtype == pl.Binary:
        raise InputError(f"{file}, column {cells.name!r}: text is expected, not {cells.dtype}")
    return cells.cast(pl.String)
