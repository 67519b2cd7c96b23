"""``downriver forecast testbed | ladder | coverage``: the laws held against ladders of runs that others made."""

import json
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from downriver.cli.forecast_output import (
    JSON,
    LEVEL,
    OBJECTIVE,
    Objective,
    finite,
    forecast_row,
    hidden_rows,
    print_rows,
    show,
)
from downriver.core.errors import InputError

if TYPE_CHECKING:
    from downriver.forecast import RunTable


class Share(StrEnum):
    """What the tasks of a ladder have in common."""

    none = "none"
    exponents = "exponents"
    exponent = "exponent"


class Measure(StrEnum):
    """The loss of a task."""

    bpb = "bpb"
    soft = "soft"


def testbed(
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
                found += [{"trained_on": group} | row | {"metric": what} for row in hidden_rows(test)]
    if as_json:
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
    else:
        print_rows(found)
        inside = sum(row["forecast_low"] <= row["reached"] <= row["forecast_high"] for row in found)
        typer.echo(f"{inside} of {len(found)} lie inside the 90 % interval")


def ladder(
    source: Annotated[
        Path,
        typer.Argument(help="ladder-runs of github.com/allenai/OLMo-ladder, or a table with bpb_ and error_ columns."),
    ],
    share: Annotated[
        Share, typer.Option(help="Exponents common to all tasks, or none (the paper's).")
    ] = Share.exponents,
    weigh: Annotated[
        bool | None, typer.Option(help="Weigh by the noise of last checkpoints; by default where there are any.")
    ] = None,
    measure: Annotated[Measure, typer.Option(help="The loss of a task.")] = Measure.bpb,
    up_to: Annotated[
        float, typer.Option(help="Fit the runs of at most so many parameters, forecast the others.")
    ] = 2e9,
    predict: Annotated[
        Path | None, typer.Option(help="Forecast this plan (params, tokens) from all runs of a table.")
    ] = None,
    level: LEVEL = 0.9,
    plot: Annotated[Path | None, typer.Option(help="Draw forecasts against the truth to this PNG file.")] = None,
    as_json: JSON = False,
) -> None:
    """Forecast every task of a benchmark in two steps: N and D to the task's loss, that to its error."""
    from downriver.forecast import RunTable, TaskLadder
    from downriver.forecast.ladder import held_out, public

    laws = TaskLadder(share.value, weigh, measure.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if source.is_dir():
            found = public(source, laws, up_to, level)
        else:
            table = RunTable.read(source)
            if predict:
                laws.fit(table)
                found = _ladder_plan(laws, predict, level)
            else:
                named = table if len(set(table.names)) == len(table) else _numbered(table)
                small = named.params <= up_to
                if small.all():
                    raise InputError(f"no run has more than {up_to:g} parameters: lower --up-to, or give --predict")
                laws.fit(named.select(small))
                found = held_out(named, list(named.select(~small).names), laws, level)
    if plot:
        from downriver.forecast.plot import plot_truth

        if "error" not in found[0]:
            raise InputError("plot: forecasts of a plan have no truth to be drawn against")
        truth, said, low, high = (
            [row[k] for row in found] for k in ("error", "error_forecast", "error_low", "error_high")
        )
        plot_truth(truth, said, plot, low, high, [row["task"] for row in found], "error")
    show(found, as_json)
    if not as_json and "points_off" in found[0]:
        for run in dict.fromkeys(row["run"] for row in found):
            off = [abs(row["points_off"]) for row in found if row["run"] == run]
            typer.echo(f"{run}: {sum(off) / len(off):.2f} points off on average over {len(off)} tasks")


def coverage(
    folder: Annotated[Path, typer.Argument(help="Holds overtraining_testbed, olmo_ladder, chinchilla or obs_scaling.")],
    level: LEVEL = 0.9,
    as_json: JSON = False,
) -> None:
    """Measure how often intervals held the truth on public ladders, and the factor (--widen) that mends it.

    It hides the largest runs of every ladder and takes a few minutes. `factor` is learnt on the other ladders.
    """
    from dataclasses import asdict

    from downriver.forecast.coverage import coverage as measure
    from downriver.forecast.coverage import factor, public_outcomes

    outcomes = public_outcomes(folder, level)
    rows = [
        {k: finite(v) if isinstance(v, float) else v for k, v in asdict(row).items()}
        for row in measure(outcomes, level)
    ]
    for kind in dict.fromkeys(o.kind for o in outcomes):
        of_kind = [o for o in outcomes if o.kind == kind]
        by = factor(of_kind, level)
        inside = sum(o.inside for o in of_kind) / len(of_kind)
        after = sum(o.half_widths <= by for o in of_kind) / len(of_kind)
        every = {"ladder": "all", "kind": kind, "n": len(of_kind), "covered": inside}
        rows.append(every | {"factor": by, "covered_widened": after})
    show(rows, as_json)


def _ladder_plan(ladder: Any, plan: Path, level: float) -> list[dict[str, Any]]:
    from downriver.core.table import read_table

    found = []
    frame = read_table(plan, numeric=["params", "tokens"])
    for N, D in zip(frame["params"], frame["tokens"], strict=True):
        for task, said in ladder.forecast(N, D, level).items():
            found.append({"params": N, "tokens": D, "task": task} | forecast_row(said, []))
    return found


def _numbered(table: "RunTable") -> "RunTable":
    """The table with its runs named by their rows."""
    from dataclasses import replace

    return replace(table, names=[f"row {i + 1}" for i in range(len(table))])
