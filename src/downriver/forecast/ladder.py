"""Forecast a large model's score on each task of a benchmark from a ladder of small models, in two steps.

Reach for it when every small run was scored on the tasks with the loss on their right answers: first the task's loss
as a function of parameters and tokens, then the accuracy as a sigmoid of that loss, which all checkpoints of the
runs show.

Bhagia et al. 2024, «Establishing Task Scaling Laws via Compute-Efficient Model Ladders», arXiv:2412.04403, is
``share="none"``: a Chinchilla law a task by log-Huber on the mean of the last five checkpoints, a sigmoid by least
squares on all checkpoints but the first tenth (moving average of five, and the ideal point of no loss and no error).
Departures: starts are many instead of one, and every forecast carries an interval. Ours is ``share="exponents"``: what
a parameter or a token is worth is the ladder's, not the task's, so all tasks have one alpha and one beta, and only
floor and amplitudes of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from downriver.core.errors import InputError, unknown
from downriver.forecast.fit import Array, LawFit, column, fit_law, fit_laws, solve
from downriver.forecast.forms import Chinchilla, Sigmoid
from downriver.forecast.overtraining_law import FAR, Forecast, Step
from downriver.forecast.table import Path_, RunTable

# The ladder paper's tasks, and the splits that it forecasts.
PAPER_TASKS = (
    "mmlu_test",
    "hellaswag_val",
    "arc_challenge_test",
    "arc_easy_test",
    "piqa_val",
    "csqa_val",
    "socialiqa_val",
    "openbookqa_test",
)
SHARES = ("none", "exponents", "exponent")
LINK_STARTS = 16
NOISY = 10  # last checkpoints that show a run's noise
NOISE_FLOOR = 0.1  # squared, in units of the mean noise: ten checkpoints do not tell a quiet run from a lucky one
DRAWS, LINK_DRAWS = 400, 200


class TaskLadder(BaseEstimator):
    """Task loss ``L(N, D) = E + A N^-alpha + B D^-beta``, then accuracy = sigmoid(L), for every task of a ladder.

    Args:
        share: ``"none"``, a law of its own for each task, by log-Huber (the paper's); ``"exponents"``, alpha and beta
            common to all tasks; ``"exponent"``, one exponent for N, D and all tasks. The last two are least squares on
            relative residuals.
        weigh: divide a shared law's residuals by the noise of the task's loss over the run's last checkpoints; by
            default where checkpoints are given.
        measure: the task's loss: ``"bpb"``, bits per byte of the right answer (the paper's), or ``"soft"``, minus the
            log of its probability among the choices.
        skip: share of each run's first checkpoints that the sigmoid does not see (the paper's tenth).
        average: checkpoints in the moving average that it sees (the paper's five).

    Attributes: ``tasks_``, ``loss_law_`` (step 1), ``links_`` (step 2, a ``Link`` a task), ``compute_``.

    >>> N = np.repeat([1e8, 2e8, 4e8, 8e8], 3); D = N * np.tile([20, 60, 200], 4)
    >>> loss = {f"bpb_{t}": e + a * N**-0.3 + 40 * D**-0.25 for t, e, a in [("x", 0.4, 90), ("y", 0.7, 60)]}
    >>> errors = {f"error_{k[4:]}": 0.7 / (1 + np.exp(-6 * (v - 0.9))) for k, v in loss.items()}
    >>> ladder = TaskLadder().fit(RunTable(N, D, loss, errors))
    >>> truth = 0.7 / (1 + np.exp(-6 * (0.4 + 90 * 7e9**-0.3 + 40 * 1.4e11**-0.25 - 0.9)))
    >>> bool(abs(ladder.forecast(7e9, 1.4e11)["x"].value - truth) < 0.01)
    True
    """

    def __init__(
        self,
        share: Literal["none", "exponents", "exponent"] = "exponents",
        weigh: bool | None = None,
        measure: Literal["bpb", "soft"] = "bpb",
        skip: float = 0.1,
        average: int = 5,
    ) -> None:
        self.share = share
        self.weigh = weigh
        self.measure = measure
        self.skip = skip
        self.average = average

    def fit(
        self, runs: RunTable, checkpoints: RunTable | None = None, tasks: Sequence[str] | None = None
    ) -> "TaskLadder":
        """Fit both steps: the loss laws to ``runs``, the sigmoids to ``checkpoints`` (by default the runs).

        A table needs the losses ``<measure>_<task>`` and the metrics ``error_<task>``; checkpoints of one run have its
        name and come in the order of training. ``tasks`` are by default all that have both. Raises ``InputError`` for
        an unknown task and for fewer runs than parameters.
        """
        if self.share not in SHARES:
            raise unknown("share", self.share, SHARES)
        if not (0 <= self.skip < 1 and self.average >= 1):
            raise InputError(
                f"skip {self.skip} and average {self.average}: a share below 1 and at least 1 are expected"
            )
        prefix = f"{self.measure}_"
        known = [n.removeprefix(prefix) for n in runs.losses if n.startswith(prefix)]
        known = [t for t in known if f"error_{t}" in runs.metrics and np.isfinite(runs.metrics[f"error_{t}"]).all()]
        for task in tasks or ():
            if task not in known:
                raise unknown("task of the ladder", task, known)
        if not known:
            raise InputError(f"no task has both a loss {prefix}<task> and an error_<task>")
        self.tasks_ = tuple(tasks or known)
        N, D, losses = runs.params, runs.tokens, np.stack([runs.losses[prefix + t] for t in self.tasks_])
        self.loss_law_: LossLaws
        if self.share == "none":
            self.loss_law_ = Apart.fit(N, D, losses)
        else:
            noise = np.ones(losses.shape)
            if self.weigh or (self.weigh is None and checkpoints is not None):
                noise = np.stack([_noise(checkpoints, prefix + task, runs.names) for task in self.tasks_])
                noise = np.sqrt((noise / noise.mean()) ** 2 + NOISE_FLOOR)
            self.loss_law_ = Shared.fit(N, D, losses, noise, self.share)
        self.links_ = {}
        for task in self.tasks_:
            points = _seen(checkpoints or runs, prefix + task, f"error_{task}", self.skip, self.average)
            self.links_[task] = Link.fit(*points, step=self.average)
        self.compute_ = float(runs.compute.sum())
        self.range_ = [(float(v.min()), float(v.max())) for v in (N, D)]
        return self

    def losses(self, N: float, D: float) -> dict[str, float]:
        """Step 1 alone: the loss of each task."""
        check_is_fitted(self, "links_")
        return dict(zip(self.tasks_, self.loss_law_.predict(N, D).tolist(), strict=True))

    def forecast(self, N: float, D: float, level: float = 0.9) -> dict[str, Forecast]:
        """The error of each task at N parameters and D tokens, each with its chain and interval."""
        check_is_fitted(self, "links_")
        N, D = float(column("target params", [N])[0]), float(column("target tokens", [D])[0])
        if not 0 < level < 1:
            raise InputError(f"level {level}: a number between 0 and 1 is expected")
        ratio = 6 * N * D / self.compute_
        said = list(self.loss_law_.notes)
        if ratio > FAR:
            said.append(f"the target is {ratio:,.0f} times the compute of all fitted runs")
        if all(low <= v <= high for v, (low, high) in zip((N, D), self.range_, strict=True)):
            said.append("the target lies inside the range of the fitted runs: an interpolation, not a forecast")
        value, drawn = self.loss_law_.predict(N, D), self.loss_law_.sample(N, D)
        tail = [(1 - level) / 2, (1 + level) / 2]
        found = {}
        for task, loss, losses in zip(self.tasks_, value, drawn, strict=True):
            link = self.links_[task]
            errors = link.sample(losses)
            steps = (
                Step("loss", float(loss), *map(float, np.quantile(losses, tail))),
                Step(f"error_{task}", link.predict(loss), *map(float, np.quantile(errors, tail))),
            )
            found[task] = Forecast(steps[1].value, (steps[1].low, steps[1].high), steps, ratio, tuple(said))
        return found


@dataclass(frozen=True)
class LossLaws:
    """Step 1: the losses of all tasks at a target, and what to beware of."""

    notes: tuple[str, ...]

    def predict(self, N: float, D: float) -> Array:
        """Each task's loss, (tasks,)."""
        raise NotImplementedError

    def sample(self, N: float, D: float) -> Array:
        """Plausible losses of a new run, (tasks, draws); NaN where no run is spare."""
        raise NotImplementedError


@dataclass(frozen=True)
class Apart(LossLaws):
    """A Chinchilla law of its own for each task."""

    laws: tuple[LawFit, ...]

    @classmethod
    def fit(cls, N: Array, D: Array, losses: Array) -> "Apart":
        laws = tuple(fit_laws(Chinchilla(), [N, D], losses, objective="huber_log"))
        return cls(tuple(dict.fromkeys(note for law in laws for note in law.notes)), laws)

    def predict(self, N: float, D: float) -> Array:
        return np.array([float(law.predict(N, D)) for law in self.laws])

    def sample(self, N: float, D: float) -> Array:
        return np.stack(
            [law.sample([N], [D], n=DRAWS)[0] if law.spare > 0 else np.full(DRAWS, np.nan) for law in self.laws]
        )


@dataclass(frozen=True)
class Shared(LossLaws):
    """``E_t + A_t N^-alpha + B_t D^-beta`` with exponents common to all tasks, by variable projection.

    For given exponents the other parameters are linear (Golub & Pereyra 1973), and the same for all resamples; so the
    exponents are searched on a grid, for all resamples at once. Residuals are relative to the loss.
    """

    units: tuple[float, float]  # geometric means of N and D
    exponents: Array  # (2,)
    coefficients: Array  # (3, tasks): E, and A and B at the mean sizes
    drawn_exponents: Array  # (2, draws)
    drawn: Array  # (3, tasks, draws)
    scatter: Array  # (tasks, draws): of a new run, relative

    @classmethod
    def fit(cls, N: Array, D: Array, losses: Array, noise: Array, share: str) -> "Shared":
        tasks, n = losses.shape
        free = 3 * tasks + (1 if share == "exponent" else 2)
        different = len(np.unique(np.stack([N, D]), axis=1).T)
        if different * tasks < free or different < 4:
            raise InputError(f"{different} different runs are too few: {tasks} laws of 3 parameters share exponents")
        units = float(np.exp(np.log(N).mean())), float(np.exp(np.log(D).mean()))
        z = np.log(np.stack([N / units[0], D / units[1]]))
        if np.linalg.matrix_rank(np.vstack([np.ones(n), z]), tol=1e-9) < 3:
            raise InputError("all runs have the same parameters, tokens, or tokens per parameter: vary both")
        grid = _grid(share)
        unit, seen = losses * noise, (1 / noise)[:, :, None]
        exponents = _polished(z, seen, unit, _refined(z, seen, unit, grid, share)[:, 0], share)
        coefficients = _projected(z, exponents[:, None], seen, unit)[:, :, 0]
        fitted = _curve(exponents, coefficients, z) / unit
        residual = seen[:, :, 0] - fitted
        spare = tasks * n - free
        if spare <= 0:
            nan = np.full((3, tasks, 1), np.nan)
            said = (f"{n} runs of {tasks} tasks for {free} parameters: none is spare, so there is no interval",)
            return cls(said, units, exponents, coefficients, nan[:2, 0], nan, nan[0])
        # whole runs are resampled, for tasks err together; inflated and scaled as every law's residuals here
        rng = np.random.default_rng(0)
        inflated = residual * np.sqrt(tasks * n / spare)
        widths = np.sqrt((spare / tasks) / rng.chisquare(spare / tasks, size=DRAWS))
        picked = rng.integers(n, size=(n, DRAWS))
        targets = fitted[:, :, None] + inflated[:, picked] * widths
        drawn_exponents = _refined(z, targets, unit, grid, share)
        drawn = _projected(z, drawn_exponents, targets, unit)
        scatter = inflated[:, rng.integers(n, size=DRAWS)] * widths * noise.mean(axis=1, keepdims=True)
        return cls((), units, exponents, coefficients, drawn_exponents, drawn, scatter)

    def predict(self, N: float, D: float) -> Array:
        z = np.log(np.array([[N / self.units[0]], [D / self.units[1]]]))
        return _curve(self.exponents, self.coefficients, z)[:, 0]

    def sample(self, N: float, D: float) -> Array:
        z = np.log(np.array([[N / self.units[0]], [D / self.units[1]]]))
        a, b = np.exp(-self.drawn_exponents * z)
        return (self.drawn[0] + self.drawn[1] * a + self.drawn[2] * b) * (1 + self.scatter)


@dataclass(frozen=True)
class Link:
    """Step 2: accuracy as a sigmoid of the task's loss, its refits on resampled runs, and what a run's end scatters."""

    law: LawFit
    draws: Array  # internal parameters, (P, draws)
    scatter: Array

    @classmethod
    def fit(cls, loss: Array, error: Array, run: Array, step: int) -> "Link":
        """Fit to points of runs numbered ``run``; the ideal point, no error at no loss, is added.

        The refits see every ``step``-th point, back from each run's last: between them lie averages of the same data.
        """
        x, y = np.append(loss, IDEAL), np.append(1 - error, 1.0)
        law = fit_law(Sigmoid(), [x], y, n_starts=LINK_STARTS)
        # points of one run are not independent: whole runs are drawn, the ideal point always
        rng = np.random.default_rng(0)
        runs = int(run.max()) + 1
        last = np.array([np.flatnonzero(run == r)[-1] for r in range(runs)])
        some = np.append((last[run] - np.arange(len(run))) % step == 0, True)
        counts = rng.multinomial(runs, np.full(runs, 1 / runs), size=LINK_DRAWS).astype(np.float64)
        weights = np.concatenate([counts[:, run], np.ones((LINK_DRAWS, 1))], axis=1)
        Z = law.form.prepare(x[None, some, None], law.units)
        targets = np.broadcast_to(y[some] / law.units.y, (LINK_DRAWS, int(some.sum())))
        draws = solve(law.form, Z, targets, weights[:, some], law.theta[:, None], None, keep=1, tolerance=1e-5).theta
        off = 1 - error[last] - law.predict(loss[last])
        return cls(law, draws, off * np.sqrt(runs / max(runs - len(law.theta), 1)))

    def sample(self, loss: Array) -> Array:
        """Errors of new runs with these losses (draws,), each through a refit of its own."""
        theta = self.draws[:, np.arange(len(loss)) % self.draws.shape[1]]
        Z = self.law.form.prepare(loss[None, None, :], self.law.units)
        value = self.law.form.curve(theta, Z)[0][0] * self.law.units.y
        return np.clip(1 - value - np.random.default_rng(1).choice(self.scatter, size=len(loss)), 0, 1)

    def predict(self, loss: float) -> float:
        """The error at a loss."""
        return 1 - float(self.law.predict(loss))


IDEAL = 1e-6  # bits per byte where the ideal point stands: no loss


def public(folder: Path_, ladder: TaskLadder, up_to: float = 2e9, level: float = 0.9) -> list[dict[str, Any]]:
    """Test a ladder on the OLMo ladder's files: fit the runs of at most ``up_to`` parameters, forecast the others.

    As the paper does, runs below 20 tokens a parameter are neither fitted nor forecast, and the tasks are its eight.
    """
    runs, checkpoints = RunTable.from_olmo_ladder(folder), RunTable.from_olmo_ladder(folder, checkpoints=True)
    runs = runs.select(runs.multiplier > 15)
    fitted = runs.select(runs.params <= up_to)
    ladder.fit(
        fitted, checkpoints.select(np.isin(np.asarray(checkpoints.names), np.asarray(fitted.names))), PAPER_TASKS
    )
    held = [str(name) for name, N in zip(runs.names, runs.params, strict=True) if up_to < N]
    return held_out(runs, held, ladder, level)


def held_out(runs: RunTable, held: Sequence[str], ladder: TaskLadder, level: float = 0.9) -> list[dict[str, Any]]:
    """What a fitted ladder says of runs that it has not seen: a row a run and task, with the error in points."""
    rows = []
    for name in held:
        if name not in runs.names:
            raise unknown("run", name, set(runs.names))
        i = list(runs.names).index(name)
        for task, said in ladder.forecast(runs.params[i], runs.tokens[i], level).items():
            reached = float(runs.metrics[f"error_{task}"][i])
            rows.append(
                {
                    "run": name,
                    "task": task,
                    "loss": float(runs.losses[f"{ladder.measure}_{task}"][i]),
                    "loss_forecast": said.chain[0].value,
                    "loss_low": said.chain[0].low,
                    "loss_high": said.chain[0].high,
                    "error": reached,
                    "error_forecast": said.value,
                    "error_low": said.interval[0],
                    "error_high": said.interval[1],
                    "points_off": 100 * (said.value - reached),
                }
            )
    return rows


def _seen(table: RunTable, loss: str, error: str, skip: float, average: int) -> tuple[Array, Array, Array]:
    """The points that a sigmoid is fitted to: loss, error and the number of the run, smoothed within runs."""
    names = np.asarray(table.names)
    separate = names if len(set(table.names)) < len(names) else np.arange(len(names)).astype(str)
    x: list[Array] = []
    y: list[Array] = []
    run: list[Array] = []
    for number, name in enumerate(dict.fromkeys(separate)):
        rows = np.flatnonzero(separate == name)
        rows = rows[int(np.ceil(skip * len(rows))) :] if len(rows) > 1 else rows
        for values, into in ((table.losses[loss], x), (table.metrics[error], y)):
            into.append(_moving_average(values[rows], average))
        run.append(np.full(len(rows), number))
    return np.concatenate(x), np.concatenate(y), np.concatenate(run)


def _noise(checkpoints: RunTable | None, loss: str, names: Sequence[str]) -> Array:
    """Relative scatter of a loss about a line through each run's last checkpoints, (runs,)."""
    found = []
    for name in names:
        values = np.empty(0) if checkpoints is None else checkpoints.losses[loss][np.asarray(checkpoints.names) == name]
        values = values[-NOISY:]
        if len(values) < 4:
            raise InputError(f"weigh: at least 4 checkpoints of run {name!r} are needed, {len(values)} are given")
        at = np.arange(len(values))
        found.append(float((values - np.polyval(np.polyfit(at, values, 1), at)).std() / values.mean()))
    return np.array(found)


def _moving_average(values: Array, n: int) -> Array:
    """The mean of each value and the up to n - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - n, 0)
    return (sums[end] - sums[begin]) / (end - begin)


def _grid(share: str) -> Array:
    """Exponents tried, (2, tries): pairs of them, or one for both."""
    steps = np.geomspace(0.03, 2.0, 16)
    if share == "exponent":
        return np.stack([steps, steps])
    return np.stack([v.ravel() for v in np.meshgrid(steps, steps, indexing="ij")])


def _curve(exponents: Array, coefficients: Array, z: Array) -> Array:
    """Losses (tasks, n) at log sizes z (2, n)."""
    return coefficients.T @ _terms(z, exponents)


def _terms(z: Array, exponents: Array) -> Array:
    return np.vstack([np.ones(z.shape[1]), np.exp(-exponents[:, None] * z)])


def _refined(z: Array, Y: Array, losses: Array, grid: Array, share: str) -> Array:
    """The best exponents (2, m) of m sets of targets Y (tasks, n, m), relative to the losses (tasks, n).

    The best of the grid, then the vertex of the parabola through it and its neighbours on each axis.
    """
    m = Y.shape[2]
    cost = np.stack([sum(_cost(z, pair, y, loss) for y, loss in zip(Y, losses, strict=True)) for pair in grid.T])
    steps = np.log(np.unique(grid[0]))
    side = len(steps)
    shape = (side,) if share == "exponent" else (side, side)
    best = np.unravel_index(cost.argmin(axis=0), shape)
    cost = cost.reshape(*shape, m)
    found = []
    for axis, at in enumerate(best):
        inside = np.clip(at, 1, side - 2)
        left, here, right = (
            cost[*(inside + shift if a == axis else b for a, b in enumerate(best)), np.arange(m)]
            for shift in (-1, 0, 1)
        )
        bend = np.maximum(left - 2 * here + right, 1e-300)
        offset = np.where(at == inside, np.clip((left - right) / (2 * bend), -0.5, 0.5), 0.0)
        found.append(np.exp(steps[at] + offset * (steps[1] - steps[0])))
    return np.stack(found if len(found) == 2 else found * 2)


def _polished(z: Array, Y: Array, losses: Array, exponents: Array, share: str) -> Array:
    """The best exponents (2,) of one set of targets, from a start near them, to 1e-6."""
    from scipy.optimize import minimize

    def left(logs: Array) -> float:
        pair = np.exp(np.broadcast_to(logs, 2))
        return float(sum(_cost(z, pair, y, loss)[0] for y, loss in zip(Y, losses, strict=True)))

    start = np.log(exponents[:1] if share == "exponent" else exponents)
    found = minimize(left, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-16, "maxiter": 2000})
    return np.exp(np.broadcast_to(found.x, 2))


SUBSETS = ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,))  # which of E, A, B are above zero


def _cost(z: Array, exponents: Array, y: Array, loss: Array) -> Array:
    """Sum of squares (m,) left by the best non-negative E, A, B for m sets of relative targets y (n, m) of a task."""
    X = _terms(z, exponents).T / loss[:, None]
    total = (y * y).sum(axis=0)
    left, rest = np.full(len(total), np.inf), np.arange(len(total))
    for chosen in SUBSETS:
        Q, R = np.linalg.qr(X[:, chosen])
        share = Q.T @ y[:, rest]
        feasible = (np.linalg.solve(R, share) >= 0).all(axis=0)
        after = total[rest] - (share * share).sum(axis=0)
        left[rest] = np.where(feasible, np.minimum(left[rest], after), left[rest])
        if chosen == SUBSETS[0]:  # where all three are above zero, no subset does better
            rest = rest[~feasible]
            if not len(rest):
                break
    return left


def _projected(z: Array, exponents: Array, Y: Array, losses: Array) -> Array:
    """The best non-negative E, A, B (3, tasks, m) for each of m exponents (2, m) and targets Y (tasks, n, m)."""
    from scipy.optimize import nnls

    found = np.empty((3, len(Y), Y.shape[2]))
    for i in range(Y.shape[2]):
        terms = _terms(z, exponents[:, i]).T
        for t, loss in enumerate(losses):
            found[:, t, i] = nnls(terms / loss[:, None], Y[t, :, i])[0]
    return found
