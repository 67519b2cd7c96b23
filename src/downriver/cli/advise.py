"""``downriver advise``: which parameter-efficient method measured runs speak for."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from downriver.cli.sizes import size
from downriver.core.errors import InputError


def advise(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders with JSON files of peft's public method_comparison.")
    ] = None,
    ledger: Annotated[str | None, typer.Option(help="A ledger of your own studies.")] = None,
    study: Annotated[str | None, typer.Option(help="Only this study of the ledger.")] = None,
    metric: Annotated[str | None, typer.Option(help="The ledger's metric that is the score.")] = None,
    forgetting: Annotated[str | None, typer.Option(help="The ledger's metric of forgetting; lower is better.")] = None,
    benchmark: Annotated[str | None, typer.Option(help="Only models and data whose names contain this.")] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option("--for", help="score, forgetting, parameters, memory, seconds or disk; several times."),
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Such as 24GB.")] = None,
    max_parameters: Annotated[float | None, typer.Option(help="Trained ones, such as 1e7.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Of the whole run.")] = None,
    max_forgetting: Annotated[float | None, typer.Option(help="Loss added on text of before.")] = None,
    max_disk: Annotated[str | None, typer.Option(help="Of the adapters of all tasks, such as 1GB.")] = None,
    least_score: Annotated[float | None, typer.Option(help="A lower bound of the score.")] = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks are kept beside one another.")] = 1,
    merge: Annotated[bool, typer.Option("--merge", help="It must merge into plain weights.")] = False,
    quantised: Annotated[bool, typer.Option("--quantised", help="It must work on a quantised base.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show the runs that no other run beats, each with its reason.

    Runs come from FOLDERS, from a ledger, or from both; of different models or data they are never compared.
    The score always counts; --for adds what else matters (memory by default).
    """
    import polars as pl

    from downriver.adapt import peft_advisor

    tables = [peft_advisor.read_comparison(folder) for folder in folders or []]
    if ledger is not None:
        from downriver.study.ledger import Ledger

        if metric is None:
            raise InputError("a ledger holds many metrics: --metric names the one that is the score")
        columns = {} if forgetting is None else {"forgetting": forgetting}
        tables.append(peft_advisor.read_ledger(Ledger(ledger).rows(study), metric, **columns))
    if not tables:
        raise InputError("nothing to compare: folders of peft's method_comparison, or --ledger, are expected")
    bounds: dict[str, float | None] = {
        "memory": None if max_memory is None else size(max_memory),
        "parameters": max_parameters,
        "seconds": max_seconds,
        "forgetting": max_forgetting,
        "disk": None if max_disk is None else size(max_disk),
    }
    advice = peft_advisor.advise(
        pl.concat(tables),
        objectives=("score", *(objective or ["memory"])),
        most={name: bound for name, bound in bounds.items() if bound is not None},
        least_score=least_score,
        tasks=tasks,
        merge=merge,
        quantised=quantised,
        benchmark=benchmark,
    )
    if as_json:
        said = {"objectives": advice.objectives, "chosen": _rows(advice.chosen), "left_out": _rows(advice.left_out)}
        typer.echo(json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo(str(advice))


def _rows(table: Any) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in table.to_dicts()
    ]
