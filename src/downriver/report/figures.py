"""The figures of a report, each one function from numbers to an inline ``<svg>`` that follows the page's colours.

Reach for one when a page of your own should show a study as the report does; all carry a sentence for screen readers
and tooltips on their marks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from downriver.report.numbers import COSTS, Format, cost, listed, quantity
from downriver.report.summary import Column
from downriver.report.svg import CHARACTER, Axis, Canvas, shorten

if TYPE_CHECKING:
    from downriver.forecast.backtest import Backtest

WIDTH = 360.0
ROUND_SECONDS = (0.01, 0.1, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000, 86400, 259200, 864000)
# where a label may stand beside its dot: to the right, left, above, below, then the corners
PLACES = (
    *((9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 19, "middle")),
    *((7, -8, "start"), (7, 16, "start"), (-7, -8, "end"), (-7, 16, "end")),
)


def differences(
    values: Mapping[int, float],
    interval: tuple[float, float, float],
    margin: float,
    form: Format,
    sides: tuple[str, str],
    verdict: str,
    width: float = WIDTH,
) -> Markup:
    """Paired differences: one dot a seed, the mean with its interval, the margin a claim must clear.

    ``interval`` is mean, low, high (infinite from one seed); ``sides`` says what the left and the right of zero mean.

    >>> points = Format(100, "%", 1)
    >>> svg = differences({0: 0.01, 1: 0.02}, (0.015, 0.01, 0.02), 0.0, points, ("worse", "better"), "holds")
    >>> svg.count("<circle"), "mean +1.5 points" in svg
    (2, True)
    """
    mean, low, high = interval
    bounded = math.isfinite(low) and math.isfinite(high)
    said = f"mean {form.difference(mean)}, " + (
        f"interval {form.difference(low)} to {form.difference(high)}" if bounded else "one seed: no interval"
    )
    axis = Axis.around([*values.values(), 0.0, margin, *((low, high) if bounded else ())], 20, width - 20, pad=0.1)
    canvas = Canvas(width, 148, f"Paired differences of {len(values)} seeds: {said}; margin {form.given(margin)}.")
    top, bottom, strip, bar = 20.0, 100.0, 45.0, 80.0
    canvas.rectangle(axis(margin), top, axis.stop - axis(margin), bottom - top, "beyond")
    _bottom(canvas, axis, bottom, partial(form.ticks, sign=True))
    canvas.line(axis(0), top, axis(0), bottom, "zero")
    canvas.line(axis(margin), top - 4, axis(margin), bottom, "margin")
    words = "the claim holds right of this line" if not margin else f"margin {form.given(margin)}"
    anchor = "start" if axis(margin) < width * 0.45 else "end" if axis(margin) > width * 0.55 else "middle"
    canvas.text(axis(margin), top - 8, words, "small", anchor)
    radius = 4.0 if len(values) <= 24 else 2.5
    for seed, x, y in _swarm(values, axis, strip, radius):
        canvas.dot(x, y, radius, "seed", tip=f"seed {seed}: {form.difference(values[seed])}")
    if bounded:
        canvas.line(axis(low), bar, axis(high), bar, f"bar {verdict}", tip=said)
    canvas.diamond(axis(mean), bar, 6.5, f"mean {verdict}", tip=said)
    room = (width / 2 - 16) * 1.15  # small text is narrower
    canvas.text(4, bottom + 40, f"← {shorten(sides[0], room)}", "small")
    canvas.text(width - 4, bottom + 40, f"{shorten(sides[1], room)} →", "small", "end")
    return canvas.svg()


def arms(
    column: Column, order: Sequence[str], name: str, failed: Mapping[str, Any] | None = None, width: float = WIDTH
) -> Markup:
    """One metric by arm: a row an arm with its seeds, mean and interval; faint lines join the same seed across arms.

    ``order`` are the arms from top to bottom; one without a value says so, or «failed» when it is among ``failed``.

    >>> from downriver.report.summary import Cell
    >>> column = Column("", "accuracy", "higher", "share", ("a",), {"a": Cell({0: 0.5, 1: 0.7}, 0.6, 0.5, 0.7)})
    >>> svg = arms(column, ["a", "b"], "accuracy", failed={"b": [0, 1]})
    >>> svg.count('class="seed"'), "failed" in svg
    (2, True)
    """
    form, row = column.format, 32.0 if len(order) <= 10 else 27.0
    means = {a: form.bare(c.mean) for a, c in column.cells.items()}
    left = min(max(len(a) for a in order) * CHARACTER + 8, 0.4 * width)
    right = width - max((len(m) for m in means.values()), default=0) * 7 - 10
    shown = [v for c in column.cells.values() for v in (*c.values.values(), c.low, c.high) if v is not None]
    axis = Axis.around(shown, left + 8, right, pad=0.05)
    bottom = len(order) * row + 6
    best = listed([a for a in order if a in column.best])
    canvas = Canvas(width, bottom + 42, f"{name} of {len(order)} arms; best: {best}.")
    _bottom(canvas, axis, bottom, form.ticks, grid=True)
    height = {arm: i * row + row / 2 for i, arm in enumerate(order)}
    for seed in sorted({s for c in column.cells.values() for s in c.values}):
        for points in _runs(
            [(column.cells[a].values.get(seed), height[a]) if a in column.cells else (None, 0) for a in order]
        ):
            canvas.path([(axis(x), y) for x, y in points], "thread", tip=f"seed {seed}")
    for arm in order:
        y, top = height[arm], arm in column.best
        canvas.text(left, y + 4, shorten(arm, (left - 4) * (0.92 if top else 1)), "best" if top else "", "end", tip=arm)
        if arm not in column.cells:
            canvas.text(axis.start + 4, y + 4, "failed" if arm in (failed or {}) else "no value", "absent")
            continue
        cell = column.cells[arm]
        for seed, value in cell.values.items():
            canvas.dot(axis(value), y, 3, "seed", tip=f"{arm}, seed {seed}: {form.value(value)}")
        said = f"{arm}: mean {form.value(cell.mean)}"
        if cell.low is not None and cell.high is not None:
            said += f", interval {form.bare(cell.low)} to {form.value(cell.high)}"
            canvas.line(axis(cell.low), y + 8, axis(cell.high), y + 8, "bar arm", tip=said)
        canvas.diamond(axis(cell.mean), y + 8, 4.5, "mean arm", tip=said)
        canvas.text(width - 2, y + 4, means[arm], "best number" if top else "number", "end")
    hint = {"higher": "higher is better →", "lower": "← lower is better"}.get(column.direction, "")
    canvas.text((axis.start + axis.stop) / 2, bottom + 36, hint, "small", "middle")
    return canvas.svg()


@dataclass(frozen=True)
class Quantity:
    """One axis of ``tradeoff``: its name, which way is better, how a value and a row of ticks are written."""

    name: str
    better: str
    value: Callable[[float], str]
    ticks: Callable[[Sequence[float]], list[str]]
    log: bool = False
    round: tuple[float, ...] = ()

    @classmethod
    def of_metric(cls, column: Column, name: str) -> "Quantity":
        better = "lower" if column.direction == "lower" else "higher"
        return cls(column.format.axis(name), better, column.format.bare, column.format.ticks)

    @classmethod
    def of_cost(cls, name: str) -> "Quantity":
        write = partial(cost, name)
        round = ROUND_SECONDS if name == "seconds" else ()
        return cls(COSTS[name], "lower", write, lambda ticks: [write(t) for t in ticks], log=True, round=round)


def tradeoff(points: Mapping[str, tuple[float, float]], x: Quantity, y: Quantity, width: float = WIDTH) -> Markup:
    """Two quantities of every arm against each other, with the Pareto front: what no other arm beats on both.

    On a logarithmic first axis zeros stand apart at its left end.

    >>> gain = Quantity("accuracy", "higher", str, lambda ticks: [str(t) for t in ticks])
    >>> svg = tradeoff({"a": (1, 0.7), "b": (10, 0.8), "c": (20, 0.75)}, Quantity.of_cost("seconds"), gain)
    >>> svg.count('class="front"'), svg.count('class="beaten"')
    (2, 1)
    """
    height, left, bottom = 288.0, 52.0, 240.0
    zero = x.log and any(a <= 0 for a, _ in points.values())
    xs = Axis.around([a for a, _ in points.values()], left + (44 if zero else 10), width - 14, x.log, round=x.round)
    ys = Axis.around([b for _, b in points.values()], bottom - 12, 24, pad=0.1)
    front = pareto(points, (x.better, y.better))
    canvas = Canvas(width, height, f"{y.name} against {x.name}; on the Pareto front: {listed(front)}.")
    _left(canvas, ys, left, width, y.ticks)
    _bottom(canvas, xs, bottom, x.ticks, rule=(left, width))
    if zero:
        canvas.text(left + 14, bottom + 17, "0", "tick", "middle")
        canvas.text(left + 30, bottom + 4, "⫽", "small", "middle")
    spots = {arm: (left + 14 if x.log and a <= 0 else xs(a), ys(b)) for arm, (a, b) in points.items()}
    canvas.path([spots[a] for a in front], "frontline")
    for arm, spot in spots.items():
        tip = f"{arm}: {x.name} {x.value(points[arm][0])}, {y.name} {y.value(points[arm][1])}"
        canvas.dot(*spot, 5, "front" if arm in front else "beaten", tip=tip)
    for at_x, at_y, words, anchor, arm in _labels(spots, front, (left, 16, width, bottom)):
        canvas.text(at_x, at_y, words, "halo" if arm in front else "halo small", anchor)
    canvas.text((left + width) / 2, height - 8, f"{x.name}: {x.better} is better", "small", "middle")
    canvas.text(0, 12, f"{y.name}: {y.better} is better", "small")
    return canvas.svg()


def forecast(test: "Backtest", form: Format, width: float = 620.0) -> Markup:
    """A law against the truth: the points it was fitted on, its curve with the band, and what was hidden from it.

    >>> from downriver.forecast import LearningCurve, backtest
    >>> n = np.array([50, 100, 200, 400, 800])
    >>> svg = forecast(backtest(LearningCurve(), (n, 0.1 + n**-0.5), hide=1), Format())
    >>> svg.count('class="fitted"'), svg.count('class="truth"')
    (4, 1)
    """
    wide = width > 500
    height, left = (340.0, 58.0) if wide else (290.0, 50.0)
    bottom = height - 48
    x_all = np.concatenate([test.fit_x, test.held_x, test.curve_x]).astype(float)
    y_all = np.concatenate([test.fit_y, test.held_y, test.predicted, test.low, test.high]).astype(float)
    band = np.isfinite(test.curve_low) & np.isfinite(test.curve_high)
    xs = Axis.around(x_all, left + 6, width - 14, log=_decades(x_all) >= 1, pad=0.04)
    ys = Axis.around(y_all, bottom - 8, 26, log=_decades(y_all) >= 1, pad=0.1)
    name = f"{test.y_name} against {test.x_name}"
    canvas = Canvas(width, height, f"{name}: {test.law} fitted on {len(test.fit_x)} points, {len(test.held_x)} hidden.")
    _left(canvas, ys, left, width, form.ticks)
    _bottom(canvas, xs, bottom, lambda ticks: [quantity(t) for t in ticks], rule=(left, width))
    edge, first = float(np.max(test.fit_x)), float(np.min(test.held_x))
    if first > edge:
        x = (xs(edge) + xs(first)) / 2
        canvas.rectangle(x, 20, width - x, bottom - 20, "hidden")
        canvas.text(width - 6, 34, "hidden from the fit", "small", "end")
    inside = ys.low, ys.high
    lower, upper = (np.clip(v[band], *inside) for v in (test.curve_low, test.curve_high))
    outline = [*zip(test.curve_x[band], upper, strict=True), *zip(test.curve_x[band][::-1], lower[::-1], strict=True)]
    canvas.path([(xs(x), ys(y)) for x, y in outline], "band", close=True)
    curve = [(x, y) for x, y in zip(test.curve_x, test.curve_y, strict=True) if inside[0] <= y <= inside[1]]
    canvas.path([(xs(x), ys(y)) for x, y in curve], "curve")
    for x, y in zip(test.fit_x, test.fit_y, strict=True):
        canvas.dot(xs(x), ys(y), 3.5, "fitted", tip=f"fitted: {quantity(x)} → {form.value(y)}")
    for x, y, low, high in zip(test.held_x, test.predicted, test.low, test.high, strict=True):
        tip = f"forecast at {quantity(x)}: {form.value(y)} ({form.bare(low)} to {form.value(high)})"
        if math.isfinite(low) and math.isfinite(high):
            canvas.line(xs(x), ys(low), xs(x), ys(high), "bar arm", tip=tip)
            for edge_y in (low, high):
                canvas.line(xs(x) - 5, ys(edge_y), xs(x) + 5, ys(edge_y), "bar arm", tip=tip)
        canvas.diamond(xs(x), ys(y), 5, "mean arm", tip=tip)
    for x, y in zip(test.held_x, test.held_y, strict=True):
        canvas.dot(xs(x), ys(y), 7, "truth", tip=f"really reached at {quantity(x)}: {form.value(y)}")
    canvas.text((left + width) / 2, height - 8, test.x_name, "small", "middle")
    canvas.text(4, 12, form.axis(test.y_name), "small")
    return canvas.svg()


def pareto(points: Mapping[str, tuple[float, float]], better: tuple[str, str] = ("lower", "higher")) -> list[str]:
    """The arms that no other arm matches on both axes while beating it on one, from cheap to dear.

    >>> pareto({"a": (1, 0.7), "b": (2, 0.7), "c": (3, 0.9)})
    ['a', 'c']
    """
    sign = [1 if b == "lower" else -1 for b in better]
    loss = {arm: (sign[0] * x, sign[1] * y) for arm, (x, y) in points.items()}
    front = [a for a, p in loss.items() if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in loss.values())]
    return sorted(front, key=lambda a: points[a])


def _bottom(
    canvas: Canvas,
    axis: Axis,
    y: float,
    write: Callable[[Sequence[float]], list[str]],
    grid: bool = False,
    rule: tuple[float, float] | None = None,
) -> None:
    """The x axis: a rule, ticks as far apart as their labels need, and a grid when asked."""
    start, stop = rule or (axis.start, axis.stop)
    canvas.line(start, y, stop, y, "axis")
    ticks = axis.ticks(5)
    taken = -math.inf
    for tick, words in zip(ticks, write(ticks), strict=True):
        x, half = axis(tick), len(words) * CHARACTER / 2
        if x - half < taken:
            continue
        taken = x + half + 8
        canvas.line(x, 0 if grid else y, x, y if grid else y + 4, "grid" if grid else "axis")
        canvas.text(x, y + 17, words, "tick", "middle")


def _left(canvas: Canvas, axis: Axis, x: float, right: float, write: Callable[[Sequence[float]], list[str]]) -> None:
    ticks = axis.ticks(5)
    for tick, words in zip(ticks, write(ticks), strict=True):
        canvas.line(x, axis(tick), right, axis(tick), "grid")
        canvas.text(x - 7, axis(tick) + 4, words, "tick", "end")


def _swarm(values: Mapping[int, float], axis: Axis, middle: float, radius: float) -> list[tuple[int, float, float]]:
    """Dots moved up and down just enough not to cover one another."""
    placed: list[tuple[int, float, float]] = []
    for seed, value in sorted(values.items(), key=lambda item: item[1]):
        x = axis(value)
        offsets = sorted((k * radius * 2.1 * s for k in range(5) for s in (1, -1)), key=abs)
        free = (
            o for o in offsets if all((x - a) ** 2 + (middle + o - b) ** 2 > (1.8 * radius) ** 2 for _, a, b in placed)
        )
        placed.append((seed, x, middle + next(free, 0.0)))
    return placed


def _runs(points: Sequence[tuple[float | None, float]]) -> list[list[tuple[float, float]]]:
    """The stretches of at least two neighbours without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if x is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if len(run) > 1]


def _labels(
    spots: Mapping[str, tuple[float, float]], front: Sequence[str], frame: tuple[float, float, float, float]
) -> list[tuple[float, float, str, str, str]]:
    """Names beside their dots where there is room, the front's first, rather across its line than not at all."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots.values()]
    line = []
    for (x1, y1), (x2, y2) in pairwise(spots[arm] for arm in front):  # small squares along it
        steps = int(math.hypot(x2 - x1, y2 - y1) / 6) + 1
        along = [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(1, steps)]
        line += [(x - 1, y - 1, x + 1, y + 1) for x, y in along]
    placed = []
    for arm in [*front, *(a for a in spots if a not in front)]:
        x, y = spots[arm]
        words = shorten(arm, 150)
        wide = len(words) * CHARACTER + 2
        for obstacles, (dx, dy, anchor) in product(([*taken, *line], taken), PLACES):
            start = x + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (start, y + dy - 10, start + wide, y + dy + 3)
            fits = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if fits and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in obstacles):
                taken.append(box)
                placed.append((x + dx, y + dy, words, anchor, arm))
                break
    return placed


def _decades(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return math.log10(finite.max() / finite.min()) if finite.size and finite.min() > 0 else 0.0
