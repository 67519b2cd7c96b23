"""Forecast the error that more training examples will give, from a few small training sizes.

Reach for it before labelling or training on everything: fit error against training size on small subsets, and read off
the error at the full size or the size that an error needs.

The form ``E + A n^-alpha`` is the usual one (Hestness et al. 2017, arXiv:1712.00409); the solver, the intervals and the
audit are those of every law here.
"""

from typing import Any, Literal

import numpy as np

from downriver.core.errors import InputError
from downriver.forecast.fit import Array, column, fit_law
from downriver.forecast.forms import PowerLaw
from downriver.forecast.law import Law, caution, shaped

FAR = 10.0  # times the largest fitted size; our choice: learning curves are seldom straight for longer


class LearningCurve(Law):
    """``error(n) = E + A n^-alpha``: a power law with a floor, for an error or loss that falls with n.

    Args:
        loss: ``"lsq"``, least squares on the error, or ``"huber_log"``, Huber's loss of width 1e-3 on its logarithm.
        n_starts: starting points of the fit; the best end is kept.

    Attributes: ``params_`` (E, A, alpha), ``fit_`` (the whole ``LawFit``), ``range_`` (smallest and largest fitted n).

    >>> n = np.array([50, 100, 200, 400, 800])
    >>> curve = LearningCurve().fit(n, 0.08 + 1.5 * n**-0.5)
    >>> round(curve.predict(3200), 4), round(curve.examples_for(0.1))
    (0.1065, 5625)
    """

    def __init__(self, loss: Literal["lsq", "huber_log"] = "lsq", n_starts: int = 108) -> None:
        self.loss = loss
        self.n_starts = n_starts

    def fit(self, n: Any, error: Any, sample_weight: Any = None) -> "LearningCurve":
        """Fit to training sizes ``n`` and errors, 1-D, positive, of one length; a size may be there once a seed.

        ``sample_weight`` multiplies squared residuals. Raises ``InputError`` for fewer than three different sizes.
        Warns (``RuntimeWarning``) of a parameter pinned at its bound: a floor at 0 means that these sizes show none.
        """
        self._check()
        n = column("n", n)
        self.fit_ = fit_law(PowerLaw(), [n], error, weight=sample_weight, objective=self.loss, n_starts=self.n_starts)
        self.params_ = self.fit_.params
        self.range_ = (float(n.min()), float(n.max()))
        caution(self.cautions())
        return self

    def predict(self, n: Any) -> Any:
        """The error at n examples: a float for a number, else an array. Warns beyond ten times the largest size."""
        fit = self._fitted()
        sizes = column("n", np.ravel(n)).reshape(np.shape(n))
        caution(self.cautions_at(sizes))
        return shaped(fit.predict(sizes), n)

    def interval(self, n: Any, level: float = 0.95) -> tuple[Array, Array]:
        """The band in which a new measurement at n examples is expected, ``(low, high)``; NaN if no size is spare."""
        return self._fitted().interval(column("n", np.ravel(n)), level=level)

    def examples_for(self, error: Any) -> Any:
        """The training size that reaches an error; ``InputError`` for an error at or below the floor E."""
        self._fitted()
        E, A, alpha = self.params_["E"], self.params_["A"], self.params_["alpha"]
        reducible = np.asarray(error, dtype=np.float64) - E
        if not (reducible > 0).all():
            raise InputError(f"error {error!r} is not reached: the curve's floor is {E:.4g}")
        return shaped((A / reducible) ** (1 / alpha), error)

    def extrapolation_ratio(self, n: Any) -> Any:
        """The target size divided by the largest fitted one."""
        self._fitted()
        return shaped(np.asarray(n, dtype=np.float64) / self.range_[1], n)

    def cautions_at(self, n: Any) -> list[str]:
        """What to beware of at these sizes, in words."""
        self._fitted()
        ratio = float(np.max(n)) / self.range_[1]
        return [f"the target is {ratio:,.0f} times the largest fitted size"] if ratio > FAR * (1 + 1e-9) else []
