"""Shapes of what grows with scale: pass rate, score after transfer, a plain power."""

import numpy as np

from downriver.forecast.forms.form import EXPONENT, TERM, Array, Form, Units, empty_jacobian


class PassRate(Form):
    """``g + (1 - g) exp(-a C^-b - c)``: the share of items solved at compute C, from chance g to ``g + (1-g) e^-c``."""

    names = ("g", "a", "b", "c")
    inputs = ("compute",)
    bounds = ((0.0, 1.0), TERM, EXPONENT, (0.0, 25.0))
    formula = "g + (1 - g) exp(-a C^-b - c)"
    logged = (False, True, False, False)

    def units(self, X: Array, y: Array) -> Units:
        # a pass rate stays in its own unit: its ends, 0 and 1, mean something
        return Units(super().units(X, y).x, 1.0)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        g, log_a, b, c = theta
        t = np.exp(log_a - b * Z[0])
        solved = np.exp(-t - c)
        J = empty_jacobian(4, Z, theta)
        J[0] = 1 - solved
        J[1] = -(1 - g) * solved * t
        J[2] = -J[1] * Z[0]
        J[3] = -(1 - g) * solved
        return g + (1 - g) * solved, J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        g = u[0] * np.clip(y.min(), 0.0, 0.98)
        c = u[3] ** 2 * 0.9 * -np.log(np.clip(y.max(), 0.02, 1 - 1e-3))
        middle = np.clip((y.mean() - g) / (1 - g), 1e-3, 1 - 1e-3)
        return np.stack([g, np.log(np.maximum(-np.log(middle) - c, 1e-2)) + 2 * u[1] - 1, 0.05 * 40.0 ** u[2], c])

    def natural(self, theta: Array, units: Units) -> Array:
        g, log_a, b, c = theta
        return np.stack([g, np.exp(log_a + b * np.log(units.x[0])), b, c])

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        g, log_a, b, c = theta
        with np.errstate(all="ignore"):
            t = -np.log((y - g) / (1 - g)) - c
            return units.x[0] * np.exp((log_a - np.log(t)) / b)


class LogLaw(Form):
    """``(log(A D^alpha))^beta``: a score after transfer against the amount D of pretraining data; log A is ``log_A``.

    Internally ``exp(s) (1 + g z / beta)^beta`` with z = log(D / smallest D), s the log score there and g its slope:
    the logarithm that is raised to beta is positive at every fitted point, whatever the parameters, and a plain power
    of D is the limit of large beta.
    """

    names = ("log_A", "alpha", "beta")
    inputs = ("data",)
    bounds = ((-20.0, 10.0), (-20.0, 5.0), (-4.0, 6.0))
    formula = "(log_A + alpha log D)^beta"
    logged = (False, True, True)

    def units(self, X: Array, y: Array) -> Units:
        return Units((float(X[0].min()),), float(np.abs(y).mean()) or 1.0)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        s, log_g, log_beta = theta
        beta = np.exp(log_beta)
        w = np.exp(log_g) * Z[0] / beta
        with np.errstate(all="ignore"):  # NaN below w = -1, where the logarithm is negative: outside the law's domain
            grown = np.log1p(w)
        J = empty_jacobian(3, Z, theta)
        J[0] = value = np.exp(s + beta * grown)
        J[1] = value * beta * w / (1 + w)
        J[2] = value * beta * (grown - w / (1 + w))
        return value, J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        z, positive = Z[0, :, 0], np.maximum(y, 1e-3 * np.abs(y).mean())
        slope = max(float(np.polyfit(z, np.log(positive), 1)[0]), 1e-3)
        first = np.log(positive[np.argmin(z)])
        return np.stack([first + u[0] - 0.5, np.log(slope) + 3 * u[1] - 1, 6 * u[2] - 3])

    def natural(self, theta: Array, units: Units) -> Array:
        s, log_g, log_beta = theta
        beta = np.exp(log_beta)
        with np.errstate(over="ignore"):
            first = np.exp((s + np.log(units.y)) / beta)  # log_A + alpha log(smallest D)
        alpha = np.exp(log_g) / beta * first
        return np.stack([first - alpha * np.log(units.x[0]), alpha, beta])

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        s, log_g, log_beta = theta
        beta = np.exp(log_beta)
        with np.errstate(all="ignore"):
            return units.x[0] * np.exp(np.expm1((np.log(y / units.y) - s) / beta) * beta / np.exp(log_g))


class PowerGrowth(Form):
    """``a n^b``: a score that grows (b > 0) or falls with n, without an end."""

    names = ("a", "b")
    inputs = ("n",)
    bounds = (TERM, (-EXPONENT[1], EXPONENT[1]))
    formula = "a n^b"
    logged = (True, False)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        log_a, b = theta
        J = empty_jacobian(2, Z, theta)
        J[0] = np.exp(log_a + b * Z[0])
        J[1] = J[0] * Z[0]
        return J[0].copy(), J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        return np.stack([np.log(max(y.mean(), 1e-6)) + u[0] - 0.5, 2 * u[1] - 1])

    def natural(self, theta: Array, units: Units) -> Array:
        log_a, b = theta
        return np.stack([np.exp(log_a - b * np.log(units.x[0])) * units.y, b])

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        log_a, b = theta
        with np.errstate(all="ignore"):
            return units.x[0] * np.exp((np.log(y / units.y) - log_a) / b)
