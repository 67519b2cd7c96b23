"""Forecast the loss and the downstream error of a large, over-trained model from a few small runs.

Reach for it before paying for a run that is larger, or trained longer for its size, than anything you have: where the
law holds, five small runs give the loss of a model 300 times as expensive to about one percent.

Gadre et al. 2024, «Language models scale reliably with over-training and on downstream tasks», arXiv:2403.08540.
Defaults are the paper's: tied exponent, least squares on the raw loss, error law fitted on measured losses and fed the
predicted one. Departures: starts are spread over the data's own scale instead of a fixed grid (the optimum is the
same); E >= 0, positive A, B, alpha and a rising error law are enforced; every forecast carries an interval;
``loss="huber_log"`` is our robust variant.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.forecast.fit import Array, aligned, column, fit_law
from downriver.forecast.forms import Chinchilla, ExpOfLoss, ExpOfLossFrom, TiedChinchilla
from downriver.forecast.law import Law, caution, shaped
from downriver.forecast.table import RunTable

FAR = 1000.0  # times the compute of all fitted runs: nothing larger was validated
OUTSIDE = 2.0  # times the fitted range of D / N


class OverTrainingLaw(Law):
    """``L(N, D) = E + A N^-alpha + B D^-alpha``: loss after training N parameters (embeddings included) on D tokens.

    In the paper's form ``L(C, M) = E + (a M^eta + b M^-eta) C^-eta`` with compute C = 6ND, token multiplier M = D/N and
    eta = alpha/2, so that A = a 6^-eta and B = b 6^-eta.

    Args:
        tied_exponent: one exponent for N and D, the paper's law; false gives D an exponent beta of its own
            (Chinchilla's law, five parameters).
        loss: ``"lsq"``, least squares on the loss (the paper's), or ``"huber_log"``, Huber's loss of width 1e-3 on its
            logarithm (robust).
        n_starts: starting points of the fit; the best end is kept.

    Attributes: ``params_`` (E, A, B, alpha; tied also a, b, eta; untied also beta), ``fit_`` (the whole ``LawFit``),
    ``compute_`` (FLOP of all fitted runs), ``multipliers_`` (smallest and largest fitted D/N).

    >>> N = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7]); D = N * [20, 20, 20, 20, 320]
    >>> law = OverTrainingLaw().fit(N, D, 1.8 + 170 * N**-0.27 + 290 * D**-0.27)
    >>> round(law.predict(1.4e9, 8.4e11), 4), round(law.params_["alpha"], 6)
    (2.5517, 0.27)
    >>> [f"{v:.3g}" for v in law.optimal_allocation(1e21)]
    ['4.8e+09', '3.47e+10', '7.23']
    """

    def __init__(
        self, tied_exponent: bool = True, loss: Literal["lsq", "huber_log"] = "lsq", n_starts: int = 108
    ) -> None:
        self.tied_exponent = tied_exponent
        self.loss = loss
        self.n_starts = n_starts

    def fit(self, N: Any, D: Any, loss: Any, sample_weight: Any = None) -> "OverTrainingLaw":
        """Fit to runs: parameters ``N``, tokens ``D`` and final ``loss`` (nats a token), 1-D, positive, of one length.

        ``sample_weight`` multiplies squared residuals. Raises ``InputError`` for fewer different runs than free
        parameters, for runs that all have the same N, the same D or the same D/N, and for values that are not
        positive finite numbers. Warns (``RuntimeWarning``) of a parameter pinned at its bound.
        """
        self._check()
        N, D, loss = aligned({"N": N, "D": D, "loss": loss})
        if not self.tied_exponent and np.ptp(np.log(D / N)) < 1e-9:
            raise InputError(f"all {len(N)} runs have the same D/N: an untied law cannot tell A and B apart")
        form = TiedChinchilla() if self.tied_exponent else Chinchilla()
        self.fit_ = fit_law(form, [N, D], loss, weight=sample_weight, objective=self.loss, n_starts=self.n_starts)
        self.params_ = dict(self.fit_.params)
        if self.tied_exponent:
            E, A, B, alpha = self.params_.values()
            _, a, b, eta = to_compute_form(E, A, B, alpha)
            self.params_ |= {"a": a, "b": b, "eta": eta}
        self.compute_ = float((6 * N * D).sum())
        self.multipliers_ = (float((D / N).min()), float((D / N).max()))
        caution(self.cautions())
        return self

    def predict(self, N: Any, D: Any) -> Any:
        """The loss of N parameters trained on D tokens: a float for numbers, else the broadcast array.

        Warns (``RuntimeWarning``) of targets beyond 1000 times the fitted compute, and of D/N outside the fitted range
        by more than a factor of 2.
        """
        fit = self._fitted()
        targets = _targets(N, D)
        caution(self.cautions_at(*targets))
        return shaped(fit.predict(*targets), N, D)

    def predict_compute(self, C: Any, M: Any) -> Any:
        """The loss after C floating-point operations at M tokens a parameter; the same as ``predict(N, D)`` there."""
        C, M = np.asarray(C, dtype=np.float64), np.asarray(M, dtype=np.float64)
        N = np.sqrt(C / (6 * M))
        return self.predict(*(v if v.ndim else float(v) for v in (N, M * N)))

    def interval(self, N: Any, D: Any, level: float = 0.95) -> tuple[Array, Array]:
        """The band in which the loss of a new run is expected, ``(low, high)``; NaN where the fit spared no run."""
        return self._fitted().interval(*np.broadcast_arrays(*map(np.atleast_1d, _targets(N, D))), level=level)

    def optimal_allocation(self, C: float) -> tuple[float, float, float]:
        """The N, D and M = D/N that reach the lowest loss with C floating-point operations (C = 6ND).

        Tied, M* = (B/A)^(1/alpha) = (b/a)^(1/(2 eta)) whatever C is.
        """
        self._fitted()
        (C,) = column("C", [C])
        p = self.params_
        alpha, beta = p["alpha"], p.get("beta", p["alpha"])
        # dL/dN = 0 along D = C / 6N:  alpha A N^-alpha = beta B (C / 6N)^-beta
        N = ((alpha * p["A"]) / (beta * p["B"]) * (C / 6) ** beta) ** (1 / (alpha + beta))
        return float(N), float(C / (6 * N)), float(C / (6 * N * N))

    def overtraining_penalty(self, M: Any, C: float) -> Any:
        """Reducible loss ``L - E`` at M tokens a parameter divided by that of the best M, both at compute C; >= 1."""
        self._fitted()
        (C,), multipliers = column("C", [C]), column("M", np.atleast_1d(M))
        N = np.sqrt(C / (6 * multipliers))
        best_N, best_D, _ = self.optimal_allocation(C)
        E = self.params_["E"]
        return shaped(
            ((self.fit_.predict(N, multipliers * N) - E) / (self.fit_.predict(best_N, best_D) - E)).reshape(
                np.shape(M)
            ),
            M,
        )

    def extrapolation_ratio(self, N: Any, D: Any) -> Any:
        """Compute of the target divided by the compute of all fitted runs together."""
        self._fitted()
        targets = _targets(N, D)
        return shaped(6 * targets[0] * targets[1] / self.compute_, N, D)

    def cautions_at(self, N: Any, D: Any) -> list[str]:
        """What to beware of at these targets, in words; empty inside what the law was ever validated for."""
        self._fitted()
        N, D = _targets(N, D)
        ratio, M = float((6 * N * D).max() / self.compute_), D / N
        low, high = self.multipliers_
        said = []
        if ratio > FAR:
            runs = f"{ratio:,.0f} times the compute of all fitted runs"
            said.append(f"the target is {runs}: nothing beyond {FAR:,.0f} was ever validated")
        above, below = bool(M.max() > OUTSIDE * high * (1 + 1e-9)), bool(M.min() * OUTSIDE < low * (1 - 1e-9))
        if above or below:
            worst, fitted = float(M.max() if above else M.min()), f"the fitted {low:,.4g} to {high:,.4g}"
            said.append(f"{worst:,.4g} tokens a parameter lie outside {fitted} by more than a factor of {OUTSIDE:g}")
        return said


class DownstreamErrorLaw(Law):
    """``Err(L) = epsilon - k exp(-gamma L)``: average downstream error as a function of loss.

    Args:
        chance: accuracy of guessing; given, epsilon is held at ``1 - chance`` and two parameters are left.
        n_starts: starting points of the fit.

    Always least squares on the error, as the paper does. Attributes: ``params_`` (epsilon, k, gamma), ``fit_``.

    >>> L = np.array([2.5, 2.8, 3.2, 3.6, 4.2])
    >>> law = DownstreamErrorLaw().fit(L, 0.85 - 2.2 * np.exp(-0.7 * L))
    >>> {name: round(value, 6) for name, value in law.params_.items()}
    {'epsilon': 0.85, 'k': 2.2, 'gamma': 0.7}
    >>> round(law.invert(law.predict(2.4)), 9)
    2.4
    """

    def __init__(self, chance: float | None = None, n_starts: int = 108) -> None:
        self.chance = chance
        self.n_starts = n_starts

    def fit(self, loss: Any, error: Any, sample_weight: Any = None) -> "DownstreamErrorLaw":
        """Fit to runs: measured ``loss`` and measured ``error`` (a fraction; the mean over tasks), 1-D, of one length.

        Warns (``RuntimeWarning``) where gamma is not positive: the error then does not level off with the loss.
        """
        self._check()
        if self.chance is not None and not 0 <= self.chance < 1:
            raise InputError(f"chance is {self.chance!r}: an accuracy of at least 0 and below 1 is expected")
        (loss,), (error,) = aligned({"loss": loss}), aligned({"error": error}, positive=False)
        if len(loss) != len(error):
            raise InputError(f"columns of one length are expected: loss {len(loss)}, error {len(error)}")
        form = ExpOfLoss() if self.chance is None else ExpOfLossFrom(1 - self.chance)
        self.fit_ = fit_law(form, [loss], error, weight=sample_weight, n_starts=self.n_starts)
        self.params_ = ({} if self.chance is None else {"epsilon": 1 - self.chance}) | self.fit_.params
        caution(self.cautions())
        return self

    def predict(self, loss: Any) -> Any:
        """The error at a loss: a float for a number, else an array."""
        return shaped(self._fitted().predict(loss), loss)

    def interval(self, loss: Any, level: float = 0.95) -> tuple[Array, Array]:
        """The band in which the error of a new run with this loss is expected, ``(low, high)``."""
        return self._fitted().interval(np.atleast_1d(loss), level=level)

    def invert(self, error: Any) -> Any:
        """The loss needed for an error; ``InputError`` for an error that no loss reaches."""
        self._fitted()
        epsilon, k, gamma = (self.params_[name] for name in ("epsilon", "k", "gamma"))
        share = (epsilon - np.asarray(error, dtype=np.float64)) / k  # exp(-gamma L)
        if not (share > 0).all():
            raise InputError(f"error {error!r}: the law's errors lie below epsilon = {epsilon:.4g}")
        return shaped(-np.log(share) / gamma, error)

    def cautions(self) -> list[str]:
        said = super().cautions()
        if self.params_["gamma"] <= 0:
            said.append(
                "gamma is not positive: these errors do not level off as the loss grows, the law does not describe them"
            )
        return said


@dataclass(frozen=True)
class Step:
    """One link of a chain: what it forecasts, the value, and its interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """A forecast for one target: the value and interval of the last link, the links, and what to beware of.

    ``extrapolation_ratio`` is the target's compute divided by that of all runs the forecast was fitted on.
    """

    value: float
    interval: tuple[float, float]
    chain: tuple[Step, ...]
    extrapolation_ratio: float
    warnings: tuple[str, ...]


class Chain:
    """A loss law and, where a metric is asked for, an error law fed the *predicted* loss; both fitted to one table.

    The interval is carried through: every draw of the loss goes through a draw of the error law.

    Args:
        law: an ``OverTrainingLaw`` with the settings wanted (fitted here).
        error_law: a ``DownstreamErrorLaw`` with the settings wanted (fitted here).
        metric: ``"loss"``, or one of the table's metrics.
        loss: which of the table's losses; by default its first.

    >>> N = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7, 1e9]); D = N * [20, 20, 20, 20, 320, 20]
    >>> L = 1.8 + 170 * N**-0.27 + 290 * D**-0.27
    >>> runs = RunTable(N, D, {"loss": L}, {"avg_error": 0.85 - 2.2 * np.exp(-0.7 * L)})
    >>> chain = Chain(metric="avg_error").fit(runs)
    >>> [(step.name, round(step.value, 4)) for step in chain.forecast(6.9e9, 138e9).chain]
    [('loss', 2.4598), ('avg_error', 0.4568)]
    """

    def __init__(
        self,
        law: OverTrainingLaw | None = None,
        error_law: DownstreamErrorLaw | None = None,
        metric: str = "loss",
        loss: str | None = None,
    ) -> None:
        self.law, self.error_law, self.metric, self.loss = law or OverTrainingLaw(), error_law, metric, loss

    def fit(self, runs: RunTable, loss_rows: Any = None, error_rows: Any = None) -> "Chain":
        """Fit the loss law to ``loss_rows`` (all) and the error law to ``error_rows`` (all that have the metric).

        Rows are chosen by a boolean mask over the table.
        """
        loss = self.loss or next(iter(runs.losses))
        if loss not in runs.losses:
            raise unknown("loss", loss, runs.losses)
        if self.metric != "loss" and self.metric not in runs.metrics:
            raise unknown("metric", self.metric, ["loss", *runs.metrics])
        used = _rows(runs, "loss_rows", loss_rows)
        self.law.fit(runs.params[used], runs.tokens[used], runs.losses[loss][used])
        self.fitted_ = used
        if self.metric != "loss":
            measured = runs.metrics[self.metric]
            rows = _rows(runs, "error_rows", error_rows) & np.isfinite(measured)
            if not rows.any():
                raise InputError(f"no fitted run has the metric {self.metric!r}")
            self.error_law = (self.error_law or DownstreamErrorLaw()).fit(runs.losses[loss][rows], measured[rows])
            self.fitted_ = used | rows
        self.compute_ = float(runs.compute[self.fitted_].sum())
        self.range_ = [(float(v[used].min()), float(v[used].max())) for v in (runs.params, runs.tokens)]
        return self

    def forecast(self, N: float, D: float, level: float = 0.95) -> Forecast:
        """The forecast for N parameters trained on D tokens."""
        law = self.law.fit_
        N, D = float(column("target params", [N])[0]), float(column("target tokens", [D])[0])
        value = float(law.predict(N, D))
        steps = [Step("loss", value, *_band(law.sample([N], [D]) if law.spare > 0 else None, level))]
        said = [*self.law.cautions(), *self.law.cautions_at(N, D)]
        if self.error_law:
            error = self.error_law.fit_
            known = law.spare > 0 and error.spare > 0
            band = _band(error.sample(law.sample([N], [D])) if known else None, level)
            steps.append(Step(self.metric, float(error.predict(value)), *band))
            said += self.error_law.cautions()
        inside = all(low <= v <= high for v, (low, high) in zip((N, D), self.range_, strict=True))
        if inside:
            said.append("the target lies inside the range of the fitted runs: an interpolation, not a forecast")
        last = steps[-1]
        return Forecast(last.value, (last.low, last.high), tuple(steps), 6 * N * D / self.compute_, tuple(said))


def forecast(
    runs: RunTable,
    target: tuple[float, float],
    metric: str = "avg_error",
    *,
    level: float = 0.95,
    law: OverTrainingLaw | None = None,
    error_law: DownstreamErrorLaw | None = None,
    loss: str | None = None,
    loss_rows: Any = None,
    error_rows: Any = None,
) -> Forecast:
    """Fit the chain to a table of runs and forecast one target ``(N, D)``; see ``Chain`` for the arguments."""
    chain = Chain(law, error_law, metric, loss).fit(runs, loss_rows, error_rows)
    return chain.forecast(*target, level=level)


def to_compute_form(E: float, A: float, B: float, alpha: float) -> tuple[float, float, float, float]:
    """``(E, a, b, eta)`` of ``E + (a M^eta + b M^-eta) C^-eta`` from the tied law in N and D.

    >>> from_compute_form(*to_compute_form(1.8, 170.0, 290.0, 0.27)) == (1.8, 170.0, 290.0, 0.27)
    True
    """
    return E, A * 6 ** (alpha / 2), B * 6 ** (alpha / 2), alpha / 2


def from_compute_form(E: float, a: float, b: float, eta: float) -> tuple[float, float, float, float]:
    """``(E, A, B, alpha)`` of the tied law in N and D from the paper's form; the inverse of ``to_compute_form``."""
    return E, a / 6**eta, b / 6**eta, 2 * eta


def paper_runs(runs: RunTable, multiplier: float = 20.0, overtrained: float = 320.0, sizes: int = 4) -> Array:
    """Which rows the paper's recipe fits: the smallest ``sizes`` models at D/N = 20, and the smallest at D/N = 320.

    >>> N = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7, 1e9]); D = N * [20, 20, 20, 20, 320, 20]
    >>> paper_runs(RunTable(N, D, {"loss": np.full(6, 3.0)})).tolist()
    [True, True, True, True, True, False]
    """
    small = np.unique(runs.params)[:sizes]
    at = [np.isclose(runs.multiplier, m, rtol=1e-3) for m in (multiplier, overtrained)]
    return (np.isin(runs.params, small) & at[0]) | ((runs.params == small[0]) & at[1])


def _targets(N: Any, D: Any) -> tuple[Array, Array]:
    """Targets broadcast together as float64, so that 6ND cannot overflow; positive and finite."""
    N, D = np.broadcast_arrays(np.asarray(N, dtype=np.float64), np.asarray(D, dtype=np.float64))
    column("N", np.ravel(N))
    column("D", np.ravel(D))
    return N, D


def _rows(runs: RunTable, name: str, mask: Any) -> Array:
    if mask is None:
        return np.ones(len(runs), dtype=bool)
    rows = np.asarray(mask)
    if rows.dtype != bool or rows.shape != (len(runs),):
        raise InputError(f"{name}: a boolean mask over the {len(runs)} runs is expected")
    return rows


def _band(sample: Array | None, level: float) -> tuple[float, float]:
    if sample is None:
        return float("nan"), float("nan")
    low, high = np.quantile(sample[0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
