"""Forecast what fine-tuning costs: how much the loss on pretraining data rises with fine-tuning tokens and model size.

Reach for it when several runs were fine-tuned and their pretraining loss was measured before and after: to say how long
a larger model may be tuned, or whether a method that is to keep what was there makes the rise flatter (``compare``).
«AlignGuard-LoRA» (2025) compares methods by such a law. Its abstract gives no formula; this is the one of the
literature on forgetting. E may be negative here, since fine-tuning data can be good for the pretraining loss too.
"""

from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl

from downriver.core.errors import InputError
from downriver.forecast.fit import Array, aligned, column, fit_law
from downriver.forecast.forms.form import EXPONENT, TERM, Form, Units, empty_jacobian
from downriver.forecast.law import Law, caution, shaped

FAR = 10.0  # times the most tokens fitted; our choice, as for the other laws


class RiseOfTokens(Form):
    """``E + A D^beta``: the rise of a loss with fine-tuning tokens D, for models of one size."""

    names: ClassVar[tuple[str, ...]] = ("E", "A", "beta")
    inputs: ClassVar[tuple[str, ...]] = ("tokens",)
    bounds: ClassVar[tuple[tuple[float, float], ...]] = ((-np.inf, np.inf), TERM, EXPONENT)
    formula = "E + A D^beta"
    logged: ClassVar[tuple[bool, ...]] = (False, True, False)
    signs: ClassVar[tuple[int, ...]] = (1,)  # of the exponents

    def size(self, X: Array) -> Array:
        return X[0]

    def curve(self, theta: Array, Z: Array) -> tuple[Array, Array]:
        E, log_a, *exponents = theta
        J = empty_jacobian(len(self.names), Z, theta)
        J[0] = 1.0
        J[1] = np.exp(log_a + sum(s * e * z for s, e, z in zip(self.signs, exponents, Z, strict=True)))
        for i, (sign, z) in enumerate(zip(self.signs, Z, strict=True)):
            J[2 + i] = sign * J[1] * z
        return E + J[1], J

    def starts(self, u: Array, Z: Array, y: Array) -> Array:
        E = y.min() - u[0] * np.ptp(y)
        return np.stack([E, np.log(np.maximum(y.mean() - E, 1e-6)), *(0.05 * 30.0 ** u[2:])])

    def natural(self, theta: Array, units: Units) -> Array:
        E, log_a, *exponents = theta
        centre = sum(s * e * np.log(x) for s, e, x in zip(self.signs, exponents, units.x, strict=True))
        return np.stack([E * units.y, np.exp(log_a - centre) * units.y, *exponents])


class Rise(RiseOfTokens):
    """``E + A D^beta N^-alpha``: the same over models of several sizes N."""

    names = ("E", "A", "beta", "alpha")
    inputs = ("tokens", "params")
    bounds = (*RiseOfTokens.bounds, EXPONENT)
    formula = "E + A D^beta N^-alpha"
    logged = (False, True, False, False)
    signs = (1, -1)


class ForgettingLaw(Law):
    """``L_pt = L_pt0 + A D_ft^beta / N^alpha + E``: the loss on pretraining data after fine-tuning.

    Args:
        loss: ``"lsq"``, least squares on the rise L_pt - L_pt0, or ``"huber_log"``, Huber's loss of width 1e-3 on its
            logarithm, for rises that are all positive.
        n_starts: starting points of the fit; the best end is kept.

    Attributes: ``params_`` (E, A, beta, alpha; without alpha where all models have one size: then A has N^-alpha in
    it), ``fit_`` (the whole ``LawFit`` of the rise), ``range_`` (fewest and most fitted tokens).

    >>> D, N = np.array([1e6, 4e6, 1.6e7] * 2), np.repeat([1e8, 1e9], 3)
    >>> law = ForgettingLaw().fit(D, N, before=2.5, after=2.51 + 0.05 * D**0.4 / N**0.2)
    >>> {name: round(value, 4) for name, value in law.params_.items()}
    {'E': 0.01, 'A': 0.05, 'beta': 0.4, 'alpha': 0.2}
    >>> round(law.predict(3e7, 1e9, before=2.5), 4), f"{law.tokens_for(0.5, 1e9):.3g}"
    (3.2859, '9.51e+06')
    """

    def __init__(self, loss: Literal["lsq", "huber_log"] = "lsq", n_starts: int = 108) -> None:
        self.loss = loss
        self.n_starts = n_starts

    def fit(self, tokens: Any, params: Any, before: Any, after: Any, sample_weight: Any = None) -> "ForgettingLaw":
        """Fit to one run an entry: fine-tuning tokens D_ft, parameters N, and the pretraining loss before and after.

        ``params`` and ``before`` may be a number for all runs. Raises ``InputError`` where the runs cannot determine
        the law: fewer than three different amounts of tokens, or as many tokens a parameter in all of them.
        """
        self._check()
        (tokens,) = aligned({"tokens": tokens})
        params, before = (_whole(n, v, len(tokens)) for n, v in (("params", params), ("before", before)))
        tokens, params, before, after = aligned({"tokens": tokens, "params": params, "before": before, "after": after})
        one_size = np.ptp(params) == 0
        form, X = (RiseOfTokens(), [tokens]) if one_size else (Rise(), [tokens, params])
        self.fit_ = fit_law(form, X, after - before, weight=sample_weight, objective=self.loss, n_starts=self.n_starts)
        self.params_ = self.fit_.params
        self.range_ = (float(tokens.min()), float(tokens.max()))
        self._size = float(params[0]) if one_size else None
        caution(self.cautions())
        return self

    def predict(self, tokens: Any, params: Any = None, *, before: Any = 0.0) -> Any:
        """The loss after fine-tuning on so many tokens; without ``before`` its rise alone. Warns far beyond the runs.

        ``params`` may be left out where all fitted models had one size.
        """
        X = self._inputs(tokens, params)
        caution(self.cautions_at(X[0]))
        found = self._fitted().predict(*X) + np.asarray(before, dtype=np.float64)
        return shaped(found, tokens, 0.0 if params is None else params, before)

    def interval(self, tokens: Any, params: Any = None, level: float = 0.95) -> tuple[Array, Array]:
        """The band in which the rise of a new run is expected, ``(low, high)``; NaN where no run is spare."""
        X = np.broadcast_arrays(*(np.atleast_1d(x) for x in self._inputs(tokens, params)))
        return self._fitted().interval(*X, level=level)

    def tokens_for(self, rise: Any, params: Any = None) -> Any:
        """The fine-tuning tokens at which the loss has risen by so much; ``InputError`` for a rise not above E."""
        p, (size, *_) = self.params_, self._inputs(1.0, params)[1:] or [np.ones(())]
        above = np.asarray(rise, dtype=np.float64) - p["E"]
        if not (above > 0).all():
            raise InputError(f"rise {rise!r} is not reached: the law begins at E = {p['E']:.4g}")
        found = (above * size ** p.get("alpha", 0.0) / p["A"]) ** (1 / p["beta"])
        return shaped(found, rise, 0.0 if params is None else params)

    def cautions_at(self, tokens: Any) -> list[str]:
        """What to beware of at these amounts, in words."""
        self._fitted()
        ratio = float(np.max(tokens)) / self.range_[1]
        return [f"the target is {ratio:,.0f} times the most fitted tokens"] if ratio > FAR * 1.001 else []

    def compare(
        self, other: "ForgettingLaw", tokens: float, params: float | None = None, level: float = 0.95
    ) -> pl.DataFrame:
        """Set this law beside another method's: A, E, beta, and the rise at so many tokens (of a model of that size).

        A row each: ``this``, ``other``, ``difference`` (other - this), and its ``low`` and ``high`` from bootstrap
        refits of both. A has the exponents in its unit: judge by the rise, and by A only where they agree.

        >>> D = np.array([1e6, 2e6, 4e6, 8e6, 1.6e7])
        >>> noise = np.array([1, -2, 1, 1, -1]) / 1000
        >>> plain, kept = (
        ...     ForgettingLaw().fit(D, 1e8, 2.5, 2.5 + a * D**0.5 + noise) for a in (2e-4, 1e-4)
        ... )
        >>> plain.compare(kept, 3e7).filter(pl.col("high") < 0)["quantity"].to_list()[-1]
        'rise'
        """
        if not 0 < level < 1:
            raise InputError(f"level {level}: a number between 0 and 1 is expected")
        found = []
        for seed, law in enumerate((self, other)):
            X, fit = law._inputs(tokens, params), law._fitted()
            theta = np.concatenate([fit.theta[:, None], fit.draws(seed=seed).theta], axis=1)
            Z = fit.form.prepare(np.stack([np.ravel(x) for x in X])[:, :, None], fit.units)
            rise = fit.form.curve(theta, Z)[0][0] * fit.units.y
            natural = dict(zip(fit.form.names, fit.form.natural(theta, fit.units), strict=True))
            found.append({name: natural[name] for name in ("A", "E", "beta")} | {"rise": rise})
        rows = []
        for name, mine in found[0].items():
            theirs = found[1][name]
            low, high = np.quantile((theirs - mine)[1:], [(1 - level) / 2, (1 + level) / 2])
            rows.append((name, mine[0], theirs[0], theirs[0] - mine[0], low, high))
        return pl.DataFrame(rows, schema=["quantity", "this", "other", "difference", "low", "high"], orient="row")

    def _inputs(self, tokens: Any, params: Any) -> list[Array]:
        """What the form takes: tokens, and the size where the law has one."""
        self._fitted()
        found = [column("tokens", np.ravel(tokens)).reshape(np.shape(tokens))]
        if self._size is None:
            if params is None:
                raise InputError("params: the law was fitted to several sizes, say of which model")
            return [*found, column("params", np.ravel(params)).reshape(np.shape(params))]
        if params is not None and np.any(np.asarray(params) != self._size):
            raise InputError(f"params: the law was fitted to models of {self._size:g} parameters only")
        return found


def _whole(name: str, values: Any, count: int) -> Array:
    """A column; a number stands for all rows."""
    return np.full(count, values) if np.ndim(values) == 0 else np.asarray(values)
