"""Predict what a mixture of domains leads to, from small runs on random mixtures.

Reach for ``MixtureRegressor`` when you have a table of mixtures and a table of losses or scores. Liu et al. 2024,
«RegMix: Data Mixture as Regression for Language Model Pre-training», arXiv:2407.01492. ``lightgbm`` has the paper's
settings, with one departure: all trees are grown, where the public notebook stops early on its test set. The
exponential law (as Ye et al. 2024, arXiv:2403.16952, fit it), the same with LightGBM on what it leaves, and a Gaussian
process are ours to choose from; ``cross_validate`` says which suits your runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import check_is_fitted

from downriver.core.errors import InputError, require, unknown
from downriver.core.seeds import derive_seed, generator
from downriver.data.mix.space import Array, shares

Kind = Literal["lightgbm", "linear", "exp", "exp+lightgbm", "gp", "mlp"]
FEW = 64  # runs below which trees may have leaves of five
Function = Callable[[Array], Array]


@dataclass(frozen=True)
class CrossValidation:
    """How well runs that a regressor has not seen are predicted; one entry a target.

    ``rho`` is Spearman's rank correlation (what counts: a proposal needs the order only), ``mse`` the mean squared
    error, ``predicted`` (n, k) the predictions out of fold, ``groups`` how many groups of runs were kept together.
    """

    targets: tuple[str, ...]
    rho: Array
    mse: Array
    predicted: Array
    folds: int
    groups: int


class MixtureRegressor(RegressorMixin, BaseEstimator):
    """Mixtures (n, d) → targets (n, k): one regressor a target.

    Args:
        kind: ``"lightgbm"`` (the paper's: gradient-boosted trees), ``"linear"`` (its baseline), ``"exp"``
            (``c + exp(k + w·t)``, least squares, a handful of parameters), ``"exp+lightgbm"`` (trees on what the law
            leaves), ``"gp"`` (a Gaussian process with a length scale a domain), ``"mlp"`` (DaMo's network, all
            targets together: a run that lacks one is left out).
        trees: at most so many trees; ``learning_rate`` of each. 1000 and 0.01 are the paper's.
        seed: of the trees (42 in the paper's code).

    Attributes: ``domains_``, ``targets_``, ``low_`` and ``high_`` (the sampled range of each domain), ``mixtures_``.

    >>> W = np.random.default_rng(0).dirichlet(np.ones(3), size=40)
    >>> loss = 2 + np.exp(W @ [1.0, 0.2, -0.5])
    >>> law = MixtureRegressor("exp").fit(W, loss)
    >>> round(law.score(W, loss), 6), {name: round(v, 3) for name, v in law.law(0).items()}
    (1.0, {'c': 2.0, 'k': 0.233, 'domain 0': 0.767, 'domain 1': -0.033, 'domain 2': -0.733})
    """

    def __init__(self, kind: Kind = "lightgbm", trees: int = 1000, learning_rate: float = 0.01, seed: int = 42) -> None:
        self.kind = kind
        self.trees = trees
        self.learning_rate = learning_rate
        self.seed = seed

    def fit(self, W: Any, losses: Any) -> "MixtureRegressor":
        """Fit to mixtures ``W`` (n, d) and ``losses`` (n,) or (n, k); data frames are read by their columns' names.

        Runs whose target is NaN are left out of that target (``dropped_`` counts them). Raises ``InputError`` for
        shares that do not sum to 1, and for fewer runs than the regressor has parameters.
        """
        if self.kind not in get_args(Kind):
            raise unknown("kind of regressor", self.kind, get_args(Kind))
        rows, self.domains_ = shares(W)
        values, self.targets_ = targets(losses, len(rows))
        self.mixtures_, self.low_, self.high_ = rows, rows.min(axis=0), rows.max(axis=0)
        self.one_dimensional_ = np.ndim(losses) == 1
        known = np.isfinite(values)
        self.dropped_ = (~known).sum(axis=0)
        fewest = {"linear": rows.shape[1], "exp": rows.shape[1] + 1, "exp+lightgbm": rows.shape[1] + 1}.get(
            self.kind, 5
        )
        for name, there in zip(self.targets_, known.T, strict=True):
            if there.sum() < fewest:
                raise InputError(f"{there.sum()} runs have {name}: {self.kind} needs {fewest} at least")
        self.models_ = self.functions(rows, values)
        return self

    def functions(self, X: Array, Y: Array) -> list[Function]:
        """Fit any features X (n, d) to Y (n, k): functions (m, d) → (m,), one a target (→ (m, k), one, for ``mlp``)."""
        known = np.isfinite(Y)
        if self.kind == "mlp":
            whole = known.all(axis=1)
            return [_network(X[whole], Y[whole], self.seed)]
        return [self._one(X[there], y[there]) for y, there in zip(Y.T, known.T, strict=True)]

    def predict(self, W: Any) -> Array:
        """Predictions for mixtures (m, d): (m, k), or (m,) where the fitted losses were one column."""
        check_is_fitted(self)
        rows, _ = shares(W, self.domains_)
        found = np.column_stack([model(rows) for model in self.models_])  # (m, k)
        return found[:, 0] if self.one_dimensional_ else found

    def law(self, target: str | int = 0) -> dict[str, float]:
        """The constants of an exponential law: c, k, and t by domain with mean 0 (a common part of t is in k)."""
        check_is_fitted(self)
        index = target if isinstance(target, int) else self.index(target)
        model = self.models_[index]
        if not isinstance(model, _Exponential):
            raise InputError(f"a {self.kind} regressor is no law: fit one with kind='exp'")
        k = float(model.t.mean())
        return {"c": model.c, "k": k} | {n: float(v) for n, v in zip(self.domains_, model.t - k, strict=True)}

    def index(self, target: str) -> int:
        """The column of a target."""
        if target not in self.targets_:
            raise unknown("target", target, self.targets_)
        return self.targets_.index(target)

    def cross_validate(self, W: Any, losses: Any, folds: int = 5, groups: Any = None, seed: int = 0) -> CrossValidation:
        """Fit to all folds but one, predict that one, for each.

        Runs of one group are never split between the two sides. ``groups`` is one label a run; by default runs with
        the same mixture are one group (a table with several rows a run would otherwise leak its own answers).
        """
        rows, domains = shares(W)
        values, names = targets(losses, len(rows))
        if groups is None:
            member = np.unique(np.round(rows, 9), axis=0, return_inverse=True)[1].ravel()
        else:
            member = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
        if len(member) != len(rows):
            raise InputError(f"groups: a label for each of {len(rows)} runs is expected, not {len(member)}")
        count = int(member.max()) + 1
        if not 2 <= folds <= count:
            raise InputError(f"folds is {folds}: from 2 to the {count} groups of runs are expected")
        fold = (generator("mix folds", seed).permutation(count) % folds)[member]
        predicted = np.empty_like(values)
        for k in range(folds):
            named = {name: rows[fold != k, i] for i, name in enumerate(domains)}
            fitted = clone(self).fit(named, values[fold != k])
            predicted[fold == k] = fitted.predict({name: rows[fold == k, i] for i, name in enumerate(domains)})
        rho, mse = np.empty(len(names)), np.empty(len(names))
        for j, (truth, guess) in enumerate(zip(values.T, predicted.T, strict=True)):
            known = np.isfinite(truth)
            rho[j] = spearmanr(truth[known], guess[known]).statistic
            mse[j] = ((truth - guess)[known] ** 2).mean()
        return CrossValidation(names, rho, mse, predicted, folds, count)

    def _one(self, W: Array, y: Array) -> Any:
        match self.kind:
            case "linear":
                from sklearn.linear_model import LinearRegression

                return LinearRegression().fit(W, y).predict
            case "exp":
                return _Exponential(W, y)
            case "gp":
                return _gaussian_process(W, y, self.seed)
            case "lightgbm":
                return self._trees(W, y)
            case _:
                law = _Exponential(W, y)
                rest = self._trees(W, y - law(W))
                return lambda V: law(V) + rest(V)

    def _trees(self, W: Array, y: Array) -> Any:
        lightgbm = require("lightgbm", "data")
        settings: dict[str, Any] = {"min_child_samples": 5} if len(y) < FEW else {}
        booster = lightgbm.LGBMRegressor(
            n_estimators=self.trees,
            learning_rate=self.learning_rate,
            random_state=self.seed,
            deterministic=True,
            force_row_wise=True,
            n_jobs=1,  # so few rows gain nothing from threads
            verbosity=-1,
            **settings,
        ).fit(W, y)
        return lambda V: booster.booster_.predict(np.ascontiguousarray(V))


class _Exponential:
    """``y = c + exp(w·t)`` by least squares; shares sum to 1, so k is a common part of t."""

    def __init__(self, W: Array, y: Array) -> None:
        unit = float(y.std()) or 1.0
        z, spread = y / unit, float(np.ptp(y)) / unit or 1.0
        best: Any = None
        for gap in (0.02, 0.1, 0.5, 2.0, 10.0):  # how far below the smallest value the floor starts
            c = z.min() - gap * spread
            t = np.linalg.lstsq(W, np.log(z - c), rcond=None)[0]
            found = least_squares(self._residuals, np.r_[c, t], self._jacobian, args=(W, z), method="trf", max_nfev=500)
            if best is None or found.cost < best.cost:
                best = found
        self.c = float(best.x[0] * unit)
        self.t = best.x[1:] + np.log(unit)

    def __call__(self, W: Array) -> Array:
        return self.c + np.exp(W @ self.t)

    @staticmethod
    def _residuals(x: Array, W: Array, z: Array) -> Array:
        return x[0] + np.exp(np.minimum(W @ x[1:], 50.0)) - z

    @staticmethod
    def _jacobian(x: Array, W: Array, z: Array) -> Array:
        return np.column_stack([np.ones(len(z)), np.exp(np.minimum(W @ x[1:], 50.0))[:, None] * W])


def _gaussian_process(W: Array, y: Array, seed: int) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(np.ones(W.shape[1]), (1e-2, 1e2)) + WhiteKernel(1e-2, (1e-8, 1.0))
    fitted = GaussianProcessRegressor(kernel, normalize_y=True, random_state=derive_seed("gp", seed) % 2**32)
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound: the domain does not matter
        return fitted.fit(W, y).predict


def _network(X: Array, Y: Array, seed: int) -> Any:
    """As the code of DaMo (arXiv:2510.19336) has it, with targets as they are."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1500 steps are what is asked for
        fitted = MLPRegressor(hidden_layer_sizes=(100, 100), max_iter=1500, tol=1e-6, random_state=seed).fit(
            X, Y[:, 0] if Y.shape[1] == 1 else Y
        )
    return lambda V: fitted.predict(V).reshape(len(V), -1)


def targets(losses: Any, n: int) -> tuple[Array, tuple[str, ...]]:
    """Losses or scores as an array (n, k), NaN where one is missing, and their names.

    >>> targets({"loss": [2.0, 1.5]}, 2)[1]
    ('loss',)
    """
    columns = list(losses) if isinstance(losses, dict) else getattr(losses, "columns", None)
    if columns is not None:
        names = tuple(map(str, columns))
        values = np.column_stack([np.asarray(losses[c], dtype=np.float64) for c in columns])
    else:
        values = np.asarray(losses, dtype=np.float64)
        values = values[:, None] if values.ndim == 1 else values
        names = tuple(f"target {i}" for i in range(values.shape[-1]))
    if values.ndim != 2 or len(values) != n:
        raise InputError(f"losses have shape {values.shape}: {n} rows are expected, one a mixture")
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise InputError(
            f"losses, row {row + 1}, {names[column]}: {values[row, column]} where a finite number is expected"
        )
    return values, names
