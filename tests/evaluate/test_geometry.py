"""The measures of geometry: exact values on cubes, simplices and random points, and agreement with other ways."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from sklearn.decomposition import PCA

from downriver.core import InputError
from downriver.evaluate import geometry
from downriver.evaluate.geometry import (
    all_dichotomies,
    ccgp,
    geometry_report,
    pairing_parallelism,
    parallelism_score,
    partial_alignment,
    participation_ratio,
    selectivity,
    separable,
    shattering,
    sparsity,
)
from downriver.nn.similarity import alignment, cka, gram

CUBE = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
PARITY = CUBE.prod(axis=1) > 0


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("bit", range(3))
def test_a_factorised_cube_is_parallel_and_generalises(rng, bit):
    turned = 2.5 * CUBE @ np.linalg.qr(rng.normal(size=(20, 3)))[0].T + rng.normal(size=20)
    assert parallelism_score(turned, CUBE[:, bit] > 0) == pytest.approx(1, abs=1e-9)
    for n_pairs in (1, 2, 3):
        assert ccgp(turned, CUBE[:, bit] > 0, n_pairs) == 1
    assert ccgp(turned, CUBE[:, bit] > 0, classifier="logistic") == 1


def test_random_points_in_many_dimensions_are_neither(rng):
    points = [rng.normal(size=(8, 500)) for _ in range(30)]
    bit, pairs = CUBE[:, 0] > 0, [[0, 4], [5, 1], [2, 6], [7, 3]]  # what differs in the bit only
    assert abs(np.mean([parallelism_score(z, bit) for z in points[:10]])) < 0.05
    assert abs(np.mean([ccgp(z, bit, pairs=pairs) for z in points]) - 0.5) < 0.07
    assert ccgp(CUBE, bit, pairs=pairs) == 1


def test_parity_of_the_cube_is_as_little_parallel_as_four_pairs_can_be():
    even, odd = CUBE[PARITY], CUBE[~PARITY]
    distances = np.linalg.norm(even[:, None] - odd, axis=2)
    for length in (2, 2 * np.sqrt(3)):  # along the edges, and through the middle
        pairings = [p for p in itertools.permutations(range(4)) if np.allclose(distances[range(4), p], length)]
        assert len(pairings) == (9 if length == 2 else 1)
        for pairing in pairings:
            assert pairing_parallelism(even, odd[list(pairing)]) == pytest.approx(-1 / 3, abs=1e-9)
    best = max(pairing_parallelism(even, odd[list(p)]) for p in itertools.permutations(range(4)))
    assert parallelism_score(CUBE, PARITY) == pytest.approx(best) == pytest.approx(-0.2738, abs=1e-4)


def test_exact_and_assignment_agree_up_to_eight_points(rng):
    for points in (4, 6, 8):
        for _ in range(15):
            z = rng.normal(size=(points, int(rng.integers(2, 12))))
            side = np.arange(points) % 2 == 0
            exact, climbed = (parallelism_score(z, side, method) for method in ("exact", "assignment"))
            assert climbed == pytest.approx(exact, abs=1e-9)


def test_many_pairs_are_assigned(rng):
    bits = np.array(list(itertools.product([-1.0, 1.0], repeat=5)))
    z = bits @ np.linalg.qr(rng.normal(size=(40, 5)))[0].T + 0.05 * rng.normal(size=(32, 40))
    assert parallelism_score(z, bits[:, 0] > 0) > 0.9
    with pytest.warns(UserWarning, match="16 pairs are too many"):
        assert parallelism_score(z, bits[:, 0] > 0, "exact") > 0.9
    assert ccgp(z, bits[:, 0] > 0) == 1


def test_sides_may_be_unequal_and_change_places(rng):
    z, side = rng.normal(size=(5, 4)), np.array([1, 1, 0, 0, 0], dtype=bool)
    best = max(pairing_parallelism(z[:2], z[2:][list(p)]) for p in itertools.permutations(range(3), 2))
    for dichotomy in (side, ~side):
        assert parallelism_score(z, dichotomy) == pytest.approx(best)
        assert 0 <= ccgp(z, dichotomy) <= 1


def test_participation_ratio_counts_equal_directions(rng):
    for k in (1, 3, 7):
        axes = np.linalg.qr(rng.normal(size=(20, k)))[0].T
        assert participation_ratio(np.vstack([axes, -axes]) + 5) == pytest.approx(k)
    z = rng.normal(size=(50, 6)) * [5, 3, 1, 1, 0.5, 0.1]
    variances = PCA().fit(z).explained_variance_
    assert participation_ratio(z) == pytest.approx(variances.sum() ** 2 / (variances**2).sum())


def test_partial_alignment_is_a_partial_correlation(rng):
    x, y, z = (gram(rng.normal(size=(20, 3))) for _ in range(3))
    H = np.eye(20) - 1 / 20
    a, b, c = ((H @ k @ H).ravel() for k in (x, y, z))
    left = [v - c * (v @ c) / (c @ c) for v in (a, b)]
    expected = left[0] @ left[1] / np.sqrt((left[0] @ left[0]) * (left[1] @ left[1]))
    assert partial_alignment(x, y, z) == pytest.approx(expected, abs=1e-10)
    assert partial_alignment(x, y, y) == 0


def test_sparsity_and_selectivity(rng):
    assert sparsity(np.eye(10)) == pytest.approx(0.9)
    assert sparsity(np.hstack([np.eye(10), np.zeros((10, 3))])) == pytest.approx(0.9)  # neurons never active
    z, y = rng.normal(size=(30, 4)), rng.integers(2, size=(30, 2))
    expected = np.corrcoef(z.T, y.T)[:4, 4:] ** 2
    np.testing.assert_allclose(selectivity(z, y), expected, atol=1e-12)


def test_a_hyperplane_separates_what_it_can():
    assert shattering(np.eye(6)) == 1  # a simplex: everything
    assert not separable(CUBE, PARITY)
    threshold = sum(separable(CUBE, d) for d in all_dichotomies(8, balanced=False))
    assert threshold == (104 - 2) / 2  # the known number of threshold functions of three bits, without constants
    line = np.arange(6.0)[:, None]
    assert shattering(line) == pytest.approx(1 / 10)


def test_dichotomies_are_all_different_and_balanced():
    found = all_dichotomies(8)
    assert len(found) == 35 and len({d.tobytes() for d in found}) == 35
    assert all(d.sum() == 4 and not d[0] for d in found)
    drawn = all_dichotomies(20, max_n=50, seed=1)
    assert len({d.tobytes() for d in drawn}) == 50 and all(d.sum() == 10 and not d[0] for d in drawn)
    assert [d.tolist() for d in drawn] == [d.tolist() for d in all_dichotomies(20, max_n=50, seed=1)]
    assert len(all_dichotomies(12, balanced=False, max_n=30)) == 30


def test_the_report_is_of_condition_means(rng):
    condition = np.repeat(np.arange(8), 20)
    noisy = CUBE[condition] + rng.normal(size=(160, 3))
    means = np.stack([noisy[condition == c].mean(axis=0) for c in range(8)])
    report = geometry_report(noisy, inputs=2 * noisy, targets=CUBE[condition] > 0, conditions=condition)
    assert report.conditions == 8
    assert report.target_alignment == pytest.approx(cka(means, CUBE))
    assert report.input_alignment == pytest.approx(1)
    assert report.participation_ratio == pytest.approx(participation_ratio(means))
    assert report.parallelism["0"] == pytest.approx(parallelism_score(means, CUBE[:, 0] > 0)) and len(report.ccgp) == 3
    single = geometry_report(noisy, targets=CUBE[condition][:, 0])
    assert single.target_alignment < geometry_report(means, targets=CUBE[:, 0]).target_alignment - 0.05


def test_the_report_does_not_see_rotation_and_takes_tensors(rng):
    z = rng.normal(size=(8, 5))
    one = geometry_report(z, inputs=CUBE, targets=CUBE > 0, debiased=True)
    other = geometry_report(
        torch.tensor(z @ ortho_group.rvs(5, random_state=0) * 3),
        torch.tensor(CUBE),
        torch.tensor(CUBE > 0),
        debiased=True,
    )
    assert one.target_alignment == pytest.approx(alignment(gram(z), gram(CUBE), debiased=True))
    for name in ("target_alignment", "input_alignment", "partial_target_alignment", "participation_ratio"):
        assert getattr(one, name) == pytest.approx(getattr(other, name))
    assert one.parallelism == pytest.approx(other.parallelism) and one.ccgp == pytest.approx(other.ccgp)


def test_class_ids_become_one_target_a_class(rng):
    labels = np.repeat(["a", "b", "c"], 4)
    report = geometry_report(np.eye(3)[np.repeat(range(3), 4)] + 1e-3 * rng.normal(size=(12, 3)), targets=labels)
    assert set(report.parallelism) == {"0", "1", "2"} and report.target_alignment > 0.99
    assert not geometry_report(rng.normal(size=(3, 4)), targets=[0, 1, 2]).parallelism  # sides of one condition


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometry_report(CUBE, conditions=[1] * 8), "one condition only"),
        (lambda: geometry_report(CUBE, conditions=[1, 2]), "for 8 rows: one a row"),
        (lambda: geometry_report(CUBE, targets=[1, 0]), "targets has 2 rows, features 8"),
        (lambda: geometry_report(CUBE, targets=CUBE[:, 0], conditions=[0, 1] * 4), "targets differ within a condition"),
        (lambda: geometry_report(CUBE, targets=[1] * 8), "one class only"),
        (lambda: geometry_report(CUBE, targets=np.ones((8, 2))), "column 0: two different values"),
        (lambda: participation_ratio(np.ones((4, 2))), "all rows of features are equal"),
        (lambda: sparsity(np.zeros((4, 2))), "no neuron is active"),
        (lambda: parallelism_score(CUBE, [1] * 8), "a side of the dichotomy is empty"),
        (lambda: parallelism_score(CUBE, [1] + [0] * 7), "has one condition"),
        (lambda: parallelism_score(CUBE, [0, 1]), "2 entries for 8 conditions"),
        (lambda: parallelism_score(CUBE, PARITY, "exacts"), "did you mean 'exact'"),
        (lambda: ccgp(CUBE, PARITY, 4), "from 1 to 3 of the 4 pairs"),
        (lambda: ccgp(CUBE, CUBE[:, 0], pairs=[[0, 4], [1, 8]]), "different numbers from 0 to 7"),
        (lambda: ccgp(CUBE, CUBE[:, 0], pairs=[[0, 4], [1, 2]]), "on different sides"),
        (lambda: ccgp(CUBE, CUBE[:, 0], pairs=[0, 4]), r"\(m, 2\)"),
        (lambda: ccgp(CUBE, PARITY, classifier="tree"), "unknown classifier"),
        (lambda: separable(CUBE, [0, 1]), "2 entries for 8"),
        (lambda: all_dichotomies(5), "an even number"),
        (lambda: geometry_report([[1.0, np.inf], [0.0, 1.0]]), "row 1: a value is not finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_room_offers_the_report():
    from downriver import evaluate

    assert evaluate.geometry_report is geometry.geometry_report
