"""``downriver rank``: which pretrained model to start from, and how long trying them all would take."""

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from downriver.core.errors import InputError, unknown

if TYPE_CHECKING:
    from downriver.rank import Ranking


def rank(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or built-in names of pretrained models.")],
    task: Annotated[str, typer.Option(help="A built-in task, a table with the columns text and label, or a hub id.")],
    score: Annotated[
        str,
        typer.Option(help="logme, leep, nleep, nce, hscore, transrate, sfda, gbc, parc, knn or linear_probe."),
    ] = "logme",
    ped: Annotated[bool, typer.Option("--ped", help="Let overlapping classes push one another apart first.")] = False,
    general: Annotated[str | None, typer.Option(help="A task that stands for data in general, for --ped.")] = None,
    split: Annotated[str, typer.Option(help="Which split to read.")] = "train",
    rows: Annotated[int, typer.Option(min=4, help="At most so many rows of it.")] = 2000,
    resamples: Annotated[int, typer.Option(min=0, help="Random halves behind the intervals; 0: none.")] = 40,
    level: Annotated[float, typer.Option(min=0.01, max=0.999, help="Level of the intervals.")] = 0.9,
    epochs: Annotated[float, typer.Option(min=0, help="Epochs of fine-tuning to compare with; 0: not measured.")] = 3.0,
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut texts at so many tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the rows and the halves.")] = 0,
    truth: Annotated[
        Path | None, typer.Option(help="A table with model and a column of what fine-tuning reached: how good was it?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Rank MODELS for a task by their features, without training any.

    Features are kept in the cache, so that another score of the same models costs seconds. With --truth, a table of
    fine-tuned results (higher is better; rows of one model are averaged), the ranking is held against them: weighted
    Kendall's tau, what taking the first model loses, and the best of the first 1 and 3.
    """
    from downriver import tasks
    from downriver.rank import PED, rank_models

    reached = None if truth is None else _reached(truth, models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what PED warns of is said among the notes
        found = rank_models(
            models,
            task,
            score,
            PED() if ped else None,
            split=split,
            rows=rows,
            general=None if general is None else tasks.load(general),
            resamples=resamples,
            level=level,
            epochs=epochs or None,
            max_length=max_length,
            seed=seed,
        )
    said = _said(found, epochs)
    if reached is not None:
        said["truth"] = {name: _finite(value) for name, value in asdict(found.agreement(reached)).items()}
    typer.echo(json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False)) if as_json else _print(found, said)


def _said(found: "Ranking", epochs: float) -> dict[str, Any]:
    rows = [{name: _finite(value) for name, value in row.items()} for row in found.table.to_dicts()]
    taken = sum(row["seconds"] for row in rows)
    tuning = sum(row["fine_tuning_seconds"] for row in rows) if epochs else None
    about = {"task": found.task, "score": found.score, "rows": found.rows, "level": found.level, "models": rows}
    return about | {"seconds": taken, "epochs": epochs, "fine_tuning_seconds": tuning, "notes": list(found.notes)}


def _reached(file: Path, models: list[str]) -> dict[str, float]:
    """What each model reached, from a table with ``model`` and one more column of numbers."""
    from downriver.core.table import read_table

    frame = read_table(file)
    if "model" not in frame.columns:
        raise unknown(f"column of {file}", "model", frame.columns)
    numbers = [name for name, kind in frame.schema.items() if name not in ("model", "seed") and kind.is_numeric()]
    if len(numbers) != 1:
        raise InputError(f"{file}: beside model (and seed) one column of numbers is expected, not {numbers or 'none'}")
    means = dict(frame.group_by("model").mean().select("model", numbers[0]).iter_rows())
    if len(models) < 2:
        raise InputError("one model cannot be held against the truth: two at least are expected")
    for model in models:
        if means.get(model) is None:
            raise unknown(f"model in {file}", model, means)
    return {model: float(means[model]) for model in models}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(found: "Ranking", said: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    interval = f"{found.level:.0%} interval"
    table = Table("", "model", found.score, interval, "first", "seconds", "parameters", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    for row in said["models"]:
        between = "-" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        first = "-" if row["first"] is None else f"{row['first']:.0%}"
        numbers = (f"{row['score']:.4g}", between, first, f"{row['seconds']:.1f}", f"{row['parameters'] / 1e6:.1f} M")
        table.add_row(str(row["rank"]), row["model"], *numbers)
    console = Console()
    console.print(table)
    line = f"{found.rows} rows of {found.task}; features and scores took {_time(said['seconds'])}"
    if (tuning := said["fine_tuning_seconds"]) is not None:
        line += (
            f"; fine-tuning all {len(said['models'])} for {said['epochs']:g} epochs would take about {_time(tuning)}"
        )
        line += " (one real step of 16 rows each, times the steps)"
    console.print(line, highlight=False)
    if (held := said.get("truth")) is not None:
        console.print(_held(held), highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)


def _held(truth: dict[str, Any]) -> str:
    """The agreement with what fine-tuning reached, in a line."""
    tau = f"{truth['weighted_tau']:.2f}"
    if truth["tau_low"] is not None:
        tau += f" ({truth['tau_low']:.2f} to {truth['tau_high']:.2f})"
    if truth["size_tau"] is not None:
        tau += f", of taking the larger model {truth['size_tau']:.2f}"
    best = ", ".join(f"{share:.1%} of the best among the first {k}" for k, share in truth["top"].items())
    return f"against the truth: weighted tau {tau}; the first model loses {truth['regret']:.4g}; {best}"


def _time(seconds: float) -> str:
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
