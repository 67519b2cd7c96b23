"""Transferability scores: how well a pretrained model's features, or its own classes, suit a task's labels.

Reach for ``score`` with a method's name, or for the functions themselves; in all of them larger is better, everything
is float64, and no input is changed. ``docs/ranking.md`` says which to use when. PARC is in ``downriver.nn.similarity``.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, lapack, solve
from scipy.special import softmax

from downriver.core.errors import InputError, unknown
from downriver.core.registry import check_parameters
from downriver.nn.similarity import as_rows, class_ids, parc

if TYPE_CHECKING:
    from downriver.rank.ped import PED

Array = NDArray[np.float64]
Ids = NDArray[np.int64]


def score(
    X: Any,
    y: Any,
    method: str = "logme",
    *,
    probs: Any = None,
    pre: "PED | None" = None,
    general: Any = None,
    **parameters: Any,
) -> float:
    """The score of features X (n, d) for targets y (n,) by a method's name; larger is better.

    Parameters
    ----------
    y
        Class labels of any kind; for ``logme`` also floating-point targets, (n,) or (n, targets).
    method
        ``logme``, ``leep``, ``nleep``, ``nce``, ``hscore``, ``transrate``, ``sfda``, ``gbc``, ``parc``, ``knn`` or
        ``linear_probe``.
    probs
        Probabilities (n, source classes) that the model's own classifier gives: what ``leep`` and ``nce`` read.
    pre, general
        ``PED()`` moves the features first, standardised by ``general`` (see ``PED.transform``).
    parameters
        Those of the method's function, such as ``neighbours=5`` for ``knn``.

    Raises ``InputError`` for an unknown method or parameter, features that are not finite or do not vary, one class,
    a class with a single row, ``leep`` or ``nce`` without ``probs`` or with ``pre``.

    >>> X = np.array([[0.0, 1], [0, 2], [3, 1], [3, 2]])
    >>> score(X, ["a", "a", "b", "b"], "knn"), round(score(X, ["a", "a", "b", "b"], "hscore"), 6)
    (1.0, 1.0)
    """
    if method not in SCORES:
        raise unknown("score", method, SCORES)
    function = SCORES[method]
    checked = check_parameters(function, parameters, method)
    if method in OF_PROBABILITIES:
        if probs is None:
            raise InputError(f"{method} reads the probabilities of the model's own classes: give them as probs")
        if pre is not None:
            raise InputError(f"{method} reads probabilities, and pre moves features: they do not go together")
        return float(function(probs, y, **checked))
    return float(function(X if pre is None else pre.transform(X, y, general), y, **checked))


def logme(X: Any, y: Any, *, iterations: int = 11, tolerance: float = 1e-3) -> float:
    """LogME: the log evidence of a Bayesian linear model of each target, a row of X, averaged over the targets.

    y ~ N(Xw, 1/β), w ~ N(0, 1/α), with α and β where the evidence is largest, found by a fixed point from 1 and 1.
    Classes are one 0/1 target each; floating-point ``y``, (n,) or (n, targets), are targets as they are. Features are
    neither centred nor scaled. ``iterations`` and ``tolerance`` (of α/β, relative) are the published ones.

    You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", in the faster form of
    You et al. 2022. One decomposition of the smaller Gram matrix serves all targets, whose fixed points run side by
    side. Departure: with features of a rank below d the determinant has all d factors, as the evidence asks; the
    authors' fast code leaves out those of the empty directions.

    >>> X = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    >>> logme(X, [0, 0, 1, 1]) > logme(X, [0, 1, 0, 1])
    True
    """
    X = _features(X)
    Y = _one_hot(*classes_of(y, len(X))) if _classes(y) else _targets(y, len(X))
    (n, d), eps = X.shape, 1e-5
    sigma, x2 = _projections(X, Y)
    sigma = sigma[:, None]
    outside = np.maximum((Y**2).sum(axis=0) - x2.sum(axis=0), 0.0)  # of y, what no feature reaches
    alpha, beta = np.ones(Y.shape[1]), np.ones(Y.shape[1])
    m2, res2 = np.zeros(Y.shape[1]), np.zeros(Y.shape[1])
    active = np.arange(Y.shape[1])
    for _ in range(iterations):
        t = alpha[active] / beta[active]
        gamma = (sigma / (sigma + t)).sum(axis=0)
        m2[active] = (sigma * x2[:, active] / (sigma + t) ** 2).sum(axis=0)  # ‖m‖²
        res2[active] = (x2[:, active] * (t / (sigma + t)) ** 2).sum(axis=0) + outside[active]  # ‖y − Xm‖²
        alpha[active] = gamma / (m2[active] + eps)
        beta[active] = (n - gamma) / (res2[active] + eps)
        active = active[np.abs(alpha[active] / beta[active] - t) > tolerance * t]
        if not active.size:
            break
    log_det = np.log(alpha + beta * sigma).sum(axis=0) + (d - len(sigma)) * np.log(alpha)
    evidence = d * np.log(alpha) + n * np.log(beta) - log_det - beta * res2 - alpha * m2 - n * np.log(2 * np.pi)
    return float(evidence.mean() / (2 * n))


def leep(probs: Any, y: Any) -> float:
    """LEEP: the mean log-likelihood of the labels when each source class votes by how often it meets them.

    mean_i log Σ_z P̂(y_i | z) θ_z(x_i) with ``probs`` θ (n, source classes); at most 0. Nguyen et al. 2020, "LEEP: A
    New Measure to Evaluate Transferability of Learned Representations".

    >>> leep(np.eye(2)[[0, 0, 1, 1]], [1, 1, 0, 0]), round(leep(np.full((4, 3), 1 / 3), [0, 0, 1, 1]), 6)
    (0.0, -0.693147)
    """
    theta = _probabilities(probs)
    ids, counts = classes_of(y, len(theta))
    joint = _one_hot(ids, counts).T @ theta / len(theta)  # P̂(y, z)
    marginal = joint.sum(axis=0)
    conditional = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    return float(np.log(np.minimum(np.einsum("iz,iz->i", theta, conditional[ids]), 1.0)).mean())


def nce(probs: Any, y: Any) -> float:
    """NCE: minus the conditional entropy H(Y | Z) in nats of the labels given the source class of highest probability.

    At most 0. Tran et al. 2019, "Transferability and Hardness of Supervised Classification Tasks".

    >>> nce(np.eye(2)[[0, 0, 1, 1]], [1, 1, 0, 0]), round(nce(np.eye(2)[[0, 0, 0, 0]], [1, 1, 0, 0]), 6)
    (0.0, -0.693147)
    """
    theta = _probabilities(probs)
    ids, counts = classes_of(y, len(theta))
    joint = np.zeros((len(counts), theta.shape[1]))
    np.add.at(joint, (ids, theta.argmax(axis=1)), 1 / len(theta))
    conditional = joint / np.maximum(joint.sum(axis=0), 1e-300)
    return float((joint * np.log(np.where(joint > 0, conditional, 1.0))).sum())


def nleep(X: Any, y: Any, *, components_per_class: int = 5, explained: float = 0.8, seed: int = 0) -> float:
    """NLEEP: LEEP with the components of a Gaussian mixture on the features in place of source classes.

    The features' principal components that hold ``explained`` of the variance, a mixture of ``components_per_class``
    Gaussians a class (5 as published; 1 spares time on large sets) with full covariances, drawn by ``seed``. Li et
    al. 2021, "Ranking Neural Checkpoints". Ours: at most one component for two rows, and components are scaled as one
    so that the mixture's regularisation does not depend on the features' unit.

    >>> X = np.random.default_rng(0).normal(size=(60, 3)) + 9 * np.eye(3)[np.arange(60) % 3]
    >>> nleep(X, np.arange(60) % 3, components_per_class=1) > -1e-6 > nleep(X, np.arange(60) // 20)
    True
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if components_per_class < 1:
        raise InputError(f"components_per_class is {components_per_class}: at least 1 is expected")
    if not 0 < explained <= 1:
        raise InputError(f"explained is {explained}: a share of the variance, above 0 and at most 1, is expected")
    X = _features(X)
    _, counts = classes_of(y, len(X))
    Z, _, variances = _principal(X)
    kept = 1 + int(np.searchsorted(np.cumsum(variances) / variances.sum(), explained - 1e-12))
    Z = Z[:, :kept] / np.sqrt(variances[0])
    mixture = GaussianMixture(min(components_per_class * len(counts), len(X) // 2), random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a hundred steps, as published
        return leep(mixture.fit(Z).predict_proba(Z), y)


def hscore(X: Any, y: Any, *, regularised: bool = False) -> float:
    """H-score: tr(cov(f)⁺ cov(E[f | y])), how much of the features' spread lies between the classes.

    From 0 to the number of classes less one. ``regularised`` takes Ledoit and Wolf's covariance in place of the
    sample's and multiplies by 1 − α, their shrinkage: reach for it with fewer than some ten rows a feature, where the
    plain one rises with d. Bao et al. 2019, "An Information-Theoretic Approach to Transferability in Task Transfer
    Learning"; Ibrahim et al. 2022, "Newer is not always better".

    >>> round(hscore(np.eye(3)[[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, 2]), 9)
    2.0
    """
    X = _features(X)
    ids, counts = classes_of(y, len(X))
    X = X - X.mean(axis=0)
    n, d = X.shape
    sigma, x2 = _projections(X, _one_hot(ids, counts))
    between = (x2 / counts).sum(axis=1)  # of each direction of unit variance, the share between the classes
    if not regularised:
        return float(between.sum())
    from sklearn.covariance import ledoit_wolf_shrinkage

    shrinkage = float(ledoit_wolf_shrinkage(X, assume_centered=True))
    covariance = (1 - shrinkage) * sigma / n + shrinkage * sigma.sum() / n / d
    return float((1 - shrinkage) * (sigma / (n - 1) * between / covariance).sum())


def transrate(X: Any, y: Any, *, eps: float = 1e-4) -> float:
    """TransRate: the coding rate of all features less the mean rate of each class's, R(f) − mean_c R(f_c), in nats.

    R(f) = ½ log det(I + fᵀf / (nε)) of features centred by the common mean, with distortion ε. Not below 0 for
    balanced classes. Huang et al. 2022, "Frustratingly Easy Transferability Estimation".

    >>> X = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    >>> round(transrate(X, [0, 0, 1, 1, 2, 2]), 3), round(transrate(X, [0, 1, 2, 0, 1, 2]), 3)
    (3.71, 0.144)
    """
    if not 0 < eps < np.inf:
        raise InputError(f"eps is {eps}: a positive number is expected")
    X = _features(X)
    ids, counts = classes_of(y, len(X))
    X = X - X.mean(axis=0)
    return _coding_rate(X, eps) - float(np.mean([_coding_rate(X[ids == c], eps) for c in range(len(counts))]))


def sfda(X: Any, y: Any) -> float:
    """SFDA: how sure a Fisher discriminant is of the right class after every row was drawn towards the other classes.

    The discriminant's within-class scatter S_w is shrunk by max(exp(−5 λ), 1e-10), λ its largest eigenvalue by three
    double power iterations. Each row is mixed with the mean of the other classes' means, the more the less sure the
    (twice softened) posterior is of its class; a second discriminant with the same shrinkage gives the score, the
    mean posterior of the right class, from 0 to 1. Shao et al. 2022, "Not All Models Are Equal: Predicting Model
    Transferability in a Self-challenging Fisher Space". All discriminant directions together are Sw⁻¹, so a linear
    system is solved in place of the authors' eigenproblem; with d > n it is solved among the n directions of the rows.

    >>> X = np.array([[0.0, 1], [0, 2], [3, 1], [3, 2]])
    >>> sfda(X, [0, 0, 1, 1]) > 0.9 > 0.6 > sfda(X, [0, 1, 1, 0])
    True
    """
    X = _features(X)
    ids, counts = classes_of(y, len(X))
    d, X = X.shape[1], X - X.mean(axis=0)
    ones = np.ones(d)
    if d > len(X):
        X, ones, _ = _principal(X)
    posterior, shrinkage, means = _discriminant(X, ids, counts, d, ones, None)
    sure = softmax(posterior, axis=1)[np.arange(len(X)), ids][:, None]
    others = (means.sum(axis=0) - means) / (len(counts) - 1)
    posterior, _, _ = _discriminant(sure * X + (1 - sure) * others[ids], ids, counts, d, ones, shrinkage)
    return float(posterior[np.arange(len(X)), ids].mean())


def gbc(X: Any, y: Any, *, dims: int | None = 64) -> float:
    """GBC: minus the overlap of the classes, −Σ_{i≠j} exp(−D_B) over Gaussians of each class with diagonal covariance.

    D_B is Bhattacharyya's distance. ``dims`` leading principal components are used (all with ``None``): in hundreds
    of dimensions every overlap vanishes. A class's variances are at least 1e-4 of the mean variance of all. At most
    0. Pándy et al. 2022, "Transferability Estimation using Bhattacharyya Class Separability".

    >>> X = np.array([[0.0, 1], [0, 2], [3, 1], [3, 2]])
    >>> gbc(X, [0, 0, 1, 1]) > -0.01, round(gbc(X, [0, 1, 1, 0]), 6)
    (True, -2.0)
    """
    if dims is not None and dims < 1:
        raise InputError(f"dims is {dims}: at least 1 is expected")
    X = _features(X)
    ids, counts = classes_of(y, len(X))
    Z = _principal(X)[0][:, :dims]
    Y = _one_hot(ids, counts) / counts
    means = Y.T @ Z
    variances = np.maximum(Y.T @ (Z - means[ids]) ** 2, 1e-4 * Z.var(axis=0).mean())
    logs = np.log(variances).sum(axis=1)
    total = 0.0
    for i in range(len(counts) - 1):
        middle = (variances[i] + variances[i + 1 :]) / 2
        apart = ((means[i] - means[i + 1 :]) ** 2 / middle).sum(axis=1) / 8
        unlike = (np.log(middle).sum(axis=1) - (logs[i] + logs[i + 1 :]) / 2) / 2
        total += 2 * float(np.exp(-apart - unlike).sum())
    return -total


def knn(X: Any, y: Any, *, neighbours: int = 1) -> float:
    """The share of rows whose class most of their nearest other rows have, by Euclidean distance, each left out once.

    One neighbour, as in the benchmark of Bolya et al. 2021. Of classes with as many neighbours the nearest one's wins.

    >>> knn([[0.0], [0.1], [1.0], [1.2]], [0, 0, 1, 1])
    1.0
    """
    X = _features(X)
    ids, counts = classes_of(y, len(X))
    n = len(X)
    if not 1 <= neighbours < n:
        raise InputError(f"neighbours is {neighbours}: from 1 to {n - 1} of {n} rows are expected")
    X = X - X.mean(axis=0)
    squares = (X**2).sum(axis=1)
    right = 0
    for start in range(0, n, 1024):
        distance = squares - 2 * X[start : start + 1024] @ X.T  # up to the row's own square
        here = np.arange(len(distance))
        distance[here, start + here] = np.inf
        nearest = np.argpartition(distance, neighbours - 1, axis=1)[:, :neighbours]
        order = np.take_along_axis(distance, nearest, axis=1).argsort(axis=1, kind="stable")
        votes = np.zeros((len(distance), len(counts)))
        for place, who in enumerate(np.take_along_axis(nearest, order, axis=1).T):
            votes[here, ids[who]] += 1 + (place == 0) / 2
        right += int((votes.argmax(axis=1) == ids[start : start + 1024]).sum())
    return right / n


def linear_probe(X: Any, y: Any, *, l2: float = 100.0, folds: int = 5, seed: int = 0) -> float:
    """The accuracy of a logistic regression on standardised features, cross-validated.

    ``l2 / 2 · ‖w‖²`` is added to the summed cross-entropy; 100 lies in the middle of what ``adapt.linear_probe``
    tries. As many folds as the smallest class has rows, at most ``folds``, each with the classes in their shares.

    >>> X = np.random.default_rng(0).normal(size=(40, 2)) + 9 * np.eye(2)[np.arange(40) % 2]
    >>> linear_probe(X, np.arange(40) % 2)
    1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not 0 < l2 < np.inf:
        raise InputError(f"l2 is {l2}: a positive number is expected")
    if folds < 2:
        raise InputError(f"folds is {folds}: at least 2 are expected")
    X = _features(X)
    ids, counts = classes_of(y, len(X))
    split = StratifiedKFold(min(folds, int(counts.min())), shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / l2, max_iter=1000))
    return float(cross_val_score(probe, X, ids, cv=split).mean())


def _parc(X: Any, y: Any, *, components: int = 32) -> float:
    X = _features(X)
    return parc(X, classes_of(y, len(X))[0], components=components)


SCORES: Mapping[str, Callable[..., float]] = {
    "logme": logme,
    "leep": leep,
    "nleep": nleep,
    "nce": nce,
    "hscore": hscore,
    "transrate": transrate,
    "sfda": sfda,
    "gbc": gbc,
    "parc": _parc,
    "knn": knn,
    "linear_probe": linear_probe,
}
OF_PROBABILITIES = ("leep", "nce")
"""The scores that read source probabilities in place of features."""


def classes_of(y: Any, n: int) -> tuple[Ids, Ids]:
    """Class ids 0 … C−1 of n rows and the number of rows of each class, which must be two at least."""
    if not _classes(y):
        raise InputError("y holds floating-point numbers: class labels are expected (only logme takes numbers)")
    ids = class_ids(y)
    if len(ids) != n:
        raise InputError(f"{len(ids)} labels for {n} rows: as many are expected")
    counts = np.bincount(ids)
    if counts.min() < 2:
        names = np.unique(y.detach().cpu().numpy() if hasattr(y, "detach") else np.asarray(y))
        raise InputError(f"class {str(names[counts.argmin()])!r} has one row: two at least are expected of every class")
    return ids, counts


def _classes(y: Any) -> bool:
    values = y.detach().cpu().numpy() if hasattr(y, "detach") else np.asarray(y)
    return values.dtype.kind != "f" and values.ndim == 1


def _targets(y: Any, n: int) -> Array:
    Y = as_rows(y, "y")
    if len(Y) != n:
        raise InputError(f"{len(Y)} targets for {n} rows: as many are expected")
    if (np.ptp(Y, axis=0) == 0).any():
        raise InputError(f"y, target {int(np.flatnonzero(np.ptp(Y, axis=0) == 0)[0]) + 1}: all its values are equal")
    return Y


def _features(X: Any) -> Array:
    rows = as_rows(X, "X")
    if not np.ptp(rows, axis=0).any():
        raise InputError("X: every column is constant, features that vary are expected")
    return rows


def _probabilities(probs: Any) -> Array:
    theta = as_rows(probs, "probs")
    if (theta < 0).any() or not np.allclose(theta.sum(axis=1), 1, atol=1e-3):
        row = int(np.flatnonzero((theta < 0).any(axis=1) | (np.abs(theta.sum(axis=1) - 1) > 1e-3))[0])
        raise InputError(f"probs, row {row + 1}: probabilities that sum to 1 are expected")
    return theta / theta.sum(axis=1, keepdims=True)


def _one_hot(ids: Ids, counts: Ids) -> Array:
    return np.eye(len(counts))[ids]


def _projections(X: Array, Y: Array) -> tuple[Array, Array]:
    """σ² (k,) and the squares (UᵀY)² (k, targets) for X = UΣVᵀ, by the smaller Gram matrix and without U or V.

    The Gram matrix is QTQᵀ with T tridiagonal; Q is applied to the few columns that are needed and never made, which
    spares half of the time of a full decomposition.
    """
    n, d = X.shape
    B = X.T @ Y if d <= n else Y
    if min(n, d) < 3:  # nothing to make tridiagonal
        sigma, vectors = np.linalg.eigh(X.T @ X if d <= n else X @ X.T)
        turned = vectors.T @ B
    else:
        size = min(n, d)
        packed, diagonal, beside, tau, _ = lapack.dsytrd(X.T @ X if d <= n else X @ X.T, lower=1, lwork=64 * size)
        reflected, _, _ = lapack.dormqr("L", "T", packed[1:, :-1], tau, B[1:], 64 * max(B.shape[1], 1))
        sigma, vectors = eigh_tridiagonal(diagonal, beside)
        turned = vectors.T @ np.vstack([B[:1], reflected])
    kept = _not_zero(sigma, n, d)
    squares = turned[kept] ** 2
    return sigma[kept], squares / sigma[kept, None] if d <= n else squares


def _not_zero(sigma: Array, n: int, d: int) -> NDArray[np.bool_]:
    return sigma > sigma[-1] * max(n, d) * np.finfo(np.float64).eps


def _principal(X: Array) -> tuple[Array, Array, Array]:
    """Scores (n, k) on all principal components, the sum of each component's loadings (k,), and the variances (k,)."""
    X = X - X.mean(axis=0)
    n, d = X.shape
    sigma, vectors = np.linalg.eigh(X.T @ X if d <= n else X @ X.T)
    kept = np.flatnonzero(_not_zero(sigma, n, d))[::-1]
    sigma, vectors = sigma[kept], vectors[:, kept]
    if d <= n:
        return X @ vectors, vectors.sum(axis=0), sigma / n
    return vectors * np.sqrt(sigma), vectors.T @ X.sum(axis=1) / np.sqrt(sigma), sigma / n


def _coding_rate(F: Array, eps: float) -> float:
    n, d = F.shape
    gram = F.T @ F if d <= n else F @ F.T
    return 0.5 * float(np.linalg.slogdet(np.eye(len(gram)) + gram / (n * eps))[1])


def _discriminant(
    X: Array, ids: Ids, counts: Ids, d: int, ones: Array, shrinkage: float | None
) -> tuple[Array, float, Array]:
    """Posteriors (n, C) of a shrunk Fisher discriminant on its own training rows, the shrinkage, the class means.

    ``d`` is the number of features and ``ones`` the vector of ones in the basis that X is given in.
    """
    Y = _one_hot(ids, counts)
    means = Y.T @ X / counts[:, None]
    within = X - means[ids]
    scatter = within.T @ within / len(X)  # S_w
    if shrinkage is None:
        shrinkage = max(np.exp(-5 * _largest(scatter, ones)), 1e-10)
    spread = max(np.trace(scatter), 1e-12 * (X**2).sum() / len(X)) / d  # not 0 where classes are points
    shrunk = (1 - shrinkage) * scatter
    shrunk.flat[:: len(shrunk) + 1] += shrinkage * spread
    directions = solve(shrunk, means.T, assume_a="pos")
    logits = X @ directions - np.einsum("cd,dc->c", means, directions) / 2 + np.log(counts / len(X))
    return softmax(logits, axis=1), shrinkage, means


def _largest(scatter: Array, start: Array) -> float:
    """An estimate of the largest eigenvalue: three double power iterations from the row sums."""
    vector = scatter @ start
    if np.linalg.norm(vector) <= 1e-12 * np.trace(scatter):  # the ones tell nothing: the widest direction does
        vector = scatter[:, scatter.diagonal().argmax()]
    length = np.linalg.norm(vector)
    for _ in range(6):
        if length == 0:
            return 0.0
        vector = scatter @ (vector / length)
        length = np.linalg.norm(vector)
    return float(length)
