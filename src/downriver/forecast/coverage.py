"""Do the intervals mean what they say? Coverage over public ladders of models, and the factor that mends it.

Reach for it to know how often a 90 % interval held the truth where the truth is known, and to widen your own forecasts
by a factor that other ladders ask for. The factor is split-conformal (Vovk et al. 2005; Lei et al. 2018,
arXiv:1604.04173) with ladders in the place of points: the quantile, over the forecasts of the *other* ladders, of how
many half-widths the truth lay from the forecast. Each ladder weighs the same, whatever number of tasks it has.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from downriver.core.errors import InputError
from downriver.forecast.fit import Array
from downriver.forecast.ladder import TaskLadder, public
from downriver.forecast.learning_curve import LearningCurve
from downriver.forecast.overtraining_law import Chain, DownstreamErrorLaw, OverTrainingLaw
from downriver.forecast.table import Path_, RunTable

FAMILY = 6  # models that a family of the observational table needs: one is hidden, five are fitted


@dataclass(frozen=True)
class Outcome:
    """One hidden value: which ladder, ``loss`` or ``error``, what it was, and what was said of it."""

    ladder: str
    kind: str
    name: str
    truth: float
    value: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.truth <= self.high

    @property
    def half_widths(self) -> float:
        """How far the truth lies from the forecast, in half-widths of the interval on its side; 1 is its end."""
        half = self.high - self.value if self.truth > self.value else self.value - self.low
        off = abs(self.truth - self.value)
        return off / half if half > 0 else (0.0 if off == 0 else np.inf)


@dataclass(frozen=True)
class Coverage:
    """The forecasts of one kind on one ladder; ``factor`` was learnt on the other ladders alone."""

    ladder: str
    kind: str
    n: int
    covered: float
    factor: float
    covered_widened: float


def public_outcomes(folder: Path_, level: float = 0.9) -> list[Outcome]:
    """Hide the largest runs of every public ladder found in ``folder`` and forecast them from the smaller ones.

    The folder holds one or more of ``overtraining_testbed``, ``olmo_ladder``, ``chinchilla`` and ``obs_scaling``, each
    as its repository has it. Hidden are: of the testbed, the 1.4B and 6.9B runs (all 8 losses, and 46 tasks through
    the chain; runs below 20 tokens a parameter are not fitted); of the OLMo ladder, 3B, 7B and 13B (texts, task losses,
    task errors); of Chinchilla's points, the quarter with the most compute; of each family of at least 6 public models,
    the largest (errors as learning curves in compute). Intervals that do not exist (no point to spare) are left out.
    """
    found: list[Outcome] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # cautions of single fits; here it is the outcome that speaks
        for name, read in SOURCES.items():
            if (Path(folder) / name).exists():
                found += read(Path(folder) / name, level)
    if not found:
        raise InputError(f"{folder} holds none of {', '.join(SOURCES)}")
    return [o for o in found if np.isfinite([o.low, o.high]).all()]


def factor(outcomes: Sequence[Outcome], level: float = 0.9) -> float:
    """The number that half-widths are to be multiplied by so that a share ``level`` of these truths lies inside.

    >>> one = [Outcome("a", "loss", "x", 2.0 + i / 10, 2.0, 1.5, 2.5) for i in range(10)]
    >>> round(factor(one, 0.9), 2)
    1.8
    """
    if not outcomes:
        raise InputError("no outcome to learn a factor from")
    scores = np.array([o.half_widths for o in outcomes])
    ladders = [o.ladder for o in outcomes]
    weights = np.array([1 / ladders.count(name) for name in ladders])
    order = np.argsort(scores)
    share = np.cumsum(weights[order]) / weights.sum()
    # the conformal quantile: one more score, of the forecast to come, is counted as the largest
    needed = min(level * (1 + 1 / len(scores)), 1.0)
    return float(scores[order][min(int(np.searchsorted(share, needed - 1e-12)), len(scores) - 1)])


def widened(value: float, low: float, high: float, by: float) -> tuple[float, float]:
    """An interval stretched about its forecast.

    >>> widened(2.0, 1.9, 2.2, 2.0)
    (1.7999999999999998, 2.4000000000000004)
    """
    return value - by * (value - low), value + by * (high - value)


def coverage(outcomes: Sequence[Outcome], level: float = 0.9) -> list[Coverage]:
    """Coverage of every ladder and kind, as it is and widened by the factor that the other ladders ask for."""
    found = []
    for kind, ladder in dict.fromkeys((o.kind, o.ladder) for o in outcomes):
        mine = [o for o in outcomes if (o.kind, o.ladder) == (kind, ladder)]
        others = [o for o in outcomes if o.kind == kind and o.ladder != ladder]
        by = factor(others, level) if others else float("nan")
        inside = [o.inside for o in mine]
        after = [o.half_widths <= by for o in mine] if others else [float("nan")]
        found.append(Coverage(ladder, kind, len(mine), float(np.mean(inside)), by, float(np.mean(after))))
    return found


def _testbed(folder: Path, level: float) -> Iterator[Outcome]:
    table = RunTable.from_testbed(folder)
    table = table.select(table.multiplier > 19.9)
    for group in sorted(set(table.groups)):
        runs = table.group(group)
        held = runs.params > 1e9
        for loss in runs.losses:
            yield from _hidden(f"testbed {group}", "loss", Chain(loss=loss), runs, held, level)
        # every task's chain shares the loss law and its draws
        law = OverTrainingLaw().fit(runs.params[~held], runs.tokens[~held], runs.loss[~held]).fit_
        drawn = law.sample(runs.params[held], runs.tokens[held])
        for metric, errors in runs.metrics.items():
            if metric.startswith("avg"):
                continue
            error_law = DownstreamErrorLaw().fit(runs.loss[~held], errors[~held]).fit_
            said = error_law.predict(law.predict(runs.params[held], runs.tokens[held]))
            low, high = np.quantile(error_law.sample(drawn), [(1 - level) / 2, (1 + level) / 2], axis=1)
            for i, values in zip(np.flatnonzero(held), zip(errors[held], said, low, high, strict=True), strict=True):
                yield Outcome(f"testbed {group}", "error", f"{metric} of {runs.names[int(i)]}", *map(float, values))


def _olmo(folder: Path, level: float) -> Iterator[Outcome]:
    for row in public(folder, TaskLadder(), level=level):
        for kind in ("loss", "error"):
            values = [float(row[f"{kind}{part}"]) for part in ("", "_forecast", "_low", "_high")]
            yield Outcome("OLMo tasks", kind, f"{row['task']} of {row['run']}", *values)
    runs = RunTable.from_olmo_ladder(folder)
    runs = runs.select(runs.multiplier > 15)
    for text in (name for name in runs.losses if not name.startswith(("bpb_", "soft_"))):
        chain = Chain(OverTrainingLaw(tied_exponent=False), loss=text)
        yield from _hidden("OLMo texts", "loss", chain, runs, runs.params > 2e9, level)


def _chinchilla(folder: Path, level: float) -> Iterator[Outcome]:
    runs = RunTable.from_chinchilla(folder / "svg_extracted_data.csv")
    chain = Chain(OverTrainingLaw(tied_exponent=False, loss="huber_log"))
    yield from _hidden("Chinchilla", "loss", chain, runs, runs.compute > np.quantile(runs.compute, 0.75), level)


def _observed(folder: Path, level: float) -> Iterator[Outcome]:
    table = RunTable.from_obs_scaling(folder / "base_llm_benchmark_eval.csv")
    for family in sorted(set(table.groups)):
        runs = table.group(family)
        for metric, errors in runs.metrics.items():
            known = np.isfinite(errors) & (errors > 0)
            order = np.argsort(runs.compute[known], kind="stable")
            x, y = runs.compute[known][order], errors[known][order]
            if len(x) < FAMILY or len(np.unique(x)) < FAMILY:
                continue
            curve = LearningCurve().fit(x[:-1], y[:-1])
            low, high = curve.interval(x[-1:], level)
            name = f"{metric.removeprefix('error_')} of the largest"
            yield Outcome(f"family {family}", "error", name, y[-1], curve.predict(x[-1]), float(low[0]), float(high[0]))


SOURCES: dict[str, Callable[[Path, float], Iterator[Outcome]]] = {
    "overtraining_testbed": _testbed,
    "olmo_ladder": _olmo,
    "chinchilla": _chinchilla,
    "obs_scaling": _observed,
}


def _hidden(ladder: str, kind: str, chain: Chain, runs: RunTable, held: Array, level: float) -> Iterator[Outcome]:
    chain.fit(runs.select(~held))
    truth = runs.losses[chain.loss or next(iter(runs.losses))] if kind == "loss" else runs.metrics[chain.metric]
    for i in np.flatnonzero(held & np.isfinite(truth)):
        said = chain.forecast(runs.params[i], runs.tokens[i], level)
        name = f"{chain.loss or chain.metric} of {runs.names[int(i)] or f'{runs.params[i]:.3g} parameters'}"
        yield Outcome(ladder, kind, name, float(truth[i]), said.value, *said.interval)
