"""A study in words: sentences for its verdicts, and its table for a terminal.

Reach for ``table`` and ``verdict_lines`` at the end of a run; the page is built from the same words.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from downriver.core.stats import FEWEST
from downriver.report.numbers import (
    MISSING,
    NARROW,
    Format,
    cost,
    counted,
    listed,
    percent,
    probability,
    quantity,
)
from downriver.report.summary import Column, Summary, summarise

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table
    from rich.text import Text

    from downriver.forecast.backtest import Backtest
    from downriver.study import Claim, Result, Verdict

COLOURS = {"holds": "green", "fails": "red", "undecided": "yellow"}
SIGNS = {"holds": "✓", "fails": "✗", "undecided": "?"}


def table(result: "Result", width: int | None = None) -> "Table":
    """Arms by metrics for a terminal: mean and under it the 95 % interval over seeds, the best mean bold, and the cost.

    As many metrics are shown as fit ``width`` characters (those of the terminal by default), the ones of the study's
    claims first and at least one; the caption counts the rest.

    >>> import tempfile
    >>> from downriver.study import Arm, study
    >>> @study("coin", seeds=2)
    ... def coin(seed, budget, scale):
    ...     yield Arm("fair", lambda: {"heads": 0.5})
    >>> shown = table(coin.run(tempfile.mkdtemp(), executor="serial", progress=False))
    >>> shown.row_count, str(shown.caption).replace(NARROW, " ")
    (1, 'mean and 95 % interval over 2 seeds')
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = summarise(result)
    claimed = [claim.on for claim in result.study.claims]
    costs = [name for name in ("seconds", "flops") if any(c[name] for c in found.costs.values())]
    spent = ["\n".join(cost(n, found.costs[arm][n]) for n in costs if arm in found.costs) for arm in found.arms]
    names = [Text("arm"), *map(Text, found.arms)]
    prices = [Text("cost" if costs else ""), *map(Text, spent)]
    columns = [
        [
            Text(f"{found.name(column)} {column.arrow}\n{column.format.unit}".rstrip()),
            *(_terminal(found, column, arm) for arm in found.arms),
        ]
        for column in sorted(found.columns, key=lambda c: (c.metric not in claimed, not c.varies))
    ]
    room = (width or Console().width) - _width(names) - _width(prices) - 2
    fitting = [sum(_width(c) + 2 for c in columns[:n]) <= room for n in range(1, len(columns) + 1)].count(True)
    columns, rest = columns[: max(fitting, 1)], len(columns) - max(fitting, 1)
    caption = Text(footnote(found) + (f"; {counted(rest, 'more metric')} not shown" if rest > 0 else ""))
    shown = Table(box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
    shown.add_column(names[0], no_wrap=True)
    for column in columns:
        shown.add_column(column[0], justify="right", no_wrap=True)
    shown.add_column(prices[0], justify="right", style="dim", no_wrap=True)
    for row in zip(names[1:], *(column[1:] for column in columns), prices[1:], strict=True):
        shown.add_row(*row)
    return shown


def _width(cells: "Sequence[Text]") -> int:
    return max(line.cell_len for cell in cells for line in cell.split("\n"))


def _terminal(found: Summary, column: Column, arm: str) -> "Text":
    from rich.text import Text

    cell = column.cells.get(arm)
    if cell is None:
        return Text("failed", style="red") if arm in found.failed else Text(MISSING)
    text = Text(column.format.bare(cell.mean), style="bold" if arm in column.best else "")
    if cell.low is not None and cell.high is not None:
        text.append(f"\n{column.format.span(cell.low, cell.high)}", style="dim not bold")
    return text


def verdict_lines(result: "Result") -> "list[Text]":
    """One line a claim: its sign and word, the claim, and the figures behind it.

    >>> import tempfile
    >>> from downriver.study import Arm, above, study
    >>> @study("coin", seeds=1, claims=[above("fair", on="heads", value=0.4)])
    ... def coin(seed, budget, scale):
    ...     yield Arm("fair", lambda: {"heads": 0.5})
    >>> print(verdict_lines(coin.run(tempfile.mkdtemp(), executor="serial", progress=False))[0])
    ? undecided fair is above 0.4 on heads: distance from 0.4 +0.100 on one seed: no interval
    """
    from rich.text import Text

    rows = result.rows()
    return [
        Text.assemble(
            (f"{SIGNS[v.verdict]} {v.verdict:<9} ", f"bold {COLOURS[v.verdict]}"),
            f"{v.claim.text}: {evidence(v, verdict_format(v, rows))}",
        )
        for v in result.verdicts()
    ]


def verdict_format(verdict: "Verdict", rows: "pl.DataFrame") -> Format:
    """The format of a claim's metric, with decimals from the verdict's own interval."""
    units = rows.filter(metric=verdict.claim.on)["unit"].drop_nulls()
    return Format.of(verdict.differences, units[0] if len(units) else "", (verdict.high - verdict.low) / 2)


def evidence(verdict: "Verdict", form: Format) -> str:
    """The figures behind a verdict: mean difference, interval, p, and the seeds that could not be compared."""
    dropped = [str(seed) for seed in verdict.dropped]
    left_out = f"; seed{'s'[: len(dropped) > 1]} {listed(dropped)} left out for want of a value" if dropped else ""
    if verdict.n == 0:
        return f"nothing to compare{left_out}"
    what = "difference" if verdict.claim.than is not None else f"distance from {verdict.claim.value:g}"
    if verdict.n == 1:
        return f"{what} {form.difference(verdict.mean)} on one seed: no interval{left_out}"
    low, high = form.difference(verdict.low).removesuffix(" points"), form.difference(verdict.high)
    adjusted = f" (Holm over all claims: {probability(verdict.p_holm).removeprefix(f'={NARROW}')})"
    return (
        f"mean {what} {form.difference(verdict.mean)} over {counted(verdict.n, 'seed')},"
        f" {percent(0.95)} interval {low} to {high}; one-sided p{NARROW}{probability(verdict.p)}"
        f"{adjusted if verdict.p_holm != verdict.p else ''}{left_out}"
    )


def reason(verdict: "Verdict", form: Format) -> str:
    """Why the verdict is what it is, in one sentence."""
    claim = verdict.claim
    line = {
        "better": f"the margin of {form.given(claim.margin)}" if claim.margin else "zero",
        "keeps": f"the allowed loss of {form.given(-claim.margin)}",
    }.get(claim.kind, f"the threshold of {claim.value:g}" if claim.value is not None else "zero")
    if verdict.n == 0:
        return "Nothing was measured that could decide it."
    if verdict.n < FEWEST:
        return f"{counted(verdict.n, 'seed')} cannot decide it: at least {FEWEST} are needed."
    return {
        "holds": f"The whole interval clears {line}.",
        "fails": f"The whole interval falls short of {line}.",
        "undecided": f"The interval includes {line}: these seeds do not decide it.",
    }[verdict.verdict]


def sides(claim: "Claim") -> tuple[str, str]:
    """What a negative and a positive difference mean."""
    if claim.than is not None:
        return f"{claim.than} better", f"{claim.arm} better"
    words = (f"below {claim.value:g}", f"above {claim.value:g}")
    return words if claim.kind == "above" else words[::-1]


def difference_caption(claim: "Claim", form: Format) -> str:
    """What one dot of the figure of a claim is."""
    unit = ", in points" if form.unit == "%" else f", in {form.unit}" if form.unit else ""
    if claim.than is None:
        return f"How far {claim.arm} lies {claim.kind} {claim.value:g} on {claim.on}, seed by seed{unit}."
    return f"How much better {claim.arm} is than {claim.than} on {claim.on}, seed by seed{unit}."


def column_caption(column: Column) -> str:
    """The best and the worst mean of a metric, in words."""
    means = {arm: cell.mean for arm, cell in column.cells.items()}
    if len(means) < 2:
        return ""
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    if column.direction == "none" or not column.best:
        return f"From {column.format.value(means[low])} ({low}) to {column.format.value(means[high])} ({high})."
    top, last = (low, high) if column.direction == "lower" else (high, low)
    best = listed([arm for arm in means if arm in column.best])
    return f"Best mean: {best}, {column.format.value(means[top])}; worst: {last}, {column.format.value(means[last])}."


def tally(word: str, count: int) -> str:
    """A count of verdicts with its verb.

    >>> tally("holds", 1), tally("holds", 3), tally("undecided", 2)
    ('1 holds', '3 hold', '2 undecided')
    """
    return f"{count} {word}" if count == 1 or word == "undecided" else f"{count} {word.removesuffix('s')}"


def lead(words: Sequence[str], found: Sequence[Summary], forecasts: "Sequence[Backtest]" = ()) -> str:
    """The page's summary in one or two sentences.

    >>> lead(["holds", "holds", "undecided"], [])
    'Of 3 claims, 2 hold and 1 is undecided.'
    """
    counts = Counter(words)
    verbs = {"holds": ("holds", "hold"), "fails": ("fails", "fail"), "undecided": ("is undecided", "are undecided")}
    if len(counts) > 1:
        said = [f"{counts[w]} {verbs[w][counts[w] > 1]}" for w in verbs if counts[w]]
        sentence = f"Of {len(words)} claims, {listed(said)}"
    elif counts:
        every = {1: "The claim", 2: "Both claims"}.get(len(words), f"All {len(words)} claims")
        sentence = f"{every} {verbs[words[0]][len(words) > 1]}"
    else:
        sentence = "No claim was made"
    if found:
        seeds = sorted({len(s.seeds) for s in found})
        over = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        sentence += f", measured on {counted(sum(len(s.arms) for s in found), 'arm')} over {over}"
    failed, missing = sum(len(f) for s in found for f in s.failed.values()), sum(s.missing for s in found)
    sentence += f"; {counted(failed, 'run')} failed" if failed else ""
    sentence += f"; {counted(missing, 'run')} not done yet" if missing else ""
    sentences = [sentence] if words or found else []
    if forecasts:
        hidden = sum(len(f.held_x) for f in forecasts)
        inside = sum(int(np.sum((f.low <= f.held_y) & (f.held_y <= f.high))) for f in forecasts)
        if hidden == 1:
            sentences.append(f"The forecast's interval {'covers' if inside else 'misses'} what was really reached")
        else:
            sentences.append(f"The intervals of {inside} of {hidden} forecasts cover what was really reached")
    return "".join(f"{s}. " for s in sentences).rstrip()


def footnote(found: Summary) -> str:
    """What a reader of the table must know."""
    if not found.columns:
        return "nothing was measured"
    words = f"mean and {percent(0.95)} interval over {len(found.seeds)} seeds"
    if len(found.seeds) == 1:
        words = "one seed: no interval"
    return words + ("; bold: the best mean" if any(c.best for c in found.columns) else "")


def forecast_sentence(test: "Backtest", form: Format, at: int) -> str:
    """One hidden point: what was forecast, what was reached, how far off, and whether the interval covered it."""
    predicted, truth, low, high = (float(v[at]) for v in (test.predicted, test.held_y, test.low, test.high))
    said = (
        f"At {quantity(float(test.held_x[at]))} {test.x_name} the law forecasts {test.y_name} {form.value(predicted)};"
        f" {form.value(truth)} was reached. That is {relative(predicted, truth)}"
    )
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{said}, without an interval."
    place = "inside" if low <= truth <= high else "outside"
    return f"{said}; the truth lies {place} the {percent(test.level)} interval, {form.bare(low)} to {form.value(high)}."


def forecast_average(test: "Backtest") -> str:
    """How far off the law was over all hidden points, where there are several."""
    if len(test.held_x) < 2:
        return ""
    off = float(np.mean(np.abs(test.relative_errors)))
    inside = int(np.sum((test.low <= test.held_y) & (test.held_y <= test.high)))
    return (
        f"Over all {len(test.held_x)} hidden points it is {percent(float(f'{off:.2g}'))} off in the mean;"
        f" {inside} of them lie inside their interval."
    )


def relative(predicted: float, truth: float) -> str:
    """A relative error in words.

    >>> relative(0.99, 1.0), relative(1.05, 1.0), relative(1.00001, 1.0)
    ('1\u202f% too low', '5\u202f% too high', 'less than 0.1\u202f% off')
    """
    if truth == 0:
        return "not to be said in percent of zero"
    error = (predicted - truth) / abs(truth)
    if abs(error) < 0.001:
        return f"less than {percent(0.001)} off"
    return f"{percent(float(f'{abs(error):.2g}'))} too {'high' if error > 0 else 'low'}"
