"""Metrics agree with scikit-learn and with values worked out by hand."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as sk

from downriver.core import InputError
from downriver.evaluate import metrics
from downriver.evaluate.metrics import METRICS, lookup

rng = np.random.default_rng(0)
SCORES = rng.normal(size=(300, 5)).astype(np.float32)
TARGETS = rng.integers(0, 5, 300)
PROBABILITIES = softmax(SCORES.astype(np.float64), axis=1)


def test_classification_agrees_with_scikit_learn():
    predicted = SCORES.argmax(axis=1)
    assert metrics.accuracy(SCORES, TARGETS) == pytest.approx(sk.accuracy_score(TARGETS, predicted))
    assert metrics.macro_f1(SCORES, TARGETS) == pytest.approx(sk.f1_score(TARGETS, predicted, average="macro"))
    assert metrics.nll(SCORES, TARGETS) == pytest.approx(sk.log_loss(TARGETS, PROBABILITIES))
    assert metrics.nll(SCORES * 1e4, TARGETS) < np.inf  # saturated softmax


def test_brier_of_two_classes_is_twice_that_of_scikit_learn():
    two = PROBABILITIES[:, :2] / PROBABILITIES[:, :2].sum(axis=1, keepdims=True)
    y = TARGETS % 2
    assert metrics.brier(two, y) == pytest.approx(2 * sk.brier_score_loss(y, two[:, 1]))
    assert metrics.brier(np.eye(3), np.arange(3)) == 0
    assert metrics.brier(np.eye(3), np.array([1, 2, 0])) == 2


def test_numbers_agree_with_scikit_learn_and_scipy():
    truth, guess = rng.normal(size=50), rng.normal(size=50)
    assert metrics.rmse(guess, truth) == pytest.approx(sk.root_mean_squared_error(truth, guess))
    assert metrics.r2(guess, truth) == pytest.approx(sk.r2_score(truth, guess))
    assert metrics.spearman(np.exp(truth), truth) == pytest.approx(1)
    assert metrics.spearman(-truth, truth) == pytest.approx(-1)
    assert np.isnan(metrics.spearman(np.ones(50), truth))
    assert np.isnan(metrics.r2(guess[:1], truth[:1]))


def two_class(confidence: list[float]) -> np.ndarray:
    return np.array([[c, 1 - c] for c in confidence])


def test_ece_by_hand():
    # fifteen bins: 0.95 and 0.98 share the last (14/15, 1], 0.90 lies in (13/15, 14/15], 0.62 in (9/15, 10/15]
    p = two_class([0.95, 0.98, 0.90, 0.62])
    right = np.array([0, 1, 0, 1])  # the second and the fourth are wrong
    expected = 2 / 4 * abs(0.5 - 0.965) + 1 / 4 * abs(1 - 0.90) + 1 / 4 * abs(0 - 0.62)
    assert metrics.ece(p, right) == pytest.approx(expected)
    assert metrics.ece(p, right, bins=1) == pytest.approx(abs(0.5 - np.mean([0.95, 0.98, 0.90, 0.62])))


def test_ece_bins_are_open_below_and_closed_above():
    p = two_class([0.8, 0.81])  # 0.8 is the upper edge of the fourth of five bins, 0.81 lies in the fifth
    assert metrics.ece(p, np.array([0, 1]), bins=5) == pytest.approx(0.5 * 0.2 + 0.5 * 0.81)
    assert metrics.ece(p, np.array([0, 1]), bins=2) == pytest.approx(abs(1 - 0.8 - 0.81) / 2)


def test_a_calibrated_forecast_has_little_ece_and_a_sure_one_much():
    confidence = rng.uniform(0.5, 1, 20000)
    right = np.where(rng.uniform(size=20000) < confidence, 0, 1)
    assert metrics.ece(two_class(confidence.tolist()), right) < 0.02
    sure = np.tile([1.0, 0.0], (20000, 1))
    assert metrics.ece(sure, right) == pytest.approx(1 - confidence.mean(), abs=0.02)
    with pytest.raises(InputError, match="bins is 0"):
        metrics.ece(sure, right, bins=0)


def test_language_metrics_are_three_views_of_one_sum():
    nats, tokens, size = np.array([10.0, 20.0]), np.array([5, 5]), np.array([20, 40])
    value = {
        name: lookup(name, "tokens").function(nats, tokens, size) for name in ("loss", "perplexity", "bits_per_byte")
    }
    assert value["loss"] == pytest.approx(3.0)
    assert value["perplexity"] == pytest.approx(np.exp(3.0))
    assert value["bits_per_byte"] == pytest.approx(0.5 / np.log(2))


def test_every_metric_declares_unit_and_direction():
    for name, forms in METRICS.items():
        for metric in forms:
            assert metric.unit, name
            assert metric.direction in ("higher", "lower")
    assert lookup("loss", "classes").unit == "nats"
    assert lookup("loss", "tokens").unit == "nats per token"


@pytest.mark.parametrize(
    ("name", "of", "message"),
    [
        ("acuracy", "classes", "unknown metric for classes 'acuracy': did you mean 'accuracy'"),
        ("rmse", "classes", "unknown metric for classes 'rmse'"),
        ("accuracy", "tokens", r"\(known: bits_per_byte, loss, perplexity\)"),
    ],
)
def test_unknown_and_unfit_metrics_are_refused(name, of, message):
    with pytest.raises(InputError, match=message):
        lookup(name, of)
