"""The forgetting law: what it recovers, its jacobian, one size or several, comparison of methods, bad input."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from downriver.core.errors import InputError
from downriver.forecast import ForgettingLaw
from downriver.forecast.forgetting_law import Rise, RiseOfTokens

D = np.tile(np.geomspace(1e6, 3e7, 5), 3)
N = np.repeat([1e8, 4e8, 1.6e9], 5)
RISE = 0.02 + 0.05 * D**0.4 / N**0.2


def noisy(rise, seed=0, size=0.01):
    return rise + size * np.random.default_rng(seed).standard_normal(len(rise))


def test_recovers_predicts_and_inverts():
    before = 3.0 - N / 1e9  # a larger model starts lower
    law = ForgettingLaw().fit(D, N, before, before + RISE)
    assert law.params_ == pytest.approx({"E": 0.02, "A": 0.05, "beta": 0.4, "alpha": 0.2}, rel=1e-5)
    assert law.predict(2e7, 8e8, before=2.2) == pytest.approx(2.22 + 0.05 * 2e7**0.4 / 8e8**0.2)
    amounts, sizes = np.array([2e6, 2e7]), np.array([1e8, 1e9])
    np.testing.assert_allclose(law.tokens_for(law.predict(amounts, sizes), sizes), amounts, rtol=1e-6)
    assert isinstance(law.predict(1e7, 1e9), float) and law.range_ == (1e6, 3e7)
    assert "E + A D^beta N^-alpha" in law.report()


def test_same_as_curve_fit():
    rise = noisy(RISE)
    law = ForgettingLaw().fit(D, N, 2.0, 2.0 + rise)
    formula = lambda x, E, A, b, a: E + A * x[0] ** b / x[1] ** a  # noqa: E731
    best, _ = curve_fit(formula, [D, N], rise, p0=(0.02, 0.05, 0.4, 0.2), ftol=1e-14, xtol=1e-14, maxfev=10**5)
    np.testing.assert_allclose(law.predict(D, N), formula([D, N], *best), rtol=1e-5)


@pytest.mark.parametrize("form", [RiseOfTokens(), Rise()])
def test_the_jacobian_is_the_slope(form):
    rng = np.random.default_rng(0)
    P, inputs = len(form.names), len(form.inputs)
    theta, Z = rng.uniform(0.1, 1, (P, 3)), rng.standard_normal((inputs, 4, 1))
    value, J = form.curve(theta, Z)
    for p in range(P):
        step = np.zeros((P, 1))
        step[p] = 1e-6
        slope = (form.curve(theta + step, Z)[0] - form.curve(theta - step, Z)[0]) / 2e-6
        np.testing.assert_allclose(J[p], slope, rtol=1e-6, atol=1e-8)
    assert value.shape == (4, 3)


def test_models_of_one_size_and_a_loss_that_falls():
    tokens = np.geomspace(1e6, 3e7, 6)
    law = ForgettingLaw().fit(tokens, 1e8, 2.5, 2.5 - 0.3 + 1e-3 * tokens**0.4)
    assert law.params_ == pytest.approx({"E": -0.3, "A": 1e-3, "beta": 0.4}, rel=1e-4)
    assert law.predict(2e7) == law.predict(2e7, 1e8)
    with pytest.raises(InputError, match="models of 1e\\+08 parameters only"):
        law.predict(2e7, 1e9)
    low, high = law.interval([1e6, 5e7])
    assert low.shape == high.shape == (2,) and (low <= high).all()


def test_a_flatter_rise_is_found_and_an_equal_one_is_not():
    plain = ForgettingLaw(n_starts=16).fit(D, N, 2.0, 2.0 + noisy(RISE, 0))
    again = ForgettingLaw(n_starts=16).fit(D, N, 2.0, 2.0 + noisy(RISE, 1))
    kept = ForgettingLaw(n_starts=16).fit(D, N, 2.0, 2.0 + noisy(0.02 + (RISE - 0.02) / 3, 2))
    flatter = plain.compare(kept, 2e7, 4e8).rows_by_key("quantity", named=True, unique=True)
    assert set(flatter) == {"A", "E", "beta", "rise"}
    true = -2 / 3 * 0.05 * 2e7**0.4 / 4e8**0.2
    assert flatter["rise"]["low"] < true < flatter["rise"]["high"] < 0
    assert flatter["rise"]["difference"] == pytest.approx(kept.predict(2e7, 4e8) - plain.predict(2e7, 4e8))
    same = plain.compare(again, 2e7, 4e8).rows_by_key("quantity", named=True, unique=True)["rise"]
    assert same["low"] < 0 < same["high"]


def test_what_is_refused():
    law = ForgettingLaw(n_starts=8).fit(D, N, 2.0, 2.0 + RISE)
    with pytest.raises(InputError, match="say of which model"):
        law.predict(1e7)
    with pytest.raises(InputError, match="begins at E"):
        law.tokens_for(0.01, 1e9)
    with pytest.raises(InputError, match="tokens: entry 0 is 0"):
        law.predict(0.0, 1e9)
    with pytest.raises(InputError, match="level"):
        law.compare(law, 1e7, 1e8, level=2)
    with pytest.warns(RuntimeWarning, match="100 times the most"):
        law.predict(3e9, 1e9)
    with pytest.raises(InputError, match="one length"):
        ForgettingLaw().fit(D, N[:3], 2.0, 2.0 + RISE)
    with pytest.raises(InputError, match="after: entry 1"):
        ForgettingLaw().fit(D, N, 2.0, [2.0, np.nan, *RISE[2:]])
    with pytest.raises(InputError, match="need at least as many different points"):
        ForgettingLaw().fit([1e6] * 4, 1e8, 2.0, [2.1, 2.2, 2.1, 2.3])
