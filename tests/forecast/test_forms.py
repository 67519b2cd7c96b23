"""Forms: analytic jacobians, and internal coordinates that mean what the formula says."""

import numpy as np
import pytest

from downriver.forecast.forms import Chinchilla, ExpOfLoss, ExpOfLossFrom, Form, PowerLaw, TiedChinchilla

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
    y = np.linspace(0.4, 0.7, 7) if len(inputs[0]) and form.inputs == ("loss",) else np.linspace(3, 2, 7)
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
