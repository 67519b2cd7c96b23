"""When unlabelled rows save labels: what theory says up to constants, and what a simulation or your own data show.

Reach for ``labels_saved`` before labels are bought, and for ``advantage_study`` to measure it. «On the Provable
Advantage of Unsupervised Pretraining» (2023): two-phase learning has excess risk √(C_Φ/m) + √(C_Ψ/n) against √(C_Φ∘Ψ/n)
without pretraining. The theorem's constants are left out, so a bound here compares and guarantees nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.pretrain.latent import Array, TwoPhase

Kind = Literal["factor", "mixture", "contrastive"]
PENALTIES = np.logspace(-3, 3, 25)
"""The ridge penalties that the supervised baseline chooses from by leave-one-out."""


def bound(
    kind: Kind,
    *,
    d: int,
    m: float,
    n: float,
    r: int | None = None,
    K: int | None = None,
    kappa: float = 1.0,
    delta: float = 0.05,
) -> dict[str, float | str]:
    """The terms of the excess-risk bound, up to constants: they compare settings and guarantee nothing.

    Parameters
    ----------
    kind
        ``factor`` (r factors): C_Φ = dr, C_Ψ = r, without pretraining d. ``mixture`` (K components): Kd, K and Kd.
        ``contrastive`` (r features of a linear map): dr, r and d.
    d, m, n
        Columns, unlabelled rows, labelled rows.
    kappa
        κ of the informativeness condition; 1 when the likelihood tells all about the latent variable.
    delta
        The bound holds with probability 1 − δ.

    Returns ``pretraining`` κ√((C_Φ + log 1/δ)/m), ``labelled`` √((C_Ψ + log 1/δ)/n), their sum ``two_phase``,
    ``supervised`` √((C_Φ∘Ψ + log 1/δ)/n), and a ``note``.

    >>> terms = bound("factor", d=60, r=3, m=20_000, n=80)
    >>> round(terms["two_phase"], 2), round(terms["supervised"], 2), terms["note"]
    (0.37, 0.89, 'up to constants')
    """
    phi, psi, joint = _capacities(kind, d, r, K, delta)
    _positive(m=m, n=n, kappa=kappa)
    terms: dict[str, float] = {
        "pretraining": kappa * math.sqrt(phi / m),
        "labelled": math.sqrt(psi / n),
        "supervised": math.sqrt(joint / n),
    }
    return {**terms, "two_phase": terms["pretraining"] + terms["labelled"], "note": "up to constants"}


@dataclass(frozen=True)
class Saving:
    """Labels that pretraining stands for, up to constants.

    ``supervised_labels`` n′ would be needed without pretraining for the bound that n labels have with it, ``saved`` is
    n′ − n (negative: pretraining loses), and below ``crossover`` n* labels two-phase learning has the smaller bound.
    """

    supervised_labels: float
    saved: float
    crossover: float
    note: str = "up to constants"


def labels_saved(
    kind: Kind,
    *,
    d: int,
    m: float,
    n: float,
    r: int | None = None,
    K: int | None = None,
    kappa: float = 1.0,
    delta: float = 0.05,
) -> Saving:
    """How many labels m unlabelled rows stand for beside n labelled ones, by the bound; parameters as in ``bound``.

    >>> saving = labels_saved("factor", d=60, r=3, m=20_000, n=20)
    >>> round(saving.supervised_labels), round(saving.saved), round(saving.crossover)
    (152, 132, 3292)
    >>> labels_saved("factor", d=60, r=3, m=200, n=5000).saved < 0
    True
    """
    terms = bound(kind, d=d, m=m, n=n, r=r, K=K, kappa=kappa, delta=delta)
    phi, psi, joint = _capacities(kind, d, r, K, delta)
    needed = joint / float(terms["two_phase"]) ** 2
    return Saving(needed, needed - n, m * max(0.0, math.sqrt(joint) - math.sqrt(psi)) ** 2 / (kappa**2 * phi))


@dataclass(frozen=True)
class Draw:
    """One draw of data: unlabelled rows, labelled rows with targets, rows to test with targets, and, where they are
    known, what the Bayes predictor says of these and the true latent variable's posterior mean.
    """

    unlabelled: Array
    labelled: Array
    targets: NDArray[Any]
    test: Array
    test_targets: NDArray[Any]
    bayes: NDArray[Any] | None = None
    oracle: Callable[[Array], Array] | None = None


Source = Callable[[np.random.Generator, int, int], Draw]


def factor_source(
    d: int = 60, r: int = 3, *, noise: float = 0.3, low_variance: bool = False, test: int = 4000
) -> Source:
    """Data of the factor model x = B z + μ, z ~ N(0, I_r), μ ~ N(0, I_d), y = βᵀz + ν, anew for every generator.

    B has standard normal entries, β is a random unit vector, ν has deviation ``noise``. ``low_variance`` lets y depend
    on a direction of x at right angles to all factors instead: the model is then wrong for the task, and pretraining
    loses.

    >>> factor_source(10, 2, test=5)(np.random.default_rng(0), 30, 4).labelled.shape
    (4, 10)
    """

    def draw(rng: np.random.Generator, m: int, n: int) -> Draw:
        B, beta = rng.standard_normal((d, r)), rng.standard_normal(r)
        beta /= np.linalg.norm(beta)
        z = rng.standard_normal((m + n + test, r))
        x = z @ B.T + rng.standard_normal((m + n + test, d))
        if low_variance:
            off = np.linalg.qr(np.hstack([B, rng.standard_normal((d, 1))]))[0][:, r]
            signal = x @ off
            best = signal
        else:
            signal = z @ beta
            best = x @ np.linalg.solve(B @ B.T + np.eye(d), B) @ beta
        y = signal + noise * rng.standard_normal(len(x))

        def posterior(rows: Array) -> Array:
            return rows @ np.linalg.solve(B @ B.T + np.eye(d), B)

        return Draw(x[:m], x[m : m + n], y[m : m + n], x[m + n :], y[m + n :], best[m + n :], posterior)

    return draw


def data_source(X: Any, y: Any, *, test: float = 0.3) -> Source:
    """Real rows: a share ``test`` to test; of the others n labelled (n/C of each of C classes), m unlabelled.

    Columns are standardised by the unlabelled rows.

    >>> source = data_source(np.random.default_rng(0).normal(size=(100, 3)), np.arange(100) % 2)
    >>> draw = source(np.random.default_rng(1), 50, 6)
    >>> draw.unlabelled.shape, np.bincount(draw.targets)
    ((50, 3), array([3, 3]))
    """
    rows, labels = np.asarray(X, dtype=np.float64), np.unique(np.asarray(y), return_inverse=True)[1]
    if rows.ndim != 2 or len(rows) != len(labels) or not np.isfinite(rows).all():
        raise InputError(f"X of shape {rows.shape} and {len(labels)} labels: finite rows (n, d), and as many, expected")
    if labels.max() == 0:
        raise InputError("y holds one class only: at least two are expected")

    def draw(rng: np.random.Generator, m: int, n: int) -> Draw:
        classes = labels.max() + 1
        order = rng.permutation(len(rows))
        held, rest = np.split(order, [round(test * len(rows))])
        few = np.concatenate([rest[labels[rest] == c][: max(1, n // classes)] for c in range(classes)])
        others = rest[~np.isin(rest, few)]
        if m > len(others):
            raise InputError(f"{m} unlabelled rows are asked for, {len(others)} are left beside {n} labelled ones")
        mean, scale = rows[others[:m]].mean(axis=0), rows[others[:m]].std(axis=0)
        scaled = (rows - mean) / np.where(scale > 0, scale, 1.0)
        return Draw(scaled[others[:m]], scaled[few], labels[few], scaled[held], labels[held])

    return draw


@dataclass(frozen=True)
class Advantage:
    """What ``advantage_study`` measured: ``table`` has a row (m, n, seed, method, risk) each; ``methods`` two-phase,
    supervised, and oracle where the source knows it. Without m (0) for what does not pretrain.
    """

    table: pl.DataFrame

    def medians(self) -> pl.DataFrame:
        """The median risk over seeds by method, m and n."""
        return self.table.group_by("method", "m", "n").agg(pl.col("risk").median()).sort("method", "m", "n")

    def crossover(self, m: int) -> float:
        """The number of labels from which two-phase learning is no better any more, interpolated in log n.

        ``inf`` where it is better at every n of the grid, 0 where at none.
        """
        n, gap = self._gap(m)
        worse = np.flatnonzero(gap >= 0)
        if not len(worse):
            return math.inf
        first = int(worse[0])
        if first == 0:
            return 0.0
        share = gap[first - 1] / (gap[first - 1] - gap[first])
        return float(np.exp(np.log(n[first - 1]) + share * (np.log(n[first]) - np.log(n[first - 1]))))

    def labels_saved(self, m: int, n: int) -> float:
        """Labels that supervised learning would need for the two-phase risk at (m, n), less n; ``inf`` beyond the grid.

        Interpolated in log n on the supervised curve, made non-increasing.
        """
        grid, supervised = self._curve("supervised", 0)
        ours = dict(zip(*self._curve("two-phase", m), strict=True))
        if n not in ours:
            raise InputError(f"n = {n} is not on the grid: one of {', '.join(str(int(k)) for k in ours)} is expected")
        falling = np.minimum.accumulate(supervised)
        if ours[n] < falling[-1]:
            return math.inf
        return float(np.exp(np.interp(-ours[n], -falling, np.log(grid))) - n)

    def _gap(self, m: int) -> tuple[Array, Array]:
        n, two = self._curve("two-phase", m)
        return n, two - self._curve("supervised", 0)[1]

    def _curve(self, method: str, m: int) -> tuple[Array, Array]:
        rows = self.medians().filter(pl.col("method") == method, pl.col("m") == m)
        if not len(rows):
            known = sorted(set(self.table.filter(method="two-phase")["m"]))
            raise InputError(f"m = {m} is not on the grid: one of {', '.join(map(str, known))} is expected")
        return rows["n"].to_numpy().astype(np.float64), rows["risk"].to_numpy()


def advantage_study(
    source: Source,
    pretrainer: Any,
    *,
    m_grid: Sequence[int],
    n_grid: Sequence[int],
    seeds: int = 10,
    head: Any = None,
    supervised: Any = None,
    seed: int = 0,
) -> Advantage:
    """Measure two-phase learning against supervised learning over m unlabelled and n labelled rows.

    Parameters
    ----------
    source
        ``factor_source(...)``, ``data_source(X, y)``, or a function of (generator, m, n) that gives a ``Draw``. Within
        a seed all m and n are cut from one draw of the largest.
    pretrainer
        Fitted to m unlabelled rows.
    head, supervised
        On the latent variable, and on the rows themselves. Default for classes: logistic regression; for numbers:
        least squares, and ridge with its penalty chosen by leave-one-out (plain least squares near n = d is no fair
        rival).

    The risk is the error rate for classes; for numbers the mean squared distance to the Bayes predictor where the
    source knows it (the excess risk), else to the targets.

    >>> from downriver.pretrain import FactorPretrainer
    >>> found = advantage_study(
    ...     factor_source(20, 2, test=500), FactorPretrainer(2), m_grid=[1000], n_grid=[10, 40], seeds=5
    ... )
    >>> found.crossover(1000), found.labels_saved(1000, 10) > 0
    (inf, True)
    """
    if not (len(m_grid) and len(n_grid) and seeds >= 1) or min(*m_grid, *n_grid) < 1:
        raise InputError("m_grid, n_grid and seeds: at least one of each, and all of them positive, are expected")
    records = []
    for number in range(seeds):
        whole = source(generator("advantage", seed, number), max(m_grid), max(n_grid))
        classes = whole.bayes is None and np.asarray(whole.targets).dtype.kind in "iub"
        last = head if head is not None else LogisticRegression(max_iter=2000) if classes else LinearRegression()
        plain = supervised
        if plain is None:
            plain = LogisticRegression(max_iter=2000) if classes else RidgeCV(alphas=PENALTIES)
        fits = {m: clone(pretrainer).fit(whole.unlabelled[:m]) for m in m_grid}

        def record(method: str, m: int, n: int, predicted: NDArray[Any]) -> None:
            risk = _risk(whole, predicted, classes)  # noqa: B023
            records.append({"m": m, "n": n, "seed": number, "method": method, "risk": risk})  # noqa: B023

        for n in n_grid:
            x, y = _first(whole, n, classes)
            record("supervised", 0, n, clone(plain).fit(x, y).predict(whole.test))
            for m, fitted in fits.items():
                two = TwoPhase(fitted, last, prefitted=True).fit(whole.unlabelled[:m], x, y)
                record("two-phase", m, n, two.predict(whole.test))
            if whole.oracle is not None:
                known = clone(last).fit(whole.oracle(x), y)
                record("oracle", 0, n, known.predict(whole.oracle(whole.test)))
    return Advantage(pl.DataFrame(records))


def _first(draw: Draw, n: int, classes: bool) -> tuple[Array, NDArray[Any]]:
    """The first n labelled rows; of classes as many of each."""
    if not classes:
        return draw.labelled[:n], draw.targets[:n]
    known = np.unique(draw.targets)
    each = max(1, n // len(known))
    chosen = np.concatenate([np.flatnonzero(draw.targets == c)[:each] for c in known])
    return draw.labelled[chosen], draw.targets[chosen]


def _risk(draw: Draw, predicted: NDArray[Any], classes: bool) -> float:
    if classes:
        return float(np.mean(predicted != draw.test_targets))
    return float(np.mean(np.square(predicted - (draw.test_targets if draw.bayes is None else draw.bayes))))


def _capacities(kind: str, d: int, r: int | None, K: int | None, delta: float) -> tuple[float, float, float]:
    """C_Φ, C_Ψ and C_Φ∘Ψ, each with log 1/δ."""
    if kind not in ("factor", "mixture", "contrastive"):
        raise unknown("kind", kind, ("factor", "mixture", "contrastive"))
    name, size = ("K", K) if kind == "mixture" else ("r", r)
    if size is None:
        raise InputError(f"a {kind} model needs {name}")
    _positive(d=d, **{name: size})
    if kind != "mixture" and size > d:
        raise InputError(f"r is {size}: at most d = {d} is expected")
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}: a probability between 0 and 1 is expected")
    log = math.log(1 / delta)
    return d * size + log, size + log, (d * size if kind == "mixture" else d) + log


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name} is {value}: a positive number is expected")
