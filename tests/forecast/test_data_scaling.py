"""A power of the number of examples: the log-log line, its ceiling, its inverse."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import DataScalingCurve

N = np.array([64.0, 128, 256, 512])
SCORE = 0.2 * N**0.15 * np.array([1.01, 0.99, 1.02, 0.99])


def test_default_is_the_log_log_line():
    slope, intercept = np.polyfit(np.log(N), np.log(SCORE), 1)
    curve = DataScalingCurve().fit(N, SCORE)
    assert curve.params_ == pytest.approx({"a": np.exp(intercept), "b": slope}, rel=1e-7)
    low, high = curve.interval([1024], 0.9)
    assert low[0] < curve.predict(1024) < high[0]


def test_least_squares_on_the_score_is_another_objective():
    raw, line = (DataScalingCurve(loss=loss).fit(N, SCORE) for loss in ("lsq", "log_lsq"))
    assert ((raw.fit_.predict(N) - SCORE) ** 2).sum() < ((line.fit_.predict(N) - SCORE) ** 2).sum()


def test_forecasts_end_at_the_maximum():
    curve = DataScalingCurve().fit(N, 0.1 * N**0.33)
    with pytest.warns(RuntimeWarning, match="times the largest"):
        assert curve.predict(1e6) == 1.0
    assert curve.examples_for(0.5) == pytest.approx(5 ** (1 / 0.33))
    open_ended = DataScalingCurve(maximum=None).fit(N, 100 * N**0.33)
    assert open_ended.examples_for(2000) == pytest.approx(20 ** (1 / 0.33))


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="above the maximum of 1"):
        DataScalingCurve().fit(N, SCORE * 100)
    with pytest.raises(InputError, match="above the maximum"):
        DataScalingCurve().fit(N, SCORE).examples_for(1.5)
    with pytest.raises(InputError, match="need at least as many different points"):
        DataScalingCurve().fit([64, 64], [0.3, 0.31])
    with pytest.raises(InputError, match="unknown loss 'l1'"):
        DataScalingCurve(loss="l1").fit(N, SCORE)
