"""What every form has, and the ranges that their parameters share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from downriver.core.errors import InputError

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

    def inverse(self, y: Array, theta: Array, units: Units) -> Array:
        """The input at which one fit (``theta`` is (P,)) takes each value of ``y``; NaN where it never does."""
        raise InputError(f"{self.formula} is not turned round: it has no inverse in closed form")


def empty_jacobian(P: int, Z: Array, theta: Array) -> Array:
    """A jacobian (P, n, L) to be filled, for these points and internal parameters."""
    return np.empty((P, *np.broadcast_shapes(Z[0].shape, theta[0].shape)))
