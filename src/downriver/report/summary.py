"""One study's rows brought together: arms by metrics with means and intervals, costs by arm, what failed.

Reach for it when a page and a terminal must show the same figures. Intervals are those of ``core.stats`` (BCa
bootstrap), the same as in the verdicts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import polars as pl

from downriver.core.stats import paired
from downriver.report.numbers import COSTS, Format

if TYPE_CHECKING:
    from downriver.study import Result


@dataclass(frozen=True)
class Cell:
    """The values of one arm on one metric, by seed, and the interval of their mean (none from one seed)."""

    values: Mapping[int, float]
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Column:
    """One metric on one task: ``asked`` are the arms that measured it, ``cells`` those whose values are numbers."""

    task: str
    metric: str
    direction: str
    unit: str
    asked: tuple[str, ...]
    cells: Mapping[str, Cell]

    @cached_property
    def format(self) -> Format:
        """Decimals follow the median half interval, so that a column is written alike from top to bottom."""
        halves = sorted((c.high - c.low) / 2 for c in self.cells.values() if c.low is not None and c.high is not None)
        values = [v for c in self.cells.values() for v in c.values.values()]
        return Format.of(values, self.unit, halves[len(halves) // 2] if halves else 0.0)

    @cached_property
    def best(self) -> frozenset[str]:
        """The arms whose mean, as written, is the best one; none where no direction is better or all are alike."""
        means = {arm: c.mean for arm, c in self.cells.items()}
        if self.direction == "none" or len(means) < 2:
            return frozenset()
        top = (max if self.direction == "higher" else min)(means.values())
        best = frozenset(arm for arm, mean in means.items() if self.format.bare(mean) == self.format.bare(top))
        return best if len(best) < len(means) else frozenset()

    @property
    def varies(self) -> bool:
        """Whether the arms differ at all; what was measured before any of them ran does not."""
        return len({tuple(c.values.items()) for c in self.cells.values()}) > 1 or len(self.cells) == 1

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓"}.get(self.direction, "")


@dataclass(frozen=True)
class Summary:
    """Everything a page shows of a study: ``costs`` are means over seeds, ``failed`` the seeds an arm failed on."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    costs: Mapping[str, Mapping[str, float]]
    failed: Mapping[str, tuple[int, ...]]
    cells: int  # finished ones
    missing: int  # neither finished nor failed
    seconds: float

    def name(self, column: Column) -> str:
        """The metric, with its task where the study has several."""
        several = len({c.task for c in self.columns}) > 1
        return f"{column.metric} · {column.task}" if several and column.task else column.metric

    def find(self, metric: str, task: str = "") -> Column | None:
        """The first column of a metric, on one task where it is named."""
        return next((c for c in self.columns if c.metric == metric and task in ("", c.task)), None)

    def varied(self) -> list[str]:
        """The costs worth a figure: those that were measured and are not the same for all arms, best known first."""
        seen = {name: {round(c[name], 12) for c in self.costs.values()} for name in COSTS}
        return [name for name in COSTS if len(seen[name]) > 1]


def summarise(result: "Result") -> Summary:
    """Bring a result's rows together; values that are not numbers count as missing.

    >>> import tempfile
    >>> from downriver.study import Arm, study
    >>> @study("coin", seeds=4)
    ... def coin(seed, budget, scale):
    ...     yield Arm("fair", lambda: {"heads": 0.5 + seed / 100})
    >>> found = summarise(coin.run(tempfile.mkdtemp(), executor="serial", progress=False))
    >>> found.arms, round(found.columns[0].cells["fair"].mean, 3)
    (('fair',), 0.515)
    """
    rows = result.rows()
    failed: dict[str, list[int]] = {}
    for failure in result.failures:
        failed.setdefault(failure.arm, []).append(failure.seed)
    columns = []
    for (task, metric), group in rows.group_by("task", "metric", maintain_order=True):
        known = group.filter(pl.col("value").is_finite())
        by_arm: dict[str, dict[int, float]] = {}
        for arm, seed, value in known.select("arm", "seed", "value").iter_rows():
            by_arm.setdefault(arm, {})[seed] = value
        cells = {arm: _cell(values) for arm, values in by_arm.items()}
        columns.append(
            Column(
                task,
                metric,
                group["direction"][0],
                group["unit"][0] or "",
                tuple(group["arm"].unique(maintain_order=True)),
                cells,
            )
        )
    spent = rows.group_by("arm", "seed").agg(pl.col(name).max() for name in COSTS)
    costs = {row.pop("arm"): row for row in spent.group_by("arm").agg(pl.col(name).mean() for name in COSTS).to_dicts()}
    return Summary(
        tuple(result.arms),
        tuple(result.seeds),
        tuple(columns),
        costs,
        {arm: tuple(seeds) for arm, seeds in failed.items()},
        spent.height,
        len(result.cells) - spent.height - len(result.failures),
        float(spent["seconds"].sum()),
    )


def _cell(values: Mapping[int, float]) -> Cell:
    found = paired(list(values.values()))
    bounded = math.isfinite(found.low) and math.isfinite(found.high)
    return Cell(dict(sorted(values.items())), found.mean, *((found.low, found.high) if bounded else (None, None)))
