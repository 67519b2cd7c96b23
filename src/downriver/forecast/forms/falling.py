"""Shapes of a loss: power laws that fall to a floor, in one input or two, straight or with a break."""

import numpy as np

from downriver.forecast.forms.form import EXPONENT, FLOOR, TERM, Array, Form, Units, empty_jacobian


class PowerLaw(Form):
    """``E + A n^-alpha``: a learning curve that falls to a floor."""

    names = ("E", "A", "alpha")
    inputs = ("n",)
    bounds = (FLOOR, TERM, EXPONENT)
    formula = "E + A n^-alpha"
    logged = (False, True, False)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        E, log_a, alpha = theta
        J = empty_jacobian(3, Z, theta)
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

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        E, log_a, alpha = theta
        with np.errstate(all="ignore"):
            return units.x[0] * np.exp((log_a - np.log(y / units.y - E)) / alpha)


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
        J = empty_jacobian(4, Z, theta)
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
        J = empty_jacobian(5, Z, theta)
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


class SmoothlyBroken(Form):
    """``E + A n^-c0 (1 + (n / d)^(1/f))^(-c1 f)``: a power law whose exponent turns from c0 to c0 + c1 about n = d.

    Caballero et al. 2023, «Broken Neural Scaling Laws», arXiv:2210.14891, with one break; f is how gently it turns.
    """

    names = ("E", "A", "c0", "c1", "d", "f")
    inputs = ("n",)
    bounds = (FLOOR, TERM, (-2.0, 5.0), (-5.0, 5.0), (-30.0, 30.0), (-4.0, 3.0))
    formula = "E + A n^-c0 (1 + (n / d)^(1/f))^(-c1 f)"
    logged = (False, True, False, False, True, True)

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        E, log_a, c0, c1, log_d, log_f = theta
        z, f = Z[0], np.exp(log_f)
        h = (z - log_d) / f
        turned = np.logaddexp(0, h)
        share = np.exp(h - turned)  # of the way from c0 to c0 + c1
        J = empty_jacobian(6, Z, theta)
        J[0] = 1.0
        J[1] = term = np.exp(log_a - c0 * z - c1 * f * turned)
        J[2] = -term * z
        J[3] = -term * f * turned
        J[4] = term * c1 * share
        J[5] = -term * c1 * f * (turned - h * share)
        return E + term, J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        E = u[0] * y.min()
        low, high = Z[0].min(), Z[0].max()
        log_d = low + u[4] * (high - low)
        c0, c1 = 0.8 * u[2], 1.6 * u[3] - 0.6
        # the curve passes near the mean at the centre, whatever the turn
        past = c1 * np.maximum(-log_d, 0)
        return np.stack([E, np.log(np.maximum(y.mean() - E, 1e-6)) + past + u[1] - 0.5, c0, c1, log_d, 3 * u[5] - 2.5])

    def natural(self, theta: Array, units: Units) -> Array:
        E, log_a, c0, c1, log_d, log_f = theta
        A = np.exp(log_a + c0 * np.log(units.x[0])) * units.y
        return np.stack([E * units.y, A, c0, c1, np.exp(log_d) * units.x[0], np.exp(log_f)])


def _split(u: Array, y: Array) -> tuple[Array, Array, Array]:
    """Floors up to the smallest target; the rest of the mean shared between two terms."""
    E = u[0] * y.min()
    rest = np.maximum(y.mean() - E, 1e-6)
    share = 0.02 + 0.96 * u[1]
    jitter = 4.0 ** (u[2] - 0.5)
    return E, np.log(rest * share * jitter), np.log(rest * (1 - share) * jitter)
