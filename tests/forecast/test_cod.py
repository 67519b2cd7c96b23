"""Clustering on difficulty: clusters, their laws, the mapping, the whole, and its rivals."""

import warnings

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import CODPredictor, EndToEndLaw, LossIntermediate, NoPredictableSubset
from downriver.forecast.cod import ScoreMapping, cluster_items, smoothed

C = 3.0 ** np.arange(6)
TARGET = 3.0**9


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(pinned|trade off)", category=RuntimeWarning)
        yield


def items(seed: int = 0, n: int = 60, compute=C) -> np.ndarray:
    """Two families that grow and one that nobody solves."""
    rng = np.random.default_rng(seed)
    a = np.repeat([1.6, 5.0], n)[:, None] * np.exp(0.1 * rng.standard_normal((2 * n, 1)))
    grows = 0.1 + 0.9 * np.exp(-a * np.asarray(compute) ** -0.4 - 0.03)
    return np.vstack([grows, np.full((n, grows.shape[1]), 0.1)])


def sampled(rates: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).binomial(100, rates) / 100


def test_clusters_are_large_enough_and_small_enough():
    rng = np.random.default_rng(0)
    X, radius = rng.random((200, 3)), 0.25
    labels = cluster_items(X, radius, 10)
    assert labels.max() >= 2
    for k in range(labels.max() + 1):
        mine = X[labels == k]
        assert len(mine) >= 10
        assert np.linalg.norm(mine[:, None] - mine[None], axis=2).max() <= 2 * radius
    assert (labels == -1).any()


def test_clusters_depend_neither_on_order_nor_on_a_model_given_twice():
    rates = sampled(items())
    labels, order = cluster_items(rates, 0.25), np.random.default_rng(2).permutation(180)
    np.testing.assert_array_equal(cluster_items(rates[order], 0.25), labels[order])
    np.testing.assert_array_equal(cluster_items(rates[:, [0, 1, 1, 2, 3, 4, 5, 5]], 0.25), labels)


def test_an_item_without_growth_lies_in_no_kept_cluster():
    rates = items()
    rates[5] = rates[5, ::-1]
    rates[70] = rates[70, [5, 0, 4, 1, 3, 2]]
    cod = CODPredictor(chance=0.1).fit(rates, C)
    assert cod.kept_[:120].sum() == 118 and not cod.kept_[[5, 70]].any()


def test_clusters_that_have_not_emerged_are_dropped_and_the_rest_is_extrapolated():
    truth = items(compute=[TARGET]).mean()
    anchor = items(compute=[3.0**12])[:, 0]
    cod = CODPredictor(chance=0.1).fit(items(), C, [anchor])
    assert sorted(c.reason or "kept" for c in cod.clusters_) == ["kept", "kept", "non-emergent"]
    forecast = cod.predict(TARGET)
    assert forecast.subset_fraction == pytest.approx(2 / 3)
    assert forecast.subset_score == pytest.approx(items(compute=[TARGET])[:120].mean(), abs=0.005)
    assert forecast.score == pytest.approx(truth, abs=0.01) and not forecast.warnings
    low, high = cod.interval(TARGET)
    assert low <= forecast.score <= high and high - low < 0.05
    assert len(cod.ci()) == 2 and "non-emergent" in cod.report()
    assert abs(cod.audit()) < 0.01


def test_one_homogeneous_cluster_is_the_end_to_end_law():
    a = 3 * np.exp(0.05 * np.random.default_rng(0).standard_normal((50, 1)))
    rates = 0.1 + 0.9 * np.exp(-a * C**-0.4 - 0.05)
    cod = CODPredictor().fit(rates, C)
    assert len(cod.clusters_) == 1 and cod.kept_.all()
    assert cod.predict(TARGET).score == pytest.approx(
        EndToEndLaw("exp").fit(C, rates.mean(axis=0)).predict(TARGET), abs=1e-6
    )


def test_noise_free_clusters_give_their_law_back():
    rates = np.repeat(0.1 + 0.9 * np.exp(-np.array([[2.0], [6.0]]) * C**-0.5 - 0.02), 20, axis=0)
    found = CODPredictor().fit(rates, C).clusters_
    assert sorted(c.params["a"] for c in found) == pytest.approx([2.0, 6.0], rel=1e-4)
    for cluster in found:
        assert cluster.params["g"] == pytest.approx(0.1, abs=1e-4)
        assert cluster.params["b"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("kind", ["spline", "quartic", "linear"])
def test_the_mapping_runs_from_nothing_to_all_and_never_falls(kind):
    rng = np.random.default_rng(0)
    subset = np.sort(rng.random(9))
    mapping = ScoreMapping.fit(subset, subset**2 + 0.02 * rng.standard_normal(9), kind)
    assert mapping(0.0) == pytest.approx(0, abs=1e-9) and mapping(1.0) == pytest.approx(1, abs=1e-9)
    assert (np.diff(mapping(np.linspace(0, 1, 500))) >= -1e-12).all()


@pytest.mark.parametrize("kind", ["spline", "quartic", "linear"])
def test_the_mapping_of_everything_is_the_identity(kind):
    points = np.array([0.1, 0.2, 0.35, 0.5, 0.7])
    np.testing.assert_allclose(ScoreMapping.fit(points, points, kind)(points), points, atol=1e-6)


def test_the_spline_bends_until_it_is_close():
    subset = np.linspace(0.05, 0.95, 15)
    whole = 1 / (1 + np.exp(-25 * (subset - 0.5)))
    mapping = ScoreMapping.fit(subset, whole, "spline")
    assert np.sqrt(((mapping(subset) - whole) ** 2).mean()) < 0.005
    quartic = ScoreMapping.fit(subset, whole, "quartic")
    assert np.sqrt(((quartic(subset) - whole) ** 2).mean()) > 0.02


def test_the_spline_holds_what_a_part_that_nobody_solves_costs():
    subset = np.array([0.33, 0.42, 0.54, 0.67, 0.79, 0.97])
    mapping = ScoreMapping.fit(subset, 2 / 3 * subset + 0.083, "spline")
    assert mapping(0.9) == pytest.approx(2 / 3 * 0.9 + 0.083, abs=0.015)


def test_beyond_every_anchor_and_inside_the_range_are_said():
    cod = CODPredictor(chance=0.1).fit(items(), C)
    with pytest.warns(RuntimeWarning, match="no anchor reaches"):
        cod.predict(TARGET)
    with pytest.warns(RuntimeWarning, match="interpolation"):
        cod.predict(C[2])


def test_thresholds_are_in_units_of_the_smallest_model():
    one, other = (CODPredictor(mapping="linear").fit(items(), C * unit) for unit in (1.0, 1e20))
    assert [c.kept for c in one.clusters_] == [c.kept for c in other.clusters_]
    assert one.predict(TARGET).score == pytest.approx(other.predict(TARGET * 1e20).score, abs=1e-6)


def test_smoothing_moves_features_towards_growth_only():
    rates = np.array([[0.1, 0.3, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4]])
    np.testing.assert_allclose(smoothed(rates, 1.0), [[0.1, 0.25, 0.25, 0.4], rates[1]])
    np.testing.assert_allclose(smoothed(rates, 0.5)[0], [0.1, 0.275, 0.225, 0.4])
    assert smoothed(rates, 0.0) is rates


def test_nothing_predictable_says_why():
    with pytest.raises(NoPredictableSubset, match="30 items non-emergent"):
        CODPredictor(chance=0.1).fit(np.full((30, 6), 0.1), C)
    with pytest.raises(NoPredictableSubset, match="no 10 of 5 items"):
        CODPredictor().fit(items()[:5], C)


@pytest.mark.parametrize(
    ("rates", "compute", "anchors", "message"),
    [
        (items() * 1.5, C, (), r"pass_rates: entry \[.*from 0 to 1"),
        (items() * np.nan, C, (), "is nan"),
        (items()[:, :3], C[:3], (), "3 models: at least 4"),
        (items(), C[::-1], (), "a larger number for each next model"),
        (items(), C[:5], (), "pass_rates: 6 models, compute: 5"),
        (items(), C, [np.ones(3)], "anchor 0: pass rates of all 180 items"),
        (items()[0], C, (), "2 dimensions"),
    ],
)
def test_bad_input_is_named(rates, compute, anchors, message):
    with pytest.raises(InputError, match=message):
        CODPredictor().fit(rates, compute, anchors)


def test_bad_settings_are_named():
    for bad, message in (
        ({"mapping": "cubic"}, "mapping 'cubic'"),
        ({"radius": 0}, "radius 0"),
        ({"smooth": 2}, "smooth 2"),
    ):
        with pytest.raises(InputError, match=message):
            CODPredictor(**bad).fit(items(), C)
    with pytest.raises(InputError, match="at least five models"):
        CODPredictor(mapping="linear").fit(items()[:, :4], C[:4]).audit()


@pytest.mark.parametrize("form", ["exp", "passrate", "bnsl"])
def test_end_to_end_laws_hold_their_own_truth(form):
    C = 3.0 ** np.arange(10)
    truth = {
        "exp": lambda c: 0.2 + 0.8 * np.exp(-4 * c**-0.4 - 0.05),
        "passrate": lambda c: np.exp(-0.1 - 2 * c**-0.3),
        "bnsl": lambda c: 1 - 0.1 - 0.8 * c**-0.1 * (1 + (c / 300) ** 2) ** (-0.3 * 0.5),
    }[form]
    law = EndToEndLaw(form).fit(C, truth(C))
    assert law.predict(3.0**12) == pytest.approx(truth(3.0**12), abs=1e-4)
    noisy = np.clip(truth(C) + 0.005 * np.random.default_rng(0).standard_normal(10), 0, 1)
    low, high = EndToEndLaw(form).fit(C, noisy).interval([C[5]], 0.9)
    assert low[0] < truth(C[5]) < high[0] and high[0] - low[0] < 0.2


def test_loss_intermediate_goes_through_the_loss():
    loss = 1.5 + 2 * C**-0.3
    law = LossIntermediate().fit(C, loss, 0.9 - 0.7 / (1 + np.exp(-3 * (loss - 2.3))))
    far = 1.5 + 2 * TARGET**-0.3
    assert law.predict(TARGET) == pytest.approx(0.9 - 0.7 / (1 + np.exp(-3 * (far - 2.3))), abs=1e-5)
    low, high = law.interval(TARGET)
    assert low[0] <= law.predict(TARGET) <= high[0]
    with pytest.raises(InputError, match="score: entry"):
        LossIntermediate().fit(C, loss, np.full(6, 1.2))
    with pytest.raises(InputError, match="unknown form"):
        EndToEndLaw("log").fit(C, loss / 10)
