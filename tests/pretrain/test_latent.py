"""The three latent-variable models: closed forms, agreement with scikit-learn, invariances, rates, and bad input."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from scipy.stats import ortho_group
from sklearn.base import clone
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.mixture import GaussianMixture

from downriver.core import InputError
from downriver.pretrain import ContrastivePretrainer, FactorPretrainer, MixturePretrainer, TwoPhase, informativeness
from downriver.pretrain.latent import bic, contrastive_pairs


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def factors(rng, m, d=12, r=3):
    B = rng.normal(size=(d, r))
    z = rng.normal(size=(m, r))
    return z @ B.T + rng.normal(size=(m, d)), z, B


def blobs(rng, m, K=3, d=4, spread=4.0):
    centres = spread * rng.normal(size=(K, d))
    label = rng.integers(K, size=m)
    return centres[label] + rng.normal(size=(m, d)), label, centres


def test_the_factor_model_is_the_closed_form_and_its_maximum(rng):
    x, _, B = factors(rng, 300)
    fitted = FactorPretrainer(3).fit(x)
    S = np.cov(x.T, bias=True)
    values, vectors = np.linalg.eigh(S)
    expected = vectors[:, -3:] @ np.diag(values[-3:] - 1) @ vectors[:, -3:].T
    np.testing.assert_allclose(fitted.components_ @ fitted.components_.T, expected, atol=1e-10)
    best = fitted.log_likelihood(x)
    for other in (B, fitted.components_ + 0.01 * rng.normal(size=(12, 3)), fitted.components_ * 1.01):
        worse = clone(fitted).fit(x)
        worse.components_ = other
        assert best > worse.log_likelihood(x)
    posterior = (x - x.mean(0)) @ np.linalg.inv(fitted.components_ @ fitted.components_.T + np.eye(12))
    np.testing.assert_allclose(fitted.transform(x), posterior @ fitted.components_, atol=1e-10)


def test_isotropic_noise_is_probabilistic_pca(rng):
    x, _, _ = factors(rng, 400)
    reference = PCA(3).fit(x)
    shrink = 399 / 400  # scikit-learn divides by m − 1, the maximum likelihood by m
    reference.explained_variance_ *= shrink
    reference.noise_variance_ *= shrink
    fitted = FactorPretrainer(3, "isotropic").fit(x)
    assert fitted.log_likelihood(x) == pytest.approx(reference.score(x), abs=1e-6)
    np.testing.assert_allclose(fitted.log_densities(x), reference.score_samples(x), atol=1e-6)


def test_diagonal_noise_is_factor_analysis(rng):
    x, _, _ = factors(rng, 400)
    x = x * np.linspace(0.5, 3, 12)
    fitted = FactorPretrainer(3, "diagonal").fit(x)
    reference = FactorAnalysis(3, tol=1e-6, max_iter=10_000, svd_method="lapack").fit(x)
    assert fitted.log_likelihood(x) == pytest.approx(reference.score(x), abs=1e-6)
    np.testing.assert_allclose(fitted.transform(x), reference.transform(x), atol=1e-6)


def test_a_rotation_of_the_factors_changes_no_prediction(rng):
    x, z, _ = factors(rng, 300)
    y = z @ [1.0, -2.0, 0.5] + rng.normal(size=300)
    one = TwoPhase(FactorPretrainer(3), LinearRegression()).fit(x, x[:40], y[:40])
    turned = FactorPretrainer(3).fit(x)
    turned.components_ = turned.components_ @ ortho_group.rvs(3, random_state=0)
    other = TwoPhase(turned, LinearRegression(), prefitted=True).fit(x, x[:40], y[:40])
    np.testing.assert_allclose(one.predict(x), other.predict(x), atol=1e-8)


def test_the_column_space_is_learnt_at_the_rate_of_a_root(rng):
    B = rng.normal(size=(20, 2))
    sizes = np.array([300, 1000, 3000, 10_000, 30_000])
    angles = []
    for m in sizes:
        found = []
        for _ in range(8):
            x = rng.normal(size=(m, 2)) @ B.T + rng.normal(size=(m, 20))
            found.append(subspace_angles(FactorPretrainer(2).fit(x).components_, B).max())
        angles.append(np.mean(found))
    slope = np.polyfit(np.log(sizes), np.log(angles), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_parameters_are_counted_and_bic_finds_the_factors(rng):
    x, _, _ = factors(rng, 1000)
    assert FactorPretrainer(3).fit(x).n_parameters_ == 12 + 36 - 3
    assert FactorPretrainer(3, "isotropic").fit(x).n_parameters_ == 12 + 36 - 3 + 1
    assert min(range(1, 7), key=lambda r: bic(FactorPretrainer(r, "isotropic").fit(x), x)) == 3
    y, _, _ = blobs(rng, 300)
    assert min(range(1, 6), key=lambda K: bic(MixturePretrainer(K, n_init=2, tol=1e-5).fit(y), y)) == 3


def test_a_weak_factor_is_warned_of(rng):
    with pytest.warns(UserWarning, match="of 2 factors explain no more than noise"):
        FactorPretrainer(2).fit(0.5 * rng.normal(size=(200, 5)))


def test_the_mixture_is_scikit_learns_from_the_same_start(rng):
    x, _, _ = blobs(rng, 400, spread=1.5)
    start = x[:3]
    fitted = MixturePretrainer(3, "spherical", means_init=start, tol=1e-10, max_iter=5000).fit(x)
    variance = x.var(axis=0).mean()
    reference = GaussianMixture(
        3, covariance_type="spherical", means_init=start, weights_init=np.full(3, 1 / 3),
        precisions_init=np.full(3, 1 / variance), reg_covar=0, tol=1e-10, max_iter=5000,
    ).fit(x)  # fmt: skip
    assert fitted.log_likelihood(x) == pytest.approx(reference.score(x), abs=1e-6)
    np.testing.assert_allclose(fitted.means_, reference.means_, atol=1e-3)
    np.testing.assert_allclose(fitted.transform(x), reference.predict_proba(x), atol=1e-3)


def test_identity_covariance_gives_scikit_learns_responsibilities(rng):
    x, _, _ = blobs(rng, 300, spread=1.5)
    fitted = MixturePretrainer(3, tol=1e-12, max_iter=5000).fit(x)
    reference = GaussianMixture(3, covariance_type="tied")
    reference.weights_, reference.means_ = fitted.weights_, fitted.means_
    reference.precisions_cholesky_ = np.eye(4)
    np.testing.assert_allclose(fitted.transform(x), reference.predict_proba(x), atol=1e-10)
    assert fitted.log_likelihood(x) == pytest.approx(reference.score(x))
    np.testing.assert_allclose(fitted.transform(x).sum(axis=1), 1)
    resp = fitted.transform(x)  # a fixed point of EM
    np.testing.assert_allclose(resp.T @ x / resp.sum(axis=0)[:, None], fitted.means_, atol=1e-4)


def test_em_does_not_lose_likelihood_and_starts_help(rng):
    x, _, _ = blobs(rng, 300, K=5, spread=2.0)
    by_steps = [
        MixturePretrainer(5, means_init=x[:5], max_iter=k, tol=0).fit(x).log_likelihood(x) for k in range(1, 15)
    ]
    assert (np.diff(by_steps) > -1e-9).all() and by_steps[-1] > by_steps[0]
    one, ten = (MixturePretrainer(5, n_init=k).fit(x).log_likelihood(x) for k in (1, 10))
    assert ten >= one


def test_an_order_of_the_components_changes_no_prediction(rng):
    x, label, _ = blobs(rng, 300)
    fitted = MixturePretrainer(3).fit(x)
    turned = MixturePretrainer(3, means_init=fitted.means_[[2, 0, 1]]).fit(x)
    one, other = (
        TwoPhase(p, LogisticRegression(tol=1e-8), prefitted=True).fit(x, x[:30], label[:30]) for p in (fitted, turned)
    )
    assert (one.predict(x) == other.predict(x)).all() and one.score(x, label) > 0.95


def test_contrastive_features_span_what_two_views_share(rng):
    z, mix = rng.normal(size=(4000, 2)), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    views = [np.hstack([z + 0.2 * rng.normal(size=z.shape), rng.normal(size=(4000, 6))]) @ mix for _ in range(2)]
    pairs, s = contrastive_pairs(*views, seed=1)
    fitted = ContrastivePretrainer(2).fit(pairs, s)
    assert np.rad2deg(subspace_angles(fitted.components_.T, mix[:2].T).max()) < 8
    assert fitted.log_likelihood(pairs, s) > -0.6  # log 2 is what nothing gives
    halved = ContrastivePretrainer(2, temperature=4.0).fit(pairs, s)
    ratio = np.linalg.norm(halved.components_) / np.linalg.norm(fitted.components_)
    assert ratio == pytest.approx(2, rel=0.02)  # the temperature sets the scale of W and no more
    assert halved.log_likelihood(pairs, s) == pytest.approx(fitted.log_likelihood(pairs, s), abs=1e-4)
    model = TwoPhase(ContrastivePretrainer(2), LinearRegression()).fit(pairs, views[0][:50], z[:50, 0], s=s)
    assert model.score(views[0][50:], z[50:, 0]) > 0.8


def test_contrastive_gradients_are_exact(rng):
    """The optimum found is one: random small changes of W lose likelihood."""
    views = [rng.normal(size=(500, 3)) + rng.normal(size=(500, 1)) for _ in range(2)]
    views[1] = views[0] + 0.3 * rng.normal(size=(500, 3))
    pairs, s = contrastive_pairs(*views)
    fitted = ContrastivePretrainer(1).fit(pairs, s)
    best, W = fitted.log_likelihood(pairs, s), fitted.components_.copy()
    for _ in range(20):
        fitted.components_ = W + 0.03 * rng.normal(size=W.shape)
        assert fitted.log_likelihood(pairs, s) < best + 1e-9


def test_informativeness_sees_what_the_likelihood_hides(rng):
    clear, _, _ = blobs(rng, 600, K=2, spread=6.0)
    mixed, _, _ = blobs(rng, 600, K=2, spread=0.3)
    mixture = MixturePretrainer(2, n_init=2, tol=1e-5)
    assert informativeness(mixture, clear) < informativeness(mixture, mixed)
    strong, _, B = factors(rng, 800)
    weak = rng.normal(size=(800, 3)) @ (0.3 * B).T + rng.normal(size=(800, 12))
    assert 0 < informativeness(FactorPretrainer(3), strong) < informativeness(FactorPretrainer(3), weak)


def test_drawn_rows_are_of_the_fitted_model(rng):
    x, _, _ = factors(rng, 2000)
    for fitted in (FactorPretrainer(3).fit(x), MixturePretrainer(2, "spherical", n_init=1).fit(x)):
        drawn = fitted.draw(40_000, rng)
        np.testing.assert_allclose(drawn.mean(axis=0), x.mean(axis=0), atol=0.15)
        assert fitted.log_likelihood(drawn) == pytest.approx(fitted.log_likelihood(x), abs=0.4)


def test_scikit_learns_contract(rng):
    x, _, _ = blobs(rng, 60)
    for estimator in (FactorPretrainer(2, "isotropic"), MixturePretrainer(2, seed=4)):
        before = x.copy()
        again = clone(estimator)
        assert again.get_params() == estimator.get_params()
        assert estimator.fit(x) is estimator and (x == before).all()
        np.testing.assert_array_equal(again.fit_transform(x), estimator.transform(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: FactorPretrainer(5).fit(x), "n_factors is 5: from 1 to 4 are expected for 5 columns"),
        (lambda x: FactorPretrainer(3).fit(x[:3]), "3 rows for 3 factors"),
        (lambda x: FactorPretrainer(2, "diag").fit(x), "did you mean 'diagonal'"),
        (lambda x: FactorPretrainer(2, "isotropic").fit(x[:, :2] @ np.ones((2, 5)) * 1.0), "no noise is left"),
        (lambda x: FactorPretrainer(2).fit(x).transform(x[:, :3]), "rows of 3 columns: 5 are expected"),
        (lambda x: FactorPretrainer(2).fit(x * np.nan), "row 1: a value is not finite"),
        (lambda x: MixturePretrainer(20).fit(x), "n_components is 20: from 1 to 19"),
        (lambda x: MixturePretrainer(2, "full").fit(x), "unknown covariance"),
        (lambda x: MixturePretrainer(2, means_init=x[:3]).fit(x), r"\(2, 5\) is expected"),
        (lambda x: ContrastivePretrainer(2).fit(x, [1]), r"\(m, 2, d\) is expected"),
        (lambda x: ContrastivePretrainer(2).fit(x.reshape(10, 2, 5), np.ones(10)), "both of them met"),
        (lambda x: ContrastivePretrainer(9).fit(x.reshape(10, 2, 5), [0, 1] * 5), "dim is 9"),
        (lambda x: contrastive_pairs(x, x[:3]), "two of one shape"),
        (lambda x: informativeness(ContrastivePretrainer(2), x), "with a density of x"),
        (lambda x: TwoPhase(FactorPretrainer(2), LogisticRegression()).fit(x, x[:5], [1] * 5), "one class only"),
        (lambda x: TwoPhase(FactorPretrainer(2), LinearRegression()).fit(x, x[:5], [1] * 4), "4 values for 5"),
    ],
)  # fmt: skip
def test_bad_input_is_named(rng, call, message):
    with pytest.raises(InputError, match=message):
        call(rng.normal(size=(20, 5)))


def test_components_without_a_label_are_warned_of(rng):
    x, label, _ = blobs(rng, 200, spread=6.0)
    few = np.concatenate([np.flatnonzero(label == k)[:2] for k in (0, 1)])
    with pytest.warns(UserWarning, match="1 of 3 components have no labelled row"):
        TwoPhase(MixturePretrainer(3), LogisticRegression()).fit(x, x[few], label[few])


def test_informativeness_against_a_known_latent_variable(rng):
    def mixture(distance):
        labels = rng.integers(2, size=600)
        return rng.normal(0, 1, (600, 2)) + distance * (2 * labels[:, None] - 1), labels

    pretrainer = MixturePretrainer(2, n_init=1)
    x, labels = mixture(3.0)
    sure = informativeness(pretrainer, x, labels)
    assert sure == pytest.approx(informativeness(pretrainer, x, 1 - labels))  # the numbering does not matter
    assert sure == pytest.approx(informativeness(pretrainer, x, np.eye(2)[labels]))
    assert sure < informativeness(pretrainer, *mixture(0.3))
    assert sure < informativeness(pretrainer, x, rng.permutation(labels))
    B, z = rng.normal(size=(8, 2)), rng.normal(size=(800, 2))
    x = z @ B.T + rng.normal(size=(800, 8))
    posterior = x @ np.linalg.solve(B @ B.T + np.eye(8), B)
    turned = posterior @ np.array([[0.6, -0.8], [0.8, 0.6]])
    factors = FactorPretrainer(2)
    found = informativeness(factors, x, posterior)
    assert found == pytest.approx(informativeness(factors, x, turned))  # nor does a rotation
    assert found < informativeness(factors, x, z) < informativeness(factors, x, rng.permutation(z))


@pytest.mark.parametrize("z", [np.zeros(3, dtype=int), np.full(40, 2), np.zeros((40, 3)), np.full((40, 2), np.nan)])
def test_a_latent_variable_of_another_shape_is_refused(rng, z):
    with pytest.raises(InputError, match="z of shape"):
        informativeness(MixturePretrainer(2, n_init=1), rng.normal(size=(40, 2)), z)
