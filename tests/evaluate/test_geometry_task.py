"""Tasks with a given geometry: alignment, rank and spectrum are what was asked for, and what is impossible is said."""

import numpy as np
import pytest

from downriver.core import InputError
from downriver.evaluate.geometry import participation_ratio, separable
from downriver.evaluate.geometry_task import GeometryTask, random_task, xor_task
from downriver.nn.similarity import alignment, centre


@pytest.mark.parametrize("points", [4, 16, 64])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("c", [0.0, 0.3, 0.8, 1.0])
def test_the_alignment_is_the_one_asked_for(points, targets, c):
    if points == 4 and targets == 3 and c < 1:
        with pytest.raises(InputError, match="only 1 is possible"):
            random_task(points, targets, alignment=c)
        return
    task = random_task(points, targets, alignment=c, seed=2)
    K_x, K_y = task.kernels
    assert alignment(K_x, K_y) == pytest.approx(c, abs=1e-6)
    assert np.linalg.eigvalsh(K_x).min() > -1e-9
    np.testing.assert_allclose(centre(K_x), K_x, atol=1e-9)
    assert np.trace(K_x) == pytest.approx(points - 1)
    np.testing.assert_allclose(task.targets.mean(axis=0), 0.5)


def test_the_rank_is_limited():
    for rank in (1, 4):
        task = random_task(32, 2, signal=1.0, max_rank=rank)
        assert np.linalg.matrix_rank(task.kernels[0], tol=1e-8) == rank + 2
    assert np.linalg.matrix_rank(random_task(32, 2, alignment=1.0).kernels[0], tol=1e-8) == 2


def test_signal_one_and_a_flat_spectrum_are_equidistant_points():
    K_x, K_y = random_task(16, 4, signal=1.0, spectrum="flat").kernels
    np.testing.assert_allclose(K_x, np.eye(16) - 1 / 16, atol=1e-9)
    assert alignment(K_x, K_y) == pytest.approx(np.sqrt(4 / 15))


def test_signal_at_its_ends():
    assert alignment(*random_task(16, 3, signal=0.0).kernels) == pytest.approx(0, abs=1e-9)
    task = random_task(16, 3, signal=5.0)
    assert alignment(*task.kernels) == pytest.approx(1)
    assert participation_ratio(task.means) == pytest.approx(3)


def test_targets_are_single_bits_before_parities():
    targets = random_task(8, 7, alignment=1.0).targets
    bits = (np.arange(8)[:, None] >> np.arange(3)) & 1
    assert {tuple(c) for c in targets[:, :3].T} == {tuple(c) for c in bits.T}
    np.testing.assert_array_equal(targets[:, 6], bits.sum(axis=1) % 2)


def test_samples_are_means_and_noise():
    task = random_task(8, 2, noise=0.5, dim=40, seed=1)
    x, y, condition = task.sample(8000)
    np.testing.assert_array_equal(np.bincount(condition), 1000)
    np.testing.assert_array_equal(y, task.targets[condition])
    assert (x - task.means[condition]).std() == pytest.approx(0.5, rel=0.01)
    assert (x == task.sample(8000)[0]).all() and not (x == task.sample(8000, draw=1)[0]).any()
    assert not np.allclose(random_task(8, 2, seed=2).means, random_task(8, 2, seed=1).means)


def test_exclusive_or_becomes_separable():
    assert not separable(xor_task(0.0).means, xor_task(0.0).targets[:, 0])
    task = xor_task(0.4, dim=10)
    assert separable(task.means, task.targets[:, 0])
    side = task.targets[:, 0] > 0
    assert np.linalg.norm(task.means[side].mean(0) - task.means[~side].mean(0)) == pytest.approx(0.8)


def test_condition_means_of_real_data_make_a_task():
    task = GeometryTask(np.arange(8.0).reshape(4, 2), [[0], [0], [1], [1]], noise=0.0)
    assert task.kernels[0].shape == (4, 4) and (task.sample(4)[0].sum() == 28)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_task(12, 2), "n_points is 12: a power of two"),
        (lambda: random_task(8, 8), "n_targets is 8: from 1 to 7"),
        (lambda: random_task(8, 2, signal=1.0, alignment=0.5), "give one of them"),
        (lambda: random_task(16, 3, signal=6.0), r"signal is 6.0: from 0 to .* = 5 is possible"),
        (lambda: random_task(16, 3, alignment=1.2), "from 0 to 1 is possible"),
        (lambda: random_task(16, 3, alignment=0.5, max_rank=0), "only 1 is possible"),
        (lambda: random_task(16, 3, dim=10), "the kernel has rank 15"),
        (lambda: random_task(16, 3, spectrum="falt"), "did you mean 'flat'"),
        (lambda: xor_task(-1.0), "eps is -1"),
        (lambda: GeometryTask([[0.0], [1.0]], [[0], [2]]), "0 and 1 are expected"),
        (lambda: GeometryTask([[0.0], [1.0]], [[0], [1], [1]]), "as many are expected"),
        (lambda: GeometryTask([[0.0], [1.0]], [[0], [1]], noise=-1.0), "noise is -1"),
    ],
)
def test_what_is_impossible_is_said(call, message):
    with pytest.raises(InputError, match=message):
        call()
