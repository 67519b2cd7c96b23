"""Metrics, each a plain function of numpy arrays, and the table of their names, units and directions.

Reach for the functions to score predictions made elsewhere; ``evaluate`` looks them up by name. Where scikit-learn or
scipy has the metric it is theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax
from scipy.stats import spearmanr
from sklearn import metrics as sk

from downriver.core.errors import InputError, unknown
from downriver.core.measurement import Direction


def accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """The share of rows whose highest score, of (n, K), is at the target's class.

    >>> accuracy(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
    0.5
    """
    return float(np.mean(scores.argmax(axis=1) == targets))


def macro_f1(scores: np.ndarray, targets: np.ndarray) -> float:
    """The mean over classes of F1; a class that is neither met nor predicted does not count.

    >>> macro_f1(np.array([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0]]), np.array([0, 1, 0])).__round__(3)
    0.667
    """
    return float(sk.f1_score(targets, scores.argmax(axis=1), average="macro", zero_division=0.0))


def nll(scores: np.ndarray, targets: np.ndarray) -> float:
    """The mean negative log-likelihood in nats of the targets under the softmax of the scores (logits)."""
    return float(-np.mean(log_softmax(scores.astype(np.float64), axis=1)[np.arange(len(targets)), targets]))


def ece(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: by how much confidence and accuracy differ, averaged over bins of equal width.

    ``Σ_m |B_m| / n · |acc(B_m) - conf(B_m)|`` with ``B_m`` the rows whose highest probability lies in ((m-1)/M, m/M],
    M = 15: Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern neural networks", equation 3 and section
    5.

    >>> ece(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]), np.array([0, 1, 1])).__round__(4)
    0.4
    """
    if bins < 1:
        raise InputError(f"bins is {bins}: at least 1 is expected")
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == targets
    m = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(m, weights=right.astype(np.float64) - confidence, minlength=bins)  # |B_m| (acc - conf)
    return float(np.abs(gap).sum() / len(targets))


def brier(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Brier's score in its original form: the mean squared distance of the probabilities to the one-hot target.

    Summed over the classes, so between 0 and 2: Brier 1950, "Verification of forecasts expressed in terms of
    probability".
    """
    one_hot = np.eye(probabilities.shape[1])[targets]
    return float(np.mean(((probabilities - one_hot) ** 2).sum(axis=1)))


def rmse(predicted: np.ndarray, targets: np.ndarray) -> float:
    """The root of the mean squared error, in the target's unit."""
    return float(np.sqrt(np.mean((predicted.astype(np.float64) - targets) ** 2)))


def r2(predicted: np.ndarray, targets: np.ndarray) -> float:
    """The share of the targets' variance that the predictions explain (not a number for fewer than two targets)."""
    return float(sk.r2_score(targets, predicted)) if len(targets) > 1 else float("nan")


def spearman(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Spearman's rank correlation; not a number where one side is constant."""
    if len(targets) < 2 or np.ptp(predicted) == 0 or np.ptp(targets) == 0:
        return float("nan")
    return float(spearmanr(predicted, targets).statistic)


@dataclass(frozen=True)
class Metric:
    """A metric by name: what it is computed from, its unit, and which way is better."""

    of: str  # "classes": (n, K) logits; "numbers": (n, 1) predictions; "tokens": sums a document
    function: Callable[..., float]
    unit: str
    direction: Direction


def _probable(metric: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda scores, targets: metric(softmax(scores.astype(np.float64), axis=1), targets)


def _flat(metric: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda scores, targets: metric(scores[:, 0].astype(np.float64), targets)


METRICS: dict[str, tuple[Metric, ...]] = {
    "accuracy": (Metric("classes", accuracy, "share", "higher"),),
    "macro_f1": (Metric("classes", macro_f1, "share", "higher"),),
    "loss": (
        Metric("classes", nll, "nats", "lower"),
        Metric("numbers", _flat(lambda p, y: rmse(p, y) ** 2), "squared unit of the target", "lower"),
        Metric("tokens", lambda nats, tokens, size: float(nats.sum() / tokens.sum()), "nats per token", "lower"),
    ),
    "ece": (Metric("classes", _probable(ece), "share", "lower"),),
    "brier": (Metric("classes", _probable(brier), "squared probability", "lower"),),
    "rmse": (Metric("numbers", _flat(rmse), "unit of the target", "lower"),),
    "r2": (Metric("numbers", _flat(r2), "share of variance", "higher"),),
    "spearman": (Metric("numbers", _flat(spearman), "correlation", "higher"),),
    "perplexity": (
        Metric("tokens", lambda nats, tokens, size: float(np.exp(nats.sum() / tokens.sum())), "per token", "lower"),
    ),
    "bits_per_byte": (
        Metric(
            "tokens", lambda nats, tokens, size: float(nats.sum() / np.log(2) / size.sum()), "bits per byte", "lower"
        ),
    ),
}


def lookup(name: str, of: str) -> Metric:
    """The metric of that name for predictions of that sort; an unknown or unfit name is an ``InputError``.

    >>> lookup("acuracy", "classes")
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: unknown metric for classes 'acuracy': did you mean 'accuracy'? ...
    """
    for metric in METRICS.get(name, ()):
        if metric.of == of:
            return metric
    raise unknown(f"metric for {of}", name, [n for n, forms in METRICS.items() if any(m.of == of for m in forms)])
