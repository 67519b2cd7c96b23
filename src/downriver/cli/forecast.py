"""``downriver forecast``: fit a law to a table of runs, forecast a plan, and test the law on the runs it has."""

import json
import math
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from downriver.core.errors import InputError, unknown

if TYPE_CHECKING:
    from downriver.forecast import Backtest, Chain, RunTable

app = typer.Typer(help="Predict a large run from small ones, with intervals and a test.", no_args_is_help=True)


class LawName(StrEnum):
    """The laws that a table can be fitted with."""

    overtraining = "overtraining"
    chinchilla = "chinchilla"
    learning_curve = "learning-curve"


class Objective(StrEnum):
    """What a fit minimises."""

    lsq = "lsq"
    huber_log = "huber_log"


RUNS = Annotated[
    Path, typer.Argument(help="A CSV, JSONL or Parquet table of runs: params, tokens, loss[, error][, group].")
]
LAW = Annotated[LawName, typer.Option("--law", help="Which law.")]
OBJECTIVE = Annotated[Objective, typer.Option(help="Least squares on the values, or Huber's loss on logarithms.")]
GROUP = Annotated[str | None, typer.Option(help="Only the runs of this group.")]
LEVEL = Annotated[float, typer.Option(min=0.01, max=0.999, help="Level of the intervals.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command()
def fit(
    runs: RUNS,
    law: LAW = LawName.overtraining,
    predict: Annotated[Path | None, typer.Option(help="A table of targets: params and tokens.")] = None,
    objective: OBJECTIVE = Objective.lsq,
    group: GROUP = None,
    level: LEVEL = 0.95,
    as_json: JSON = False,
) -> None:
    """Fit a law to RUNS and print it; with --predict, forecast every row of a plan, in its order.

    Where RUNS has several groups, the plan may name one in each row (column group); without that, and without --group,
    all runs are fitted together and every forecast says so. A learning curve is fitted to the columns examples and
    error (else tokens, else loss), and its plan has the first of them.
    """
    forecast = _curve_forecasts if law is LawName.learning_curve else _run_forecasts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all of them are said in the output
        found = forecast(runs, law, predict, objective, group, level)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    elif predict:
        _print(found)
    else:
        typer.echo("\n".join(one["report"] for one in found))


@app.command()
def backtest(
    runs: RUNS,
    law: LAW = LawName.overtraining,
    hide: Annotated[int, typer.Option(min=1, help="How many of the largest runs to hide.")] = 1,
    metric: Annotated[str, typer.Option(help="loss, or a metric of the table such as error.")] = "loss",
    objective: OBJECTIVE = Objective.lsq,
    group: GROUP = None,
    level: LEVEL = 0.9,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this PNG file.")] = None,
    as_json: JSON = False,
) -> None:
    """Hide the largest runs, forecast them from the rest, and say how far off the law was."""
    from downriver.forecast.backtest import backtest as run_test

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if law is LawName.learning_curve:
            _, x, _, y = _points(runs, group)
            test = run_test(_law(law, objective), (x, y), hide, level=level)
        else:
            test = run_test(_law(law, objective), _table(runs, group), hide, metric=metric, level=level)
    if plot:
        from downriver.forecast.plot import plot as draw

        draw(test, plot)
    typer.echo(json.dumps(_hidden(test), indent=1, allow_nan=False) if as_json else test.text)


@app.command("testbed")
def public_testbed(
    folder: Annotated[Path, typer.Argument(help="exp_data of github.com/mlfoundations/scaling.")],
    objective: OBJECTIVE = Objective.lsq,
    as_json: JSON = False,
) -> None:
    """Test the over-training law on its public testbed, on every evaluation set, by the paper's own recipe.

    Five small runs are fitted; the largest over-trained run and the 6.9B run are forecast. Errors of downstream tasks
    come through the chain, whose error law has also seen the 1.4B run at 20 tokens a parameter.
    """
    from downriver.forecast import RunTable
    from downriver.forecast.testbed import recipe

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        table, found = RunTable.from_testbed(folder), []
        for group in sorted(set(table.groups)):
            for what, test in recipe(table.group(group), objective.value).items():
                found += [{"trained_on": group} | row | {"metric": what} for row in _hidden(test)]
    if as_json:
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
    else:
        _print(found)
        inside = sum(row["forecast_low"] <= row["reached"] <= row["forecast_high"] for row in found)
        typer.echo(f"{inside} of {len(found)} lie inside the 90 % interval")


def _law(law: LawName, objective: Objective) -> Any:
    from downriver.forecast import LearningCurve, OverTrainingLaw

    if law is LawName.learning_curve:
        return LearningCurve(loss=objective.value)
    return OverTrainingLaw(tied_exponent=law is LawName.overtraining, loss=objective.value)


def _table(path: Path, group: str | None) -> "RunTable":
    from downriver.forecast import RunTable

    table = RunTable.read(path)
    return table if group is None else table.group(group)


def _run_forecasts(
    path: Path, law: LawName, plan: Path | None, objective: Objective, group: str | None, level: float
) -> list[dict[str, Any]]:
    from downriver.core.table import read_table
    from downriver.forecast import Chain

    table = _table(path, group)
    groups = sorted(set(table.groups))

    def chain(runs: "RunTable") -> "Chain":
        return Chain(_law(law, objective), metric="error" if "error" in runs.metrics else "loss").fit(runs)

    if plan is None:
        return [_described(chain(table.group(name)), name, level) for name in groups]
    targets = read_table(plan, numeric=["params", "tokens"])
    apart = len(groups) > 1 and "group" in targets.columns
    names = [str(name) for name in targets["group"]] if apart else [""] * targets.height
    chains = {name: chain(table.group(name) if apart else table) for name in dict.fromkeys(names)}
    pooled = len(groups) > 1 and not apart
    mixed = [f"{len(groups)} groups are fitted together: {', '.join(groups)}"] if pooled else []
    found = []
    for name, N, D in zip(names, targets["params"], targets["tokens"], strict=True):
        said = chains[name].forecast(N, D, level)
        row = {"params": N, "tokens": D} | _values("loss", said.chain[0])
        row |= _values("error", said.chain[1] if len(said.chain) > 1 else None)
        found.append(row | {"extrapolation_ratio": said.extrapolation_ratio, "warnings": [*mixed, *said.warnings]})
    return found


def _curve_forecasts(
    path: Path, law: LawName, plan: Path | None, objective: Objective, group: str | None, level: float
) -> list[dict[str, Any]]:
    from downriver.core.table import read_table

    x_name, x, y_name, y = _points(path, group)
    curve = _law(law, objective).fit(x, y)
    if plan is None:
        return [_fitted(curve, group or "", level)]
    found = []
    for n in read_table(plan, numeric=[x_name])[x_name]:
        low, high = curve.interval([n], level)
        values = {y_name: curve.predict(n), f"{y_name}_low": _finite(low[0]), f"{y_name}_high": _finite(high[0])}
        said = [*curve.cautions(), *curve.cautions_at(n)]
        if curve.range_[0] <= n <= curve.range_[1]:
            said.append("the target lies inside the range of the fitted sizes: an interpolation, not a forecast")
        found.append({x_name: n} | values | {"extrapolation_ratio": curve.extrapolation_ratio(n), "warnings": said})
    return found


def _points(path: Path, group: str | None) -> tuple[str, Any, str, Any]:
    """The names and columns of a learning curve: examples (else tokens) and error (else loss)."""
    import polars as pl

    from downriver.core.table import read_table

    columns = read_table(path).columns
    x_name = "tokens" if "tokens" in columns and "examples" not in columns else "examples"
    y_name = "loss" if "loss" in columns and "error" not in columns else "error"
    frame: pl.DataFrame = read_table(path, numeric=[x_name, y_name], text=[] if group is None else ["group"])
    if group is not None:
        if group not in frame["group"]:
            raise unknown("group", group, frame["group"].unique())
        frame = frame.filter(pl.col("group") == group)
    if "params" in frame.columns and frame["params"].n_unique() > 1:
        raise InputError(f"{path}: a learning curve is of one model, and column 'params' has several values")
    return x_name, frame[x_name].to_numpy(), y_name, frame[y_name].to_numpy()


def _described(chain: "Chain", group: str, level: float) -> dict[str, Any]:
    found = _fitted(chain.law, group, level)
    if chain.error_law:
        error = _fitted(chain.error_law, group, level)
        found |= {"report": f"{found['report']}\n{error['report']}", "error_law": error}
    return found


def _fitted(law: Any, group: str, level: float) -> dict[str, Any]:
    bounds = {name: [_finite(v) for v in pair] for name, pair in law.ci(level).items()}
    report = f"{group}: {law.report()}" if group else law.report()
    return {"group": group, "params": law.params_, "intervals": bounds, "warnings": law.cautions(), "report": report}


def _values(name: str, step: Any) -> dict[str, float | None]:
    values = (step.value, step.low, step.high) if step else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(_finite, values), strict=True))


def _hidden(test: "Backtest") -> list[dict[str, Any]]:
    """One row a hidden run."""
    x_name = test.x_name.replace(" ", "_").lower()
    names = ("metric", x_name, "reached", "forecast", "forecast_low", "forecast_high", "relative_error")
    columns = (test.held_x, test.held_y, test.predicted, test.low, test.high, test.relative_errors)
    return [dict(zip(names, (test.y_name, *map(_finite, row)), strict=True)) for row in zip(*columns, strict=True)]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [name for name in rows[0] if name != "warnings" and not name.endswith(("_low", "_high"))]
    table = Table(*(name.replace("_", " ") for name in names), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_shown(name, row) for name in names))
    console = Console()
    console.print(table)
    for said in dict.fromkeys(w for row in rows for w in row.get("warnings", [])):
        console.print(f"note: {said}", highlight=False)


def _shown(name: str, row: dict[str, Any]) -> str:
    """One cell: a number with its interval, where the row has one."""
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if name == "relative_error":
        return f"{value:+.2%}"
    return f"{value:.4g}" + (f" ({low:.4g} to {high:.4g})" if low is not None else "")
