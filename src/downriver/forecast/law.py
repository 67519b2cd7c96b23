"""What every fitted law of this room offers after ``fit``: intervals, an audit, a report; the scikit-learn contract.

Reach for it when you write a law of your own: set ``fit_`` to a ``LawFit`` and ``params_`` in ``fit``, return ``self``.
"""

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from downriver.core.errors import InputError, unknown
from downriver.forecast.fit import OBJECTIVES, Array, Audit, Interval, LawFit


class Law(BaseEstimator):
    """Base of the laws: hyper-parameters are constructor keywords, what was learned ends in an underscore."""

    fit_: LawFit
    params_: dict[str, float]

    def ci(self, level: float = 0.95, method: Interval = "bootstrap") -> dict[str, tuple[float, float]]:
        """An interval for each fitted parameter: ``"bootstrap"`` of residuals, ``"case"`` of runs, or ``"hessian"``."""
        return self._fitted().ci(level, method)

    def audit(self) -> Audit:
        """How wrong the law is about runs it has not seen: each left out in turn, and the largest quarter left out."""
        return self._fitted().audit()

    def report(self) -> str:
        """The fit in a few lines of text: parameters with intervals, residuals, what to beware of, the audit."""
        return f"{self._fitted().report()}\n  audit: {self.audit()}"

    def cautions(self) -> list[str]:
        """What to beware of in the fit itself, in words."""
        return self._fitted().notes

    def _fitted(self) -> LawFit:
        check_is_fitted(self, "fit_")
        return self.fit_

    def _check(self) -> None:
        loss, n_starts = getattr(self, "loss", "lsq"), getattr(self, "n_starts", 1)
        if loss not in OBJECTIVES:
            raise unknown("loss", loss, OBJECTIVES)
        if not (isinstance(n_starts, int) and n_starts >= 1):
            raise InputError(f"n_starts is {n_starts!r}: a whole number of at least 1 is expected")


def caution(messages: list[str], stacklevel: int = 3) -> None:
    """Emit each message as a ``RuntimeWarning`` at the caller of the public method."""
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


def shaped(values: Array, *like: Any) -> Any:
    """A float where every input was a number, else the array."""
    return float(values) if all(np.ndim(x) == 0 for x in like) else values
