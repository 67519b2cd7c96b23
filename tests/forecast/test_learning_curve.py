"""The learning-curve law."""

import numpy as np
import pytest
from scipy.optimize import curve_fit
from sklearn.base import clone

from downriver.core.errors import InputError
from downriver.forecast import LearningCurve

n = np.array([50, 100, 200, 400, 800])


def test_recovers_and_inverts():
    curve = LearningCurve().fit(n, 0.08 + 1.5 * n**-0.5)
    assert curve.params_ == pytest.approx({"E": 0.08, "A": 1.5, "alpha": 0.5}, rel=1e-6)
    sizes = np.array([300.0, 3000.0])
    np.testing.assert_allclose(curve.examples_for(curve.predict(sizes)), sizes, rtol=1e-7)
    assert isinstance(curve.predict(1000), float)
    with pytest.raises(InputError, match=r"floor is 0\.08"):
        curve.examples_for(0.05)


def test_same_as_curve_fit():
    rng = np.random.default_rng(0)
    sizes = np.repeat(n, 5)
    error = 0.08 + 1.5 * sizes**-0.5 + 0.004 * rng.standard_normal(25)
    curve = LearningCurve().fit(sizes, error)
    best, _ = curve_fit(lambda x, E, A, a: E + A * x**-a, sizes, error, p0=(0.05, 1, 0.4), ftol=1e-14, xtol=1e-14)
    assert list(curve.params_.values()) == pytest.approx(list(best), rel=1e-5)


def test_band_holds_the_large_size():
    rng = np.random.default_rng(1)
    sizes = np.repeat(n, 5)
    inside = 0
    for _ in range(16):
        curve = LearningCurve(n_starts=12).fit(sizes, 0.08 + 1.5 * sizes**-0.5 + 0.005 * rng.standard_normal(25))
        low, high = curve.interval(4000, 0.9)
        inside += low[0] <= 0.08 + 1.5 * 4000**-0.5 + 0.005 * rng.standard_normal() <= high[0]
    assert inside >= 12


def test_robust_to_a_failed_seed():
    error = 0.08 + 1.5 * n**-0.5
    sizes, errors = np.tile(n, 3), np.tile(error, 3)
    errors[4] = 0.9
    robust = LearningCurve(loss="huber_log").fit(sizes, errors)
    truth, plain = 0.08 + 1.5 * 3200**-0.5, LearningCurve().fit(sizes, errors)
    assert abs(robust.fit_.predict(3200) / truth - 1) < 2e-3 < 0.1 < abs(plain.fit_.predict(3200) / truth - 1)


def test_contract_and_warnings():
    curve = LearningCurve(loss="huber_log", n_starts=9)
    assert clone(curve).get_params() == {"loss": "huber_log", "n_starts": 9}
    fitted = curve.fit(n, 0.08 + 1.5 * n**-0.5)
    assert fitted is curve and curve.range_ == (50.0, 800.0)
    with pytest.warns(RuntimeWarning, match="100 times the largest"):
        curve.predict(80_000)
    with pytest.warns(RuntimeWarning, match="E is pinned"):
        LearningCurve().fit(n, 1.5 * n**-0.5 - 0.01)
    assert curve.extrapolation_ratio(1600) == 2.0


@pytest.mark.parametrize(
    ("sizes", "errors", "message"),
    [
        ([50, 100], [0.3, 0.2], "3 parameters.*2 are given"),
        ([50, 50, 50], [0.3, 0.2, 0.25], "1 are given"),
        ([50, 0, 200], [0.3, 0.2, 0.1], "n: entry 1 is 0.0"),
        ([50, 100, 200], [0.3, np.inf, 0.1], "target: entry 1 is inf"),
        ([50, 100, 200], [0.3, 0.1], "each of 3 points"),
    ],
)
def test_bad_input(sizes, errors, message):
    with pytest.raises(InputError, match=message):
        LearningCurve().fit(sizes, errors)
