"""Claims that a study must bear out, and the verdicts that its measurements give on them.

A claim is about one metric of one arm, seed by seed: ``better`` and ``keeps`` pair it with another arm under the same
seed, ``above`` and ``below`` hold it against a number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from downriver.core.errors import InputError, unknown
from downriver.core.stats import FEWEST, Word, decide, holm, paired


@dataclass(frozen=True)
class Claim:
    """What must hold of ``arm`` on the metric ``on``; made by ``better``, ``keeps``, ``above`` or ``below``."""

    kind: Literal["better", "keeps", "above", "below"]
    arm: str
    on: str
    than: str | None = None
    margin: float = 0.0
    value: float | None = None
    task: str | None = None

    @property
    def text(self) -> str:
        """The claim in plain words."""
        metric = self.metric
        if self.kind == "better":
            return f"{self.arm} is better than {self.than} on {metric}" + (
                f" by more than {self.margin:g}" if self.margin else ""
            )
        if self.kind == "keeps":
            return f"{self.arm} keeps the {metric} of {self.than}" + (
                f" to within {-self.margin:g}" if self.margin else ""
            )
        return f"{self.arm} is {self.kind} {self.value:g} on {metric}"

    @property
    def metric(self) -> str:
        """The metric, with the task where the claim names one."""
        return f"{self.on} of {self.task}" if self.task else self.on

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that the claim needs."""
        return (self.arm,) if self.than is None else (self.arm, self.than)


@dataclass(frozen=True)
class Verdict:
    """What the measurements say of a claim: one difference a seed (positive speaks for the claim), and their summary.

    ``margin`` is what the mean difference must exceed; ``dropped`` are the seeds left out because an arm has no value.
    """

    claim: Claim
    verdict: Word
    n: int
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    differences: tuple[float, ...]
    seeds: tuple[int, ...]
    dropped: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The verdict in plain words, with its figures."""
        c, left_out = self.claim, ""
        if self.dropped:
            left_out = f"; without seed {', '.join(map(str, self.dropped))}, where a value is missing"
        if self.n == 0:
            return f"{self.verdict}: {c.text}: no seed has the values it needs{left_out}"
        sign = 1 if self.mean >= 0 else -1
        low, high = sorted((sign * self.low, sign * self.high))
        if c.than is None:
            side = c.kind if sign > 0 else {"above": "below", "below": "above"}[c.kind]
            found = f"{c.arm} lies {side} {c.value:g} on {c.metric}"
        else:
            found = f"{c.arm} is {'better' if sign > 0 else 'worse'} than {c.than} on {c.metric}"
        said = found if c.kind == "better" and sign > 0 and not c.margin else f"{c.text}: {found}"
        if self.n < FEWEST:
            few = "one seed" if self.n == 1 else f"{self.n} seeds"
            return (
                f"{self.verdict}: {said} by {abs(self.mean):.3g} over {few}, too few to decide:"
                f" at least {FEWEST} are needed{left_out}"
            )
        return (
            f"{self.verdict}: {said} by {abs(self.mean):.3g} [{low:.3g}, {high:.3g}] over {self.n} seeds,"
            f" p = {self.p_holm:.3g} (Holm){left_out}"
        )


def better(arm: str, *, than: str, on: str, margin: float = 0.0, task: str | None = None) -> Claim:
    """Claim that ``arm`` beats ``than`` on the metric ``on`` by more than ``margin``, in the metric's own direction.

    >>> better("ties", than="average", on="accuracy", margin=0.01).text
    'ties is better than average on accuracy by more than 0.01'
    """
    return Claim("better", arm, on, than=than, margin=_margin(margin), task=task)


def keeps(arm: str, *, than: str, on: str, within: float, task: str | None = None) -> Claim:
    """Claim that ``arm`` loses less than ``within`` against ``than`` on the metric ``on``.

    >>> keeps("lora", than="full", on="accuracy", within=0.02).text
    'lora keeps the accuracy of full to within 0.02'
    """
    return Claim("keeps", arm, on, than=than, margin=-_margin(within), task=task)


def above(arm: str, *, on: str, value: float, task: str | None = None) -> Claim:
    """Claim that the metric ``on`` of ``arm`` lies above ``value``.

    >>> above("full", on="accuracy", value=0.8).text
    'full is above 0.8 on accuracy'
    """
    return Claim("above", arm, on, value=float(value), task=task)


def below(arm: str, *, on: str, value: float, task: str | None = None) -> Claim:
    """Claim that the metric ``on`` of ``arm`` lies below ``value``.

    >>> below("full", on="loss", value=1.5).text
    'full is below 1.5 on loss'
    """
    return Claim("below", arm, on, value=float(value), task=task)


def verdicts(
    claims: Sequence[Claim], rows: pl.DataFrame, arms: Sequence[str], seeds: Sequence[int], level: float = 0.95
) -> list[Verdict]:
    """Judge the claims by the rows of a study; Holm's correction runs over all of them.

    ``rows`` holds at least the columns arm, seed, task, metric, value and direction. Where an arm measures a metric on
    several tasks, a seed's difference is the mean over them. A seed in which an arm has no value (it failed, or
    measured NaN) is left out and named. A claim on an unknown arm or metric is an ``InputError``.
    """
    judged = []
    for claim in claims:
        differences, dropped = _differences(claim, rows, arms, seeds)
        d = list(differences.values())
        if d:
            found = paired(d, level=level, margin=claim.margin)
            word = decide(found.low, found.high, claim.margin, found.n)
            figures = (found.mean, found.low, found.high, found.p)
        else:
            word, figures = "undecided", (math.nan, -math.inf, math.inf, 1.0)
        judged.append((claim, word, figures, differences, dropped))
    adjusted = holm([figures[3] for _, _, figures, _, _ in judged])
    return [
        Verdict(claim, word, len(d), *figures, p_holm, tuple(d.values()), tuple(d), dropped)
        for (claim, word, figures, d, dropped), p_holm in zip(judged, adjusted, strict=True)
    ]


def check(claims: Sequence[Claim], arms: Sequence[str]) -> None:
    """Raise ``InputError`` when a claim speaks of an arm that the study does not have."""
    for claim in claims:
        for arm in claim.arms:
            if arm not in arms:
                raise unknown(f"arm in the claim «{claim.text}»", arm, arms)


def _differences(
    claim: Claim, rows: pl.DataFrame, arms: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[int, float], tuple[int, ...]]:
    """One difference a seed, positive speaking for the claim, and the seeds that have none."""
    check([claim], arms)
    if not rows.is_empty() and claim.on not in set(rows["metric"]):
        raise unknown(f"metric in the claim «{claim.text}»", claim.on, set(rows["metric"]))
    of_metric = rows.filter(pl.col("metric") == claim.on)
    if claim.task is not None:
        if not of_metric.is_empty() and claim.task not in set(of_metric["task"]):
            raise unknown(f"task in the claim «{claim.text}»", claim.task, set(of_metric["task"]))
        of_metric = of_metric.filter(pl.col("task") == claim.task)
    for arm in claim.arms:
        has_run, measured = arm in set(rows["arm"]), arm in set(of_metric["arm"])
        if has_run and not measured:
            raise InputError(f"the claim «{claim.text}» needs {claim.on}, which arm {arm!r} does not measure")
    sign = _sign(claim, of_metric)
    values: dict[tuple[str, int], dict[str, float]] = {}
    for arm, seed, task, value in of_metric.select("arm", "seed", "task", "value").iter_rows():
        values.setdefault((arm, seed), {})[task] = value
    found: dict[int, float] = {}
    for seed in seeds:
        mine = values.get((claim.arm, seed), {})
        other = values.get((claim.than, seed), {}) if claim.than else dict.fromkeys(mine, claim.value or 0.0)
        if mine.keys() != other.keys() or not mine:
            continue
        difference = sum(sign * (mine[task] - other[task]) for task in mine) / len(mine)
        if math.isfinite(difference):
            found[seed] = difference
    return found, tuple(seed for seed in seeds if seed not in found)


def _sign(claim: Claim, of_metric: pl.DataFrame) -> float:
    if claim.than is None:
        return 1.0 if claim.kind == "above" else -1.0
    directions = set(of_metric.filter(pl.col("arm").is_in(claim.arms))["direction"])
    if directions - {"higher"} and directions - {"lower"}:
        raise InputError(
            f"the claim «{claim.text}» needs to know which way {claim.on} is better; its rows say"
            f" {', '.join(sorted(directions))}: give it one direction, higher or lower"
        )
    return -1.0 if directions == {"lower"} else 1.0


def _margin(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"a margin of {value} was given: a finite number of at least 0 is expected")
    return float(value)
