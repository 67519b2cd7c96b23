"""Forecast a score from the amount of training data by a plain power of it.

Reach for it when a score has been growing steadily with the number of examples, in a straight line on log-log paper,
and shows no sign of a ceiling; where it does, ``LearningCurve`` on the error is the better law.

Blankemeier et al. 2024, «Merlin: A Vision Language Foundation Model for 3D Computed Tomography», arXiv:2406.06512,
relates downstream scores to the number of pretraining scans. The form and the log-log line are taken as the usual
ones: the paper's public code does not hold its fit. ``loss="lsq"`` fits the scores themselves.
"""

from typing import Any, Literal

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.forecast.curve import Curve
from downriver.forecast.fit import OBJECTIVES, aligned
from downriver.forecast.forms import PowerGrowth

LOG_LINE = 1e6  # Huber's loss wider than any residual is least squares: a straight line through the logarithms


class DataScalingCurve(Curve):
    """``score(n) = a n^b``.

    Args:
        loss: ``"log_lsq"``, least squares on log score against log n (the default), ``"lsq"`` on the score, or
            ``"huber_log"``, Huber's loss of width 1e-3 on its logarithm.
        maximum: the highest score there is; a forecast beyond it is cut there. None: the score has no end.

    Attributes: ``params_`` (a, b), ``fit_``, ``range_`` (smallest and largest fitted n).

    >>> n = np.array([64, 128, 256])
    >>> curve = DataScalingCurve().fit(n, 0.2 * n**0.15)
    >>> round(curve.predict(512), 4), round(curve.examples_for(0.5))
    (0.5098, 450)
    """

    input = "n"
    output = "score"

    def __init__(
        self, loss: Literal["log_lsq", "lsq", "huber_log"] = "log_lsq", maximum: float | None = 1.0, n_starts: int = 24
    ) -> None:
        self.loss = loss
        self.maximum = maximum
        self.n_starts = n_starts

    def fit(self, n: Any, score: Any, sample_weight: Any = None) -> "DataScalingCurve":
        """Fit to numbers of examples ``n`` and scores, 1-D, positive, of one length; n may be there once a seed.

        Raises ``InputError`` for fewer than two different n, and for a score above ``maximum``.
        """
        if self.loss not in ("log_lsq", *OBJECTIVES):
            raise unknown("loss", self.loss, ("log_lsq", *OBJECTIVES))
        n, score = aligned({"n": n, "score": score})
        if self.maximum is not None and (score > self.maximum).any():
            raise InputError(f"score: {score.max():g} is above the maximum of {self.maximum:g}")
        if self.loss == "log_lsq":
            return self._fit_curve(PowerGrowth(), n, score, sample_weight, "huber_log", self.n_starts, LOG_LINE)
        return self._fit_curve(PowerGrowth(), n, score, sample_weight, self.loss, self.n_starts)

    def examples_for(self, score: Any) -> Any:
        """The number of examples at which the law reaches a score; ``InputError`` for one above ``maximum``."""
        if self.maximum is not None and (np.asarray(score) > self.maximum).any():
            raise InputError(f"score {score!r} is above the maximum of {self.maximum:g}")
        return self._input_for(score)

    def _value(self, points: np.ndarray) -> np.ndarray:
        return np.minimum(super()._value(points), np.inf if self.maximum is None else self.maximum)
