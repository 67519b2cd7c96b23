"""The mixture to train the large run on, by what a regressor says of mixtures nobody has tried.

Reach for ``propose`` with a fitted ``MixtureRegressor``. Liu et al. 2024, «RegMix», arXiv:2407.01492: many mixtures are
drawn from the natural one, and the best 128 of 100 000 are averaged, which damps what the regressor imagines. Ours:
caps hold for every draw, the pull towards the natural mixture, the exact solution for laws that allow it, and the two
baselines that a proposal must beat, which are always reported.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import linprog, minimize
from scipy.special import rel_entr

from downriver.core.errors import InputError
from downriver.core.seeds import generator
from downriver.data.mix.regress import MixtureRegressor
from downriver.data.mix.space import Array, MixtureSpace, dirichlet

NEAR = 0.05  # share of the mass


@dataclass(frozen=True)
class Mixture:
    """A proposal: shares by domain, what is predicted of it, and what is predicted of the obvious alternatives.

    ``predicted`` is the objective at the shares; ``spread`` the standard deviation of the averaged mixtures'
    predictions (0 for an exact solution); ``epochs_per_domain`` needs token counts; ``alternatives`` are the natural
    mixture, equal shares, and the best single domain (as much of it as its cap allows, the rest natural);
    ``inside`` says whether the shares lie among the mixtures that the regressor has seen: within their convex hull, or
    so near that moving a twentieth of the mass leads there.
    """

    weights: dict[str, float]
    predicted: float
    spread: float
    epochs_per_domain: dict[str, float] | None
    alternatives: dict[str, float]
    inside: bool


def propose(
    regressor: MixtureRegressor,
    space: MixtureSpace,
    target: str | Mapping[str, float] | None = None,
    *,
    n: int = 100_000,
    top_k: int = 128,
    kl_to_prior: float = 0.0,
    direction: Literal["lower", "higher"] = "lower",
    exact: bool = False,
    seed: int = 0,
) -> Mixture:
    """The mixture with the best predicted target.

    Parameters
    ----------
    target
        A target by name, or several with their weights; by default the only one, or all alike.
    n, top_k
        So many mixtures are drawn from Dirichlet(prior) below the caps, and the best ``top_k`` averaged (the paper's
        100 000 and 128).
    kl_to_prior
        Adds so many times KL(w ‖ prior) to the objective (subtracts it where higher is better).
    direction
        Whether a ``"lower"`` (loss) or a ``"higher"`` target is better.
    exact
        Solve instead of draw: for ``linear`` and ``exp`` regressors and a lower target the problem is convex.

    Warns (``RuntimeWarning``) where the proposal leaves the convex hull of the fitted mixtures: the regressor then
    guesses. Raises ``InputError`` for domains that are not the regressor's, and where the caps refuse nearly all draws.

    >>> W = np.random.default_rng(0).dirichlet(np.ones(3), size=60)
    >>> law = MixtureRegressor("exp").fit(W, 2 + np.exp(W @ [1.0, 0.2, -0.5]))
    >>> space = MixtureSpace(law.domains_, max_repeat=1.8)  # at most 0.6 of one domain
    >>> {name: round(w, 2) for name, w in propose(law, space, exact=True).weights.items()}
    {'domain 0': 0.0, 'domain 1': 0.4, 'domain 2': 0.6}
    """
    if set(space.domains) != set(regressor.domains_):
        strange = sorted(set(space.domains) ^ set(regressor.domains_))
        raise InputError(f"domain {strange[0]!r} is known to only one of space and regressor")
    if direction not in ("lower", "higher") or kl_to_prior < 0 or not 1 <= top_k <= n:
        raise InputError(
            f"direction {direction!r}, kl_to_prior {kl_to_prior}, top_k {top_k} of {n}: 'lower' or 'higher', a number"
            " of at least 0, and 1 <= top_k <= n are expected"
        )
    sign = 1.0 if direction == "lower" else -1.0
    share = _weights(regressor, target)

    def predicted(W: Array) -> Array:
        found = regressor.predict({name: W[:, i] for i, name in enumerate(space.domains)})
        return found.reshape(len(W), -1) @ share

    def objective(W: Array) -> Array:
        return sign * predicted(W) + kl_to_prior * rel_entr(W, space.prior).sum(axis=1)

    if exact:
        if regressor.kind not in ("linear", "exp") or (regressor.kind == "exp" and sign < 0):
            raise InputError(
                f"an exact proposal needs a linear or exp regressor and a lower target, not {regressor.kind}"
            )
        weights, spread = _solve(objective, space), 0.0
    else:
        drawn = dirichlet(space, n, 1.0, generator("propose", seed))
        if len(drawn) < top_k:
            raise InputError(
                f"{len(drawn)} of {20 * n} drawn mixtures keep to the caps: raise max_repeat, or use exact"
            )
        order = np.argsort(objective(drawn), kind="stable")[:top_k]
        weights, spread = drawn[order].mean(axis=0), float(predicted(drawn[order]).std())
    columns = [regressor.domains_.index(name) for name in space.domains]
    inside = in_hull(weights, regressor.mixtures_[:, columns])
    if not inside:
        warnings.warn(
            "the proposal lies outside the mixtures that were fitted: sample more of that region, or pull it back with"
            " kl_to_prior",
            RuntimeWarning,
            stacklevel=2,
        )
    obvious = baselines(space)
    values = dict(zip(obvious, map(float, predicted(np.array(list(obvious.values())))), strict=True))
    single = (min if sign > 0 else max)((k for k in values if k.startswith("only ")), key=lambda k: values[k])
    return Mixture(
        space.named(weights),
        float(predicted(weights[None])[0]),
        spread,
        space.epochs(weights),
        {name: values[name] for name in ("natural", "equal shares", single)},
        inside,
    )


def _weights(regressor: MixtureRegressor, target: str | Mapping[str, float] | None) -> Array:
    k = len(regressor.targets_)
    if target is None:
        return np.full(k, 1 / k)
    chosen = {target: 1.0} if isinstance(target, str) else dict(target)
    share = np.zeros(k)
    for name, weight in chosen.items():
        if not (np.isfinite(weight) and weight >= 0):
            raise InputError(f"target {name!r} has the weight {weight}: a number of at least 0 is expected")
        share[regressor.index(name)] = weight
    if share.sum() <= 0:
        raise InputError("target: at least one weight above 0 is expected")
    return share


def baselines(space: MixtureSpace) -> dict[str, Array]:
    """The natural mixture, equal shares, and each domain alone (``only a``), (d,) each, all cut to the caps.

    >>> {name: w.round(2).tolist() for name, w in baselines(MixtureSpace(("a", "b"), (0.9, 0.1), 2)).items()}
    {'natural': [0.9, 0.1], 'equal shares': [0.8, 0.2], 'only a': [1.0, 0.0], 'only b': [0.8, 0.2]}
    """
    found = {"natural": _fill(space.prior, space), "equal shares": _fill(np.ones(len(space.domains)), space)}
    for i, name in enumerate(space.domains):
        alone = np.full(len(space.domains), 1e-12)
        alone[i] = 1.0
        found[f"only {name}"] = _fill(alone if space.caps[i] >= 1 else np.where(alone == 1, 1e12, space.prior), space)
    return found


def _fill(wish: Array, space: MixtureSpace) -> Array:
    """Shares in proportion to the wish, none above its cap; what is cut goes to the others in proportion."""
    full = np.zeros(len(wish), dtype=bool)
    while True:
        left = 1 - space.caps[full].sum()
        shares = np.where(full, space.caps, left * wish / wish[~full].sum() if (~full).any() else 0.0)
        over = ~full & (shares > space.caps + 1e-12)
        if not over.any():
            return shares / shares.sum()
        full |= over


def _solve(objective: Any, space: MixtureSpace) -> Array:
    start = _fill(space.prior, space)
    found = minimize(
        lambda w: float(objective(np.clip(w, 0, None)[None] / np.clip(w, 0, None).sum())[0]),
        start,
        bounds=[(0.0, cap) for cap in space.caps],
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return _fill(np.clip(found.x, 1e-15, None), space)


def in_hull(w: Array, W: Array) -> bool:
    """Whether w (d,) is a convex combination of the rows of W (n, d), give or take a twentieth of its mass.

    In many dimensions a sample's hull is small: of the paper's 512 mixtures of 17 domains one in ten lies farther than
    a tenth of its mass from the hull of the others, and half of them farther than a fortieth.
    """
    d = len(w)
    slack = np.r_[np.zeros(len(W)), np.ones(2 * d)]
    equal = np.vstack([np.hstack([W.T, np.eye(d), -np.eye(d)]), np.r_[np.ones(len(W)), np.zeros(2 * d)]])
    found = linprog(slack, A_eq=equal, b_eq=np.r_[w, 1.0], bounds=(0, None), method="highs")
    return bool(found.success and found.fun / 2 <= NEAR)
