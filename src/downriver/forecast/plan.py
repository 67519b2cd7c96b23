"""From a fitted law to a decision: what a budget buys, what a goal costs, and whether over-training pays.

Reach for it after ``Chain.fit``, before renting machines. Sizes follow from the law in closed form: at the optimum of
Chinchilla's law the two reducible terms stand as ``alpha A N^-alpha = beta B D^-beta`` (Hoffmann et al. 2022,
arXiv:2203.15556, approach 3). «32 times over-trained» is 32 times 20 tokens a parameter, as the over-training paper
counts; serving costs 2N operations a token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from downriver.core.errors import InputError
from downriver.forecast.fit import Array, column
from downriver.forecast.overtraining_law import Chain, Forecast

TWENTY = 20.0  # tokens a parameter of a model that is not over-trained, the over-training paper's unit


@dataclass(frozen=True)
class Plan:
    """One way to spend: the model, the data, and what they are forecast to reach.

    ``compute_interval`` is given where the goal was a loss or an error: the compute that reaches it, over the draws of
    the law (infinite where a draw never does). ``break_even`` is given for an over-trained model with the loss of an
    optimal one: from so many served tokens on, training and serving together cost less.
    """

    name: str
    params: float
    tokens: float
    forecast: Forecast
    compute_interval: tuple[float, float] | None = None
    break_even: float | None = None

    @property
    def compute(self) -> float:
        """Training compute in floating-point operations, 6ND."""
        return 6 * self.params * self.tokens

    @property
    def multiplier(self) -> float:
        """Tokens a parameter."""
        return self.tokens / self.params


def buy(chain: Chain, compute: float, level: float = 0.95, anywhere: bool = False) -> Plan:
    """The model and data that reach the lowest loss with ``compute`` operations, and what they reach.

    The tokens a parameter stay within those of the fitted runs, for beyond them nothing says that the law holds;
    ``anywhere=True`` gives the law's own optimum.

    >>> N = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7, 8e7]); D = N * [5, 20, 20, 20, 320, 160]
    >>> from downriver.forecast import RunTable
    >>> chain = Chain().fit(RunTable(N, D, {"loss": 1.8 + 170 * N**-0.27 + 290 * D**-0.27}))
    >>> plan = buy(chain, 1e21)
    >>> f"{plan.params:.3g} parameters, {plan.tokens:.3g} tokens, loss {plan.forecast.value:.3f}"
    '4.8e+09 parameters, 3.47e+10 tokens, loss 2.627'
    """
    _, _, best = chain.law.optimal_allocation(compute)
    M = best if anywhere else _within(chain, best)
    N = float(np.sqrt(compute / (6 * M)))
    return Plan(_name("optimal", best, M), N, M * N, chain.forecast(N, M * N, level))


def cheapest(
    chain: Chain,
    *,
    loss: float | None = None,
    error: float | None = None,
    level: float = 0.95,
    anywhere: bool = False,
) -> Plan:
    """The model and data that reach a loss, or an error of the chain's metric, with the least compute.

    Tokens a parameter as in ``buy``. Raises ``InputError`` for a goal below the law's floor, and for an error where the
    chain forecasts none.
    """
    if (loss is None) == (error is None):
        raise InputError("one goal is expected: a loss, or an error")
    wanted = _loss_for(chain, error) if error is not None else float(column("loss", [loss])[0])
    params = np.array([chain.law.params_[name] for name in chain.law.fit_.form.names])[:, None]
    N, D = (float(v[0]) for v in _sizes_for(params, np.array([wanted])))
    if not np.isfinite(N):
        goal = f"loss {wanted:.4g}" if error is None else f"error {error:.4g} (loss {wanted:.4g})"
        raise InputError(f"{goal} is not reached by any size: the law's floor is {params[0, 0]:.4g}")
    best = D / N
    M = best if anywhere else _within(chain, best)
    N = float(_size_at(params, np.array([wanted]), M)[0])
    needed = _compute_interval(chain, wanted, error, level, None if best == M else M)
    return Plan(_name("cheapest", best, M), N, M * N, chain.forecast(N, M * N, level), needed)


def overtrained(chain: Chain, plan: Plan, factor: float, level: float = 0.95) -> tuple[Plan, Plan]:
    """Two models with ``20 factor`` tokens a parameter: one with the compute of ``plan``, one with its loss.

    The first is smaller and worse, the second smaller, as good, and dearer to train; its ``break_even`` says when it
    pays. Raises ``InputError`` where the plan itself has as many tokens a parameter.
    """
    M = TWENTY * float(column("over-training factor", [factor])[0])
    if plan.multiplier >= M:
        raise InputError(
            f"the plan has {plan.multiplier:,.4g} tokens a parameter already: {factor:g} times over-trained is {M:,.4g}"
        )
    N = float(np.sqrt(plan.compute / (6 * M)))
    same_compute = Plan(f"{factor:g}x over-trained, same compute", N, M * N, chain.forecast(N, M * N, level))
    params = np.array([chain.law.params_[name] for name in chain.law.fit_.form.names])[:, None]
    N = float(_size_at(params, np.array([plan.forecast.chain[0].value]), M)[0])
    dearer, saved = 6 * N * N * M - plan.compute, 2 * (plan.params - N)
    return same_compute, Plan(
        f"{factor:g}x over-trained, same loss", N, M * N, chain.forecast(N, M * N, level), break_even=dearer / saved
    )


def _loss_for(chain: Chain, error: float) -> float:
    if chain.error_law is None:
        raise InputError("these runs have no error: a goal in error needs a column 'error' in the table of runs")
    return float(chain.error_law.invert(float(column("error", [error])[0])))


def _sizes_for(params: Array, loss: Array) -> tuple[Array, Array]:
    """N and D that reach a loss with the least compute, for m laws (4 or 5, m); infinite where the floor is above.

    With s = A N^-alpha, alpha s = beta (loss - E - s).
    """
    E, A, B, alpha, beta = params if len(params) == 5 else (*params, params[-1])
    with np.errstate(all="ignore"):
        s = np.where(loss > E, (loss - E) / (1 + alpha / beta), 0.0)
        return (A / s) ** (1 / alpha), (B * beta / (alpha * s)) ** (1 / beta)


def _compute_interval(
    chain: Chain, loss: float, error: float | None, level: float, M: float | None
) -> tuple[float, float] | None:
    """The compute that reaches the goal over the draws of the laws, at M tokens a parameter or each draw's best.

    None where no run is spare.
    """
    law = chain.law.fit_
    if law.spare <= 0:
        return None
    params = law.form.natural(law.draws().theta, law.units)
    wanted: Any = np.full(params.shape[1], loss)
    if error is not None and chain.error_law is not None:
        fit = chain.error_law.fit_
        if fit.spare <= 0:
            return None
        drawn = fit.form.natural(fit.draws().theta, fit.units)
        epsilon, k, gamma = drawn if len(drawn) == 3 else (chain.error_law.params_["epsilon"], *drawn)
        with np.errstate(all="ignore"):
            wanted = np.where(epsilon > error, -np.log((epsilon - error) / k) / gamma, -np.inf)
    if M is None:
        N, D = _sizes_for(params, wanted)
    else:
        N = _size_at(params, wanted, M)
        D = M * N
    # not linear between draws: infinities must not be interpolated
    low, high = np.quantile(6 * N * D, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def _size_at(params: Array, loss: Array, M: float) -> Array:
    """The N (m,) that reach losses at M tokens a parameter, for m laws: by bisection, for the loss falls in N."""
    E, A, B, alpha, beta = params if len(params) == 5 else (*params, params[-1])
    low, high = np.zeros(len(loss)), np.full(len(loss), 200.0)
    for _ in range(80):
        middle = (low + high) / 2
        reached = E + A * np.exp(-alpha * middle) + B * np.exp(-beta * (middle + np.log(M))) <= loss
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return np.where(loss > E, np.exp(high), np.inf)


def _within(chain: Chain, M: float) -> float:
    low, high = chain.law.multipliers_
    return float(np.clip(M, low, high))


def _name(name: str, best: float, M: float) -> str:
    if best == M:
        return name
    return f"{name} at {M:.3g} tokens a parameter, the {'fewest' if best < M else 'most'} fitted"
