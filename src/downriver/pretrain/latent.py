"""Two-phase learning with latent variables: a model of the inputs by maximum likelihood, then a small predictor on it.

Reach for it when rows without labels are many, labels are few, and a factor model, a mixture or pairs of related rows
describe the inputs; ``TwoPhase`` joins either with any scikit-learn head. «On the Provable Advantage of Unsupervised
Pretraining» (2023), whose three examples these are. All follow scikit-learn's contract; rows are float64 (m, d).
"""

import math
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import expit, log_expit, logsumexp, softmax
from sklearn.base import BaseEstimator, TransformerMixin, clone, is_classifier
from sklearn.cluster import kmeans_plusplus
from sklearn.decomposition import FactorAnalysis

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import derive_seed, generator

Array = NDArray[np.float64]


class FactorPretrainer(TransformerMixin, BaseEstimator):
    """Factor model x = B z + μ + noise with z ~ N(0, I_r), fitted in closed form.

    Parameters
    ----------
    n_factors
        r, below the number of columns; choose it by ``bic`` on unlabelled rows, never on labels.
    noise
        Variance of the noise: ``unit`` (1, as in the paper; the data must be in units of their noise), ``isotropic``
        (estimated, one for all columns: probabilistic PCA) or ``diagonal`` (one a column: factor analysis by EM).

    After ``fit``: ``components_`` B (d, r), ``mean_`` (d,), ``noise_variance_`` (d,), ``n_parameters_``. Warns where a
    factor explains no more than noise: it is then not identified.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(500, 1)) @ [[3.0, 4.0]] + rng.normal(size=(500, 2))
    >>> np.abs(FactorPretrainer(1).fit(x).components_).ravel().round()
    array([3., 4.])
    """

    def __init__(self, n_factors: int, noise: Literal["unit", "isotropic", "diagonal"] = "unit") -> None:
        self.n_factors, self.noise = n_factors, noise

    def fit(self, X: Any, s: Any = None) -> "FactorPretrainer":
        """Fit to unlabelled rows (m, d); ``s`` is not used."""
        rows = _rows(X)
        m, d = rows.shape
        r = self.n_factors
        if self.noise not in ("unit", "isotropic", "diagonal"):
            raise unknown("noise", self.noise, ("unit", "isotropic", "diagonal"))
        if not 1 <= r < d:
            raise InputError(f"n_factors is {r}: from 1 to {d - 1} are expected for {d} columns")
        if m <= r:
            raise InputError(f"{m} rows for {r} factors: more rows than factors are expected")
        self.mean_ = rows.mean(axis=0)
        if self.noise == "diagonal":
            found = FactorAnalysis(r, tol=1e-6, max_iter=10_000, svd_method="lapack").fit(rows)
            self.components_, self.noise_variance_ = found.components_.T, found.noise_variance_
        else:
            centred = rows - self.mean_
            values, vectors = np.linalg.eigh(centred.T @ centred / m)  # of S, ascending
            values, vectors = values[::-1], vectors[:, ::-1]
            variance = 1.0 if self.noise == "unit" else float(values[r:].mean())
            if variance <= 1e-12 * values[0]:
                raise InputError(f"the rows lie in {r} dimensions: no noise is left to estimate, take fewer factors")
            if (values[:r] <= variance * (1 + 1e-12)).any():
                warnings.warn(
                    f"{int((values[:r] <= variance).sum())} of {r} factors explain no more than noise of variance "
                    f"{variance:.3g}: they are not identified",
                    stacklevel=2,
                )
            # B̂ = V diag √max(λ − σ², 0)
            self.components_ = vectors[:, :r] * np.sqrt(np.maximum(values[:r] - variance, 0))
            self.noise_variance_ = np.full(d, variance)
        free = {"unit": 0, "isotropic": 1, "diagonal": d}[self.noise]
        self.n_parameters_ = d + d * r - r * (r - 1) // 2 + free
        self.n_features_in_ = d
        return self

    def transform(self, X: Any) -> Array:
        """The posterior mean E[z | x] = Bᵀ (B Bᵀ + Ψ)⁻¹ (x − μ), (n, r)."""
        rows = _rows(X, self.n_features_in_) - self.mean_
        scaled = self.components_ / self.noise_variance_[:, None]  # Ψ⁻¹ B
        return rows @ scaled @ np.linalg.inv(np.eye(scaled.shape[1]) + self.components_.T @ scaled)

    def log_densities(self, X: Any) -> Array:
        """log p(x) of every row, in nats, (n,)."""
        rows = _rows(X, self.n_features_in_) - self.mean_
        d = rows.shape[1]
        covariance = self.components_ @ self.components_.T + np.diag(self.noise_variance_)
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, rows.T)
        return -0.5 * (np.square(white).sum(axis=0) + d * math.log(2 * math.pi)) - np.log(np.diag(factor)).sum()

    def log_likelihood(self, X: Any) -> float:
        """The mean of ``log_densities``."""
        return float(self.log_densities(X).mean())

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """n rows of the fitted model."""
        d, r = self.components_.shape
        noise = rng.standard_normal((n, d)) * np.sqrt(self.noise_variance_)
        return self.mean_ + rng.standard_normal((n, r)) @ self.components_.T + noise


class MixturePretrainer(TransformerMixin, BaseEstimator):
    """Mixture of K Gaussians by EM, from several k-means++ starts; the likeliest fit is kept.

    Parameters
    ----------
    n_components
        K.
    covariance
        ``identity`` (as in the paper) or ``spherical``: a variance of its own a component.
    n_init
        Starts; EM ends in local optima.
    means_init
        (K, d): start there instead, once, with equal weights.
    seed, max_iter, tol
        Of the starts; EM ends when the mean log-likelihood gains less than ``tol``.

    After ``fit``: ``means_`` (K, d), ``weights_`` (K,), ``variances_`` (K,), ``n_parameters_``.

    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(-5, 1, (50, 2)), rng.normal(5, 1, (50, 2))])
    >>> MixturePretrainer(2).fit(x).transform(x).max(axis=1).min() > 0.99
    np.True_
    """

    def __init__(
        self,
        n_components: int,
        covariance: Literal["identity", "spherical"] = "identity",
        *,
        n_init: int = 10,
        means_init: Any = None,
        seed: int = 0,
        max_iter: int = 500,
        tol: float = 1e-7,
    ) -> None:
        self.n_components, self.covariance, self.n_init, self.means_init = n_components, covariance, n_init, means_init
        self.seed, self.max_iter, self.tol = seed, max_iter, tol

    def fit(self, X: Any, s: Any = None) -> "MixturePretrainer":
        """Fit to unlabelled rows (m, d); ``s`` is not used."""
        rows = _rows(X)
        m, d = rows.shape
        K = self.n_components
        if self.covariance not in ("identity", "spherical"):
            raise unknown("covariance", self.covariance, ("identity", "spherical"))
        if not 1 <= K < m:
            raise InputError(f"n_components is {K}: from 1 to {m - 1} are expected for {m} rows")
        if self.means_init is None:
            starts = [
                kmeans_plusplus(rows, K, random_state=derive_seed("mixture", self.seed, i))[0]
                for i in range(self.n_init)
            ]
        else:
            starts = [np.asarray(self.means_init, dtype=np.float64)]
            if starts[0].shape != (K, d):
                raise InputError(f"means_init has shape {starts[0].shape}: ({K}, {d}) is expected")
        best = -np.inf
        for start in starts:
            found, likelihood = self._em(rows, start)
            if likelihood > best:
                best, (self.weights_, self.means_, self.variances_) = likelihood, found
        self.n_parameters_ = K * d + K - 1 + (K if self.covariance == "spherical" else 0)
        self.n_features_in_ = d
        return self

    def transform(self, X: Any) -> Array:
        """The responsibilities p(z = k | x), (n, K)."""
        return softmax(self._joint(_rows(X, self.n_features_in_)), axis=1)

    def log_densities(self, X: Any) -> Array:
        """log p(x) of every row, in nats, (n,)."""
        return logsumexp(self._joint(_rows(X, self.n_features_in_)), axis=1)

    def log_likelihood(self, X: Any) -> float:
        """The mean of ``log_densities``."""
        return float(self.log_densities(X).mean())

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """n rows of the fitted model."""
        k = rng.choice(len(self.weights_), size=n, p=self.weights_)
        noise = rng.standard_normal((n, self.means_.shape[1]))
        return self.means_[k] + noise * np.sqrt(self.variances_[k])[:, None]

    def _joint(self, rows: Array) -> Array:
        return _log_joint(rows, self.weights_, self.means_, self.variances_)

    def _em(self, rows: Array, means: Array) -> tuple[tuple[Array, Array, Array], float]:
        d, K = rows.shape[1], len(means)
        fixed = self.covariance == "identity"
        weights = np.full(K, 1 / K)
        variances = np.full(K, 1.0 if fixed else rows.var(axis=0).mean())
        least = 1e-9 * rows.var(axis=0).mean()
        before = -np.inf
        for _ in range(self.max_iter):
            joint = _log_joint(rows, weights, means, variances)
            density = logsumexp(joint, axis=1)
            likelihood = float(density.mean())
            if likelihood - before < self.tol:
                break
            before = likelihood
            resp = np.exp(joint - density[:, None])
            mass = resp.sum(axis=0) + 1e-12
            weights, means = mass / mass.sum(), resp.T @ rows / mass[:, None]
            if not fixed:
                variances = np.maximum((resp * _squares(rows, means)).sum(axis=0) / (mass * d), least)
        return (weights, means, variances), likelihood


class ContrastivePretrainer(TransformerMixin, BaseEstimator):
    """A linear map f(x) = W (x − μ) learnt from pairs: p(s = 1 | x, x′) = σ(f(x)ᵀ f(x′) / T + b).

    Parameters
    ----------
    dim
        Rows of W: the dimension of f.
    temperature
        T; it only sets the scale of W.
    seed
        Of the start of the optimisation (L-BFGS; the problem is not convex in W).

    After ``fit``: ``components_`` W (dim, d), ``intercept_`` b, ``mean_``, ``n_parameters_``.

    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(2000, 1))
    >>> views = [np.hstack([z, rng.normal(size=(2000, 4))]) for _ in range(2)]
    >>> fitted = ContrastivePretrainer(1).fit(*contrastive_pairs(*views))
    >>> np.abs(fitted.components_[0]).argmax()
    np.int64(0)
    """

    def __init__(self, dim: int, temperature: float = 1.0, *, seed: int = 0, max_iter: int = 500) -> None:
        self.dim, self.temperature, self.seed, self.max_iter = dim, temperature, seed, max_iter

    def fit(self, X: Any, s: Any = None) -> "ContrastivePretrainer":
        """Fit to pairs X (m, 2, d) and whether the two share their latent variable, s (m,) of 0 and 1."""
        first, second, same = self._pairs(X, s)
        m, d = first.shape
        if not 1 <= self.dim <= d or not self.temperature > 0:
            raise InputError(f"dim is {self.dim} and temperature {self.temperature}: 1 to {d}, and above 0, expected")
        self.mean_ = np.vstack([first, second]).mean(axis=0)
        a, b = first - self.mean_, second - self.mean_
        sign = 2 * same - 1

        def loss(theta: Array) -> tuple[float, Array]:
            W, bias = theta[:-1].reshape(self.dim, d), theta[-1]
            fa, fb = a @ W.T, b @ W.T
            logit = (fa * fb).sum(axis=1) / self.temperature + bias
            slope = -sign * expit(-sign * logit) / m
            gradient = (fa * slope[:, None]).T @ b + (fb * slope[:, None]).T @ a
            return -log_expit(sign * logit).mean(), np.append(gradient.ravel() / self.temperature, slope.sum())

        rng = generator("contrastive", self.seed)
        scale = math.sqrt(self.temperature / (d * max(np.square(a).mean(), 1e-12))) / d**0.25
        start = np.append(scale * rng.standard_normal(self.dim * d), 0.0)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": self.max_iter})
        self.components_, self.intercept_ = found.x[:-1].reshape(self.dim, d), float(found.x[-1])
        self.n_parameters_ = d + self.dim * d - self.dim * (self.dim - 1) // 2 + 1
        self.n_features_in_ = d
        return self

    def transform(self, X: Any) -> Array:
        """f(x), (n, dim)."""
        return (_rows(X, self.n_features_in_) - self.mean_) @ self.components_.T

    def log_likelihood(self, X: Any, s: Any) -> float:
        """The mean of log p(s | x, x′) over pairs."""
        first, second, same = self._pairs(X, s)
        logit = (self.transform(first) * self.transform(second)).sum(axis=1) / self.temperature + self.intercept_
        return float(log_expit((2 * same - 1) * logit).mean())

    def _pairs(self, X: Any, s: Any) -> tuple[Array, Array, Array]:
        pairs = np.asarray(X, dtype=np.float64)
        if pairs.ndim != 3 or pairs.shape[1] != 2:
            raise InputError(f"pairs of shape {pairs.shape}: (m, 2, d) is expected (contrastive_pairs makes them)")
        same = np.asarray(s, dtype=np.float64) if s is not None else np.empty(0)
        if same.shape != (len(pairs),) or not np.isin(same, (0, 1)).all() or len(np.unique(same)) < 2:
            raise InputError(f"s: 0 or 1 for each of {len(pairs)} pairs is expected, both of them met")
        return _rows(pairs[:, 0]), _rows(pairs[:, 1]), same


class TwoPhase(BaseEstimator):
    """Pretrain on unlabelled rows, then fit a head on the few labelled ones as the pretrained model sees them.

    ``pretrainer`` is one of this file's, or any scikit-learn transformer; ``head`` any scikit-learn estimator. Neither
    is changed: ``pretrainer_`` and ``head_`` are fitted copies. A pretrainer given fitted with ``prefitted=True`` is
    used as it is. Rows are centred by unlabelled data only.

    Raises ``InputError`` for labels of one class; warns where a component of a mixture has no labelled row.

    >>> from sklearn.linear_model import LinearRegression
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(1000, 1))
    >>> x = z @ rng.normal(size=(1, 20)) + rng.normal(size=(1000, 20))
    >>> model = TwoPhase(FactorPretrainer(1), LinearRegression()).fit(x, x[:10], z[:10, 0])
    >>> np.corrcoef(model.predict(x[10:]), z[10:, 0])[0, 1] > 0.9
    np.True_
    """

    def __init__(self, pretrainer: Any, head: Any, *, prefitted: bool = False) -> None:
        self.pretrainer, self.head, self.prefitted = pretrainer, head, prefitted

    def fit(self, X_unlab: Any, X_lab: Any, y: Any, *, s: Any = None) -> "TwoPhase":
        """Unlabelled rows (m, d) (pairs (m, 2, d) with ``s`` for a contrastive pretrainer), labelled rows (n, d), y."""
        rows, targets = _rows(X_lab), np.asarray(y)
        if len(targets) != len(rows):
            raise InputError(f"y has {len(targets)} values for {len(rows)} labelled rows: as many are expected")
        if is_classifier(self.head) and len(np.unique(targets)) < 2:
            raise InputError("y holds one class only: at least two are expected")
        self.pretrainer_ = self.pretrainer if self.prefitted else clone(self.pretrainer).fit(X_unlab, s)
        latent = self.pretrainer_.transform(rows)
        if isinstance(self.pretrainer_, MixturePretrainer):
            unseen = latent.shape[1] - len(np.unique(latent.argmax(axis=1)))
            if unseen:
                warnings.warn(
                    f"{unseen} of {latent.shape[1]} components have no labelled row: what is predicted there is a "
                    "guess",
                    stacklevel=2,
                )
        self.head_ = clone(self.head).fit(latent, targets)
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The head's predictions, (n,)."""
        return self.head_.predict(self.pretrainer_.transform(X))

    def score(self, X: Any, y: Any) -> float:
        """The head's own score: accuracy or R²."""
        return float(self.head_.score(self.pretrainer_.transform(X), y))


def bic(pretrainer: Any, X: Any) -> float:
    """The Bayesian information criterion of a fitted factor model or mixture on rows; the lower the better.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(500, 2)) @ (2 * rng.normal(size=(2, 10))) + rng.normal(size=(500, 10))
    >>> min(range(1, 6), key=lambda r: bic(FactorPretrainer(r, "isotropic").fit(x), x))
    2
    """
    m = len(_rows(X))
    return pretrainer.n_parameters_ * math.log(m) - 2 * m * pretrainer.log_likelihood(X)


def contrastive_pairs(first: Any, second: Any, *, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
    """Pairs (2m, 2, d) for ``ContrastivePretrainer``: m of two views of one row (s = 1), m of views of different ones.

    >>> pairs, s = contrastive_pairs(np.zeros((3, 2)), np.ones((3, 2)))
    >>> pairs.shape, s.tolist()
    ((6, 2, 2), [1, 1, 1, 0, 0, 0])
    """
    a, b = _rows(first), _rows(second)
    if a.shape != b.shape or len(a) < 2:
        raise InputError(f"views of shapes {a.shape} and {b.shape}: two of one shape, of two rows at least, expected")
    order = generator("contrastive pairs", seed).permutation(len(a))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # nobody keeps its own
    same = np.stack([a, b], axis=1)
    return np.concatenate([same, np.stack([a, b[other]], axis=1)]), np.repeat([1, 0], len(a))


def informativeness(pretrainer: Any, X: Any, z: Any = None, *, draws: int = 5000, seed: int = 0) -> float:
    """A proxy of κ: how far two fits differ in the latent variable for a difference in the inputs' distribution.

    The pretrainer is fitted to two halves of the rows. Their latent variables, aligned by a rotation (factors) or a
    permutation (mixtures), differ by a relative root-mean-square; that is divided by the Hellinger distance of the two
    densities of x. Small: pretraining says what there is to know about z. Large: the likelihood hardly sees z, as with
    overlapping components, and pretraining may not help. It is no bound.

    Where the latent variable of the rows is known, give it as ``z``: factors or their posterior means (n, r), or
    component numbers (n,) or probabilities (n, K). The fits are then held against it instead of against each other
    (the mean of both errors); drawn factors, other than posterior means, carry noise that no fit can tell. Raises
    ``InputError`` for a ``z`` of another shape than the fits'.

    >>> rng = np.random.default_rng(0)
    >>> def kappa(distance):
    ...     x = np.vstack([rng.normal(side * distance, 1, (300, 2)) for side in (-1, 1)])
    ...     return informativeness(MixturePretrainer(2, n_init=1), x)
    >>> kappa(3.0) < kappa(0.5)
    True
    """
    if not isinstance(pretrainer, FactorPretrainer | MixturePretrainer):
        raise InputError("informativeness: a FactorPretrainer or a MixturePretrainer is expected, with a density of x")
    rows = _rows(X)
    rng = generator("informativeness", seed)
    order = rng.permutation(len(rows))
    fits = [clone(pretrainer).fit(rows[half]) for half in np.array_split(order, 2)]
    z1, z2 = (fit.transform(rows) for fit in fits)
    rotate = isinstance(pretrainer, FactorPretrainer)
    if z is None:
        error = _aligned_error(z1, z2, rotate)
    else:
        known = _latent(z, z1.shape, rotate)
        error = (_aligned_error(known, z1, rotate) + _aligned_error(known, z2, rotate)) / 2
    drawn = np.vstack([fit.draw(draws, rng) for fit in fits])
    p, q = (fit.log_densities(drawn) for fit in fits)
    overlap = np.exp((p + q) / 2 - np.logaddexp(p, q) + math.log(2)).mean()  # E under (p + q)/2 of 2√(pq)/(p + q)
    return error / math.sqrt(max(1 - overlap, 1e-12))


def _aligned_error(known: Array, found: Array, rotate: bool) -> float:
    """Root-mean-square difference relative to ``known``, after the best rotation or permutation of ``found``."""
    if rotate:
        found = found @ orthogonal_procrustes(found, known)[0]
    else:
        found = found[:, linear_sum_assignment(known.T @ found, maximize=True)[1]]
    return math.sqrt(np.square(known - found).mean() / max(np.square(known).mean(), 1e-300))


def _latent(z: Any, shape: tuple[int, ...], rotate: bool) -> Array:
    """``z`` as the fits give theirs: component numbers become rows of zeros and a one."""
    known = np.asarray(z)
    if (
        not rotate
        and known.ndim == 1
        and known.dtype.kind in "iu"
        and len(known)
        and 0 <= known.min() <= known.max() < shape[1]
    ):
        known = np.eye(shape[1])[known]
    if known.shape != shape or not np.isfinite(known.astype(np.float64)).all():
        what = "factors" if rotate else "component numbers (n,), or probabilities"
        raise InputError(f"z of shape {np.shape(z)}: finite {what} of shape {shape} are expected")
    return known.astype(np.float64)


def _rows(X: Any, columns: int | None = None) -> Array:
    rows = np.asarray(X, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"rows of shape {rows.shape}: (n, d) is expected, with a row at least")
    if columns is not None and rows.shape[1] != columns:
        raise InputError(f"rows of {rows.shape[1]} columns: {columns} are expected, as at the fit")
    if not np.isfinite(rows).all():
        raise InputError(f"row {int(np.argwhere(~np.isfinite(rows))[0][0]) + 1}: a value is not finite")
    return rows


def _squares(rows: Array, means: Array) -> Array:
    return np.maximum(np.square(rows).sum(axis=1)[:, None] - 2 * rows @ means.T + np.square(means).sum(axis=1), 0)


def _log_joint(rows: Array, weights: Array, means: Array, variances: Array) -> Array:
    """log π_k + log N(x; μ_k, σ_k² I), (n, K)."""
    d = rows.shape[1]
    return np.log(weights) - 0.5 * (_squares(rows, means) / variances + d * np.log(2 * math.pi * variances))
