"""PED: move the features as fine-tuning would, by letting overlapping classes push one another apart.

Reach for it before a score (``score(..., pre=PED())``) when there are many classes, about a hundred: with a handful
each moves by ½ · 0.01 of the overlap a step, and next to nothing changes. Li et al. 2023, "Exploring Model
Transferability through the Lens of Potential Energy". Departures: the size of a step, which decides when to stop, is
the sum of the classes' distances and not of their coordinates' absolute values, so that turning the features changes
nothing; two classes with the very same mean do not push each other (the direction is undefined).
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from downriver.core.errors import InputError
from downriver.nn.similarity import as_rows
from downriver.rank.scores import classes_of

Array = NDArray[np.float64]
NO_GENERAL = (
    "PED has no general features to rescale by and takes the task's own: the paper takes those of ImageNet's "
    "validation set"
)
LEAST_SPREAD = 1e-3  # of the general features, per dimension


class PED:
    """Physics-inspired feature movement: ``transform`` gives the features after the classes have pushed apart.

    Every class is a ball round its mean whose radius is ``n_sigma`` · R_c, R_c² the sum of its variances over the
    dimensions. Overlap F_ij = max(n_sigma · (R_i + R_j) − ‖m_i − m_j‖, 0) of two balls is a force that moves class i
    away from j by min(½ · dt² · k · F_ij, F_ij), all its rows alike, in a space where the features of a general set
    have mean 0 and deviation 1.

    Parameters
    ----------
    n_sigma, dt, k, exit_ratio, max_steps
        0.6 (the public code's other candidate is 0.3), 0.1, 1, 0.5 and 6 as published; the mass is 1. A step is not
        taken, and the movement ends, when it is at most ``exit_ratio`` times as large as the first one.
    rescale
        Standardise by the general features first. ``False`` moves the features as they are.

    Attributes
    ----------
    energy_
        ½ · k · Σ_{i<j} F_ij² before the first step and after every step taken.
    displacement_
        How far each class moved in all, (classes, d), in the features' own units.
    steps_
        How many steps were taken.

    Example
    -------
    >>> X = np.array([[0.0, 0], [3, 0], [1, 1], [4, 1]])
    >>> ped = PED(rescale=False)
    >>> moved = ped.transform(X, [0, 0, 1, 1])
    >>> ped.steps_, ped.energy_[[0, -1]].round(3).tolist()
    (6, [0.074, 0.066])
    >>> (moved - X).round(3).tolist()
    [[-0.008, -0.008], [-0.008, -0.008], [0.008, 0.008], [0.008, 0.008]]
    """

    def __init__(
        self,
        *,
        n_sigma: float = 0.6,
        dt: float = 0.1,
        k: float = 1.0,
        exit_ratio: float = 0.5,
        max_steps: int = 6,
        rescale: bool = True,
    ) -> None:
        for name, value in (("n_sigma", n_sigma), ("dt", dt), ("k", k), ("max_steps", max_steps)):
            if not 0 < value < np.inf:
                raise InputError(f"{name} is {value}: a positive number is expected")
        if not 0 <= exit_ratio < 1:
            raise InputError(f"exit_ratio is {exit_ratio}: a number from 0 to below 1 is expected")
        self.n_sigma = n_sigma
        self.dt = dt
        self.k = k
        self.exit_ratio = exit_ratio
        self.max_steps = max_steps
        self.rescale = rescale

    def transform(self, X: Any, y: Any, general: Any = None) -> Array:
        """The moved features, (n, d) float64; X stays as it is.

        ``y`` are class labels (n,), two rows a class at least. ``general`` is what the features are standardised by:
        features of a general set by the same model (rows, d), or their mean and standard deviation as a pair (each
        (d,)). The paper takes ImageNet's validation set; without any, those of X itself are taken, with a warning.

        Raises ``InputError`` for features that are not finite, one class, a class with one row, and statistics that
        do not fit.
        """
        X = as_rows(X)
        classes, counts = classes_of(y, len(X))
        scale = self._scale(X, general) if self.rescale else np.ones(X.shape[1])
        sums = np.zeros((len(counts), X.shape[1]))
        np.add.at(sums, classes, X)
        means = sums / counts[:, None]
        variances = np.bincount(classes, (((X - means[classes]) / scale) ** 2).sum(axis=1)) / counts
        reach = self.n_sigma * np.sqrt(variances)  # n_σ R_c; rigid motion leaves it as it is

        start = (means - means.mean(axis=0)) / scale
        places, first = start.copy(), 0.0
        weights, potential = self._push(places, reach)
        energy = [potential]
        while len(energy) <= self.max_steps:
            shift = weights.sum(axis=1)[:, None] * places - weights @ places  # Σ_j û_ij min(½ dt² k F_ij, F_ij)
            size = float(np.linalg.norm(shift, axis=1).sum())
            first = first or size
            if size <= self.exit_ratio * first:
                break
            places += shift
            weights, potential = self._push(places, reach)
            energy.append(potential)
        self.energy_ = np.array(energy)
        self.steps_ = len(energy) - 1
        self.displacement_ = (places - start) * scale
        return X + self.displacement_[classes]

    def _push(self, means: Array, reach: Array) -> tuple[Array, float]:
        """Length of every pair's push divided by the distance, (classes, classes), and the potential energy."""
        distance = cdist(means, means)
        force = np.maximum(reach[:, None] + reach - distance, 0.0)
        np.fill_diagonal(force, 0.0)
        length = np.minimum(0.5 * self.dt**2 * self.k, 1.0) * force
        return np.divide(length, distance, out=np.zeros_like(length), where=distance > 0), float(
            0.25 * self.k * (force**2).sum()
        )

    def _scale(self, X: Array, general: Any) -> Array:
        if general is None:
            warnings.warn(NO_GENERAL, UserWarning, stacklevel=3)
            spread = X.std(axis=0)
        elif isinstance(general, tuple):
            spread = np.asarray(general[1], dtype=np.float64)
        else:
            spread = as_rows(general, "general").std(axis=0)
        if spread.shape != (X.shape[1],) or not np.isfinite(spread).all():
            raise InputError(
                f"general: statistics of shape {spread.shape}: {X.shape[1]} finite deviations are expected"
            )
        return np.maximum(spread, LEAST_SPREAD)
