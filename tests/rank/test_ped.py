"""The movement of PED has the properties of the mechanics it borrows."""

import warnings

import numpy as np
import pytest
from scipy.stats import ortho_group

from downriver.core import InputError
from downriver.rank import PED, logme, score


@pytest.fixture
def crowd():
    """Twelve overlapping classes of five rows in eight dimensions."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 12
    return rng.normal(size=(60, 8)) + 0.3 * rng.normal(size=(12, 8))[y], y


def plain_step(X, y, n_sigma=0.6, dt=0.1, k=1.0):
    """One step, pair by pair, as the card of the method writes it; and the energy before it."""
    classes = np.unique(y)
    m = [X[y == c].mean(axis=0) for c in classes]
    R = [np.sqrt(X[y == c].var(axis=0).sum()) for c in classes]
    moved, energy = X.copy(), 0.0
    for i in classes:
        for j in classes:
            if i == j:
                continue
            distance = np.linalg.norm(m[i] - m[j])
            F = max(n_sigma * (R[i] + R[j]) - distance, 0)
            energy += 0.25 * k * F**2
            moved[y == i] += (m[i] - m[j]) / distance * min(0.5 * dt**2 * k * F, F)
    return moved, energy


def test_steps_are_those_of_the_pairwise_formula(crowd):
    X, y = crowd
    ped = PED(rescale=False, max_steps=3)
    found = ped.transform(X, y)
    expected, energies = X, []
    for _ in range(3):
        expected, energy = plain_step(expected, y)
        energies.append(energy)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(ped.energy_[:3], energies, rtol=1e-12)
    assert ped.steps_ == 3 and len(ped.energy_) == 4


def test_a_push_is_never_longer_than_the_overlap(crowd):
    X, y = crowd
    ped = PED(rescale=False, dt=10.0, max_steps=1)
    np.testing.assert_allclose(ped.transform(X, y), plain_step(X, y, dt=10.0)[0], atol=1e-12)


def test_general_features_set_the_scale(crowd):
    X, y = crowd
    rng = np.random.default_rng(1)
    general = 5 + rng.normal(size=(200, 8)) * np.linspace(0.5, 3, 8)
    mean, std = general.mean(axis=0), general.std(axis=0)
    by_hand = PED(rescale=False).transform((X - mean) / std, y) * std + mean
    np.testing.assert_allclose(PED().transform(X, y, general), by_hand, atol=1e-12)
    np.testing.assert_allclose(PED().transform(X, y, (mean, std)), by_hand, atol=1e-12)


def test_a_dimension_without_spread_is_divided_by_a_thousandth(crowd):
    X, y = crowd
    std = np.ones(8)
    std[0] = 0.0
    floor = np.where(std == 0, 1e-3, std)
    np.testing.assert_array_equal(PED().transform(X, y, (X[0], std)), PED().transform(X, y, (X[0], floor)))


def test_classes_that_are_apart_stay():
    y = np.arange(20) % 4
    X = np.random.default_rng(0).normal(size=(20, 3)) + 50 * np.eye(4, 3)[y]
    ped = PED(rescale=False)
    np.testing.assert_array_equal(ped.transform(X, y), X)
    assert ped.energy_.tolist() == [0.0] and ped.steps_ == 0 and not ped.displacement_.any()


def test_energy_falls_at_every_step_and_rows_of_a_class_move_alike(crowd):
    X, y = crowd
    ped = PED(rescale=False)
    moved = ped.transform(X, y)
    assert ped.steps_ == 6 and (np.diff(ped.energy_) < 0).all()
    np.testing.assert_allclose(moved - X, ped.displacement_[y], atol=1e-14)
    assert np.linalg.norm(ped.displacement_.sum(axis=0)) < 1e-12 < np.abs(ped.displacement_).max()


def test_two_classes_of_one_radius_move_oppositely():
    X = np.array([[0.0, 0], [3, 0], [1, 1], [4, 1]])
    ped = PED(rescale=False)
    ped.transform(X, [0, 0, 1, 1])
    np.testing.assert_allclose(ped.displacement_[0], -ped.displacement_[1], atol=1e-15)
    assert ped.displacement_[1] @ np.array([1, 1]) > 0  # away from the other


def test_rotation_translation_and_the_names_of_classes_commute_with_it(crowd):
    X, y = crowd
    moved = PED(rescale=False).transform(X, y)
    Q = ortho_group.rvs(8, random_state=0)
    np.testing.assert_allclose(PED(rescale=False).transform(X @ Q + 7, y), moved @ Q + 7, atol=1e-11)
    other = np.random.default_rng(2).permutation(12)
    np.testing.assert_allclose(PED(rescale=False).transform(X, other[y]), moved, atol=1e-12)


def test_it_ends_when_steps_have_become_small(crowd):
    X, y = crowd
    far = PED(rescale=False, dt=0.3, exit_ratio=0.0, max_steps=50)
    far.transform(X, y)
    near = PED(rescale=False, dt=0.3, exit_ratio=0.5, max_steps=50)
    near.transform(X, y)
    assert 1 <= near.steps_ < far.steps_
    one_more = PED(rescale=False, dt=0.3, exit_ratio=0.0, max_steps=near.steps_ + 1)
    one_more.transform(X, y)
    before = PED(rescale=False, dt=0.3, exit_ratio=0.0, max_steps=near.steps_)
    before.transform(X, y)
    first = PED(rescale=False, dt=0.3, exit_ratio=0.0, max_steps=1)
    first.transform(X, y)

    def length(displacement):
        return np.linalg.norm(displacement, axis=1).sum()

    np.testing.assert_allclose(near.displacement_, before.displacement_)
    refused = length(one_more.displacement_ - before.displacement_)
    assert refused <= 0.5 * length(first.displacement_)


def test_classes_with_one_mean_do_not_push_each_other():
    X = np.array([[-1.0, 0], [1, 0], [0, -1], [0, 1], [0.5, 0.2], [0.5, 2.0]])
    moved = PED(rescale=False).transform(X, [0, 0, 1, 1, 2, 2])
    assert np.isfinite(moved).all()


def test_memory_does_not_grow_with_classes_times_classes_times_features():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(600), 2)
    X = rng.normal(size=(1200, 512))  # 600 x 600 x 512 doubles would be 1.5 GB
    import tracemalloc

    tracemalloc.start()
    PED(rescale=False, max_steps=1).transform(X, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_it_goes_before_a_score_and_leaves_the_features_alone(crowd):
    X, y = crowd
    before = X.copy()
    general = (X.mean(axis=0), X.std(axis=0))
    assert score(X, y, pre=PED(), general=general) == logme(PED().transform(X, y, general), y) != logme(X, y)
    np.testing.assert_array_equal(X, before)
    with pytest.raises(InputError, match="leep reads probabilities, and pre moves features"):
        score(X, y, "leep", probs=np.full((60, 2), 0.5), pre=PED())


def test_without_general_features_it_warns_and_takes_the_tasks_own(crowd):
    X, y = crowd
    with pytest.warns(UserWarning, match="no general features"):
        own = PED().transform(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(PED().transform(X, y, X), own)
        PED(rescale=False).transform(X, y)


@pytest.mark.parametrize(
    "name, value", [("n_sigma", 0), ("dt", -1), ("k", np.inf), ("max_steps", 0), ("exit_ratio", 1), ("exit_ratio", -1)]
)
def test_parameters_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=f"{name} is"):
        PED(**{name: value})


def test_bad_input_is_named(crowd):
    X, y = crowd
    with pytest.raises(InputError, match="8 finite deviations are expected"):
        PED().transform(X, y, (np.zeros(7), np.ones(7)))
    with pytest.raises(InputError, match="class '12' has one row"):
        PED().transform(X, [*y[:-1], 12])
    X[3, 1] = np.inf
    with pytest.raises(InputError, match="row 4: a value is not finite"):
        PED().transform(X, y)
