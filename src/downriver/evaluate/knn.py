"""Nearest neighbours on frozen features: what a backbone separates without any training.

Reach for it as the reference score of a vision or tabular backbone, before and after it was adapted.
"""

import numpy as np

from downriver.core.errors import InputError


def knn_accuracy(features: np.ndarray, targets: np.ndarray, neighbours: int = 10) -> float:
    """The share of rows whose class is the most frequent among their nearest other rows (leave one out, by cosine).

    ``features`` are (n, d), ``targets`` (n,) class ids; of classes met equally often among the neighbours that of the
    nearer rows wins.

    >>> x = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]])
    >>> knn_accuracy(x, np.array([0, 0, 1, 1]), neighbours=1)
    1.0
    """
    n = len(features)
    if not 1 <= neighbours < n:
        raise InputError(f"{neighbours} neighbours among {n} rows: from 1 to {n - 1} are expected")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    classes = int(targets.max()) + 1
    right = 0
    for start in range(0, n, 1000):
        cosines = unit[start : start + 1000] @ unit.T
        here = np.arange(len(cosines))
        cosines[here, start + here] = -np.inf
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :neighbours]
        votes = np.zeros((len(cosines), classes))
        for place in range(neighbours):  # a whole vote each, and a sliver more for the nearer ones
            votes[here, targets[nearest[:, place]]] += 1 + (neighbours - place) / (neighbours + 1) ** 2
        right += int((votes.argmax(axis=1) == targets[start : start + 1000]).sum())
    return right / n
