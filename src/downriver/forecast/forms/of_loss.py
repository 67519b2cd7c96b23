"""Shapes of what a loss turns into: error by an exponential, accuracy by a sigmoid."""

from typing import ClassVar

import numpy as np

from downriver.forecast.forms.form import Array, Form, Units, empty_jacobian


class ExpOfLoss(Form):
    """``epsilon - k exp(-gamma L)``: error as a function of loss.

    Internally ``c + q (1 - exp(-gamma z)) / gamma`` with z the standardised loss, c the error at its centre and q > 0
    the slope there: a straight line (gamma = 0) is an ordinary point, where epsilon and k would be infinite.
    """

    names: ClassVar[tuple[str, ...]] = ("epsilon", "k", "gamma")
    inputs = ("loss",)
    bounds: ClassVar[tuple[tuple[float, float], ...]] = ((-np.inf, np.inf), (-20.0, 10.0), (-10.0, 10.0))
    formula = "epsilon - k exp(-gamma L)"
    logged: ClassVar[tuple[bool, ...]] = (False, True, False)

    def units(self, X: Array, y: Array) -> Units:
        return Units((float(X[0].std()) or 1.0,), float(np.abs(y).mean()) or 1.0, (float(X[0].mean()),))

    def prepare(self, X: Array, units: Units) -> Array:
        return (X - np.array(units.shift)[:, None, None]) / np.array(units.x)[:, None, None]

    def size(self, X: Array) -> Array:
        return -X[0]

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        c, log_q, gamma = theta
        z = Z[0]
        x = -gamma * z
        J = empty_jacobian(3, Z, theta)
        J[0] = 1.0
        phi, slope = _phi(x)
        J[1] = np.exp(log_q) * z * phi
        J[2] = -np.exp(log_q) * z * z * slope
        return c + J[1], J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        slope = np.polyfit(Z[0, :, 0], y, 1)[0]
        return np.stack([y.mean() + (u[0] - 0.5) * y.std(), np.log(max(slope, 1e-6)) + 2 * u[1] - 1, 6 * u[2] - 2])

    def natural(self, theta: Array, units: Units) -> Array:
        c, log_q, gamma = theta
        gamma = np.where(np.abs(gamma) < 1e-9, 1e-9, gamma)
        k = np.exp(log_q) / gamma
        rate = gamma / units.x[0]
        return np.stack([(c + k) * units.y, k * np.exp(rate * units.shift[0]) * units.y, rate])

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        epsilon, k, gamma = self.natural(theta[:, None], units)[:, 0]
        with np.errstate(all="ignore"):
            return -np.log((epsilon - y) / k) / gamma


class ExpOfLossFrom(ExpOfLoss):
    """``ceiling - k exp(-gamma L)``: the same with the error of guessing known."""

    names = ("k", "gamma")
    bounds = ((-20.0, 10.0), (1e-3, 10.0))
    formula = "ceiling - k exp(-gamma L)"
    logged = (True, False)

    def __init__(self, ceiling: float) -> None:
        self.ceiling = ceiling

    def units(self, X: Array, y: Array) -> Units:
        # the target stays in its own unit, so that the ceiling is the same number inside and outside
        return Units((float(X[0].std()) or 1.0,), 1.0, (float(X[0].mean()),))

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        log_k, gamma = theta
        J = empty_jacobian(2, Z, theta)
        J[0] = -np.exp(log_k - gamma * Z[0])
        J[1] = -J[0] * Z[0]
        return self.ceiling + J[0], J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        gap = np.maximum(self.ceiling - y.mean(), 1e-6)
        return np.stack([np.log(gap) + 2 * u[0] - 1, 0.02 * 200.0 ** u[1]])

    def natural(self, theta: Array, units: Units) -> Array:
        log_k, gamma = theta
        rate = gamma / units.x[0]
        return np.stack([np.exp(log_k + rate * units.shift[0]), rate])

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        k, gamma = self.natural(theta[:, None], units)[:, 0]
        with np.errstate(all="ignore"):
            return -np.log((self.ceiling - y) / k) / gamma


class Sigmoid(Form):
    """``a / (1 + exp(-k (L - L0))) + b``: accuracy between ``a + b`` (a < 0) and ``b``, falling as the loss grows.

    The accuracy stays in its own unit, so that b lies in [0, 1] and a in [-1, 0], the ladder's bounds (Bhagia et al.
    2024, arXiv:2412.04403).
    """

    names = ("a", "k", "L0", "b")
    inputs = ("loss",)
    bounds = ((-1.0, 0.0), (-4.0, 5.0), (-20.0, 20.0), (0.0, 1.0))
    formula = "a / (1 + exp(-k (L - L0))) + b"
    logged = (False, True, False, False)

    def units(self, X: Array, y: Array) -> Units:
        return Units((float(X[0].std()) or 1.0,), 1.0, (float(X[0].mean()),))

    def prepare(self, X: Array, units: Units) -> Array:
        return (X - np.array(units.shift)[:, None, None]) / np.array(units.x)[:, None, None]

    def size(self, X: Array) -> Array:
        return -X[0]

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        a, log_k, middle, b = theta
        k, distance = np.exp(log_k), Z[0] - middle
        J = empty_jacobian(4, Z, theta)
        J[0] = S = 1 / (1 + np.exp(-np.clip(k * distance, -60, 60)))
        slope = a * S * (1 - S) * k
        J[1] = slope * distance
        J[2] = -slope
        J[3] = 1.0
        return a * S + b, J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        b = np.minimum(y.max() + u[3] * (1 - y.max()), 1.0)
        floor = u[0] * max(y.min(), 0.0)
        low, high = Z[0].min(), Z[0].max()
        return np.stack([floor - b, 3 * u[1] - 1, low - 0.5 + u[2] * (high - low + 1), b])

    def natural(self, theta: Array, units: Units) -> Array:
        a, log_k, middle, b = theta
        return np.stack([a, np.exp(log_k) / units.x[0], units.shift[0] + middle * units.x[0], b])

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        a, k, L0, b = self.natural(theta[:, None], units)[:, 0]
        with np.errstate(all="ignore"):
            return L0 - np.log(a / (y - b) - 1) / k


def _phi(x: Array) -> tuple[Array, Array]:
    """``(e^x - 1) / x`` and its derivative, by their series near 0."""
    near = np.abs(x) < 1e-3
    safe = np.where(near, 1.0, x)
    phi = np.where(near, 1 + x / 2 + x * x / 6, np.expm1(safe) / safe)
    slope = np.where(near, 0.5 + x / 3 + x * x / 8, (np.exp(safe) - np.expm1(safe) / safe) / safe)
    return phi, slope
