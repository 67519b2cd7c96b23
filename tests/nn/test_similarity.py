import numpy as np
import pytest
import torch
from scipy.stats import ortho_group, spearmanr

from downriver.core import InputError
from downriver.nn.similarity import alignment, centre, cka, dissimilarities, gram, parc, rsa


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def hsic(K, L):
    H = np.eye(len(K)) - 1 / len(K)
    return np.trace(K @ H @ L @ H)


def test_cka_is_the_ratio_of_hsics(rng):
    x, y = rng.normal(size=(30, 7)) + 2, rng.normal(size=(30, 5)) - 1
    K, L = x @ x.T, y @ y.T
    assert cka(x, y) == pytest.approx(hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L)), abs=1e-12)
    feature_form = np.linalg.norm((x - x.mean(0)).T @ (y - y.mean(0))) ** 2
    norms = [np.linalg.norm((z - z.mean(0)).T @ (z - z.mean(0))) for z in (x, y)]
    assert cka(x, y) == pytest.approx(feature_form / np.prod(norms), abs=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotation_scale_and_shift(rng, kernel, debiased):
    x, y = rng.normal(size=(25, 6)), rng.normal(size=(25, 4))
    turned = 3.7 * x @ ortho_group.rvs(6, random_state=1) + 11
    assert cka(turned, y, kernel, debiased) == pytest.approx(cka(x, y, kernel, debiased), abs=1e-10)
    assert cka(x, turned, kernel, debiased) == pytest.approx(1, abs=1e-10)


def test_debiased_cka_is_the_u_statistic_over_distinct_rows(rng):
    n = 6
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(n, 3))

    def u(K, L):  # the mean over ordered tuples of four distinct rows, Song et al. 2012
        total, count = 0.0, 0
        for i in range(n):
            for j in range(n):
                for q in range(n):
                    for r in range(n):
                        if len({i, j, q, r}) == 4:
                            total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
                            count += 1
        return total / count

    K, L = gram(x), gram(y)
    assert cka(x, y, debiased=True) == pytest.approx(u(K, L) / np.sqrt(u(K, K) * u(L, L)), abs=1e-10)


def test_debiased_cka_of_independent_features_is_near_zero_and_the_plain_one_is_not(rng):
    pairs = [(rng.normal(size=(40, 200)), rng.normal(size=(40, 200))) for _ in range(20)]
    assert abs(np.mean([cka(x, y, debiased=True) for x, y in pairs])) < 0.03
    assert np.mean([cka(x, y) for x, y in pairs]) > 0.7


def test_orthogonal_centred_kernels_have_alignment_zero(rng):
    basis = np.linalg.qr(np.column_stack([np.ones(8), rng.normal(size=(8, 4))]))[0][:, 1:]
    assert alignment(gram(basis[:, :2]), gram(basis[:, 2:])) == pytest.approx(0, abs=1e-12)
    assert alignment(gram(basis), gram(basis)) == pytest.approx(1, abs=1e-12)


def test_a_kernel_that_says_nothing_has_alignment_zero(rng):
    assert cka(np.ones((6, 3)), rng.normal(size=(6, 3))) == 0
    assert alignment(np.full((6, 6), 0.3), np.eye(6)) == 0
    assert alignment(np.full((6, 6), 0.3), np.eye(6), debiased=True) == 0


def test_small_features_are_not_taken_for_nothing(rng):
    x = rng.normal(size=(10, 3))
    assert cka(1e-6 * x, 1e-6 * x) == pytest.approx(1)


def test_centring_equals_the_kernel_of_centred_rows(rng):
    x = rng.normal(size=(9, 4)) + 5
    np.testing.assert_allclose(centre(gram(x)), gram(x - x.mean(axis=0)), atol=1e-10)


def test_rbf_takes_the_median_distance():
    x = np.array([[0.0], [1.0], [3.0]])
    assert gram(x, "rbf")[0, 1] == pytest.approx(np.exp(-1 / (2 * 4)))  # squared distances 1, 9, 4


def test_rsa_is_spearman_of_the_correlation_distances(rng):
    x, y = rng.normal(size=(15, 6)), rng.normal(size=(15, 9))
    upper = np.triu_indices(15, 1)
    direct = spearmanr((1 - np.corrcoef(x))[upper], (1 - np.corrcoef(y))[upper])[0]
    assert rsa(x, y) == pytest.approx(direct, abs=1e-12)
    np.testing.assert_allclose(dissimilarities(x), (1 - np.corrcoef(x))[upper], atol=1e-11)


def test_a_constant_row_correlates_with_nothing():
    np.testing.assert_allclose(dissimilarities([[1, 1, 1], [1, 2, 3], [3, 2, 1]]), [1, 1, 2])


@pytest.mark.parametrize("each", [4, 60])  # below and above 4 · components rows
@pytest.mark.parametrize("classes", [2, 5])
def test_parc_is_one_for_one_hot_features_and_near_zero_for_noise(rng, each, classes):
    labels = np.repeat(np.arange(classes), each)
    assert parc(np.eye(classes)[labels] * 5 + 1, labels, components=16) == pytest.approx(1, abs=1e-9)
    noise = [parc(rng.normal(size=(len(labels), 40)), labels, components=16) for _ in range(30)]
    assert abs(np.mean(noise)) < 0.15


def test_parc_with_few_rows_does_not_see_rotation_scale_and_shift(rng):
    labels = np.repeat(np.arange(5), 4)
    x = np.eye(5)[labels] @ rng.normal(size=(5, 30)) + rng.normal(size=(20, 30))
    turned = 0.2 * x @ ortho_group.rvs(30, random_state=2) + 3
    assert parc(turned, labels) == pytest.approx(parc(x, labels), abs=1e-12)


def test_parc_with_many_rows_is_the_published_recipe(rng):
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    labels = rng.integers(0, 4, size=150)
    x = np.eye(4)[labels] @ rng.normal(size=(4, 50)) + rng.normal(size=(150, 50))
    z = StandardScaler().fit_transform(PCA(32, svd_solver="full").fit_transform(x))
    z *= np.sign(z[np.abs(z).argmax(axis=0), np.arange(32)])  # principal axes have no sign of their own
    upper = np.triu_indices(150, 1)
    direct = spearmanr((1 - np.corrcoef(z))[upper], (1 - np.corrcoef(np.eye(4)[labels]))[upper])[0]
    assert parc(x, labels) == pytest.approx(direct, abs=1e-8)


def test_parc_with_fewer_rows_than_dimensions_is_not_whitened_away(rng):
    labels = np.repeat(np.arange(5), 3)
    x = np.eye(5)[labels] @ rng.normal(size=(5, 64)) + 0.3 * rng.normal(size=(15, 64))
    whitened = np.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :14]
    assert parc(x, labels) > 0.5
    assert abs(rsa(whitened, np.eye(5)[labels])) < 0.3  # what PCA and standardising would leave


def test_parc_of_equal_rows_is_zero():
    assert parc(np.ones((6, 3)), [0, 0, 0, 1, 1, 1]) == 0


def test_torch_tensors_are_taken(rng):
    x = torch.randn(12, 4, requires_grad=True)
    assert cka(x, x.to(torch.float64)) == pytest.approx(1)
    assert parc(x, torch.tensor([0, 1] * 6)) == pytest.approx(parc(x.detach().numpy(), [0, 1] * 6))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cka(np.ones((4, 2)), np.ones((5, 2))), "X has 4 rows and Y 5"),
        (lambda: cka(np.ones((3, 2)), np.ones((3, 2)), debiased=True), "at least 4"),
        (lambda: cka([[1.0], [np.nan]], [[1.0], [2.0]]), "X, row 2"),
        (lambda: cka(np.ones((4, 2)), np.ones((4, 2)), "poly"), "unknown kernel"),
        (lambda: alignment(np.eye(3), np.eye(4)), "one shape"),
        (lambda: rsa(np.ones((4, 1)), np.ones((4, 2))), "X has one column"),
        (lambda: parc(np.ones((4, 2)), [0, 0, 0, 0]), "1 class"),
        (lambda: parc(np.ones((4, 2)), [0, 1, 0]), "3 labels for 4 rows"),
        (lambda: parc(np.ones((4, 2)), [0, 1, 0, 1], components=1), "components"),
        (lambda: parc(np.ones((4, 2)), np.eye(4)), "one class a row"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call()
