"""What the commands of ``downriver forecast`` have in common: options, and how rows are printed."""

import json
import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from downriver.forecast import Backtest


class Objective(StrEnum):
    """What a fit minimises."""

    lsq = "lsq"
    huber_log = "huber_log"


OBJECTIVE = Annotated[Objective, typer.Option(help="Least squares on the values, or Huber's loss on logarithms.")]
LEVEL = Annotated[float, typer.Option(min=0.01, max=0.999, help="Level of the intervals.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def forecast_row(forecast: Any, mixed: list[str]) -> dict[str, Any]:
    row = _values("loss", forecast.chain[0]) | _values("error", forecast.chain[1] if len(forecast.chain) > 1 else None)
    return row | {"extrapolation_ratio": forecast.extrapolation_ratio, "warnings": [*mixed, *forecast.warnings]}


def _values(name: str, step: Any) -> dict[str, float | None]:
    values = (step.value, step.low, step.high) if step else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(finite, values), strict=True))


def hidden_rows(test: "Backtest") -> list[dict[str, Any]]:
    """One row a hidden run."""
    x_name = test.x_name.replace(" ", "_").lower()
    names = ("metric", x_name, "reached", "forecast", "forecast_low", "forecast_high", "relative_error")
    columns = (test.held_x, test.held_y, test.predicted, test.low, test.high, test.relative_errors)
    return [dict(zip(names, (test.y_name, *map(finite, row)), strict=True)) for row in zip(*columns, strict=True)]


def finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print_rows(rows)


def print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [name for name in rows[0] if name != "warnings" and not name.endswith(("_low", "_high"))]
    names = [name for name in names if any(row[name] is not None for row in rows)]
    table = Table(*(name.replace("_", " ") for name in names), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(shown(name, row) for name in names))
    console = Console()
    console.print(table)
    for said in dict.fromkeys(w for row in rows for w in row.get("warnings", [])):
        console.print(f"note: {said}", highlight=False)


def shown(name: str, row: dict[str, Any]) -> str:
    """One cell: a number with its interval, where the row has one."""
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if name == "relative_error":
        return f"{value:+.2%}"
    return f"{value:.4g}" + (f" ({low:.4g} to {high:.4g})" if low is not None else "")
