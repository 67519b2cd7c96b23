"""Paired statistics for verdicts: differences seed by seed, an interval of their mean, and a word."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from downriver.core.errors import InputError

Word = Literal["holds", "fails", "undecided"]
FEWEST = 3  # seeds that a verdict needs


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences, its interval, and the p-value of the exact sign-flip test."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired(differences: Sequence[float], level: float = 0.95, margin: float = 0.0, resamples: int = 9999) -> Paired:
    """Describe paired differences (one a seed, positive meaning better).

    ``low`` and ``high`` bound the mean by a BCa bootstrap (the percentile one where BCa is undefined); ``p`` is
    one-sided, for «the mean lies above ``margin``», exact by enumerating sign flips up to 16 differences and by 65 536
    seeded random flips beyond. With a single difference the interval is infinite.

    >>> r = paired([0.02, 0.03, 0.01, 0.025, 0.02])
    >>> round(r.mean, 3), r.p == 1 / 32, r.low > 0
    (0.021, True, True)
    """
    from scipy.stats import bootstrap

    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0:
        raise InputError("paired differences: a list of at least one number is expected")
    if not np.isfinite(d).all():
        raise InputError(f"paired differences: {int((~np.isfinite(d)).sum())} of {d.size} are not finite")
    mean = float(d.mean())
    if d.size == 1:
        return Paired(mean, float("-inf"), float("inf"), 1.0, 1)
    if np.ptp(d) <= 1e-15 * max(1.0, abs(mean)):
        low = high = mean
    else:
        interval = bootstrap(
            (d,), np.mean, confidence_level=level, n_resamples=resamples, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
        if not np.isfinite([low, high]).all():
            interval = bootstrap(
                (d,),
                np.mean,
                confidence_level=level,
                n_resamples=resamples,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
    return Paired(mean, low, high, sign_flip_p(d - margin), int(d.size))


def sign_flip_p(differences: np.ndarray) -> float:
    """The share of sign patterns whose mean is at least the observed one: exact up to 16 differences.

    >>> sign_flip_p(np.array([1.0, 2.0, 3.0]))
    0.125
    """
    d = np.abs(np.asarray(differences, dtype=np.float64))
    observed = float(np.sum(differences))
    if d.size <= 16:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=d.size)))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(65536, d.size))
        signs[0] = np.sign(differences)  # the observed pattern counts, so p is never 0
    tolerance = 1e-12 * max(1.0, float(d.sum()))
    return float(np.mean(signs @ d >= observed - tolerance))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that hold for all claims of a study together.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(ps)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = worst
    return adjusted


def decide(low: float, high: float, margin: float, n: int) -> Word:
    """*holds* when the interval lies above the margin, *fails* when it lies at or below it, else *undecided*.

    One or two seeds decide nothing: two differences cannot show how much a third would vary.

    >>> decide(0.01, 0.03, 0.0, 5), decide(-0.03, -0.01, 0.0, 5), decide(-0.01, 0.02, 0.0, 5)
    ('holds', 'fails', 'undecided')
    >>> decide(0.01, 0.03, 0.0, 2)
    'undecided'
    """
    if n < FEWEST:
        return "undecided"
    if low > margin:
        return "holds"
    return "fails" if high <= margin else "undecided"
