"""``downriver forecast``: collect runs, fit a law, forecast, plan, draw, and test the law where the truth is known."""

import json
import math
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from downriver.cli import forecast_public
from downriver.cli.forecast_output import (
    JSON,
    LEVEL,
    OBJECTIVE,
    Objective,
    finite,
    forecast_row,
    hidden_rows,
    show,
    shown,
)
from downriver.core.errors import InputError, unknown

if TYPE_CHECKING:
    from downriver.forecast import Chain, Plan, RunTable

app = typer.Typer(help="Predict a large run from small ones, with intervals and a test.", no_args_is_help=True)


class LawName(StrEnum):
    """The laws that a table can be fitted with."""

    overtraining = "overtraining"
    chinchilla = "chinchilla"
    learning_curve = "learning-curve"


class Source(StrEnum):
    """Layouts that ``collect`` reads."""

    lm_eval = "lm-eval"
    wandb = "wandb"
    trainer = "trainer"
    measurements = "measurements"
    testbed = "testbed"
    olmo_ladder = "olmo-ladder"
    chinchilla = "chinchilla"
    obs_scaling = "obs-scaling"


class Picture(StrEnum):
    """What ``plot`` draws."""

    law = "law"
    residuals = "residuals"
    truth = "truth"


RUNS = Annotated[
    Path, typer.Argument(help="A CSV, JSONL or Parquet table of runs: params, tokens, loss[, error][, group].")
]
LAW = Annotated[LawName, typer.Option("--law", help="Which law.")]
GROUP = Annotated[str | None, typer.Option(help="Only the runs of this group.")]
METRIC = Annotated[str | None, typer.Option(help="A metric of the table; by default error, else the loss.")]
WIDEN = Annotated[float, typer.Option(min=0.0, help="Stretch intervals by this factor, as `coverage` finds it.")]


@app.command()
def fit(
    runs: RUNS,
    law: LAW = LawName.overtraining,
    predict: Annotated[Path | None, typer.Option(help="A table of targets: params and tokens.")] = None,
    objective: OBJECTIVE = Objective.lsq,
    group: GROUP = None,
    level: LEVEL = 0.95,
    widen: WIDEN = 1.0,
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
        found = [_widened(row, widen) for row in forecast(runs, law, predict, objective, group, level)]
    if as_json or predict:
        show(found, as_json)
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
    typer.echo(json.dumps(hidden_rows(test), indent=1, allow_nan=False) if as_json else test.text)


@app.command()
def collect(
    source: Annotated[Path, typer.Argument(help="A folder or file of results.")],
    to: Annotated[Path, typer.Argument(help="The table to write: CSV or Parquet.")],
    layout: Annotated[Source, typer.Option("--from", help="How the results are laid out.")] = Source.lm_eval,
    sizes: Annotated[
        Path | None,
        typer.Option(help="A table with model (or run), params, tokens (not for trainer), and loss where you have it."),
    ] = None,
    loss: Annotated[str | None, typer.Option(help="Which loss: task/metric of lm-eval, or a column or metric.")] = None,
    at_least: Annotated[float, typer.Option(help="Leave out runs with fewer tokens a parameter; 20 is usual.")] = 0.0,
    error: Annotated[
        str | None, typer.Option(help="Which metric is the error or accuracy (lm-eval: acc_norm).")
    ] = None,
) -> None:
    """Make one table of runs from evaluations, exports or a public ladder: what every other command takes."""
    from downriver.forecast import RunTable

    read: dict[Source, Any] = {
        Source.lm_eval: lambda: RunTable.from_lm_eval(source, sizes, loss=loss, metric=error),
        Source.wandb: lambda: RunTable.from_wandb(source, sizes, loss=loss),
        Source.trainer: lambda: RunTable.from_trainer_states(source, sizes),
        Source.measurements: lambda: RunTable.from_measurements(source, loss or "loss", error),
        Source.testbed: lambda: RunTable.from_testbed(source),
        Source.olmo_ladder: lambda: RunTable.from_olmo_ladder(source),
        Source.chinchilla: lambda: RunTable.from_chinchilla(source),
        Source.obs_scaling: lambda: RunTable.from_obs_scaling(source),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        table = read[layout]()
    table = _tidy(table.select(table.multiplier >= at_least * 0.999), loss, error)
    table.write(to)
    typer.echo(f"{len(table)} runs with {len(table.losses)} losses and {len(table.metrics)} metrics in {to}")
    for note in table.notes:
        typer.echo(f"note: {note}")


@app.command()
def predict(
    runs: RUNS,
    plan: Annotated[Path | None, typer.Argument(help="A table of targets: params and tokens.")] = None,
    params: Annotated[float | None, typer.Option(help="Parameters of one target.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of one target.")] = None,
    law: LAW = LawName.overtraining,
    objective: OBJECTIVE = Objective.lsq,
    group: GROUP = None,
    level: LEVEL = 0.95,
    widen: WIDEN = 1.0,
    as_json: JSON = False,
) -> None:
    """Forecast a plan, or one target: the same as `fit --predict`."""
    if (plan is None) == (params is None or tokens is None) or (law is LawName.learning_curve and plan is None):
        raise InputError("predict: a table of targets, or both --params and --tokens, is expected")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if law is LawName.learning_curve:
            found = _curve_forecasts(runs, law, plan, objective, group, level)
        else:
            targets = None if params is None or tokens is None else [(params, tokens)]
            found = _run_forecasts(runs, law, plan, objective, group, level, targets)
    show([_widened(row, widen) for row in found], as_json)


@app.command()
def plan(
    runs: RUNS,
    compute: Annotated[float | None, typer.Option(help="A budget of training FLOP: what does it buy?")] = None,
    error: Annotated[float | None, typer.Option(help="A goal: which N and D reach this error most cheaply?")] = None,
    loss: Annotated[float | None, typer.Option(help="A goal: which N and D reach this loss most cheaply?")] = None,
    overtrain: Annotated[
        float | None, typer.Option(help="Is it worth it to train this many times longer than 20 tokens a parameter?")
    ] = None,
    anywhere: Annotated[
        bool, typer.Option("--anywhere", help="Let tokens a parameter leave the range of the fitted runs.")
    ] = False,
    law: LAW = LawName.overtraining,
    objective: OBJECTIVE = Objective.lsq,
    group: GROUP = None,
    level: LEVEL = 0.95,
    widen: WIDEN = 1.0,
    as_json: JSON = False,
) -> None:
    """Say what a budget buys, what a goal costs, and when over-training pays.

    With --overtrain two more models follow: with the same compute, smaller and worse; and with the same loss, smaller
    and dearer to train, and how many served tokens pay that back.
    """
    from downriver.forecast import buy, cheapest, overtrained

    if sum(v is not None for v in (compute, error, loss)) != 1:
        raise InputError("plan: one of --compute, --error and --loss is expected")
    if law is LawName.learning_curve:
        raise InputError("plan: a law of params and tokens is expected, overtraining or chinchilla")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        table = _table(runs, group)
        chain = _chain(table, law, objective)
        if compute is not None:
            first = buy(chain, compute, level, anywhere)
        else:
            first = cheapest(chain, loss=loss, error=error, level=level, anywhere=anywhere)
        plans = [first] if overtrain is None else [first, *overtrained(chain, first, overtrain, level)]
    rows = [_widened(_planned(one, _mixed(table)), widen) for one in plans]
    typer.echo(json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) if as_json else _in_words(rows))


@app.command()
def plot(
    runs: RUNS,
    to: Annotated[Path, typer.Argument(help="The PNG file to draw.")],
    picture: Annotated[
        Picture, typer.Option(help="Curves and bands, residuals, or each run left out against the truth.")
    ] = Picture.law,
    predict: Annotated[
        Path | None, typer.Option(help="Draw the forecasts of this plan too: params and tokens.")
    ] = None,
    metric: METRIC = None,
    law: LAW = LawName.overtraining,
    objective: OBJECTIVE = Objective.lsq,
    group: GROUP = None,
    level: LEVEL = 0.9,
) -> None:
    """Draw a law with its runs, its residuals, or what it says of each run when that run is left out."""
    from downriver.core.table import read_table
    from downriver.forecast.plot import plot_law, plot_residuals, plot_truth

    if law is LawName.learning_curve:
        raise InputError("plot: a law of params and tokens is expected; draw learning curves with backtest --plot")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        table = _table(runs, group)
        chain = _chain(table, law, objective, metric)
        if picture is Picture.law:
            targets = read_table(predict, numeric=["params", "tokens"]) if predict else None
            pairs = [] if targets is None else list(zip(targets["params"], targets["tokens"], strict=True))
            plot_law(chain, table, to, pairs, level)
        elif picture is Picture.residuals:
            plot_residuals(chain, table, to)
        else:
            left_out = chain.law.audit().left_out
            known = [i for i, off in enumerate(left_out) if math.isfinite(off)]
            if not known:
                raise InputError("plot: no run can be left out, the others do not determine the law")
            reached = chain.law.fit_.y[known]
            plot_truth(reached, reached * (1 + left_out[known]), to, name="loss")
    typer.echo(f"drawn to {to}")


def _law(law: LawName, objective: Objective) -> Any:
    from downriver.forecast import LearningCurve, OverTrainingLaw

    if law is LawName.learning_curve:
        return LearningCurve(loss=objective.value)
    return OverTrainingLaw(tied_exponent=law is LawName.overtraining, loss=objective.value)


def _table(path: Path, group: str | None) -> "RunTable":
    from downriver.forecast import RunTable

    table = RunTable.read(path)
    return table if group is None else table.group(group)


def _tidy(table: "RunTable", loss: str | None, error: str | None) -> "RunTable":
    """The table with the loss and the error that are asked for under these names, as other commands look for them."""
    from dataclasses import replace

    losses, metrics = dict(table.losses), dict(table.metrics)
    if losses and "loss" not in losses:
        if loss is not None and loss not in losses:
            raise unknown("loss", loss, losses)
        losses = {"loss": losses[loss or next(iter(losses))]} | losses
    if error is not None and "error" not in metrics:
        if error not in metrics:
            raise unknown("metric", error, metrics)
        metrics = {"error": metrics[error]} | metrics
    return replace(table, losses=losses, metrics=metrics)


def _chain(table: "RunTable", law: LawName, objective: Objective, metric: str | None = None) -> "Chain":
    from downriver.forecast import Chain

    return Chain(_law(law, objective), metric=metric or ("error" if "error" in table.metrics else "loss")).fit(table)


def _mixed(table: "RunTable") -> list[str]:
    """What to say of every forecast of a table: its notes, and groups that are fitted together."""
    groups = sorted(set(table.groups))
    together = [f"{len(groups)} groups are fitted together: {', '.join(groups)}"] if len(groups) > 1 else []
    return [*table.notes, *together]


def _run_forecasts(
    path: Path,
    law: LawName,
    plan: Path | None,
    objective: Objective,
    group: str | None,
    level: float,
    targets: list[tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
    from downriver.core.table import read_table

    table = _table(path, group)
    groups = sorted(set(table.groups))
    if plan is None and targets is None:
        return [_described(_chain(table.group(name), law, objective), name, level) for name in groups]
    names = [""] * len(targets or [])
    if plan is not None:
        frame = read_table(plan, numeric=["params", "tokens"])
        targets = list(zip(frame["params"], frame["tokens"], strict=True))
        apart = len(groups) > 1 and "group" in frame.columns
        names = [str(name) for name in frame["group"]] if apart else [""] * frame.height
    parts = {name: table.group(name) if name else table for name in dict.fromkeys(names)}
    chains = {name: _chain(part, law, objective) for name, part in parts.items()}
    found = []
    for name, (N, D) in zip(names, targets or [], strict=True):
        said = chains[name].forecast(N, D, level)
        found.append({"params": N, "tokens": D} | forecast_row(said, _mixed(parts[name])))
    return found


def _planned(plan: "Plan", mixed: list[str]) -> dict[str, Any]:
    """One row of a plan: the fields of a forecast, and what it costs to train and to serve."""
    low, high = plan.compute_interval or (None, None)
    return (
        {"plan": plan.name, "params": plan.params, "tokens": plan.tokens}
        | {"compute": plan.compute, "compute_low": finite(low), "compute_high": finite(high)}
        | {"tokens_per_parameter": plan.multiplier}
        | forecast_row(plan.forecast, mixed)
        | {"serving_flop_per_token": 2 * plan.params, "break_even_tokens": plan.break_even}
    )


def _in_words(rows: list[dict[str, Any]]) -> str:
    """A plan in lines: what to train, what it costs, what it reaches."""
    lines = []
    for row in rows:
        size = f"{row['params']:.3g} parameters, {row['tokens']:.3g} tokens"
        lines.append(f"{row['plan']}: {size} ({row['tokens_per_parameter']:.3g} a parameter)")
        serving = f"serving {row['serving_flop_per_token']:.3g} FLOP a token"
        lines.append(f"  training {shown('compute', row)} FLOP, {serving}")
        reached = [f"{name} {shown(name, row)}" for name in ("loss", "error") if row[name] is not None]
        lines.append(f"  {', '.join(reached)}; {row['extrapolation_ratio']:,.3g} times the compute of the fitted runs")
        if row["break_even_tokens"] is not None:
            lines.append(f"  dearer to train, pays after {row['break_even_tokens']:.3g} served tokens")
    return "\n".join(lines + [f"note: {said}" for said in dict.fromkeys(w for row in rows for w in row["warnings"])])


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
        values = {y_name: curve.predict(n), f"{y_name}_low": finite(low[0]), f"{y_name}_high": finite(high[0])}
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
    bounds = {name: [finite(v) for v in pair] for name, pair in law.ci(level).items()}
    report = f"{group}: {law.report()}" if group else law.report()
    return {"group": group, "params": law.params_, "intervals": bounds, "warnings": law.cautions(), "report": report}


def _widened(row: dict[str, Any], by: float) -> dict[str, Any]:
    """A row with the intervals of its loss and error stretched about their values."""
    from downriver.forecast.coverage import widened

    found = dict(row)
    for name in ("loss", "error") if by != 1 else ():
        if row.get(f"{name}_low") is not None:
            ends = widened(row[name], row[f"{name}_low"], row[f"{name}_high"], by)
            found |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
    return found


for _command in (forecast_public.testbed, forecast_public.ladder, forecast_public.coverage):
    app.command()(_command)
