"""The shapes that laws have: value and analytic jacobian in coordinates in which every fit is well conditioned.

Reach for one when you fit a law of your own with ``fit_law``; the laws of this room bring theirs. A form works on
*internal* coordinates: inputs divided by their geometric mean, the target by its mean, amplitudes as logarithms. The
*natural* parameters of the formula are what users see.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

Array = np.ndarray

TERM = (-25.0, 10.0)  # log amplitude of a falling term at the centre of the data, relative to the mean target
EXPONENT = (1e-3, 5.0)
FLOOR = (0.0, np.inf)


@dataclass(frozen=True)
class Units:
    """What inputs and target were divided by (``x`` has one entry an input; ``shift`` is subtracted first)."""

    x: tuple[float, ...]
    y: float
    shift: tuple[float, ...] = ()


class Form(ABC):
    """One shape: ``names`` of its natural parameters, ``inputs``, and box ``bounds`` of its internal coordinates.

    Arrays are laid out for a whole batch of fits at once: ``theta`` is (P, L) for L fits; ``Z`` is (inputs, n, 1), or
    (inputs, n, L) where every fit is asked about points of its own.
    """

    names: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[str, ...]]
    bounds: ClassVar[tuple[tuple[float, float], ...]]
    logged: ClassVar[tuple[bool, ...]]  # natural parameters whose error is judged on a log scale
    formula: ClassVar[str]

    def units(self, X: Array, y: Array) -> Units:
        """The units of these data: geometric means of the inputs, mean of the target."""
        return Units(tuple(float(v) for v in np.exp(np.log(X).mean(axis=1))), float(np.abs(y).mean()) or 1.0)

    def prepare(self, X: Array, units: Units) -> Array:
        """Inputs (inputs, n, 1 or L) as the internal coordinates use them: logarithms of the inputs in their units."""
        return np.log(X / np.array(units.x)[:, None, None])

    def size(self, X: Array) -> Array:
        """How far along its inputs each of n points lies; extrapolation goes upwards."""
        return X.prod(axis=0)

    @abstractmethod
    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        """Values (n, L) and jacobian (P, n, L), in units of the target."""

    @abstractmethod
    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        """Starting points (P, S) from points ``u`` (P, S) of the unit cube; ``y`` (n,) is in its unit."""

    @abstractmethod
    def natural(self, theta: Array, units: Units) -> Array:
        """The natural parameters (P, L) of internal ones."""


class PowerLaw(Form):
    """``E + A n^-alpha``: a learning curve that falls to a floor."""

    names = ("E", "A", "alpha")
    inputs = ("n",)
    bounds = (FLOOR, TERM, EXPONENT)
    formula = "E + A n^-alpha"
    logged = (False, True, False)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        E, log_a, alpha = theta
        J = _jacobian(3, Z, theta)
        J[0] = 1.0
        J[1] = np.exp(log_a - alpha * Z[0])
        J[2] = -J[1] * Z[0]
        return E + J[1], J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        E = u[0] * y.min()
        return np.stack([E, np.log(np.maximum(y.mean() - E, 1e-6)), 0.05 * 30.0 ** u[2]])

    def natural(self, theta: Array, units: Units) -> Array:
        E, log_a, alpha = theta
        return np.stack([E * units.y, np.exp(log_a + alpha * np.log(units.x[0])) * units.y, alpha])


class TiedChinchilla(Form):
    """``E + A N^-alpha + B D^-alpha``: the over-training law, one exponent for parameters N and tokens D."""

    names = ("E", "A", "B", "alpha")
    inputs = ("params", "tokens")
    bounds = (FLOOR, TERM, TERM, EXPONENT)
    formula = "E + A N^-alpha + B D^-alpha"
    logged = (False, True, True, False)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        E, log_a, log_b, alpha = theta
        log_n, log_d = Z[0], Z[1]
        J = _jacobian(4, Z, theta)
        J[0] = 1.0
        J[1] = np.exp(log_a - alpha * log_n)
        J[2] = np.exp(log_b - alpha * log_d)
        J[3] = -(J[1] * log_n + J[2] * log_d)
        return E + J[1] + J[2], J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        E, log_a, log_b = _split(u, y)
        return np.stack([E, log_a, log_b, 0.05 * 20.0 ** u[3]])

    def natural(self, theta: Array, units: Units) -> Array:
        E, log_a, log_b, alpha = theta
        A = np.exp(log_a + alpha * np.log(units.x[0])) * units.y
        B = np.exp(log_b + alpha * np.log(units.x[1])) * units.y
        return np.stack([E * units.y, A, B, alpha])


class Chinchilla(Form):
    """``E + A N^-alpha + B D^-beta``: an exponent each for parameters N and tokens D."""

    names = ("E", "A", "B", "alpha", "beta")
    inputs = ("params", "tokens")
    bounds = (FLOOR, TERM, TERM, EXPONENT, EXPONENT)
    formula = "E + A N^-alpha + B D^-beta"
    logged = (False, True, True, False, False)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        E, log_a, log_b, alpha, beta = theta
        log_n, log_d = Z[0], Z[1]
        J = _jacobian(5, Z, theta)
        J[0] = 1.0
        J[1] = np.exp(log_a - alpha * log_n)
        J[2] = np.exp(log_b - beta * log_d)
        J[3] = -J[1] * log_n
        J[4] = -J[2] * log_d
        return E + J[1] + J[2], J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        E, log_a, log_b = _split(u, y)
        return np.stack([E, log_a, log_b, 0.05 * 20.0 ** u[3], 0.05 * 20.0 ** u[4]])

    def natural(self, theta: Array, units: Units) -> Array:
        E, log_a, log_b, alpha, beta = theta
        A = np.exp(log_a + alpha * np.log(units.x[0])) * units.y
        B = np.exp(log_b + beta * np.log(units.x[1])) * units.y
        return np.stack([E * units.y, A, B, alpha, beta])


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
        J = _jacobian(3, Z, theta)
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
        J = _jacobian(2, Z, theta)
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


def _jacobian(P: int, Z: Array, theta: Array) -> Array:
    return np.empty((P, *np.broadcast_shapes(Z[0].shape, theta[0].shape)))


def _split(u: Array, y: Array) -> tuple[Array, Array, Array]:
    """Floors up to the smallest target; the rest of the mean shared between two terms."""
    E = u[0] * y.min()
    rest = np.maximum(y.mean() - E, 1e-6)
    share = 0.02 + 0.96 * u[1]
    jitter = 4.0 ** (u[2] - 0.5)
    return E, np.log(rest * share * jitter), np.log(rest * (1 - share) * jitter)


def _phi(x: Array) -> tuple[Array, Array]:
    """``(e^x - 1) / x`` and its derivative, by their series near 0."""
    near = np.abs(x) < 1e-3
    safe = np.where(near, 1.0, x)
    phi = np.where(near, 1 + x / 2 + x * x / 6, np.expm1(safe) / safe)
    slope = np.where(near, 0.5 + x / 3 + x * x / 8, (np.exp(safe) - np.expm1(safe) / safe) / safe)
    return phi, slope
