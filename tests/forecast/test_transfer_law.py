"""Transfer laws and the verdict of alignment: the card's exact properties, and what is refused."""

import warnings

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import OverTrainingLaw, PowerLossLaw, PretrainingAdvisor, RunTable, ScoreLogLaw
from downriver.forecast.fit import fit_law
from downriver.forecast.forms import LogLaw
from downriver.forecast.transfer_law import LawDomainError, alignment_verdict

D = np.geomspace(1e8, 1e10, 6)
SCORE = (-5 + 0.5 * np.log(D)) ** 1.7
LOSS = 1.5 + 60 * D**-0.2


@pytest.mark.parametrize("loss", ["huber_log", "lsq"])
def test_noise_free_predictions_come_back(loss):
    law = ScoreLogLaw(loss=loss).fit(D, SCORE)
    far = np.array([2e8, 3e10, 1e11])
    np.testing.assert_allclose(law.fit_.predict(far), (-5 + 0.5 * np.log(far)) ** 1.7, rtol=1e-4)
    assert law.residual_ < 1e-5


def test_with_beta_one_the_law_is_the_straight_line_of_polyfit():
    y = -3 + 1.2 * np.log(D)
    slope, intercept = np.polyfit(np.log(D), y, 1)
    fit = fit_law(LogLaw(), [D], y)
    np.testing.assert_allclose(fit.predict(D * 7), intercept + slope * np.log(D * 7), rtol=1e-8)
    # and in the form itself, for parameters that were not fitted
    form, units = LogLaw(), fit.units
    values = form.curve(np.array([[0.1], [-1.0], [0.0]]), form.prepare(D[None, :, None], units))[0][:, 0]
    line = np.polyval(np.polyfit(np.log(D), values, 1), np.log(D))
    np.testing.assert_allclose(values, line, rtol=1e-8)


def test_the_law_rises_and_its_inverse_leads_back():
    law = ScoreLogLaw().fit(D, SCORE)
    x = np.geomspace(1e8, 9e10, 50)
    assert law.params_["alpha"] * law.params_["beta"] > 0 and (np.diff(law.predict(x)) > 0).all()
    np.testing.assert_allclose(law.tokens_for(law.predict(x)), x, rtol=1e-8)
    loss = PowerLossLaw().fit(D, LOSS)
    np.testing.assert_allclose(loss.tokens_for(loss.predict(x)), x, rtol=1e-6)


def test_the_loss_law_is_the_over_training_law_of_an_endless_model():
    N = np.repeat([1e7, 1e8, 1e9], 6)
    tokens = np.tile(D, 3)
    two = OverTrainingLaw().fit(N, tokens, 1.5 + 200 * N**-0.25 + 300 * tokens**-0.25)
    endless = two.fit_.predict(1e40, D)
    one = PowerLossLaw().fit(D, endless)
    found = [one.params_[name] for name in ("E", "A", "alpha")]
    assert found == pytest.approx([two.params_[name] for name in ("E", "B", "alpha")], rel=1e-5)
    np.testing.assert_allclose(one.fit_.predict(D * 50), two.fit_.predict(1e40, D * 50), rtol=1e-7)


@pytest.mark.parametrize("loss", ["huber_log", "lsq"])
def test_the_unit_of_the_score_does_not_matter(loss):
    noisy = SCORE * (1 + 0.01 * np.random.default_rng(0).standard_normal(6))
    hundred = ScoreLogLaw(100, loss).fit(D, noisy)
    one = ScoreLogLaw(1, loss).fit(D, noisy / 100)
    np.testing.assert_allclose(hundred.predict(3e10), 100 * one.predict(3e10), rtol=1e-6)


def test_law_has_no_value_where_its_logarithm_is_negative():
    law = ScoreLogLaw().fit(D, (-18 + np.log(D)) ** 1.5)
    with pytest.raises(LawDomainError, match="not positive"):
        law.predict(1e7)
    with pytest.warns(RuntimeWarning, match="100 times the largest"):
        law.predict(1e12)


def test_intervals_hold_the_fitted_scores():
    noisy = SCORE * (1 + 0.01 * np.random.default_rng(0).standard_normal(6))
    law = ScoreLogLaw(loss="lsq").fit(D, noisy)
    low, high = law.interval(D, 0.9)
    assert ((low <= noisy) & (noisy <= high)).mean() >= 0.8
    assert law.ci()["alpha"][0] <= law.params_["alpha"] <= law.ci()["alpha"][1]
    assert "left out" in str(law.audit()) and "(log_A + alpha log D)^beta" in law.report()


@pytest.mark.parametrize(
    ("d_p", "score", "message"),
    [
        (D[:3], SCORE[:3], "3 different amounts; at least 4"),
        ([0, *D], [1, *SCORE], "0 is the run without pretraining"),
        (D, [*SCORE[:5], 0.0], "score: entry 5 is 0.0"),
        (D, SCORE * 100, "above scale 100"),
        (D, SCORE[:4], "one length"),
    ],
)
def test_bad_series_are_refused(d_p, score, message):
    with pytest.raises(InputError, match=message):
        ScoreLogLaw().fit(d_p, score)


def test_a_score_beyond_the_scale_needs_no_tokens():
    with pytest.raises(InputError, match="above scale"):
        ScoreLogLaw().fit(D, SCORE).tokens_for(101)
    with pytest.raises(InputError, match="never reached"):
        PowerLossLaw().fit(D, LOSS).tokens_for(1.2)


def test_aligned_series():
    found = alignment_verdict(D, SCORE, LOSS, reference_score=5.0)
    assert found.aligned and found.monotone_score and found.monotone_loss and not found.paradox
    assert found.law_residual < 1e-3


def test_falling_score_under_falling_loss_is_the_paradox():
    found = alignment_verdict(D, SCORE[::-1], LOSS)
    assert (found.aligned, found.monotone_score, found.monotone_loss, found.paradox) == (False, False, True, True)
    assert "no proxy" in found.reason and np.isnan(found.law_residual)
    assert not alignment_verdict(D, SCORE[::-1], LOSS[::-1]).paradox


def test_small_falls_are_noise_and_flat_or_useless_series_are_not_aligned():
    bumpy = SCORE.copy()
    bumpy[3] = bumpy[2] - 0.2
    assert not alignment_verdict(D, bumpy).monotone_score
    assert alignment_verdict(D, bumpy, noise=0.3).monotone_score
    assert not alignment_verdict(D, np.full(6, 20.0)).aligned
    below = alignment_verdict(D, SCORE, reference_score=float(SCORE[-1]) + 1)
    assert not below.aligned and "no better than no pretraining" in below.reason


def test_a_series_that_rises_in_one_leap_does_not_follow_the_law():
    found = alignment_verdict(D, [5, 5.01, 5.02, 5.03, 30, 30.1])
    assert found.monotone_score and not found.aligned and found.law_residual > 0.05


def test_reference_row_and_seeds():
    rng = np.random.default_rng(1)
    sizes = np.repeat([0, *D], 3)
    scores = np.repeat([4.0, *SCORE], 3) + 0.1 * rng.standard_normal(21)
    assert alignment_verdict(sizes, scores).aligned
    with pytest.raises(InputError, match="3 different amounts above 0"):
        alignment_verdict([0, *D[:3]], [1.0, 2, 3, 4])


def table() -> RunTable:
    slow, fast = 20 + 1.0 * np.log(D / 5e7), 2 + 5.0 * np.log(D / 5e7)
    scores = np.concatenate([slow, fast, SCORE[::-1]])
    return RunTable(
        np.full(18, 3e9),
        np.tile(D, 3),
        {"loss": np.concatenate([LOSS, LOSS + 0.1, LOSS + 0.2])},
        {"score": scores, "finetune_tokens": np.full(18, 6e6)},
        np.repeat(["slow", "fast", "falls"], 6).tolist(),
    )


def test_advisor_compares_at_the_target_and_puts_the_misaligned_last():
    advisor = PretrainingAdvisor(table(), reference={6e6: 10.0})
    ranked = advisor.recommend(1e11, 6e6)
    assert [r.pretraining for r in ranked] == ["fast", "slow", "falls"]
    assert ranked[0].score == pytest.approx(2 + 5 * np.log(1e11 / 5e7), rel=1e-3)
    assert ranked[0].gain == pytest.approx(ranked[0].score - 10)
    assert ranked[2].verdict.paradox and np.isnan(ranked[2].score)
    # at the smallest amount measured the order is the other way round
    assert [r.pretraining for r in advisor.recommend(1.01e8, 6e6)][:2] == ["slow", "fast"]


def test_advisor_stops_where_the_gain_is_noise():
    ranked = PretrainingAdvisor(table(), noise=1.5).recommend(1.5e10, 6e6)
    assert "within the noise" in next(r for r in ranked if r.pretraining == "slow").advice


def test_advisor_refuses_what_was_not_measured():
    with pytest.raises(InputError, match="fine-tuning data"):
        PretrainingAdvisor(table()).recommend(1e11, 7e6)
    with pytest.raises(InputError, match="metric of the runs 'bleu'"):
        PretrainingAdvisor(table(), score="bleu")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(pinned|trade off)", category=RuntimeWarning)
        yield
