"""Backtests: what is hidden stays hidden, the figures are those of the law, and the words say them."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import DownstreamErrorLaw, LearningCurve, OverTrainingLaw, RunTable, backtest
from downriver.forecast.plot import plot
from downriver.forecast.testbed import recipe

N = np.repeat([1e7, 8e7, 4e8, 1.4e9], 3)
D = N * np.tile([20.0, 80.0, 320.0], 4)
RNG = np.random.default_rng(0)
LOSS = (1.8 + 170 * N**-0.27 + 290 * D**-0.27) * (1 + 0.003 * RNG.standard_normal(12))
RUNS = RunTable(N, D, {"loss": LOSS, "other": LOSS + 0.3}, {"error": 0.85 - 2.2 * np.exp(-0.7 * LOSS)})


def test_hides_the_largest_and_predicts_them_from_the_rest():
    law = OverTrainingLaw()
    test = backtest(law, RUNS, hide=2)
    held = np.argsort(RUNS.compute)[-2:]
    assert sorted(test.held_x) == sorted(RUNS.compute[held]) and len(test.fit_x) == 10
    assert not hasattr(law, "fit_")  # the one given is not changed
    keep = np.setdiff1d(np.arange(12), held)
    by_hand = OverTrainingLaw().fit(N[keep], D[keep], LOSS[keep])
    np.testing.assert_allclose(test.predicted, by_hand.fit_.predict(N[held], D[held])[np.argsort(held)], rtol=1e-9)
    np.testing.assert_allclose(test.relative_errors, test.predicted / test.held_y - 1)
    low, high = by_hand.interval(N[held], D[held], 0.9)
    assert (test.low < test.predicted).all() and (test.predicted < test.high).all()
    np.testing.assert_allclose(np.sort(test.high - test.low), np.sort(high - low), rtol=0.2)


def test_changing_a_hidden_run_changes_no_forecast():
    loss = LOSS.copy()
    loss[np.argmax(RUNS.compute)] = 9.9
    one = backtest(OverTrainingLaw(), RUNS)
    two = backtest(OverTrainingLaw(), RunTable(N, D, {"loss": loss}))
    np.testing.assert_array_equal(one.predicted, two.predicted)
    np.testing.assert_array_equal(one.curve_high, two.curve_high)
    assert two.coverage == 0.0 and one.coverage in (0.0, 1.0)


def test_curve_passes_through_the_forecast_and_spans_everything():
    test = backtest(OverTrainingLaw(), RUNS)
    assert test.curve_x[0] == pytest.approx(RUNS.compute.min()) and test.curve_x[-1] == pytest.approx(test.held_x[0])
    assert test.curve_y[-1] == pytest.approx(test.predicted[0], rel=1e-9)
    assert test.low[0] == pytest.approx(test.curve_low[-1], rel=1e-9)
    assert all(len(v) == 60 for v in (test.curve_x, test.curve_y, test.curve_low, test.curve_high))


def test_mask_loss_and_metric():
    mask = np.zeros(12, dtype=bool)
    mask[[3, 11]] = True
    test = backtest(OverTrainingLaw(), RUNS, mask, metric="error", loss="other", error_law=DownstreamErrorLaw())
    assert test.y_name == "error" and test.held_y.tolist() == RUNS.metrics["error"][mask].tolist()
    assert np.abs(test.relative_errors).max() < 0.05


def test_words_say_the_figures():
    test = backtest(OverTrainingLaw(), RUNS, level=0.8)
    assert test.text.startswith("over-training law fitted to 11 points, 1 hidden at ")
    assert f"{abs(test.relative_errors[0]):.2%} at worst" in test.text and "80% interval" in test.text
    few = backtest(OverTrainingLaw(), RUNS.select([0, 2, 3, 6, 9]))
    assert "no interval" in few.text and np.isnan(few.coverage)


def test_learning_curve():
    n = np.repeat([50, 100, 200, 400, 800, 1600], 3)
    error = 0.08 + 1.5 * n**-0.5 + 0.003 * RNG.standard_normal(18)
    test = backtest(LearningCurve(), (n, error), hide=n == 1600)
    assert test.x_name == "training examples" and test.held_x.tolist() == [1600.0] * 3
    assert np.abs(test.relative_errors).max() < 0.2 and test.curve_x[-1] == pytest.approx(1600)


def test_public_recipe_is_off_as_published(shared_data):
    runs = RunTable.from_testbed(shared_data("overtraining_testbed")).group("rpj")
    found = recipe(runs)
    assert len(found) == 10
    for name, printed in {
        "c4_val": (0.710, 0.732),
        "paloma_falcon-refinedweb": (0.26, 0.004),
        "paloma_redpajama": (15.4, 10.3),
        "avg_subset_error": (3.637, 0.046),
        "avg_error": (3.44, 2.10),
    }.items():
        off = 100 * np.abs(found[name].relative_errors)
        assert off == pytest.approx(np.array(printed), abs=0.06 if printed[0] > 10 else 0.005), name
    assert len(found["c4_val"].fit_x) == 5 and len(found["avg_error"].fit_x) == 6


def test_plot_writes_a_picture(tmp_path):
    place = tmp_path / "sub" / "test.png"
    plot(backtest(OverTrainingLaw(), RUNS, hide=2), place)
    assert place.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and place.stat().st_size > 10_000


@pytest.mark.parametrize("hide", [0, 12, 1.5, True, np.ones(12, dtype=bool), np.zeros(12, dtype=bool), [1, 2]])
def test_bad_hide_is_refused(hide):
    with pytest.raises(InputError, match="hide"):
        backtest(OverTrainingLaw(), RUNS, hide)


def test_bad_questions_are_refused():
    with pytest.raises(InputError, match="level"):
        backtest(OverTrainingLaw(), RUNS, level=90)
    with pytest.raises(InputError, match="4 parameters"):
        backtest(OverTrainingLaw(), RUNS, 9)
    with pytest.raises(InputError, match="RunTable"):
        backtest(OverTrainingLaw(), (N, LOSS))
    with pytest.raises(InputError, match="learning curve"):
        backtest(LearningCurve(), RUNS)
    unmeasured = RunTable(N, D, {"loss": LOSS}, {"error": np.where(np.arange(12) < 9, 0.5 + LOSS / 100, np.nan)})
    with pytest.raises(InputError, match="none of the hidden runs"):
        backtest(OverTrainingLaw(), unmeasured, 1, metric="error")
