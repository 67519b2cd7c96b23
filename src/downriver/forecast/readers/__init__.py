"""Readers of the layouts in which runs are kept; a user reaches them as ``RunTable.from_...``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downriver.core.errors import InputError, unknown
from downriver.core.table import read_table
from downriver.forecast.fit import column

Sizes = Mapping[str, tuple[float, ...]]  # a run's parameters and tokens, and its loss where a third number is given


def read_json(file: Path) -> Any:
    """The content of a JSON file; ``InputError`` where it is absent or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is not there") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error


def read_sizes(sizes: Any, needs: str = "tokens") -> dict[str, dict[str, float]]:
    """Parameters, tokens and, where given, the loss of each run, from a mapping or from a table with a name column.

    ``needs`` is the one that must be there.

    >>> read_sizes({"pythia-70m": (7e7, 3e11)})
    {'pythia-70m': {'params': 70000000.0, 'tokens': 300000000000.0}}
    """
    if isinstance(sizes, Mapping):
        found = {str(name): dict(zip(("params", "tokens", "loss"), row, strict=False)) for name, row in sizes.items()}
    else:
        names = read_table(sizes).columns
        key = next((name for name in ("model", "run", "name") if name in names), None)
        if key is None:
            raise InputError(f"{sizes}: a column 'model' (or 'run', 'name') is expected beside {needs!r}")
        numeric = [name for name in ("params", "tokens", "loss") if name in names or name == needs]
        frame = read_table(sizes, numeric=numeric, text=[key])
        found = {row[key]: {name: row[name] for name in numeric} for row in frame.iter_rows(named=True)}
        if len(found) < frame.height:
            raise InputError(f"{sizes}: column {key!r} names a run twice")
    for name, row in found.items():
        for what, value in row.items():
            row[what] = float(column(f"{what} of {name}", [value])[0])
        if needs not in row:
            raise InputError(f"sizes of {name}: parameters and tokens are expected")
    return found


def size_of(names: list[str], sizes: dict[str, dict[str, float]]) -> dict[str, float]:
    """The entry of a run known under several names; ``InputError`` with the nearest one where there is none."""
    for name in names:
        if name in sizes:
            return sizes[name]
    raise unknown("run in the table of sizes", names[0], sizes)
