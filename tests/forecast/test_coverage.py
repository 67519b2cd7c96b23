"""Coverage: the factor is the quantile it says, each ladder counts the same, and no ladder learns from itself."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast.coverage import Outcome, coverage, factor, public_outcomes, widened


def outcomes(ladder: str, scores, kind: str = "loss") -> list[Outcome]:
    """Truths that lie so many half-widths above the forecast."""
    return [Outcome(ladder, kind, str(i), 2.0 + 0.1 * s, 2.0, 1.8, 2.1) for i, s in enumerate(scores)]


def test_half_widths_know_their_side():
    above, below = (Outcome("a", "loss", "x", truth, 2.0, 1.8, 2.1) for truth in (2.2, 1.6))
    assert above.half_widths == pytest.approx(2) and below.half_widths == pytest.approx(2)
    assert not above.inside and Outcome("a", "loss", "x", 2.1, 2.0, 1.8, 2.1).inside
    assert Outcome("a", "loss", "x", 2.1, 2.0, 2.0, 2.0).half_widths == np.inf
    assert Outcome("a", "loss", "x", 2.0, 2.0, 2.0, 2.0).half_widths == 0


def test_factor_covers_what_it_was_learnt_on():
    scores = np.random.default_rng(0).exponential(size=200)
    learnt = outcomes("a", scores)
    for level in (0.5, 0.8, 0.9):
        by = factor(learnt, level)
        inside = [low <= o.truth <= high for o in learnt for low, high in [widened(o.value, o.low, o.high, by)]]
        assert level <= np.mean(inside) <= level + 0.02
    assert factor(outcomes("a", [0.3]), 0.9) == pytest.approx(0.3)
    with pytest.raises(InputError, match="no outcome"):
        factor([])


def test_a_ladder_of_many_points_weighs_as_much_as_one_of_few():
    many, few = outcomes("many", [0.5] * 98), outcomes("few", [3.0, 3.0])
    assert factor(many + few, 0.9) == pytest.approx(3.0)
    assert factor(outcomes("many", [0.5] * 98 + [3.0, 3.0]), 0.9) == pytest.approx(0.5)


def test_no_ladder_learns_from_itself():
    known = [*outcomes("a", [5.0] * 4), *outcomes("b", [0.5] * 4), *outcomes("c", [1.5], "error")]
    found = {(row.ladder, row.kind): row for row in coverage(known)}
    assert found["a", "loss"].factor == pytest.approx(0.5) and found["a", "loss"].covered_widened == 0
    assert found["b", "loss"].factor == pytest.approx(5.0) and found["b", "loss"].covered_widened == 1
    assert found["a", "loss"].covered == 0 and found["b", "loss"].n == 4
    assert np.isnan(found["c", "error"].factor)  # the only ladder of its kind


@pytest.mark.slow
def test_hidden_points_of_two_public_ladders(shared_data, tmp_path):
    (tmp_path / "chinchilla").symlink_to(shared_data("chinchilla"))
    (tmp_path / "obs_scaling").symlink_to(shared_data("obs_scaling"))
    found = public_outcomes(tmp_path)
    by = {row.ladder: row for row in coverage(found)}
    assert by["Chinchilla"].n == 61 and {"family Pythia", "family OPT", "family Qwen1.5"} < set(by)
    assert all(np.isfinite([o.truth, o.value, o.low, o.high]).all() and o.low < o.high for o in found)
    pythia = [o for o in found if o.ladder == "family Pythia"]
    assert len(pythia) == 8 and {o.kind for o in pythia} == {"error"}


def test_a_folder_without_ladders_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds none of overtraining_testbed, olmo_ladder"):
        public_outcomes(tmp_path)
