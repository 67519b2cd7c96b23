"""What every law of one input has in common: prediction, interval, the input that a value needs, how far is far.

Reach for it when you write such a law: derive from ``Curve``, call ``_fit_curve`` in ``fit``, and that is all.
"""

from typing import Any, ClassVar, Self

import numpy as np

from downriver.core.errors import InputError
from downriver.forecast.fit import Array, Objective, column, fit_law
from downriver.forecast.forms import Form
from downriver.forecast.law import Law, caution, shaped


class Curve(Law):
    """Base of the laws ``y(x)`` with one positive input; ``range_`` holds the smallest and largest fitted x."""

    input: ClassVar[str] = "x"
    output: ClassVar[str] = "y"
    far: ClassVar[float] = 10.0  # times the largest fitted input; our choice: such laws are seldom tested beyond
    range_: tuple[float, float]

    def predict(self, x: Any) -> Any:
        """The law at x: a float for a number, else an array. Warns (``RuntimeWarning``) far beyond the fitted x."""
        self._fitted()
        points = column(self.input, np.ravel(x)).reshape(np.shape(x))
        caution(self.cautions_at(points))
        return shaped(self._value(points), x)

    def interval(self, x: Any, level: float = 0.95) -> tuple[Array, Array]:
        """The band in which a new measurement at x is expected, ``(low, high)``; NaN where no point is spare."""
        return self._fitted().interval(column(self.input, np.ravel(x)), level=level)

    def extrapolation_ratio(self, x: Any) -> Any:
        """The target input divided by the largest fitted one."""
        self._fitted()
        return shaped(np.asarray(x, dtype=np.float64) / self.range_[1], x)

    def cautions_at(self, x: Any) -> list[str]:
        """What to beware of at these inputs, in words."""
        self._fitted()
        ratio = float(np.max(x)) / self.range_[1]
        return [f"the target is {ratio:,.0f} times the largest fitted {self.input}"] if ratio > self.far * 1.001 else []

    def _fit_curve(
        self, form: Form, x: Any, y: Any, weight: Any, objective: Objective, n_starts: int, delta: float = 1e-3
    ) -> Self:
        found = column(self.input, x)
        self.fit_ = fit_law(form, [found], y, weight=weight, objective=objective, n_starts=n_starts, delta=delta)
        self.params_ = self.fit_.params
        self.range_ = (float(found.min()), float(found.max()))
        caution(self.cautions(), stacklevel=4)
        return self

    def _value(self, points: Array) -> Array:
        return self._fitted().predict(points)

    def _input_for(self, value: Any) -> Any:
        """The x at which the law reaches ``value``; ``InputError`` where it never does."""
        found = self._fitted().invert(value)
        if not np.isfinite(found).all():
            raise InputError(
                f"{self.output} {value!r} is never reached by {self.fit_.form.formula} with {self.params_}"
            )
        return shaped(found, value)
