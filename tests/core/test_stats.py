import itertools

import numpy as np
import pytest
from scipy.stats import permutation_test

from downriver.core import InputError
from downriver.core.stats import decide, holm, paired, sign_flip_p


def test_sign_flip_p_equals_scipys_exact_test():
    d = np.random.default_rng(0).normal(0.3, 1, size=9)
    reference = permutation_test(
        (d, np.zeros_like(d)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="greater",
        vectorized=True,
    )
    assert sign_flip_p(d) == pytest.approx(reference.pvalue, abs=1e-12)


def test_sign_flip_p_counts_all_patterns():
    assert sign_flip_p(np.array([0.1] * 5)) == 1 / 32
    assert sign_flip_p(-np.array([0.1] * 5)) == 1.0


def test_many_differences_are_sampled_and_p_is_never_zero():
    d = np.full(40, 1.0)
    assert 0 < sign_flip_p(d) < 1e-3
    assert sign_flip_p(-d) > 0.999


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        r = paired(rng.normal(1.0, 1.0, size=20), resamples=999)
        covered += r.low <= 1.0 <= r.high
    assert 0.87 <= covered / 200 <= 0.99


def test_margin_moves_p_but_not_the_interval():
    d = [0.02, 0.03, 0.01, 0.025, 0.02]
    assert paired(d, margin=0.05).p > 0.9 > 0.05 > paired(d).p
    assert paired(d).low == paired(d, margin=0.05).low


def test_equal_differences_have_a_point_interval_and_one_seed_an_infinite_one():
    same = paired([0.5, 0.5, 0.5])
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    one = paired([0.5])
    assert (one.low, one.high, one.p) == (-np.inf, np.inf, 1.0)


@pytest.mark.parametrize("bad", [[], [0.1, np.nan], [np.inf]])
def test_bad_differences_are_refused(bad):
    with pytest.raises(InputError, match="paired differences"):
        paired(bad)


def test_holm_is_monotone_and_never_below_the_raw_values():
    ps = [0.001, 0.2, 0.03, 0.04, 0.5]
    adjusted = holm(ps)
    assert all(a >= p for a, p in zip(adjusted, ps, strict=True))
    order = np.argsort(ps)
    assert all(adjusted[i] <= adjusted[j] for i, j in itertools.pairwise(order))
    assert adjusted[0] == pytest.approx(0.005)


def test_verdicts_need_the_whole_interval_and_three_seeds():
    assert decide(0.011, 0.02, 0.01, 5) == "holds"
    assert decide(0.009, 0.02, 0.01, 5) == "undecided"
    assert decide(-0.02, 0.01, 0.01, 5) == "fails"
    assert decide(0.5, 0.6, 0.0, 1) == decide(0.5, 0.6, 0.0, 2) == "undecided"
    assert decide(0.5, 0.6, 0.0, 3) == "holds"
