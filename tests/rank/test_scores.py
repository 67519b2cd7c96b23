"""Each score is what its formula says, against independent computations on small data."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, ortho_group
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier

from downriver.core import InputError
from downriver.nn.similarity import parc
from downriver.rank import gbc, hscore, knn, leep, linear_probe, logme, nce, nleep, score, sfda, transrate
from downriver.rank.scores import OF_PROBABILITIES, SCORES

SHAPES = [(60, 12), (30, 80)]  # more rows than features, and fewer


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def blobs(rng, n=60, d=12, classes=3, apart=1.0):
    y = np.arange(n) % classes
    return rng.normal(size=(n, d)) + apart * rng.normal(size=(classes, d))[y], y


def probabilities(rng, n, z):
    return rng.dirichlet(np.full(z, 0.3), size=n)


# LogME


def log_evidence(X, y, alpha, beta):
    """The density of y under y ~ N(0, 1/β + XXᵀ/α), without any algebra of ours."""
    covariance = np.eye(len(X)) / beta + X @ X.T / alpha
    return multivariate_normal(np.zeros(len(X)), covariance).logpdf(y) / len(X)


@pytest.mark.parametrize("shape", [(60, 12), (60, 80)])
@pytest.mark.parametrize("duplicate", [False, True])
def test_logme_at_its_fixed_point_is_the_largest_evidence(rng, shape, duplicate):
    X = rng.normal(size=shape) * np.geomspace(1, 0.05, shape[1])
    target = X @ rng.normal(size=shape[1]) + rng.normal(size=shape[0])
    if duplicate:
        X = np.hstack([X, X[:, :1]])

    def lowest(logs):
        return -log_evidence(X, target, *np.exp(logs))

    best = minimize(lowest, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13})
    assert logme(X, target, iterations=3000, tolerance=1e-13) == pytest.approx(-best.fun, abs=1e-9)
    assert logme(X, target) == pytest.approx(-best.fun, abs=1e-2)


def published(X, Y, iterations=11, tolerance=1e-3):
    """The published iteration for one target after another, by dense linear algebra."""
    n, d = X.shape
    values = []
    for y in Y.T:
        alpha = beta = 1.0
        for _ in range(iterations):
            t = alpha / beta
            A = X.T @ X + t * np.eye(d)
            m = np.linalg.solve(A, X.T @ y)
            gamma = d - t * np.trace(np.linalg.inv(A))
            alpha = gamma / (m @ m + 1e-5)
            residual = np.sum((y - X @ m) ** 2)
            beta = (n - gamma) / (residual + 1e-5)
            if abs(alpha / beta - t) <= tolerance * t:
                break
        sign, log_det = np.linalg.slogdet(alpha * np.eye(d) + beta * X.T @ X)
        assert sign == 1
        fit = beta * residual + alpha * m @ m
        values.append((d * np.log(alpha) + n * np.log(beta) - log_det - fit - n * np.log(2 * np.pi)) / 2 / n)
    return np.mean(values)


@pytest.mark.parametrize("shape", SHAPES)
def test_logme_is_the_published_iteration_class_by_class(rng, shape):
    X, y = blobs(rng, *shape, classes=4)
    assert logme(X, y) == pytest.approx(published(X, np.eye(4)[y]), abs=1e-6)
    Y = rng.normal(size=(len(X), 3))
    assert logme(X, Y) == pytest.approx(published(X, Y), abs=1e-6)
    assert logme(X, Y) == pytest.approx(np.mean([logme(X, column) for column in Y.T]), abs=1e-12)


def test_logme_by_either_gram_matrix(rng):
    X, y = blobs(rng, 40, 40)
    wide = np.hstack([X, np.zeros((40, 1))])  # one column more, and the other Gram matrix is taken
    assert np.isfinite(logme(wide, y))
    # an empty column adds its prior alone: d ln α and its determinant cancel
    assert logme(wide, y) == pytest.approx(logme(X, y), abs=1e-9)


def test_logme_does_not_see_a_rotation_and_prefers_the_informative(rng):
    X, y = blobs(rng)
    assert logme(X @ ortho_group.rvs(12, random_state=0), y) == pytest.approx(logme(X, y), abs=1e-10)
    assert logme(X, y) > logme(X, rng.permutation(y))


# scores of probabilities


def test_leep_of_the_true_label_is_zero_and_its_maximum(rng):
    _, y = blobs(rng)
    assert leep(np.eye(3)[y], y) == 0
    assert leep(probabilities(rng, 60, 7), y) < 0


def test_leep_and_nce_are_their_sums(rng):
    y = rng.integers(0, 3, 50)
    theta = probabilities(rng, 50, 4)
    joint = np.zeros((3, 4))
    hard = np.zeros((3, 4))
    for row, label in zip(theta, y, strict=True):
        joint[label] += row / 50
        hard[label, row.argmax()] += 1 / 50
    expected = np.mean([np.log(row @ (joint[label] / joint.sum(0))) for row, label in zip(theta, y, strict=True)])
    assert leep(theta, y) == pytest.approx(expected, abs=1e-12)
    entropy = sum(
        -hard[label, z] * np.log(hard[label, z] / hard[:, z].sum())
        for label in range(3)
        for z in range(4)
        if hard[label, z] > 0
    )
    assert nce(theta, y) == pytest.approx(-entropy, abs=1e-12)


def test_leep_is_at_least_nce_and_the_confidence(rng):
    for _ in range(20):
        theta, y = probabilities(rng, 80, 5), rng.integers(0, 4, 80)
        assert leep(theta, y) >= nce(theta, y) + np.log(theta.max(axis=1)).mean() - 1e-12


def test_nleep_is_leep_of_the_mixture(rng):
    X, y = blobs(rng, 90, 6)
    Z = PCA(0.8).fit_transform(X)
    scaled = Z / Z[:, 0].std()
    mixture = GaussianMixture(15, random_state=3).fit(scaled)
    # the sign of a component is free, and the mixture's start draws rows, not directions
    assert nleep(X, y, seed=3) == pytest.approx(leep(mixture.predict_proba(scaled), y), abs=1e-2)
    assert nleep(X, y, seed=3) == nleep(X, y, seed=3)
    assert nleep(1000 * X, y, seed=3) == pytest.approx(nleep(X, y, seed=3), abs=1e-6)


# scores of class separation


@pytest.mark.parametrize("shape", SHAPES)
def test_hscore_is_the_trace(rng, shape):
    X, y = blobs(rng, *shape)
    means = np.stack([X[y == c].mean(axis=0) for c in range(3)])[y]
    between = np.cov(means.T)
    assert hscore(X, y) == pytest.approx(np.trace(np.linalg.pinv(np.cov(X.T), rcond=1e-10) @ between), abs=1e-8)
    covariance, shrinkage = ledoit_wolf(X)
    expected = (1 - shrinkage) * np.trace(np.linalg.solve(covariance, between))
    assert hscore(X, y, regularised=True) == pytest.approx(expected, abs=1e-10)


def test_hscore_of_separating_features_is_the_rank_of_the_class_means(rng):
    y = np.arange(50) % 5
    X = rng.normal(size=(5, 9))[y]
    assert hscore(X, y) == pytest.approx(np.linalg.matrix_rank(X - X.mean(axis=0)), abs=1e-9) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_transrate_is_the_difference_of_rates_and_not_negative_for_balanced_classes(rng, shape):
    X, y = blobs(rng, *shape, apart=0.0)
    F = X - X.mean(axis=0)

    def rate(f):
        return 0.5 * np.linalg.slogdet(np.eye(f.shape[1]) + f.T @ f / (len(f) * 1e-4))[1]

    expected = rate(F) - np.mean([rate(F[y == c]) for c in range(3)])
    assert transrate(X, y) == pytest.approx(expected, abs=1e-9)
    assert transrate(X, y) > 0
    assert transrate(X, rng.permutation(y)) > -1e-9


def plain_sfda(X, y):
    """The authors' steps: shrunk scatters, the generalised eigenproblem, the mix, and all of it again."""
    classes, n = np.unique(y), len(X)

    def fit(X, shrinkage):
        prior = np.array([np.mean(y == c) for c in classes])
        within = sum(p * np.cov(X[y == c].T, bias=True) for p, c in zip(prior, classes, strict=True))
        if shrinkage is None:
            x = within.sum(axis=1)
            for _ in range(3):
                z = within @ x / np.linalg.norm(within @ x)
                x = within @ z / np.linalg.norm(within @ z)
            shrinkage = max(np.exp(-5 * (x @ within @ z)), 1e-10)

        def shrink(S):
            return (1 - shrinkage) * S + shrinkage * np.trace(S) / len(S) * np.eye(len(S))

        between = shrink(np.cov(X.T, bias=True)) - shrink(within)
        U = eigh(between, shrink(within))[1]
        means = np.stack([X[y == c].mean(axis=0) for c in classes])
        coefficients = means @ U @ U.T
        logits = X @ coefficients.T - 0.5 * np.diag(means @ coefficients.T) + np.log(prior)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True), shrinkage, means

    p, shrinkage, means = fit(X, None)
    soft = np.exp(p) / np.exp(p).sum(axis=1, keepdims=True)
    sure = soft[np.arange(n), y][:, None]
    others = np.stack([np.delete(means, c, axis=0).mean(axis=0) for c in classes])
    return fit(sure * X + (1 - sure) * others[y], shrinkage)[0][np.arange(n), y].mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_sfda_is_the_authors_eigenproblem(rng, shape, scale):
    X, y = blobs(rng, *shape, classes=4)
    X = scale * X + 2
    assert sfda(X, y) == pytest.approx(plain_sfda(X, y), abs=1e-6)


def test_sfda_of_classes_that_are_points(rng):
    y = np.arange(20) % 4
    assert sfda(rng.normal(size=(4, 6))[y], y) > 0.99


def test_gbc_is_the_sum_over_pairs(rng):
    X, y = blobs(rng, 60, 4)
    Z = PCA().fit_transform(X)
    m = np.stack([Z[y == c].mean(axis=0) for c in range(3)])
    v = np.stack([Z[y == c].var(axis=0) for c in range(3)])
    total = 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                s = (v[i] + v[j]) / 2
                total += np.exp(-np.sum((m[i] - m[j]) ** 2 / s) / 8 - 0.5 * np.log(s / np.sqrt(v[i] * v[j])).sum())
    assert gbc(X, y) == pytest.approx(-total, abs=1e-10)
    assert gbc(X, y, dims=1) < gbc(X, y)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_knn_leaves_each_row_out(rng, neighbours):
    X, y = blobs(rng, 90, 5)
    right = []
    for i in range(90):
        others = np.arange(90) != i
        found = KNeighborsClassifier(neighbours).fit(X[others], y[others])
        near = y[others][found.kneighbors(X[i : i + 1])[1][0]]
        votes = np.bincount(near, minlength=3)
        tied = np.flatnonzero(votes == votes.max())
        right.append((near[0] if near[0] in tied else tied[0]) == y[i])
    assert knn(X, y, neighbours=neighbours) == pytest.approx(np.mean(right))


def test_linear_probe_is_held_out_accuracy(rng):
    X, y = blobs(rng, 120, 5, apart=5.0)
    assert linear_probe(X, y) > 0.95
    noise = rng.normal(size=(120, 60))
    assert linear_probe(noise, rng.permutation(y), l2=1e-3) < 0.5  # a probe that remembers its rows would have 1


# the family


def scores_of(X, y, theta):
    return {name: score(X, y, name, probs=theta) for name in SCORES}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_score_is_finite_with_duplicates_and_constants_and_leaves_its_input_alone(rng, shape):
    X, y = blobs(rng, *shape)
    X = np.hstack([X, X[:, :1], np.full((len(X), 1), 3.0)])
    theta = probabilities(rng, len(X), 5)
    before = X.copy(), y.copy(), theta.copy()
    assert np.isfinite(list(scores_of(X, y, theta).values())).all()
    for now, then in zip((X, y, theta), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_every_score_is_larger_for_features_that_know_the_labels(rng):
    X, y = blobs(rng, 120, 6, apart=2.0)
    theta = np.eye(3)[y] * 0.7 + 0.1
    known, shuffled = scores_of(X, y, theta), scores_of(X, rng.permutation(y), theta)
    for name in SCORES:
        assert known[name] > shuffled[name], name


def test_names_of_classes_types_and_tensors_change_nothing(rng):
    X, y = blobs(rng, 60, 6)
    theta = probabilities(rng, 60, 4)
    plain = scores_of(X, y, theta)
    for labels in (y + 7, np.array(["x", "b", "k"])[y], list(y), torch.tensor(y)):
        again = scores_of(torch.tensor(X), labels, torch.tensor(theta))
        assert again == pytest.approx(plain, abs=1e-9)


def test_parc_is_that_of_the_similarities(rng):
    X, y = blobs(rng)
    assert score(X, y, "parc") == parc(X, y)


def test_parameters_go_to_the_method(rng):
    X, y = blobs(rng)
    assert score(X, y, "knn", neighbours=5) == knn(X, y, neighbours=5)
    assert score(X, y, "hscore", regularised=True) == hscore(X, y, regularised=True)


@pytest.mark.parametrize("method", [name for name in SCORES if name not in OF_PROBABILITIES])
def test_bad_features_are_named(rng, method):
    X, y = blobs(rng)
    spoilt = X.copy()
    spoilt[4, 2] = np.nan
    with pytest.raises(InputError, match="X, row 5: a value is not finite"):
        score(spoilt, y, method)
    with pytest.raises(InputError, match="every column is constant"):
        score(np.ones((60, 3)), y, method)
    with pytest.raises(InputError, match="hold 1 class: at least two"):
        score(X, np.zeros(60, dtype=int), method)
    with pytest.raises(InputError, match="class 'c' has one row: two at least"):
        score(X, ["a", "b"] * 29 + ["a", "c"], method)
    with pytest.raises(InputError, match="59 labels for 60 rows"):
        score(X, y[:59], method)


def test_bad_input_is_named(rng):
    X, y = blobs(rng)
    theta = probabilities(rng, 60, 4)
    for message, call in [
        ("unknown score 'logmee': did you mean 'logme'", lambda: score(X, y, "logmee")),
        ("unknown parameter of knn 'k'", lambda: score(X, y, "knn", k=3)),
        ("leep reads the probabilities", lambda: score(X, y, "leep")),
        ("probs, row 3: probabilities that sum to 1", lambda: leep(np.vstack([theta[:2], 2 * theta[2:]]), y)),
        ("y holds floating-point numbers", lambda: score(X, y.astype(float), "sfda")),
        ("target 2: all its values are equal", lambda: logme(X, np.stack([X[:, 0], np.ones(60)], axis=1))),
        ("neighbours is 60", lambda: knn(X, y, neighbours=60)),
        ("components_per_class is 0", lambda: nleep(X, y, components_per_class=0)),
        ("explained is 0", lambda: nleep(X, y, explained=0)),
        ("eps is 0", lambda: transrate(X, y, eps=0)),
        ("dims is 0", lambda: gbc(X, y, dims=0)),
        ("l2 is 0", lambda: linear_probe(X, y, l2=0)),
        ("folds is 1", lambda: linear_probe(X, y, folds=1)),
        ("parameter 'neighbours' of knn is 'many'", lambda: score(X, y, "knn", neighbours="many")),
    ]:
        with pytest.raises(InputError, match=message):
            call()
