"""Leave-one-out nearest neighbours agree with scikit-learn's, vote by vote."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from downriver.core import InputError
from downriver.evaluate.knn import knn_accuracy


def test_agrees_with_scikit_learn_left_out_one_by_one():
    x, y = load_digits(return_X_y=True)
    x, y = x[:200] / np.linalg.norm(x[:200], axis=1, keepdims=True), y[:200]
    right = 0
    for i in range(200):
        rest = np.arange(200) != i
        model = KNeighborsClassifier(1).fit(x[rest], y[rest])
        right += model.predict(x[i : i + 1])[0] == y[i]
    assert knn_accuracy(x.astype(np.float32), y, neighbours=1) == right / 200
    assert knn_accuracy(x.astype(np.float32), y) > 0.85


def test_of_equal_votes_the_nearer_win():
    angle = np.array([0.0, 0.1, 0.25, 0.35])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # every row sees its like nearest, then one other: a tie, which the nearer wins; of three neighbours two are others
    y = np.array([0, 0, 1, 1])
    assert knn_accuracy(x, y, neighbours=2) == 1.0
    assert knn_accuracy(x, y, neighbours=3) == 0.0


def test_noise_is_at_chance():
    rng = np.random.default_rng(0)
    assert knn_accuracy(rng.normal(size=(2000, 8)), rng.integers(0, 4, 2000)) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("neighbours", [0, 4])
def test_too_few_rows_are_refused(neighbours):
    with pytest.raises(InputError, match=f"{neighbours} neighbours among 4 rows"):
        knn_accuracy(np.eye(4), np.array([0, 0, 1, 1]), neighbours)
