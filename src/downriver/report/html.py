"""One self-contained HTML page for any number of studies and forecasts: nothing is fetched when it is opened.

Reach for ``write`` when a result leaves the terminal. Figures are inline SVG in the page's own colours (light, dark
and print); everything that users named or that an exception said is escaped; a content policy forbids the network.
"""

import datetime
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from downriver.core import InputError, atomic_write
from downriver.report import figures, text
from downriver.report.numbers import (
    COSTS,
    MISSING,
    NARROW,
    Format,
    cost,
    counted,
    duration,
    listed,
    number,
    percent,
    quantity,
)
from downriver.report.summary import Column, Summary, summarise

if TYPE_CHECKING:
    from downriver.forecast.backtest import Backtest
    from downriver.study import Result, Verdict

OPEN_FIGURES = 6  # more metrics than this wait behind a click
SIDE = {"ece": "Calibration", "brier": "Calibration and sharpness", "retention": "What was kept of the old skill"}


def write(
    path: str | os.PathLike[str],
    results: "Sequence[Result]",
    forecasts: "Sequence[Backtest]" = (),
    title: str | None = None,
) -> Path:
    """Write the report of some studies and forecasts to ``path``, whole or not at all, and give the path back.

    The title defaults to that of the first study. Raises ``InputError`` when there is nothing to report or ``path`` is
    a folder.

    >>> import tempfile
    >>> from downriver.study import Arm, above, study
    >>> @study("coin", claims=[above("fair", on="heads", value=0.4)], seeds=2, title="Is the coin fair?")
    ... def coin(seed, budget, scale):
    ...     yield Arm("fair", lambda: {"heads": 0.5})
    >>> folder = Path(tempfile.mkdtemp())
    >>> result = coin.run(folder / "runs", executor="serial", progress=False)
    >>> "Is the coin fair?" in write(folder / "coin.html", [result]).read_text()
    True
    """
    path = Path(path)
    if not results and not forecasts:
        raise InputError("a report needs at least one result or one forecast")
    if path.is_dir():
        raise InputError(f"{path} is a folder: the name of an HTML file is expected")
    found = [summarise(result) for result in results]
    verdicts = [result.verdicts() for result in results]
    words = [v.verdict for of_study in verdicts for v in of_study]
    heading = title or (_title(results[0]) if results else f"Forecast of {forecasts[0].y_name}")
    today = datetime.date.today()
    template = _templates().get_template("page.html.j2")
    page = template.render(
        title=heading,
        lead=text.lead(words, found, forecasts),
        tally=_tally(words),
        folders=list(dict.fromkeys(result.ledger.root for result in results)),
        date=f"{today.day} {today:%B %Y}",
        studies=[_study(*of_study) for of_study in zip(results, found, verdicts, strict=True)],
        forecasts=[_forecast(test) for test in forecasts],
        signs=text.SIGNS,
        missing=MISSING,
        command=_command(),
    )
    with atomic_write(path, "w") as file:
        file.write(page)
    return path


def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _title(result: "Result") -> str:
    return str(result.study.title or result.study.name)


def _study(result: "Result", found: Summary, verdicts: "Sequence[Verdict]") -> dict[str, Any]:
    """Everything the template shows of one study, in words, figures and formatted numbers."""
    main = found.find(verdicts[0].claim.on) if verdicts else None
    main = main or (found.columns[0] if found.columns else None)
    claimed = {v.claim.on for v in verdicts}
    ordered = sorted((c for c in found.columns if c.varies), key=lambda c: (c is not main, c.metric not in claimed))
    drawn = []
    for column in ordered:
        shown = [arm for arm in found.arms if arm in column.asked or arm in found.failed]
        svg = figures.arms(column, shown, found.name(column), found.failed)
        drawn.append((f"{found.name(column)} {column.arrow}", svg, text.column_caption(column)))
    return {
        "id": f"study-{result.study.name}",
        "name": result.study.name,
        "title": _title(result),
        "found": found,
        "verdicts": [_verdict(v, text.verdict_format(v, result.rows())) for v in verdicts],
        "footnote": text.footnote(found),
        "figures": drawn[:OPEN_FIGURES],
        "more": drawn[OPEN_FIGURES:],
        "costs": _costs(found),
        "gain": _gain(found, main) if main and main.direction != "none" else [],
        "side": _side(found, main) if main and main.direction != "none" else [],
        "main": found.name(main) if main else "",
        "run": _facts(result, found),
        "versions": _versions(result),
        "failures": _failures(result),
        "tally": _tally([v.verdict for v in verdicts]),
    }


def _tally(words: Sequence[str]) -> list[tuple[str, str]]:
    return [(word, text.tally(word, words.count(word))) for word in text.SIGNS if word in words]


def _verdict(verdict: "Verdict", form: Format) -> dict[str, Any]:
    values = dict(zip(verdict.seeds, verdict.differences, strict=True))
    interval = (verdict.mean, verdict.low, verdict.high)
    drawn = figures.differences(
        values, interval, verdict.claim.margin, form, text.sides(verdict.claim), verdict.verdict
    )
    return {
        "word": verdict.verdict,
        "claim": verdict.claim.text,
        "evidence": text.evidence(verdict, form),
        "reason": text.reason(verdict, form),
        "figure": drawn if verdict.n else None,
        "caption": text.difference_caption(verdict.claim, form),
    }


def _gain(found: Summary, main: Column) -> list[tuple[str, Markup, str]]:
    """The main metric against each cost that differs between arms."""
    shown = [name for name in found.varied() if name not in ("parameters", "peak_memory")][:3]
    gain = figures.Quantity.of_metric(main, found.name(main))
    points = {name: {a: (found.costs[a][name], main.cells[a].mean) for a in main.cells} for name in shown}
    return [
        _tradeoff(f"{found.name(main)} against {COSTS[name]}", points[name], figures.Quantity.of_cost(name), gain)
        for name in shown
        if len(main.cells) > 1
    ]


def _side(found: Summary, main: Column) -> list[tuple[str, Markup, str]]:
    """What was kept or lost beside the main metric: calibration and retention, where they were measured."""
    gain = figures.Quantity.of_metric(main, found.name(main))
    drawn = []
    for column in found.columns:
        both = [arm for arm in main.cells if arm in column.cells]
        if column is main or column.metric not in SIDE or len(both) < 2:
            continue
        points = {a: (column.cells[a].mean, main.cells[a].mean) for a in both}
        side = figures.Quantity.of_metric(column, found.name(column))
        drawn.append(_tradeoff(SIDE[column.metric], points, side, gain))
    return drawn


def _tradeoff(
    name: str, points: Mapping[str, tuple[float, float]], x: figures.Quantity, y: figures.Quantity
) -> tuple[str, Markup, str]:
    front = figures.pareto(points, (x.better, y.better))
    beaten = [arm for arm in points if arm not in front]
    caption = f"On the front: {listed(front)}." + (f" Beaten or matched on both: {listed(beaten)}." if beaten else "")
    return name, figures.tradeoff(points, x, y), caption


def _costs(found: Summary) -> dict[str, Any]:
    """The table of costs by arm, with the columns in which anything was charged."""
    names = [name for name in COSTS if any(c[name] for c in found.costs.values())]
    rows = [(arm, [cost(name, found.costs.get(arm, {}).get(name)) for name in names]) for arm in found.arms]
    return {"names": [COSTS[name] for name in names], "rows": rows}


def _facts(result: "Result", found: Summary) -> list[tuple[str, str]]:
    study = result.study
    failed = sum(len(seeds) for seeds in found.failed.values())
    runs = {"finished": found.cells, "failed": failed, "not done yet": found.missing}
    return [
        ("arms", ", ".join(found.arms)),
        ("seeds", ", ".join(map(str, found.seeds))),
        ("budget of each arm", str(study.budget) if study.budget is not None else "not limited"),
        ("scale", str(study.scale)),
        ("runs", ", ".join(f"{count:,} {word}" for word, count in runs.items() if count or word == "finished")),
        ("time of all arms", f"{duration(found.seconds)}, shared work counted for each arm that used it"),
        ("study version", str(study.version)),
    ]


def _versions(result: "Result") -> list[tuple[str, str]]:
    """Hardware and versions as the rows carry them; several when the rows come from several machines."""
    rows = result.rows()
    if rows.is_empty():
        return []
    names = ["device", *(c for c in rows.columns if c.endswith("_version"))]
    return [
        (name.removesuffix("_version").replace("device", "hardware"), ", ".join(map(str, rows[name].unique().sort())))
        for name in names
        if name in rows.columns
    ]


def _failures(result: "Result") -> list[tuple[str, str, str, str]]:
    """What failed, with seeds of one arm that failed alike told together: arm, seeds, error, traceback of the first."""
    alike: dict[tuple[str, str], list[Any]] = {}
    for failure in result.failures:
        alike.setdefault((failure.arm, failure.error), []).append(failure)
    return [
        (arm, f"seed{'s' if len(them) > 1 else ''} {listed([str(f.seed) for f in them])}", error, them[0].traceback)
        for (arm, error), them in alike.items()
    ]


def _command() -> str:
    """The command line that is writing this page, as a person would type it."""
    if Path(sys.argv[0]).name == "downriver":
        return shlex.join(["downriver", *sys.argv[1:]])
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def _forecast(test: "Backtest") -> dict[str, Any]:
    halves = [h for h in (test.high - test.low) / 2 if math.isfinite(h)]
    form = Format.of(test.fit_y, "", min([*halves, float(np.min(np.abs(test.held_y))) / 100]))
    last = int(test.held_x.argmax())
    inside = (test.low <= test.held_y) & (test.held_y <= test.high)
    points = zip(
        map(quantity, test.held_x.tolist()),
        *(map(form.bare, values.tolist()) for values in (test.held_y, test.predicted)),
        map(form.span, test.low.tolist(), test.high.tolist()),
        (f"{number(100 * error, 1, sign=True)}{NARROW}%" for error in test.relative_errors.tolist()),
        inside.tolist(),
        strict=True,
    )
    span = f"{quantity(float(test.fit_x.min()))} to {quantity(float(test.fit_x.max()))} {test.x_name}"
    return {
        "x": test.x_name,
        "caption": f"{test.law[:1].upper()}{test.law[1:]}: {test.y_name} against {test.x_name}, fitted on"
        f" {counted(len(test.fit_x), 'point')} ({span}); {counted(len(test.held_x), 'point')} hidden from it.",
        "level": percent(test.level),
        "sentence": text.forecast_sentence(test, form, last),
        "average": text.forecast_average(test),
        "bounded": bool(math.isfinite(test.high[last] - test.low[last])),
        "inside": bool(inside[last]),
        "off": text.relative(float(test.predicted[last]), float(test.held_y[last])),
        "points": list(points),
        "wide": figures.forecast(test, form),
        "narrow": figures.forecast(test, form, figures.WIDTH),
    }
