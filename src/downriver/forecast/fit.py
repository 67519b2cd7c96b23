"""One robust solver for every law: many starts, many resamples and many tasks in a single array program.

Reach for ``fit_law`` when you have points and a form from ``downriver.forecast.forms``. The method is a projected
Levenberg-Marquardt in float64 with analytic jacobians; the objective is least squares on the values, or Huber's loss
on their logarithms (``huber_log``, delta 1e-3, as Hoffmann et al. 2022, arXiv:2203.15556, fit their third approach).

Intervals come from a residual bootstrap that knows how few points there are: residuals are inflated by
sqrt(n / spare), and each resample's scale is drawn as sqrt(spare / chi2(spare)), spare being the points left after the
parameters. In a linear law this gives Student's interval; a fit of five points by four parameters gets the wide band
that it deserves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.forecast.forms import Array, Form, Units

Objective = Literal["lsq", "huber_log"]
Interval = Literal["bootstrap", "case", "hessian"]
OBJECTIVES = ("lsq", "huber_log")
INTERVALS = ("bootstrap", "case", "hessian")
LANE_ELEMENTS = 1 << 16  # points x fits worked on at a time; larger ones are no faster


class FitSettings(TypedDict, total=False):
    """How a form is fitted: see ``fit_law``."""

    weight: Any
    objective: Objective
    delta: float
    n_starts: int


def fit_law(form: Form, X: Sequence[Any], y: Any, **settings: Unpack[FitSettings]) -> "LawFit":
    """Fit one form to n points: ``X`` holds one 1-D array an input, ``y`` the target.

    ``objective="lsq"`` (the default) is least squares on ``y``; ``"huber_log"`` is Huber's loss of width ``delta``
    (1e-3) on ``log y``. ``weight`` multiplies squared residuals. Of ``n_starts`` (108) evenly spread starting points
    the best end is kept. Raises ``InputError`` where the points cannot determine the parameters (too few, or all on
    one line) and for values that are not positive finite numbers.

    >>> from downriver.forecast.forms import PowerLaw
    >>> n = np.array([100.0, 200, 400, 800, 1600])
    >>> fit = fit_law(PowerLaw(), [n], 0.1 + 2 * n**-0.5)
    >>> {name: round(value, 6) for name, value in fit.params.items()}
    {'E': 0.1, 'A': 2.0, 'alpha': 0.5}
    """
    return fit_laws(form, X, [y], **settings)[0]


def fit_laws(
    form: Form,
    X: Sequence[Any],
    Y: Any,
    *,
    weight: Any = None,
    objective: Objective = "lsq",
    delta: float = 1e-3,
    n_starts: int = 108,
) -> "list[LawFit]":
    """Fit one form to many targets ``Y`` (tasks, n) measured at the same points, all in one batch.

    >>> from downriver.forecast.forms import PowerLaw
    >>> n = np.array([100.0, 200, 400, 800, 1600])
    >>> fits = fit_laws(PowerLaw(), [n], [0.1 + 2 * n**-0.5, 0.2 + 3 * n**-0.25])
    >>> [round(fit.params["alpha"], 6) for fit in fits]
    [0.5, 0.25]
    """
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if not (delta > 0 and n_starts >= 1):
        raise InputError(f"delta {delta} and n_starts {n_starts}: positive numbers are expected")
    inputs = np.stack(aligned(dict(zip(form.inputs, X, strict=True))))
    targets = np.stack([column("target", y, positive=objective == "huber_log") for y in Y])
    n = inputs.shape[1]
    weights = np.ones(n) if weight is None else column("weight", weight, positive=False)
    if targets.shape[1] != n or weights.shape != (n,) or (weights < 0).any():
        raise InputError(f"targets and non-negative weights for each of {n} points are expected")
    used = weights > 0
    inputs, targets, weights = inputs[:, used], targets[:, used], weights[used] / max(weights[used].mean(), 1e-300)
    P = len(form.names)
    cube = _cube(n_starts, P)
    problems = []
    for y in targets:
        units = form.units(inputs, y)
        Z = form.prepare(inputs[:, :, None], units)
        problems.append((units, Z, y / units.y, form.starts(cube, Z, y / units.y)))
    _check_identifiable(form, inputs, problems[0][1], problems[0][3])
    # the inputs, and so Z, are the same for every task; only target and starts differ
    y = np.stack([p[2] for p in problems])
    solved = solve(
        form,
        problems[0][1],
        np.log(y) if objective == "huber_log" else y,
        np.broadcast_to(weights, y.shape),
        np.stack([p[3] for p in problems], axis=1),
        delta if objective == "huber_log" else None,
    )
    return [
        LawFit(
            form=form,
            units=problems[i][0],
            theta=solved.theta[:, i],
            X=inputs,
            y=targets[i],
            weight=weights,
            objective=objective,
            delta=delta,
            cost=float(solved.cost[i]),
            converged=bool(solved.converged[i]),
            starts=problems[i][3],
        )
        for i in range(len(targets))
    ]


@dataclass(eq=False)
class LawFit:
    """One fitted law: its natural parameters, its data, and what can be said about both.

    ``theta`` are the internal coordinates in ``units``, ``starts`` the starting points in them; ``identifiable`` is
    false where a parameter is pinned at its bound or two of them trade off; ``notes`` says it in words.
    """

    form: Form
    units: Units
    theta: Array
    X: Array
    y: Array
    weight: Array
    objective: Objective
    delta: float
    cost: float
    converged: bool
    starts: Array = field(repr=False)
    _draws: dict[Any, "Draws"] = field(default_factory=dict, init=False, repr=False)

    @property
    def params(self) -> dict[str, float]:
        """The natural parameters by name."""
        return dict(
            zip(self.form.names, self.form.natural(self.theta[:, None], self.units)[:, 0].tolist(), strict=True)
        )

    def predict(self, *X: Any) -> Array:
        """The law at new points: one array an input, broadcast together; the shape of the broadcast comes back."""
        points = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in X))
        Z = self.form.prepare(np.stack([p.ravel() for p in points])[:, :, None], self.units)
        return (self.form.curve(self.theta[:, None], Z)[0][:, 0] * self.units.y).reshape(points[0].shape)

    def invert(self, y: Any) -> Array:
        """The input at which the law reaches each value of ``y``; NaN where it never does. One-input laws only."""
        return self.form.inverse(np.asarray(y, dtype=np.float64), self.theta, self.units)

    @property
    def residuals(self) -> Array:
        """What the fit leaves, in the scale of the objective: ``y - law`` or ``log(y / law)``."""
        fitted = self.predict(*self.X)
        return np.log(self.y / fitted) if self.objective == "huber_log" else self.y - fitted

    @property
    def free(self) -> Array:
        """Which parameters lie inside their bounds."""
        low, high = _bounds(self.form)
        return (self.theta > low[:, 0]) & (self.theta < high[:, 0])

    @property
    def spare(self) -> int:
        """Points left after the free parameters; 0 means that no interval can be given."""
        return len(self.y) - int(self.free.sum())

    @property
    def identifiable(self) -> bool:
        return bool(self.free.all()) and self._trade_off() is None

    @property
    def notes(self) -> list[str]:
        """What to know before believing the fit, in words."""
        said = [
            f"{name} is pinned at its bound: these points do not determine it"
            for name, free in zip(self.form.names, self.free, strict=True)
            if not free
        ]
        if traded := self._trade_off():
            said.append(f"{' and '.join(traded)} trade off: many pairs fit these points equally well")
        if self.spare <= 0:
            said.append(
                f"{len(self.y)} points for {len(self.theta)} parameters: none is spare, so there is no interval"
            )
        if not self.converged:
            said.append("the solver stopped before it converged")
        return said

    def draws(self, n: int = 1000, method: Interval = "bootstrap", n_starts: int = 8, seed: int = 0) -> "Draws":
        """``n`` refits on resamples, each from the best fit and ``n_starts`` spread starts; computed once and kept.

        ``"bootstrap"`` resamples residuals around the fit (right for a designed set of runs), ``"case"`` the runs.
        """
        key = (n, method, n_starts, seed)
        if key not in self._draws:
            self._draws[key] = self._resample(*key)
        return self._draws[key]

    def ci(
        self, level: float = 0.95, method: Interval = "bootstrap", n: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """An interval for each natural parameter; NaN where no point is spare."""
        _check_interval(level, method)
        if self.spare <= 0:
            return dict.fromkeys(self.form.names, (np.nan, np.nan))
        if method == "hessian":
            return self._hessian(level)
        values = self.form.natural(self.draws(n, method, seed=seed).theta, self.units)
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=1)
        return {name: (float(a), float(b)) for name, a, b in zip(self.form.names, low, high, strict=True)}

    def sample(self, *X: Any, n: int = 1000, method: Interval = "bootstrap", seed: int = 0) -> Array:
        """``n`` plausible measurements at each new point, (points, n): the law's uncertainty and a new run's scatter.

        An input may be (points, n), a value of its own for each draw: so a chain feeds one law's sample to the next.
        """
        draws = self.draws(n, method, seed=seed)
        points = np.stack(np.broadcast_arrays(*(_two(np.asarray(x, dtype=np.float64)) for x in X)))
        values = self.form.curve(draws.theta, self.form.prepare(points, self.units))[0] * self.units.y
        rng = np.random.default_rng([seed, 1])
        noise = rng.choice(draws.pool, size=values.shape) * draws.scale
        return values * np.exp(noise) if self.objective == "huber_log" else values + noise

    def interval(
        self, *X: Any, level: float = 0.95, n: int = 1000, method: Interval = "bootstrap", seed: int = 0
    ) -> tuple[Array, Array]:
        """The band in which a new measurement at each point is expected, (points,) each; NaN if no point is spare."""
        _check_interval(level, method)
        if self.spare <= 0:
            nan = np.full(len(np.atleast_1d(X[0])), np.nan)
            return nan, nan
        low, high = np.quantile(
            self.sample(*X, n=n, method=method, seed=seed), [(1 - level) / 2, (1 + level) / 2], axis=1
        )
        return low, high

    def audit(self) -> "Audit":
        """Refit without each run, and without the largest quarter; say how wrong the law is about what it missed."""
        n, size = len(self.y), self.form.size(self.X)
        largest = np.argsort(size)[n - max(1, n // 4) :]
        keep = np.vstack([~np.eye(n, dtype=bool), ~np.isin(np.arange(n), largest)])
        Z = self.form.prepare(self.X[:, :, None], self.units)
        possible = np.array([_rank_ok(self.form, Z[:, k], self.starts) for k in keep])
        relative = np.full((n + 1, n), np.nan)
        natural = np.full((len(self.form.names), n + 1), np.nan)
        if possible.any():
            theta = self._refit(
                np.broadcast_to(self.y, (int(possible.sum()), n)), self.weight * keep[possible], self.starts
            ).theta
            relative[possible] = self.form.curve(theta, Z)[0].T * self.units.y / self.y - 1
            natural[:, possible] = self.form.natural(theta, self.units)
        ranges = {
            name: (float(np.nanmin(v)), float(np.nanmax(v))) if possible[:n].any() else (np.nan, np.nan)
            for name, v in zip(self.form.names, natural[:, :n], strict=True)
        }
        return Audit(np.diag(relative[:n]).copy(), ranges, largest, relative[n, largest])

    def report(self) -> str:
        """The fit in a few lines of text."""
        lines = [f"{self.form.formula} fitted to {len(self.y)} points by {self.objective}"]
        intervals = self.ci()
        for name, value in self.params.items():
            low, high = intervals[name]
            lines.append(
                f"  {name:8} {value:<12.6g}" + (f" 95 % interval {low:.4g} to {high:.4g}" if np.isfinite(low) else "")
            )
        lines.append(f"  largest relative residual {np.abs(self.predict(*self.X) / self.y - 1).max():.3%}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _refit(self, Y: Array, W: Array, starts: Array) -> "Solved":
        """Solve the same law for other targets (m, n), in the target's own unit, from its best end and other starts."""
        P = len(self.theta)
        theta = np.concatenate([self.theta[:, None], starts.reshape(P, -1)], axis=1)
        Z = self.form.prepare(self.X[:, :, None], self.units)
        if self.objective == "huber_log":
            return solve(self.form, Z, np.log(Y / self.units.y), W, theta, self.delta, keep=2, tolerance=1e-6)
        return solve(self.form, Z, Y / self.units.y, W, theta, None, keep=2, tolerance=1e-6)

    def _resample(self, n: int, method: Interval, n_starts: int, seed: int) -> "Draws":
        if self.spare <= 0:
            raise InputError("no point is spare: the fit passes through all of them and cannot be resampled")
        rng = np.random.default_rng(seed)
        points, root = len(self.y), np.sqrt(self.weight)
        residual = self.residuals * root
        pool = (residual - residual.mean()) * np.sqrt(points / self.spare)
        some = self.starts[:, np.linspace(0, self.starts.shape[1] - 1, min(n_starts, self.starts.shape[1])).astype(int)]
        if method == "case":
            counts = rng.multinomial(points, np.full(points, 1 / points), size=4 * n)
            counts = counts[(counts > 0).sum(axis=1) > len(self.theta)][:n]
            if len(counts) < n:
                raise InputError(f"{points} points are too few to resample: use method 'bootstrap', not 'case'")
            solved = self._refit(np.broadcast_to(self.y, (n, points)), self.weight * counts, some)
            return Draws(solved.theta, pool, np.ones(n))
        scale = np.sqrt(self.spare / rng.chisquare(self.spare, size=n))
        noise = rng.choice(pool, size=(n, points)) * scale[:, None] / root
        fitted = self.predict(*self.X)
        Y = fitted * np.exp(noise) if self.objective == "huber_log" else fitted + noise
        return Draws(self._refit(Y, np.broadcast_to(self.weight, Y.shape), some).theta, pool, scale)

    def _jacobian(self) -> Array:
        """Jacobian (P, n) of the weighted residuals at the fit."""
        Z = self.form.prepare(self.X[:, :, None], self.units)
        value, J = self.form.curve(self.theta[:, None], Z)
        return ((J / value if self.objective == "huber_log" else J)[:, :, 0]) * np.sqrt(self.weight)

    def _trade_off(self) -> tuple[str, str] | None:
        """The two parameters that a nearly singular jacobian cannot tell apart."""
        J = self._jacobian()[self.free]
        names = [name for name, free in zip(self.form.names, self.free, strict=True) if free]
        norms = np.linalg.norm(J, axis=1)
        if len(J) < 2 or len(J) > J.shape[1]:
            return None
        _, singular, directions = np.linalg.svd((J / np.maximum(norms, 1e-300)[:, None]).T, full_matrices=False)
        if singular[-1] > 1e-5 * singular[0]:
            return None
        first, second = np.argsort(-np.abs(directions[-1]))[:2]
        return names[first], names[second]

    def _hessian(self, level: float) -> dict[str, tuple[float, float]]:
        if self.objective == "huber_log":
            raise InputError(
                "hessian intervals need objective 'lsq': Huber's loss far below the noise has no curvature to read"
            )
        from scipy.stats import t as student

        free, J = self.free, self._jacobian()[self.free]
        variance = float((self.weight * self.residuals**2).sum()) / self.spare / self.units.y**2
        covariance = np.zeros((len(free), len(free)))
        covariance[np.ix_(free, free)] = variance * np.linalg.pinv(J @ J.T, hermitian=True)
        logged = np.array(self.form.logged)
        step = 1e-6 * (np.abs(self.theta) + 1e-3)
        shifted = np.concatenate([self.theta[:, None] + np.diag(step), self.theta[:, None] - np.diag(step)], axis=1)
        values = self.form.natural(np.concatenate([self.theta[:, None], shifted], axis=1), self.units)
        values[logged] = np.log(np.abs(values[logged]))
        P = len(free)
        G = (values[:, 1 : P + 1] - values[:, P + 1 :]) / (2 * step)
        half = student.ppf((1 + level) / 2, self.spare) * np.sqrt(np.diag(G @ covariance @ G.T))
        bounds = np.stack([values[:, 0] - half, values[:, 0] + half])
        bounds[:, logged] = np.exp(bounds[:, logged])
        return {name: (float(a), float(b)) for name, a, b in zip(self.form.names, *bounds, strict=True)}


@dataclass(frozen=True)
class Draws:
    """Refits on resamples: internal parameters (P, m), the inflated residuals, and each resample's scale (m,)."""

    theta: Array
    pool: Array
    scale: Array


@dataclass(frozen=True)
class Audit:
    """What the law says about runs it did not see: relative errors, and how far its parameters move.

    ``left_out[i]`` is the relative error on run i when it alone is missing, NaN where the others cannot determine the
    law; ``ranges`` are the parameters over these fits; ``largest`` are the rows of the largest quarter and
    ``largest_errors`` the relative errors on them when all of them are missing.
    """

    left_out: Array
    ranges: dict[str, tuple[float, float]]
    largest: Array
    largest_errors: Array

    def __str__(self) -> str:
        seen = self.left_out[np.isfinite(self.left_out)]
        parts = []
        if len(seen):
            tried = f"{len(seen)} of {len(self.left_out)} runs"
            parts.append(f"one run left out: relative error up to {np.abs(seen).max():.2%} over {tried}")
        if np.isfinite(self.largest_errors).all():
            parts.append(f"largest {len(self.largest)} left out: up to {np.abs(self.largest_errors).max():.2%}")
        return "; ".join(parts) or "no run can be left out: the others do not determine the law"


@dataclass(frozen=True)
class Solved:
    """Ends of m problems: internal parameters (P, m), cost (m,), and whether the solver converged."""

    theta: Array
    cost: Array
    converged: Array


def solve(
    form: Form,
    Z: Array,
    Y: Array,
    W: Array,
    starts: Array,
    delta: float | None,
    *,
    keep: int = 3,
    tolerance: float = 1e-10,
) -> Solved:
    """Minimise over every problem and every start at once.

    ``Y`` and ``W`` are targets and weights (m, n) in internal units (their logarithms with ``delta``, Huber's width);
    ``starts`` is (P, S), or (P, m, S) with starts of its own for each problem. All starts run a few steps, the best
    ``keep`` of each problem run until a step is below ``tolerance``, and the best of these is the answer.
    """
    (m, n), P = Y.shape, len(starts)
    starts = np.broadcast_to(starts[:, None] if starts.ndim == 2 else starts, (P, m, starts.shape[-1]))
    S = starts.shape[2]
    parts = []
    chunk = max(1, LANE_ELEMENTS // (n * S))
    for begin in range(0, m, chunk):
        part = slice(begin, min(begin + chunk, m))
        k = part.stop - part.start
        y, w = Y[part].T, W[part].T
        lanes = np.repeat(np.arange(k), S)
        theta, cost, _ = _levenberg_marquardt(
            form, Z, y[:, lanes], w[:, lanes], starts[:, part].reshape(P, -1), delta, 1e-4, 25
        )
        best = np.argsort(cost.reshape(k, S), axis=1)[:, :keep]
        theta = np.take_along_axis(theta.reshape(P, k, S), best[None], axis=2).reshape(P, -1)
        lanes = np.repeat(np.arange(k), best.shape[1])
        theta, cost, done = _levenberg_marquardt(form, Z, y[:, lanes], w[:, lanes], theta, delta, tolerance, 500)
        cost = cost.reshape(k, -1)
        first = (np.arange(k), cost.argmin(axis=1))
        parts.append((theta.reshape(P, k, -1)[:, *first], cost[first], done.reshape(k, -1)[first]))
    return Solved(*(np.concatenate(p, axis=-1) for p in zip(*parts, strict=True)))


def _levenberg_marquardt(
    form: Form, Z: Array, Y: Array, W: Array, theta: Array, delta: float | None, tolerance: float, iterations: int
) -> tuple[Array, Array, Array]:
    """Projected Levenberg-Marquardt on L independent lanes; lanes that are done leave the batch."""
    P, L = theta.shape
    low, high = _bounds(form)
    theta = np.clip(theta, low, high)
    end, end_cost, finished = theta.copy(), np.full(L, np.inf), np.zeros(L, dtype=bool)
    lane, diagonal = np.arange(L), np.arange(P)
    cost, g, H, *own = _normal_equations(form, Z, Y, W, theta, delta)
    damping = np.full(L, 1e-2)
    for _ in range(iterations):
        # Huber's own curvature lies below H, that of its reweighted bound: little damping steps like Newton, much like
        # iteratively reweighted least squares
        A = own[0] + np.minimum(damping, 1.0) * H if own else H.copy()
        scale = H[diagonal, diagonal]
        A[diagonal, diagonal] += damping * scale + 1e-14 * (1 + scale)
        # a parameter at its bound with the gradient pushing outwards does not move
        held = ((theta <= low) & (g > 0)) | ((theta >= high) & (g < 0))
        if held.any():
            A *= ~held & ~held[:, None]
            A[diagonal, diagonal] += held
        trial = np.clip(theta - _solve_symmetric(A, np.where(held, 0.0, g)), low, high)
        moved = (np.abs(trial - theta) / (np.abs(theta) + 1e-2)).max(axis=0)
        after = _normal_equations(form, Z, Y, W, trial, delta)
        better = after[0] < cost
        theta = np.where(better, trial, theta)
        cost, g, H, *own = (np.where(better, new, old) for new, old in zip(after, (cost, g, H, *own), strict=True))
        done = (moved < tolerance) | (damping > 1e12)
        damping = np.where(better, np.maximum(damping * 0.1, 1e-12), damping * 8)
        if 8 * done.sum() >= len(lane):  # sooner, copying the rest would cost more than it saves
            end[:, lane[done]], end_cost[lane[done]], finished[lane[done]] = theta[:, done], cost[done], True
            rest = ~done
            theta, damping, lane, Y, W = (v[..., rest] for v in (theta, damping, lane, Y, W))
            cost, g, H, *own = (v[..., rest] for v in (cost, g, H, *own))
            done = done[rest]
            if not len(lane):
                break
    end[:, lane], end_cost[lane], finished[lane] = theta, cost, done
    return end, end_cost, finished


def _normal_equations(form: Form, Z: Array, Y: Array, W: Array, theta: Array, delta: float | None) -> tuple[Array, ...]:
    """Cost (L,), gradient (P, L) and curvature (P, P, L); for Huber the reweighted curvature, then its own."""
    with np.errstate(all="ignore"):  # a trial step may overflow; its cost is then infinite and the step refused
        value, J = form.curve(theta, Z)
        if delta is None:
            r = value - Y
            weighted = W * r
            cost = (weighted * r).sum(axis=0)
            curvatures = [_products(J, J * W)]
        else:
            r = np.log(value) - Y
            J /= value
            size = np.abs(r)
            inside = size <= delta
            cost = (W * np.where(inside, r * r, delta * (2 * size - delta))).sum(axis=0)
            reweighted = W * np.minimum(1.0, delta / np.maximum(size, delta))
            weighted = reweighted * r
            curvatures = [_products(J, J * reweighted), _products(J, J * (W * inside))]
        g = (J * weighted).sum(axis=1)
    return np.where(np.isfinite(cost), cost, np.inf), g, *curvatures


def _products(J: Array, K: Array) -> Array:
    """Sums over points of J_i K_j, (P, P, L); symmetric."""
    P = len(J)
    H = np.empty((P, P, J.shape[2]))
    for i in range(P):
        for j in range(i + 1):
            H[i, j] = H[j, i] = (J[i] * K[j]).sum(axis=0)
    return H


def _solve_symmetric(A: Array, g: Array) -> Array:
    """x with A x = g for L small positive matrices at once, by Cholesky's factors written out over the lanes."""
    P = len(g)
    C = np.zeros_like(A)
    with np.errstate(all="ignore"):
        for j in range(P):
            C[j, j] = np.sqrt(np.maximum(A[j, j] - (C[j, :j] ** 2).sum(axis=0), 1e-300))
            for i in range(j + 1, P):
                C[i, j] = (A[i, j] - (C[i, :j] * C[j, :j]).sum(axis=0)) / C[j, j]
        x = np.empty_like(g)
        for i in range(P):
            x[i] = (g[i] - (C[i, :i] * x[:i]).sum(axis=0)) / C[i, i]
        for i in reversed(range(P)):
            x[i] = (x[i] - (C[i + 1 :, i] * x[i + 1 :]).sum(axis=0)) / C[i, i]
    return np.where(np.isfinite(x), x, 0.0)


def _bounds(form: Form) -> tuple[Array, Array]:
    bounds = np.array(form.bounds)
    return bounds[:, :1], bounds[:, 1:]


def _cube(n: int, dimensions: int) -> Array:
    """``n`` evenly spread points of the unit cube, (dimensions, n): steps by powers of a generalised golden ratio."""
    ratio = 2.0
    for _ in range(60):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    return (0.5 + np.outer(ratio ** -np.arange(1.0, dimensions + 1), np.arange(n))) % 1


def _rank_ok(form: Form, Z: Array, starts: Array) -> bool:
    """Whether the jacobian has full rank at any of some starting points."""
    _, J = form.curve(starts[:, :16], Z)
    columns = np.moveaxis(J, 2, 0)
    norms = np.linalg.norm(columns, axis=2, keepdims=True)
    singular = np.linalg.svd(columns / np.maximum(norms, 1e-300), compute_uv=False)
    return columns.shape[2] >= len(form.names) and bool((singular[:, -1] > 1e-9 * singular[:, 0]).any())


def _check_identifiable(form: Form, X: Array, Z: Array, starts: Array) -> None:
    names = ", ".join(form.names)
    different = len(np.unique(X, axis=1).T)
    if different < len(form.names):
        raise InputError(
            f"{len(form.names)} parameters ({names}) need at least as many different points; {different} are given"
        )
    if not _rank_ok(form, Z, starts):
        raise InputError(f"these points do not determine {names}: {_why(form, X)}")


def _why(form: Form, X: Array) -> str:
    same = [name for name, x in zip(form.inputs, X, strict=True) if np.ptp(x) <= 1e-9 * np.abs(x).max()]
    if same:
        return f"all have the same {' and '.join(same)}"
    if len(X) == 2 and np.ptp(np.log(X[1] / X[0])) < 1e-9:
        return f"all have the same {form.inputs[1]} per {form.inputs[0]}"
    return "different parameters give the same curve through them"


def _check_interval(level: float, method: str) -> None:
    if not 0 < level < 1:
        raise InputError(f"level {level}: a number between 0 and 1 is expected")
    if method not in INTERVALS:
        raise unknown("interval method", method, INTERVALS)


def _two(x: Array) -> Array:
    return x if x.ndim == 2 else np.atleast_1d(x)[:, None]


def column(name: str, values: Any, positive: bool = True) -> Array:
    """One column as a new float64 array, checked: one dimension, numbers, finite, and positive where it must be.

    >>> column("loss", [3, 2.5])
    array([3. , 2.5])
    >>> column("loss", [3, 0])
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: loss: entry 1 is 0.0, a positive number is expected
    """
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: numbers are expected, not {values!r:.80}") from None
    if found.ndim != 1 or not found.size:
        raise InputError(f"{name}: one dimension and at least one entry are expected, the shape is {found.shape}")
    bad = ~np.isfinite(found) | ((found <= 0) if positive else False)
    if bad.any():
        where = int(np.flatnonzero(bad)[0])
        kind = "positive" if positive else "finite"
        raise InputError(f"{name}: entry {where} is {found[where]}, a {kind} number is expected")
    return found


def aligned(columns: dict[str, Any], positive: bool = True) -> list[Array]:
    """Several columns checked together: each by ``column``, and all of one length."""
    found = [column(name, values, positive) for name, values in columns.items()]
    if len({len(c) for c in found}) > 1:
        raise InputError(
            "columns of one length are expected: "
            + ", ".join(f"{k} {len(c)}" for k, c in zip(columns, found, strict=True))
        )
    return found
