"""Forms: analytic jacobians, and internal coordinates that mean what the formula says."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast.fit import fit_law
from downriver.forecast.forms import (
    Chinchilla,
    ExpOfLoss,
    ExpOfLossFrom,
    Form,
    LogLaw,
    PassRate,
    PowerGrowth,
    PowerLaw,
    Sigmoid,
    SmoothlyBroken,
    TiedChinchilla,
)

RNG = np.random.default_rng(0)
N, D, L = RNG.uniform(1e6, 1e9, 7), RNG.uniform(1e8, 1e11, 7), RNG.uniform(2, 5, 7)

# form, inputs, some internal parameters (P, 3), the formula in natural parameters
CASES = [
    (PowerLaw(), [N], [[0.2, 0.5, 0.0], [-0.5, -2.0, 1.0], [0.3, 0.1, 1.2]], lambda p, n: p[0] + p[1] * n ** -p[2]),
    (
        TiedChinchilla(),
        [N, D],
        [[0.5, 0.0, 0.7], [-1.0, -2.0, 0.5], [-1.5, -1.0, -3.0], [0.27, 0.5, 0.1]],
        lambda p, n, d: p[0] + p[1] * n ** -p[3] + p[2] * d ** -p[3],
    ),
    (
        Chinchilla(),
        [N, D],
        [[0.5, 0.0, 0.7], [-1.0, -2.0, 0.5], [-1.5, -1.0, -3.0], [0.27, 0.5, 0.1], [0.3, 0.2, 0.9]],
        lambda p, n, d: p[0] + p[1] * n ** -p[3] + p[2] * d ** -p[4],
    ),
    (
        ExpOfLoss(),
        [L],
        [[0.9, 1.0, 1.1], [-1.5, -2.0, -1.0], [0.7, -0.4, 2.0]],
        lambda p, x: p[0] - p[1] * np.exp(-p[2] * x),
    ),
    (
        SmoothlyBroken(),
        [N],
        [[0.2, 0.5, 0.0], [-0.5, -2.0, 1.0], [0.3, 0.1, 0.6], [0.4, -0.2, 0.9], [0.3, -1.0, 2.0], [-1.0, 0.5, -0.2]],
        lambda p, n: p[0] + p[1] * n ** -p[2] * (1 + (n / p[4]) ** (1 / p[5])) ** (-p[3] * p[5]),
    ),
    (
        Sigmoid(),
        [L],
        [[-0.5, -0.7, -0.2], [0.5, 1.0, 0.0], [0.3, -0.5, 1.0], [0.8, 0.9, 0.4]],
        lambda p, x: p[0] / (1 + np.exp(-p[1] * (x - p[2]))) + p[3],
    ),
    (
        PassRate(),
        [N],
        [[0.25, 0.0, 0.1], [0.3, -1.0, 1.0], [0.3, 0.6, 0.1], [0.0, 0.2, 0.5]],
        lambda p, n: p[0] + (1 - p[0]) * np.exp(-p[1] * n ** -p[2] - p[3]),
    ),
    (
        LogLaw(),
        [N],
        [[-0.5, -1.0, 0.2], [-2.0, -1.0, -0.5], [0.0, 0.7, -0.4]],
        lambda p, n: (p[0] + p[1] * np.log(n)) ** p[2],
    ),
    (PowerGrowth(), [N], [[-0.5, 0.0, 1.0], [0.3, -0.2, 0.9]], lambda p, n: p[0] * n ** p[1]),
    (ExpOfLossFrom(0.75), [L], [[-1.0, -2.0, 0.0], [0.5, 1.0, 0.1]], lambda p, x: 0.75 - p[0] * np.exp(-p[1] * x)),
]
IDS = [type(case[0]).__name__ for case in CASES]


@pytest.mark.parametrize(("form", "inputs", "theta", "formula"), CASES, ids=IDS)
def test_jacobian_is_the_derivative(form: Form, inputs, theta, formula):
    X, theta = np.stack(inputs), np.array(theta)
    Z = form.prepare(X[:, :, None], form.units(X, np.full(7, 3.0)))
    _, J = form.curve(theta, Z)
    for p in range(len(theta)):
        step = np.zeros_like(theta)
        step[p] = 1e-6
        numeric = (form.curve(theta + step, Z)[0] - form.curve(theta - step, Z)[0]) / 2e-6
        np.testing.assert_allclose(J[p], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("form", "inputs", "theta", "formula"), CASES, ids=IDS)
def test_natural_parameters_give_the_same_curve(form: Form, inputs, theta, formula):
    X, theta = np.stack(inputs), np.array(theta)
    units = form.units(X, np.full(7, 3.0))
    values = form.curve(theta, form.prepare(X[:, :, None], units))[0] * units.y
    natural = form.natural(theta, units)
    assert natural.shape == (len(form.names), theta.shape[1])
    for lane in range(theta.shape[1]):
        np.testing.assert_allclose(values[:, lane], formula(natural[:, lane], *inputs), rtol=1e-9)


@pytest.mark.parametrize(("form", "inputs", "theta", "formula"), CASES, ids=IDS)
def test_starts_are_finite_and_lie_within_bounds_or_next_to_them(form: Form, inputs, theta, formula):
    X = np.stack(inputs)
    y = np.linspace(0.4, 0.7, 7) if form.inputs in (("loss",), ("compute",)) else np.linspace(3, 2, 7)
    units = form.units(X, y)
    starts = form.starts(RNG.uniform(size=(len(form.names), 50)), form.prepare(X[:, :, None], units), y / units.y)
    assert starts.shape == (len(form.names), 50) and np.isfinite(starts).all()
    assert all(np.unique(row).size > 1 for row in starts)  # no coordinate is left unexplored


def test_a_straight_line_is_an_ordinary_point_of_the_error_law():
    form, X = ExpOfLoss(), L[None]
    Z = form.prepare(X[:, :, None], form.units(X, np.ones(7)))
    line = form.curve(np.array([[0.5], [-1.0], [0.0]]), Z)[0][:, 0]
    near = form.curve(np.array([[0.5], [-1.0], [1e-7]]), Z)[0][:, 0]
    np.testing.assert_allclose(line, 0.5 + np.exp(-1.0) * Z[0, :, 0], rtol=1e-12)
    np.testing.assert_allclose(near, line, rtol=1e-6)


# form, natural parameters, the range of its input
TRUTHS = [
    (PowerLaw(), (0.1, 2.0, 0.5), (1e2, 1e6)),
    (Sigmoid(), (-0.6, 3.0, 1.1, 0.95), (0.4, 2.0)),
    (PassRate(), (0.25, 4.0, 0.35, 0.05), (1.0, 1e4)),
    (LogLaw(), (-18.0, 1.4, 1.3), (1e7, 1e10)),
    (LogLaw(), (-5.0, 0.5, 1.0), (1e6, 1e9)),
    (PowerGrowth(), (3.0, 0.22), (1e2, 1e5)),
    (SmoothlyBroken(), (0.2, 30.0, 0.2, 0.3, 1e5, 0.5), (1e2, 1e8)),
]


@pytest.mark.parametrize(("form", "truth", "span"), TRUTHS, ids=[f"{type(f).__name__}-{t[-1]}" for f, t, _ in TRUTHS])
def test_exact_points_give_the_law_back(form, truth, span):
    x = np.linspace(*span, 14) if form.inputs == ("loss",) else np.geomspace(*span, 14)
    formula = {type(case[0]): case[3] for case in CASES}[type(form)]
    found = fit_law(form, [x], formula(truth, x))
    assert list(found.params.values()) == pytest.approx(truth, rel=1e-4)
    beyond = span[1] * (1.1 if form.inputs == ("loss",) else 30.0)
    assert found.predict(beyond) == pytest.approx(formula(truth, beyond), rel=1e-5)
    assert found.identifiable and found.converged


@pytest.mark.parametrize(("form", "truth", "span"), TRUTHS[:-1], ids=[type(f).__name__ for f, _, _ in TRUTHS[:-1]])
def test_inverse_leads_back_to_the_input(form, truth, span):
    x = np.linspace(*span, 9) if form.inputs == ("loss",) else np.geomspace(*span, 9)
    found = fit_law(form, [x], {type(case[0]): case[3] for case in CASES}[type(form)](truth, x))
    np.testing.assert_allclose(found.invert(found.predict(x)), x, rtol=1e-6)


def test_inverse_of_the_error_laws_and_of_what_has_none():
    for form in (ExpOfLoss(), ExpOfLossFrom(0.85)):
        found = fit_law(form, [L], 0.85 - 2.2 * np.exp(-0.7 * L))
        np.testing.assert_allclose(found.invert(found.predict(L)), L, rtol=1e-6)
        assert np.isnan(found.invert(0.9))  # above the ceiling
    n = np.geomspace(1e2, 1e8, 14)
    with pytest.raises(InputError, match="no inverse"):
        fit_law(SmoothlyBroken(), [n], 1 + n**-0.3).invert(1.1)


def test_pass_rate_runs_from_chance_to_what_noise_leaves_and_never_falls():
    form = PassRate()
    C = np.geomspace(1, 1e4, 9)
    fit = fit_law(form, [C], 0.2 + 0.8 * np.exp(-5 * C**-0.4 - 0.1))
    assert fit.predict(1e30) == pytest.approx(0.2 + 0.8 * np.exp(-0.1), rel=1e-6)
    assert fit.predict(1e-30) == pytest.approx(0.2, rel=1e-6)
    assert (np.diff(fit.predict(np.geomspace(1e-6, 1e12, 200))) >= 0).all()


def test_log_law_does_not_care_for_the_unit_of_the_score():
    D = np.geomspace(1e7, 1e10, 7)
    y = 20 + 4 * np.log(D / 1e7) ** 0.8 + np.array([0.1, -0.2, 0.15, -0.1, 0.05, 0.1, -0.1])
    for objective in ("lsq", "huber_log"):
        whole, fraction = (fit_law(LogLaw(), [D], v, objective=objective) for v in (y, y / 100))
        np.testing.assert_allclose(whole.predict(D * 10), 100 * fraction.predict(D * 10), rtol=1e-6)


def test_log_law_is_undefined_where_its_logarithm_is_negative():
    D = np.geomspace(1e7, 1e10, 7)
    fit = fit_law(LogLaw(), [D], (-15 + np.log(D)) ** 1.5)
    assert np.isnan(fit.predict(1e6)) and fit.predict(1e7) > 0
