"""Straight lines between logarithms, with the bands of textbook regression: loss against compute or size and samples.

Reach for ``ParetoPowerLaw`` when you have many runs, good and bad, and ask what the best of them say of more compute;
for ``LogLinearLaw`` when you ask which of several factors (parameters, samples) matters; for ``generalization_gap``
when a model was trained on some task-language cells and you ask what the others lose.

Spravil et al. 2025, «Florenz: Scaling Laws for Systematic Generalization in Vision-Language Models», arXiv:2503.09443:
log10 cross-entropy against log10 compute on the runs that no run beats, and against log10 size and log10 samples on
all runs, by ordinary least squares. Bands and p-values are Student's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from downriver.core.errors import InputError, unknown
from downriver.forecast.fit import Array, aligned, column
from downriver.forecast.law import shaped
from downriver.tasks.cells import CellGrid

Band = Literal["confidence", "prediction"]
BANDS = ("confidence", "prediction")


class LogLinearLaw(BaseEstimator):
    """``log10 y = b0 + b1 log10 x1 + b2 log10 x2 + ...`` by ordinary least squares.

    Args:
        factors: names of the inputs, in the order in which ``fit`` and ``predict`` take them.

    Attributes: ``params_`` (``intercept`` and one exponent a factor), ``stderr_`` and ``p_values_`` of the same names
    (two-sided, against 0), ``r2_``, ``residuals_`` (log10), ``spare_`` (degrees of freedom left).

    >>> N, S = np.array([4e8, 1e9, 4e9, 1e10, 4e8]), np.array([5e5, 2e6, 5e6, 1e7, 1e7])
    >>> law = LogLinearLaw(["params", "samples"]).fit(N, S, 10**2.3 * N**-0.16 * S**-0.04)
    >>> {name: round(value, 6) for name, value in law.params_.items()}
    {'intercept': 2.3, 'params': -0.16, 'samples': -0.04}
    """

    def __init__(self, factors: Sequence[str] = ("x",)) -> None:
        self.factors = factors

    def fit(self, *columns: Any) -> "LogLinearLaw":
        """Fit to one column a factor and then the target, 1-D, positive, of one length.

        Raises ``InputError`` for fewer runs than parameters plus one, and for factors of which one is a power of the
        others (such as a single size for all runs).
        """
        names = list(self.factors)
        if len(columns) != len(names) + 1:
            raise InputError(f"{len(names)} factors ({', '.join(names)}) and the target are expected")
        *inputs, y = (np.log10(c) for c in aligned(dict(zip([*names, "target"], columns, strict=True))))
        A = np.stack([np.ones(len(y)), *inputs], axis=1)
        n, P = A.shape
        if n <= P:
            raise InputError(f"{P} parameters need at least {P + 1} runs; {n} are given")
        self._center = A[:, 1:].mean(axis=0)
        A[:, 1:] -= self._center  # the normal equations of centred columns lose no digits
        scale = np.linalg.norm(A, axis=0)
        if (scale == 0).any() or np.linalg.matrix_rank(A / np.where(scale == 0, 1, scale), tol=1e-9) < P:
            raise InputError(f"these runs do not tell {', '.join(names)} apart: vary each by itself")
        beta, *_ = np.linalg.lstsq(A, y, rcond=None)
        self.residuals_ = y - A @ beta
        self.spare_ = n - P
        self._beta = beta
        self._variance = float(self.residuals_ @ self.residuals_) / self.spare_
        self._inverse = np.linalg.inv(A.T @ A)
        self._leverage = ((A @ self._inverse) * A).sum(axis=1)
        shift = np.eye(P)
        shift[0, 1:] = -self._center  # back to the intercept at log10 x = 0
        natural = shift @ beta
        error = np.sqrt(np.diag(shift @ self._inverse @ shift.T) * self._variance)
        labels = ["intercept", *names]
        self.params_ = dict(zip(labels, natural.tolist(), strict=True))
        self.stderr_ = dict(zip(labels, error.tolist(), strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            p = 2 * _student().sf(np.abs(natural / error), self.spare_)
        self.p_values_ = dict(zip(labels, p.tolist(), strict=True))
        total = float(((y - y.mean()) ** 2).sum())
        self.r2_ = 1 - float(self.residuals_ @ self.residuals_) / total if total > 0 else np.nan
        self.range_ = [(float(10 ** c.min()), float(10 ** c.max())) for c in inputs]
        return self

    def predict(self, *inputs: Any) -> Any:
        """The target at these factors: a float for numbers, else the broadcast array."""
        return shaped(
            10 ** (self._design(inputs) @ self._beta).reshape(np.broadcast_shapes(*map(np.shape, inputs))), *inputs
        )

    def interval(self, *inputs: Any, level: float = 0.95, band: Band = "prediction") -> tuple[Array, Array]:
        """``(low, high)``: where the line lies (``"confidence"``), or where a new run does (``"prediction"``)."""
        if band not in BANDS:
            raise unknown("band", band, BANDS)
        _level(level)
        A = self._design(inputs)
        variance = ((A @ self._inverse) * A).sum(axis=1) + (band == "prediction")
        half = _student().ppf((1 + level) / 2, self.spare_) * np.sqrt(self._variance * variance)
        middle = A @ self._beta
        return 10 ** (middle - half), 10 ** (middle + half)

    def ci(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Student's interval for the intercept and each exponent."""
        check_is_fitted(self, "params_")
        _level(level)
        t = float(_student().ppf((1 + level) / 2, self.spare_))
        return {k: (v - t * self.stderr_[k], v + t * self.stderr_[k]) for k, v in self.params_.items()}

    def audit(self) -> Array:
        """The relative error on each run when it alone is left out; NaN where the others do not determine the law."""
        check_is_fitted(self, "params_")
        leverage = self._leverage
        with np.errstate(divide="ignore", invalid="ignore"):
            left_out = self.residuals_ / (1 - leverage)  # the refit without the run, in closed form
        return np.where(leverage < 1 - 1e-9, 10**-left_out - 1, np.nan)

    def report(self) -> str:
        """The fit in a few lines of text."""
        lines = [f"log10 y on log10 {', log10 '.join(self.factors)}: {len(self.residuals_)} runs, R2 {self.r2_:.4f}"]
        for name, (low, high) in self.ci().items():
            value, p = self.params_[name], self.p_values_[name]
            lines.append(f"  {name:10} {value:<10.4g} 95 % interval {low:.4g} to {high:.4g}, p = {p:.2g}")
        return "\n".join(lines)

    def _design(self, inputs: Sequence[Any]) -> Array:
        check_is_fitted(self, "params_")
        if len(inputs) != len(self.factors):
            raise InputError(f"{len(self.factors)} factors ({', '.join(self.factors)}) are expected, not {len(inputs)}")
        points = np.broadcast_arrays(
            *(column(f, np.ravel(x)).reshape(np.shape(x)) for f, x in zip(self.factors, inputs, strict=True))
        )
        logs = np.stack([np.log10(p.ravel()) for p in points], axis=1) - self._center
        return np.column_stack([np.ones(len(logs)), logs])


class ParetoPowerLaw(LogLinearLaw):
    """``loss = a compute^b`` on the Pareto front: the runs that no other run beats at the same or lower compute.

    Compute is in whatever unit is used throughout; the paper counts multiply-accumulates as measured, not 6ND, for an
    image encoder costs more than its parameters say. Attributes: those of ``LogLinearLaw``, and ``front_`` (a mask over
    the runs given).

    >>> C, loss = np.array([1e3, 1e4, 1e4, 1e5, 1e6]), np.array([22.0, 16.0, 30.0, 11.5, 8.1])
    >>> law = ParetoPowerLaw().fit(C, loss)
    >>> law.front_.tolist(), round(law.params_["compute"], 3)
    ([True, True, False, True, True], -0.145)
    >>> low, high = law.interval(1e7, band="confidence")
    >>> bool(low < law.predict(1e7) < high)
    True
    """

    factors: Sequence[str] = ("compute",)

    def __init__(self) -> None:
        pass

    def fit(self, *columns: Any) -> "ParetoPowerLaw":
        """Fit to ``(compute, loss)``, 1-D, positive, of one length; ``InputError`` for a front of fewer than 3 runs."""
        if len(columns) != 2:
            raise InputError("compute and loss are expected")
        compute, loss = aligned({"compute": columns[0], "loss": columns[1]})
        self.front_ = front(compute, loss)
        if self.front_.sum() < 3:
            raise InputError(f"{self.front_.sum()} of {len(loss)} runs are on the front: at least 3 are needed")
        super().fit(compute[self.front_], loss[self.front_])
        return self

    def compute_for(self, loss: Any) -> Any:
        """The compute at which the line reaches a loss."""
        check_is_fitted(self, "params_")
        log = np.log10(column("loss", np.ravel(loss)).reshape(np.shape(loss)))
        return shaped(10 ** ((log - self.params_["intercept"]) / self.params_["compute"]), loss)


@dataclass(frozen=True)
class Gap:
    """What a task loses on unseen cells: losses at one compute, their ratio, and the compute factor that closes it.

    ``multiplier`` is infinite where more compute does not help the unseen cells.
    """

    task: str
    compute: float
    seen: float
    unseen: float
    ratio: float
    multiplier: float


def front(compute: Array, loss: Array) -> Array:
    """A mask of the runs with a lower loss than every run that costs no more; of equal runs the first.

    >>> front(np.array([1.0, 2.0, 2.0, 3.0]), np.array([5.0, 4.0, 4.5, 4.0])).tolist()
    [True, True, False, False]
    """
    order = np.lexsort((loss, compute))
    best = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))[:-1]
    mask = np.zeros(len(loss), dtype=bool)
    mask[order] = loss[order] < best
    return mask


def generalization_gap(results: Mapping[str, Any], grid: CellGrid, at: float | None = None) -> list[Gap]:
    """Compare seen and unseen cells of each task at equal compute, by a Pareto law of each.

    ``results`` holds columns ``compute``, ``task``, ``language`` and ``loss`` (a mapping or a data frame), one row a
    run and cell; a run is known by its compute. ``at`` is the compute to compare at, by default the largest measured.
    Tasks that have only seen or only unseen cells are left out. Raises ``InputError`` where none has both, for an
    unknown cell, and where a run lacks a cell that others have.

    >>> from downriver.tasks.cells import CellGrid
    >>> grid = CellGrid(["caption"], ["de", "es"], seen={("caption", "de")})
    >>> C = [1e3, 1e4, 1e5]
    >>> rows = {"compute": C * 2, "task": ["caption"] * 6, "language": ["de"] * 3 + ["es"] * 3}
    >>> loss = [10**1.42 * c**-0.15 for c in C] + [10**1.86 * c**-0.15 for c in C]
    >>> [gap] = generalization_gap(rows | {"loss": loss}, grid)
    >>> round(gap.ratio, 3), round(gap.multiplier)
    (2.754, 858)
    """
    compute, loss = aligned({name: np.asarray(results[name]) for name in ("compute", "loss")})
    cells = [grid.check((str(t), str(g))) for t, g in zip(results["task"], results["language"], strict=True)]
    at = float(compute.max()) if at is None else float(column("at", [at])[0])
    gaps = []
    for task in grid.tasks:
        laws = {}
        for seen in (True, False):
            mine = np.array([c[0] == task and (c in grid.seen) == seen for c in cells])
            if mine.any():
                wanted = {c for c, m in zip(cells, mine, strict=True) if m}
                laws[seen] = ParetoPowerLaw().fit(*_mean_by_run(compute[mine], loss[mine], len(wanted), task))
        if len(laws) == 2:
            there, here = laws[True].predict(at), laws[False].predict(at)
            helps = laws[False].params_["compute"] < 0
            gaps.append(
                Gap(task, at, there, here, here / there, laws[False].compute_for(there) / at if helps else np.inf)
            )
    if not gaps:
        raise InputError("no task has results on seen and on unseen cells")
    return gaps


def _mean_by_run(compute: Array, loss: Array, cells: int, task: str) -> tuple[Array, Array]:
    runs, which, counts = np.unique(compute, return_inverse=True, return_counts=True)
    if (counts != cells).any():
        run = runs[counts != cells][0]
        raise InputError(f"{task}: the run with compute {run:g} has another number of cells than {cells}")
    return runs, np.bincount(which, loss) / counts


def _student() -> Any:
    from scipy.stats import t

    return t


def _level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level {level}: a number between 0 and 1 is expected")
