"""Hide the largest runs, predict them from the rest, and say how far off the law was.

Reach for it before believing a forecast: the same law on the same kind of runs, judged where the truth is known.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone

from downriver.core.errors import InputError
from downriver.forecast.fit import Array, column
from downriver.forecast.learning_curve import LearningCurve
from downriver.forecast.overtraining_law import Chain, DownstreamErrorLaw, OverTrainingLaw
from downriver.forecast.table import RunTable

CURVE = 60  # points of the drawn curve


@dataclass(frozen=True)
class Backtest:
    """What was fitted, what was hidden, and what the law said about it. All arrays are 1-D; hidden ones align.

    ``low`` and ``high`` bound each hidden value at ``level``; ``curve_*`` draw the law over the whole range of x.
    """

    law: str
    x_name: str
    y_name: str
    fit_x: Array
    fit_y: Array
    held_x: Array
    held_y: Array
    predicted: Array
    low: Array
    high: Array
    level: float
    curve_x: Array
    curve_y: Array
    curve_low: Array
    curve_high: Array

    @property
    def relative_errors(self) -> Array:
        """``predicted / truth - 1`` of each hidden value."""
        return self.predicted / self.held_y - 1

    @property
    def coverage(self) -> float:
        """The share of hidden values inside their interval; NaN where there is none."""
        known = np.isfinite(self.low) & np.isfinite(self.high)
        return float(((self.low <= self.held_y) & (self.held_y <= self.high))[known].mean()) if known.any() else np.nan

    @property
    def text(self) -> str:
        """The outcome in words."""
        farther = self.held_x / self.fit_x.max()
        span = " to ".join(dict.fromkeys(f"{v:,.3g}" for v in (farther.min(), farther.max())))
        off = np.abs(self.relative_errors)
        each = "; ".join(
            f"{x:.3g} {self.x_name}: {self.y_name} {p:.4g} forecast, {y:.4g} reached ({e:+.2%})"
            for x, p, y, e in zip(self.held_x, self.predicted, self.held_y, self.relative_errors, strict=True)
        )
        inside = (
            f"{self.coverage:.0%} inside the {self.level:.0%} interval" if np.isfinite(self.coverage) else "no interval"
        )
        return (
            f"{self.law} fitted to {len(self.fit_x)} points, {len(self.held_x)} hidden at {span} times the largest: "
            f"relative error {off.mean():.2%} on average, {off.max():.2%} at worst, {inside}. {each}."
        )


def backtest(
    law: OverTrainingLaw | LearningCurve,
    runs: RunTable | tuple[Any, Any],
    hide: Any = 1,
    *,
    metric: str = "loss",
    error_law: DownstreamErrorLaw | None = None,
    loss: str | None = None,
    loss_rows: Any = None,
    level: float = 0.9,
) -> Backtest:
    """Fit a copy of ``law`` to the runs that stay, predict those that are hidden.

    ``runs`` is a ``RunTable`` for an ``OverTrainingLaw`` and ``(n, error)`` for a ``LearningCurve``; ``hide`` is how
    many of the largest (by compute or n) to hide, or a boolean mask. A ``metric`` other than ``"loss"`` is forecast
    through ``error_law`` from the *predicted* loss; ``loss`` names which of the table's losses, by default its first;
    ``loss_rows`` (a boolean mask over ``runs``) keeps the loss law from some of the runs that stay, so that only the
    error law sees them. The laws given are not changed. Raises ``InputError`` where too few runs stay.

    >>> n = np.array([50, 100, 200, 400, 800, 1600])
    >>> test = backtest(LearningCurve(), (n, 0.08 + 1.5 * n**-0.5), hide=2)
    >>> test.fit_x.tolist(), bool(np.abs(test.relative_errors).max() < 1e-6)
    ([50.0, 100.0, 200.0, 400.0], True)
    """
    if not 0 < level < 1:
        raise InputError(f"level {level}: a number between 0 and 1 is expected")
    law = clone(law)
    if isinstance(law, LearningCurve):
        if isinstance(runs, RunTable):
            raise InputError("a learning curve is tested on (n, error), not on a table of runs")
        return _curve_test(law, column("n", runs[0]), column("error", runs[1], positive=False), hide, level)
    if not isinstance(runs, RunTable):
        raise InputError("an over-training law is tested on a RunTable")
    return _run_test(Chain(law, error_law and clone(error_law), metric, loss), runs, hide, loss_rows, level)


def _curve_test(law: LearningCurve, n: Array, error: Array, hide: Any, level: float) -> Backtest:
    held = _held(n, hide)
    law.fit(n[~held], error[~held])
    x = np.geomspace(n.min(), n.max(), CURVE)
    predicted, curve = law.fit_.predict(n[held]), law.fit_.predict(x)
    low, high = law.interval(n[held], level)
    curve_low, curve_high = law.interval(x, level)
    return Backtest(
        law="learning curve",
        x_name="training examples",
        y_name="error",
        fit_x=n[~held],
        fit_y=error[~held],
        held_x=n[held],
        held_y=error[held],
        predicted=predicted,
        low=low,
        high=high,
        level=level,
        curve_x=x,
        curve_y=curve,
        curve_low=curve_low,
        curve_high=curve_high,
    )


def _run_test(chain: Chain, runs: RunTable, hide: Any, loss_rows: Any, level: float) -> Backtest:
    held = _held(runs.compute, hide)
    chain.fit(runs.select(~held), None if loss_rows is None else np.asarray(loss_rows)[~held])
    truth = runs.losses[chain.loss or next(iter(runs.losses))] if chain.metric == "loss" else runs.metrics[chain.metric]
    fitted = np.isfinite(truth) & ~held
    fitted[~held] &= chain.fitted_
    held &= np.isfinite(truth)
    if not held.any():
        raise InputError(f"none of the hidden runs has the metric {chain.metric!r}")
    # the curve runs at the tokens a parameter of the largest hidden run
    compute = np.geomspace(runs.compute.min(), runs.compute.max(), CURVE)
    M = runs.multiplier[held][np.argmax(runs.compute[held])]
    N = np.sqrt(compute / (6 * M))
    asked = [chain.forecast(*target, level=level) for target in zip(runs.params[held], runs.tokens[held], strict=True)]
    drawn = [chain.forecast(*target, level=level) for target in zip(N, M * N, strict=True)]
    return Backtest(
        law="over-training law" if chain.law.tied_exponent else "Chinchilla law",
        x_name="training FLOP",
        y_name=chain.metric,
        fit_x=runs.compute[fitted],
        fit_y=truth[fitted],
        held_x=runs.compute[held],
        held_y=truth[held],
        predicted=np.array([f.value for f in asked]),
        low=np.array([f.interval[0] for f in asked]),
        high=np.array([f.interval[1] for f in asked]),
        level=level,
        curve_x=compute,
        curve_y=np.array([f.value for f in drawn]),
        curve_low=np.array([f.interval[0] for f in drawn]),
        curve_high=np.array([f.interval[1] for f in drawn]),
    )


def _held(size: Array, hide: Any) -> Array:
    if np.ndim(hide) == 0:
        if isinstance(hide, bool) or not (isinstance(hide, int | np.integer) and 1 <= hide < len(size)):
            raise InputError(f"hide is {hide!r}: a whole number from 1 to {len(size) - 1}, or a mask, is expected")
        held = np.zeros(len(size), dtype=bool)
        held[np.argsort(size, kind="stable")[-hide:]] = True
        return held
    held = np.asarray(hide)
    if held.dtype != bool or held.shape != size.shape or not held.any() or held.all():
        raise InputError(f"hide: a boolean mask over {len(size)} runs that hides some and keeps some is expected")
    return held.copy()
