"""Proposals: vertices where the truth is linear, caps, invariance, and a word of warning outside the data."""

import warnings

import numpy as np
import polars as pl
import pytest

from downriver.core import InputError
from downriver.data import MixtureRegressor, MixtureSpace, propose

RNG = np.random.default_rng(1)
W = RNG.dirichlet(np.ones(3), size=80)
SLOPES = np.array([3.0, 1.0, 2.0])
LINEAR = MixtureRegressor("linear").fit(W, W @ SLOPES)
SPACE = MixtureSpace(LINEAR.domains_, max_repeat=2.1)  # at most 0.7 of one domain


def test_the_best_vertex_that_the_caps_allow() -> None:
    found = propose(LINEAR, SPACE, exact=True)
    np.testing.assert_allclose(list(found.weights.values()), [0.0, 0.7, 0.3], atol=1e-4)
    assert found.predicted == pytest.approx(0.7 * 1 + 0.3 * 2, abs=1e-3) and found.spread == 0
    drawn = propose(LINEAR, SPACE, n=20_000, top_k=32)
    np.testing.assert_allclose(list(drawn.weights.values()), [0.0, 0.7, 0.3], atol=0.03)
    assert drawn.predicted >= found.predicted - 1e-9 and drawn.spread > 0


def test_higher_may_be_better() -> None:
    found = propose(LINEAR, SPACE, direction="higher", n=20_000, top_k=32)
    np.testing.assert_allclose(list(found.weights.values()), [0.7, 0.0, 0.3], atol=0.03)


def test_the_pull_leads_back_to_the_natural_mixture() -> None:
    space = MixtureSpace(LINEAR.domains_, (0.5, 0.2, 0.3), max_repeat=1e9)
    pulled = propose(LINEAR, space, exact=True, kl_to_prior=1000.0)
    np.testing.assert_allclose(list(pulled.weights.values()), [0.5, 0.2, 0.3], atol=2e-3)
    # between the two: w ∝ prior · exp(-slope / strength), the closed form of the regularised linear problem
    some = propose(LINEAR, space, exact=True, kl_to_prior=1.0)
    expected = np.array([0.5, 0.2, 0.3]) * np.exp(-SLOPES)
    np.testing.assert_allclose(list(some.weights.values()), expected / expected.sum(), atol=1e-4)


def test_order_of_domains_and_seed() -> None:
    names = ("a", "b", "c")
    law = MixtureRegressor("exp").fit(dict(zip(names, W.T, strict=True)), 1 + np.exp(W @ SLOPES))
    space = MixtureSpace(names, max_repeat=2.1)
    turned = MixtureSpace(names[::-1], max_repeat=2.1)
    one, other = (propose(law, s, exact=True).weights for s in (space, turned))
    assert one == pytest.approx(other, abs=1e-5)
    assert propose(law, space, n=5000).weights == propose(law, space, n=5000).weights
    assert propose(law, space, n=5000).weights != propose(law, space, n=5000, seed=1).weights


def test_several_targets_and_alternatives() -> None:
    both = MixtureRegressor("linear").fit(W, {"x": W @ SLOPES, "y": W @ SLOPES[::-1]})
    x = propose(both, SPACE, "x", exact=True)
    same = propose(both, SPACE, {"x": 2.0, "y": 0.0}, exact=True)
    assert x.weights == pytest.approx(same.weights, abs=1e-4)
    assert set(x.alternatives) == {"natural", "equal shares", "only domain 1"}
    assert x.alternatives["natural"] == pytest.approx(2.0, abs=1e-6)
    assert x.predicted <= min(x.alternatives.values()) + 1e-6


def test_a_proposal_outside_the_fitted_mixtures_is_said() -> None:
    narrow = 0.25 * W + 0.25  # shares from 0.25 to 0.5
    law = MixtureRegressor("linear").fit(narrow / narrow.sum(axis=1, keepdims=True), narrow @ SLOPES)
    with pytest.warns(RuntimeWarning, match="outside the mixtures that were fitted"):
        assert not propose(law, SPACE, exact=True).inside
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert propose(law, SPACE, exact=True, kl_to_prior=100.0).inside


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "los"}, "unknown target 'los'"),
        ({"target": {"target 0": -1.0}}, "has the weight -1"),
        ({"target": {"target 0": 0.0}}, "at least one weight above 0"),
        ({"direction": "up"}, "direction 'up'"),
        ({"n": 10, "top_k": 11}, "top_k 11 of 10"),
        ({"kl_to_prior": -1.0}, "kl_to_prior -1"),
        ({"exact": True, "regressor": MixtureRegressor("gp").fit(W[:20], W[:20] @ SLOPES)}, "needs a linear or exp"),
        ({"space": MixtureSpace(("domain 0", "domain 1", "x"))}, "known to only one"),
    ],
)
def test_bad_input_is_named(settings, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        propose(**({"regressor": LINEAR, "space": SPACE} | settings))


@pytest.mark.filterwarnings("ignore")
def test_the_public_runs_of_the_paper(shared_data) -> None:  # type: ignore[no-untyped-def]
    """Trees propose mostly web text, as the paper does; an unconstrained linear proposal is outside the data."""
    folder = shared_data("regmix")
    mixtures, losses = (pl.read_csv(folder / f"train_{what}_1m.csv").drop("index") for what in ("mixture", "pile_loss"))
    target = losses["metric/the_pile_pile_cc_val_loss"]
    free = MixtureSpace(tuple(mixtures.columns), mixtures.mean().row(0), max_repeat=1e9)
    assert not propose(MixtureRegressor("linear").fit(mixtures, target), free, n=20_000).inside
    trees = MixtureRegressor("lightgbm").fit(mixtures, target)
    found = propose(trees, MixtureSpace(tuple(mixtures.columns), mixtures.mean().row(0)), n=20_000, top_k=32)
    assert found.weights["train_the_pile_pile_cc"] > 0.7
    assert found.predicted < min(found.alternatives.values())
