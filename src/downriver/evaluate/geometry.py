"""The geometry of a representation: what it keeps of its inputs and of its targets, how many dimensions it uses, and
how well a split of some conditions carries over to others.

Reach for it to compare layers, activation functions or checkpoints on the mean features of each condition (class,
stimulus, cell of a design); noise in single rows would lower every alignment. The measures are those of «Task structure
and nonlinearity jointly determine learned representational geometry» (2024); parallelism and cross-condition
generalisation were introduced by Bernardi et al. 2020. Kernels are centred throughout.
"""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.nn.similarity import Array, alignment, as_rows, centre, gram

EXACT = 8
"""Pairs up to which all pairings are tried."""
MOST = 256
"""Conditions up to which the report has parallelism and generalisation; they take P² / 4 difference vectors."""
CHOICES = 200
"""Choices of training pairs that cross-condition generalisation is averaged over."""


@dataclass(frozen=True)
class GeometryReport:
    """What ``geometry_report`` found. Alignments are ``None`` without inputs or targets; ``parallelism`` and ``ccgp``
    have one entry a target that has two conditions on either side, up to 256 conditions.
    """

    conditions: int
    participation_ratio: float
    sparsity: float
    target_alignment: float | None = None
    input_alignment: float | None = None
    partial_target_alignment: float | None = None
    parallelism: dict[str, float] = field(default_factory=dict)
    ccgp: dict[str, float] = field(default_factory=dict)


def geometry_report(
    features: Any, inputs: Any = None, targets: Any = None, conditions: Any = None, *, debiased: bool = False
) -> GeometryReport:
    """Every measure of this file at once.

    Parameters
    ----------
    features
        (n, d) array or tensor: hidden states, activations, embeddings.
    inputs
        (n, e) of the same rows: raw inputs, or the embeddings of an earlier layer.
    targets
        (n, K) of two values each, or (n,) class ids (one target a class).
    conditions
        (n,) what each row is an instance of: rows of one condition are averaged first, as they should be. By default
        each row is a condition. Targets must not differ within a condition.
    debiased
        Alignments by the unbiased estimate, for few conditions.

    >>> cube = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    >>> report = geometry_report(cube, targets=cube[:, :1] > 0)
    >>> round(report.participation_ratio, 6), report.parallelism, round(report.target_alignment, 3)
    (3.0, {'0': 1.0}, 0.577)
    """
    rows = as_rows(features)
    given = None if inputs is None else as_rows(inputs, "inputs")
    wanted = None if targets is None else _targets(targets)
    for name, other in (("inputs", given), ("targets", wanted)):
        if other is not None and len(other) != len(rows):
            raise InputError(f"{name} has {len(other)} rows, features {len(rows)}: both must describe the same rows")
    if conditions is not None:
        ids = _conditions(conditions, len(rows))
        rows, given = _means(rows, ids), None if given is None else _means(given, ids)
        if wanted is not None:
            averaged = _means(wanted, ids)
            if not np.isin(averaged, (0.0, 1.0)).all():
                raise InputError("targets differ within a condition: each condition must have one value of each target")
            wanted = averaged
    z, report = gram(rows), {}
    if given is not None:
        report["input_alignment"] = alignment(z, gram(given), debiased=debiased)
    if wanted is not None:
        y = gram(2 * wanted - 1)
        report["target_alignment"] = alignment(z, y, debiased=debiased)
        if given is not None:
            report["partial_target_alignment"] = partial_alignment(z, y, gram(given))
    parallelism, generalisation = {}, {}
    for k, column in enumerate(() if wanted is None else wanted.T.astype(bool)):
        if min(column.sum(), (~column).sum()) > 1 and len(rows) <= MOST:
            parallelism[str(k)] = parallelism_score(rows, column)
            generalisation[str(k)] = ccgp(rows, column)
    return GeometryReport(
        len(rows), participation_ratio(rows), sparsity(rows), **report, parallelism=parallelism, ccgp=generalisation
    )


def partial_alignment(K: Any, L: Any, given: Any) -> float:
    """The alignment of two kernels that a third does not explain: the partial correlation of their centred entries.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(40, 3))
    >>> K, L = (gram(np.hstack([x, 0.1 * rng.normal(size=(40, 3))])) for _ in range(2))
    >>> alignment(K, L) > 0.99, abs(partial_alignment(K, L, gram(x))) < 0.2
    (True, True)
    """
    a, b, c = alignment(K, L), alignment(K, given), alignment(L, given)
    left = (1 - b**2) * (1 - c**2)
    return (a - b * c) / math.sqrt(left) if left > 1e-20 else 0.0


def participation_ratio(features: Any) -> float:
    """(Σλ)² / Σλ² of the covariance's eigenvalues: how many directions the rows (n, d) spread over, 1 to d.

    >>> round(participation_ratio(np.vstack([np.eye(4), -np.eye(4)])), 6)
    4.0
    """
    rows = as_rows(features)
    kernel = centre(gram(rows - rows.mean(axis=0)))
    norm = float((kernel**2).sum())
    if norm == 0:
        raise InputError("all rows of features are equal: they have no dimension")
    return float(np.trace(kernel)) ** 2 / norm


def sparsity(features: Any) -> float:
    """How rarely a neuron is active, the mean over those that ever are of 1 − ⟨|z|⟩² / ⟨z²⟩ (Treves & Rolls 1991).

    0 where every activity has one size; 1 − 1/n where each neuron answers to one of n rows.

    >>> sparsity(np.eye(4)), sparsity(np.ones((4, 2)))
    (0.75, 0.0)
    """
    rows = as_rows(features)
    power = (rows**2).mean(axis=0)
    used = power > 0
    if not used.any():
        raise InputError("features are 0 throughout: no neuron is active")
    return float((1 - np.abs(rows).mean(axis=0)[used] ** 2 / power[used]).mean())


def selectivity(features: Any, targets: Any) -> Array:
    """The squared correlation of every neuron with every target, (d, K): 1 for a neuron that tells a target apart.

    Neurons that never change get 0.

    >>> cube = np.array(list(itertools.product([-1.0, 1.0], repeat=2)))
    >>> selectivity(cube, cube[:, 0] > 0).round(6)
    array([[1.],
           [0.]])
    """
    rows, wanted = as_rows(features), _targets(np.asarray(targets)[:, None] if np.ndim(targets) == 1 else targets)
    if len(rows) != len(wanted):
        raise InputError(f"targets has {len(wanted)} rows, features {len(rows)}: both must describe the same rows")
    z, y = rows - rows.mean(axis=0), wanted - wanted.mean(axis=0)
    scale = (z**2).sum(axis=0)[:, None] * (y**2).sum(axis=0)
    return np.divide((z.T @ y) ** 2, scale, out=np.zeros_like(scale), where=scale > 0)


def parallelism_score(features: Any, dichotomy: Any, method: Literal["auto", "exact", "assignment"] = "auto") -> float:
    """How parallel the steps from one side of a dichotomy to the other are: 1 for a factorised code.

    Conditions on the two sides are paired, and the cosines of the pairs' difference vectors averaged over all pairs
    of pairs; the best pairing counts. Random points in many dimensions score about 0.

    Parameters
    ----------
    features
        (P, d) condition means.
    dichotomy
        (P,) of two values; where the sides are unequal, some conditions of the larger one stay unpaired.
    method
        ``exact`` tries every pairing, ``assignment`` climbs from many starts by optimal assignment; ``auto`` is exact
        up to eight pairs. ``exact`` beyond that becomes ``assignment``, with a warning.

    P² / 4 difference vectors are held in memory.

    >>> cube = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    >>> parallelism_score(cube, cube[:, 0] > 0)
    1.0
    """
    return _most_parallel(*_sides(features, dichotomy), method)


def pairing_parallelism(positive: Any, negative: Any) -> float:
    """The mean cosine of the difference vectors positive[i] − negative[i], over all pairs of them.

    >>> pairing_parallelism([[1, 0], [1, 1]], [[0, 0], [0, 1]])
    1.0
    """
    return _mean_cosine(_unit(as_rows(positive) - as_rows(negative)))


def ccgp(
    features: Any,
    dichotomy: Any,
    n_pairs: int | None = None,
    classifier: Literal["svm", "logistic"] = "svm",
    *,
    pairs: Any = None,
) -> float:
    """Cross-condition generalisation: the accuracy on held-out conditions of a linear classifier for the dichotomy.

    The classifier is fitted on ``n_pairs`` pairs of conditions from either side, by default half of them, and tested on
    the others; the mean over all choices of pairs, or over 200 random ones. 1 where the dichotomy is a direction of its
    own, 0.5 by chance.

    ``pairs`` (m, 2) are the numbers of conditions that belong together, such as those of a design that differ in this
    variable only. By default conditions are paired so that the squared distances are least in sum; a pairing chosen
    from the features themselves lifts random points above chance (eight of them to 0.6).

    >>> cube = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    >>> ccgp(cube, cube[:, 0] > 0)
    1.0
    """
    if classifier not in ("svm", "logistic"):
        raise unknown("classifier", classifier, ("svm", "logistic"))
    positive, negative = _sides(features, dichotomy)
    if pairs is None:
        squares = np.square(positive).sum(axis=1)[:, None] + np.square(negative).sum(axis=1) - 2 * positive @ negative.T
        order = linear_sum_assignment(squares)
        paired = np.stack([positive[order[0]], negative[order[1]]])  # (2, m, d)
    else:
        paired = _given_pairs(as_rows(features), _dichotomy(dichotomy), pairs)
    m = paired.shape[1]
    n_pairs = m // 2 if n_pairs is None else n_pairs
    if not 1 <= n_pairs < m:
        raise InputError(f"n_pairs is {n_pairs}: from 1 to {m - 1} of the {m} pairs are expected")
    points = paired.reshape(2 * m, -1)
    points = points - points.mean(axis=0)
    points = points / (np.linalg.norm(points) / math.sqrt(2 * m) or 1.0)
    labels = np.repeat([1, 0], m)
    scores = []
    for chosen in _subsets(m, n_pairs):
        train = np.isin(np.arange(2 * m) % m, chosen)
        fitted = _classifier(classifier).fit(points[train], labels[train])
        scores.append(fitted.score(points[~train], labels[~train]))
    return float(np.mean(scores))


def separable(features: Any, dichotomy: Any) -> bool:
    """Whether a hyperplane separates the two sides of a dichotomy exactly (a linear programme decides).

    >>> square = [[0, 0], [0, 1], [1, 0], [1, 1]]
    >>> separable(square, [0, 0, 0, 1]), separable(square, [0, 1, 1, 0])
    (True, False)
    """
    rows, side = as_rows(features), _dichotomy(dichotomy)
    if len(side) != len(rows):
        raise InputError(f"the dichotomy has {len(side)} entries for {len(rows)} conditions")
    rows = rows - rows.mean(axis=0)
    rows = np.hstack([rows / (np.abs(rows).max() or 1.0), np.ones((len(rows), 1))])
    signs = np.where(side, 1.0, -1.0)[:, None]
    found = linprog(np.zeros(rows.shape[1]), -signs * rows, -np.ones(len(rows)), bounds=(None, None))
    return found.status == 0


def shattering(features: Any, *, balanced: bool = True, max_n: int = 1000, seed: int = 0) -> float:
    """The share of dichotomies of the conditions that a hyperplane separates: 1 for a code of high dimension.

    >>> shattering(np.eye(4)), round(shattering([[0, 0], [0, 1], [1, 0], [1, 1]]), 3)
    (1.0, 0.667)
    """
    rows = as_rows(features)
    found = [separable(rows, d) for d in all_dichotomies(len(rows), balanced=balanced, max_n=max_n, seed=seed)]
    return float(np.mean(found))


def all_dichotomies(
    n_points: int, *, balanced: bool = True, max_n: int | None = None, seed: int = 0
) -> list[NDArray[np.bool_]]:
    """All ways to split P conditions in two, each once, (P,) boolean with the first condition on the false side.

    ``balanced`` keeps those with equal sides. Where there are more than ``max_n``, so many different ones are drawn by
    ``seed``.

    >>> len(all_dichotomies(4)), len(all_dichotomies(4, balanced=False)), len(all_dichotomies(64, max_n=10))
    (3, 7, 10)
    """
    if n_points < 2 or (balanced and n_points % 2):
        raise InputError(f"{n_points} conditions: at least two{', an even number,' if balanced else ''} are expected")
    total = math.comb(n_points - 1, n_points // 2) if balanced else 2 ** (n_points - 1) - 1
    if max_n is None or total <= max_n:
        sizes = [n_points // 2] if balanced else range(1, n_points)
        chosen: list[tuple[int, ...]] = [c for k in sizes for c in itertools.combinations(range(1, n_points), k)]
    else:
        rng = generator("dichotomies", n_points, balanced, seed)
        drawn: set[tuple[int, ...]] = set()
        while len(drawn) < max_n:
            if balanced:
                split = np.isin(np.arange(n_points), rng.permutation(n_points)[: n_points // 2])
            else:
                split = rng.integers(2, size=n_points).astype(bool)
            side = tuple(np.flatnonzero(split != split[0]).tolist())  # the one without the first condition
            if side:
                drawn.add(side)
        chosen = sorted(drawn)
    return [np.isin(np.arange(n_points), side) for side in chosen]


def _targets(targets: Any) -> Array:
    """(n, K) of 0 and 1."""
    values = targets.detach().cpu().numpy() if hasattr(targets, "detach") else np.asarray(targets)
    if values.ndim == 1:
        classes = np.unique(values)
        if len(classes) < 2:
            raise InputError("targets hold one class only: at least two are expected")
        return (values[:, None] == (classes[1:] if len(classes) == 2 else classes)).astype(np.float64)
    columns = []
    for k, column in enumerate(values.T if values.ndim == 2 else ()):
        if len(np.unique(column)) != 2:
            raise InputError(f"targets, column {k}: two different values are expected, not {len(np.unique(column))}")
        columns.append(column == column.max())
    if not columns:
        raise InputError(f"targets of shape {values.shape}: (n,) or (n, K) is expected")
    return np.stack(columns, axis=1).astype(np.float64)


def _conditions(conditions: Any, n: int) -> NDArray[np.intp]:
    values = conditions.detach().cpu().numpy() if hasattr(conditions, "detach") else np.asarray(conditions)
    if values.shape != (n,):
        raise InputError(f"conditions of shape {values.shape} for {n} rows: one a row is expected")
    known, ids = np.unique(values, return_inverse=True)
    if len(known) < 2:
        raise InputError("there is one condition only: at least two are expected")
    return ids


def _means(rows: Array, ids: NDArray[np.intp]) -> Array:
    sums = np.zeros((ids.max() + 1, rows.shape[1]))
    np.add.at(sums, ids, rows)
    return sums / np.bincount(ids)[:, None]


def _dichotomy(dichotomy: Any) -> NDArray[np.bool_]:
    side = dichotomy.detach().cpu().numpy() if hasattr(dichotomy, "detach") else np.asarray(dichotomy)
    if side.ndim != 1 or len(np.unique(side)) > 2:
        raise InputError("a dichotomy: one of two values a condition is expected")
    if len(np.unique(side)) < 2:
        raise InputError("a side of the dichotomy is empty: conditions on both sides are expected")
    return side == side.max()


def _sides(features: Any, dichotomy: Any) -> tuple[Array, Array]:
    rows, side = as_rows(features), _dichotomy(dichotomy)
    if len(side) != len(rows):
        raise InputError(f"the dichotomy has {len(side)} entries for {len(rows)} conditions")
    if min(side.sum(), (~side).sum()) < 2:
        raise InputError("a side of the dichotomy has one condition: two at least are expected on either side")
    return rows[side], rows[~side]


def _given_pairs(rows: Array, side: NDArray[np.bool_], pairs: Any) -> Array:
    """(2, m, d): the positive and the negative condition of each pair."""
    numbers = np.asarray(pairs)
    if numbers.ndim != 2 or numbers.shape[1] != 2 or numbers.dtype.kind not in "iu" or len(numbers) < 2:
        raise InputError(
            f"pairs of shape {numbers.shape}: numbers of conditions, (m, 2) with m at least 2, are expected"
        )
    if numbers.min() < 0 or numbers.max() >= len(rows) or len(np.unique(numbers)) < numbers.size:
        raise InputError(f"pairs: different numbers from 0 to {len(rows) - 1} are expected")
    if (side[numbers[:, 0]] == side[numbers[:, 1]]).any():
        raise InputError("pairs: the two conditions of a pair must lie on different sides of the dichotomy")
    numbers = np.where(side[numbers[:, :1]], numbers, numbers[:, ::-1])
    return rows[numbers.T]


def _unit(vectors: Array) -> Array:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def _mean_cosine(unit: Array) -> float:
    """Over ordered pairs of different vectors: (‖Σ u‖² − m) / m(m − 1)."""
    m = len(unit)
    return float(round((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (m * (m - 1)), 12))


def _most_parallel(positive: Array, negative: Array, method: str) -> float:
    """The largest mean cosine of any pairing."""
    if method not in ("auto", "exact", "assignment"):
        raise unknown("method", method, ("auto", "exact", "assignment"))
    few, many = (positive, negative) if len(positive) <= len(negative) else (negative, positive)
    m = len(few)
    exact = method != "assignment" and m <= EXACT and math.perm(len(many), m) <= math.factorial(EXACT)
    if method == "exact" and not exact:
        warnings.warn(f"{m} pairs are too many to try every pairing: the assignment is used", stacklevel=3)
    unit = _unit(few[:, None] - many[None])  # (m, M, d)
    if exact:
        return _exhausted(unit)
    return max(_mean_cosine(unit[np.arange(m), columns]) for columns in _climbed(unit))


def _exhausted(unit: Array) -> float:
    """The largest mean cosine over all pairings, from the cosines of all differences with one another."""
    m, of, d = unit.shape
    cosines = unit.reshape(-1, d) @ unit.reshape(-1, d).T
    cells = np.array(list(itertools.permutations(range(of), m))) + of * np.arange(m)
    totals = sum(cosines[cells[:, i], cells[:, j]] for i, j in itertools.combinations(range(m), 2))
    return float(round(2 * np.max(totals) / (m * (m - 1)), 12))


def _climbed(unit: Array) -> Iterator[NDArray[np.intp]]:
    """Local maxima of ‖Σ u‖ over pairings: best pairing along a direction, best direction of a pairing, and again."""
    m, of, d = unit.shape
    every = max(1, m * of // max(8, 512 // m))
    starts = np.vstack([unit.sum(axis=(0, 1))[None], unit.reshape(-1, d)[::every]])
    rows = np.arange(m)
    for start in starts:
        direction, columns = start, None
        for _ in range(100):
            found = linear_sum_assignment(unit @ direction, maximize=True)[1]
            if columns is not None and (found == columns).all():
                break
            columns = found
            direction = unit[rows, columns].sum(axis=0)
        assert columns is not None
        yield columns


def _subsets(m: int, k: int) -> list[NDArray[np.intp]]:
    if math.comb(m, k) <= CHOICES:
        return [np.array(chosen) for chosen in itertools.combinations(range(m), k)]
    rng = generator("ccgp", m, k)
    return [rng.permutation(m)[:k] for _ in range(CHOICES)]


def _classifier(name: str) -> Any:
    return SVC(kernel="linear", C=100.0) if name == "svm" else LogisticRegression(C=100.0, max_iter=1000)
