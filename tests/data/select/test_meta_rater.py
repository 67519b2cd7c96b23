"""Meta-rater: weights that are learned, what selections do not depend on, and what is refused."""

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.data.select.meta_rater import MetaRater, train_rater
from downriver.models import small

N = 300


def table(seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {"id": [f"d{i}" for i in range(N)], "good": rng.random(N), "fair": rng.random(N), "noise": rng.random(N)}
    )


def rater(frame, **settings):
    value = 0.7 * frame["good"].to_numpy() + 0.3 * frame["fair"].to_numpy()
    settings = {"k": 60, "n_proxies": 80, "simulated": 4000, "averaged": 40} | settings
    return MetaRater(lambda rows: 2 - value[rows].mean(), **settings)


def test_weights_are_learned():
    frame = table()
    fitted = rater(frame).fit(frame)
    weights = fitted.weights_
    assert weights["good"] > weights["fair"] > weights["noise"] and weights["noise"] < 0.15
    assert sum(weights.values()) == pytest.approx(1)
    assert fitted.cv_report().rho[0] > 0.8
    value = 0.7 * frame["good"].to_numpy() + 0.3 * frame["fair"].to_numpy()
    learned = value[fitted.select(frame).indices].mean()
    assert learned > value[fitted.select(frame, weights=dict.fromkeys(weights, 1 / 3)).indices].mean()
    lost = fitted.ablate(frame)
    assert lost["good"] > lost["fair"] > 0 and lost["good"] > lost["noise"]
    assert fitted.losses_.shape == (80,) and fitted.drawn_.shape == (80, 3)


def test_one_hot_weights_are_top_k():
    frame = table()
    for name in ("good", "noise"):
        chosen = rater(frame).select(frame, weights={name: 1.0}).indices
        assert chosen.tolist() == sorted(np.argsort(-frame[name].to_numpy())[:60])


def test_ranks_do_not_see_monotone_changes_and_duplicates_share():
    frame = table()
    weights = {"good": 0.5, "fair": 0.25, "noise": 0.25}
    chosen = rater(frame).select(frame, weights=weights).ids
    bent = frame.with_columns(good=pl.col("good").exp() * 100, fair=pl.col("fair") ** 3)
    assert rater(frame).select(bent, weights=weights).ids == chosen
    assert rater(frame, normalize="zscore").select(bent, weights=weights).ids != chosen
    twice = frame.with_columns(again=pl.col("good"))
    assert rater(frame).select(twice, weights={"good": 0.25, "again": 0.25, "fair": 0.25, "noise": 0.25}).ids == chosen
    turned = frame.with_columns(good=-pl.col("good"))
    assert rater(frame, lower=["good"]).select(turned, weights=weights).ids == chosen


def test_missing_scores_and_constant_columns():
    frame = table().with_columns(good=pl.when(pl.int_range(N) == 7).then(None).otherwise("good"))
    with pytest.raises(InputError, match="column 'good': 'd7' has no finite score"):
        rater(table()).fit(frame)
    excluded = rater(table(), missing="exclude").select(frame, weights={"good": 1.0}, k=N - 1)
    assert dict(excluded.reasons) == {7: "no score in weighted sum"}
    assert len(rater(table(), missing="median").select(frame, weights={"good": 1.0}, k=N).indices) == N
    with pytest.warns(RuntimeWarning, match="constant scores are left out: flat"):
        assert "flat" not in rater(table()).fit(table().with_columns(flat=pl.lit(1.0))).weights_


def test_refused():
    frame = table()
    with pytest.raises(InputError, match="n_proxies is 1: at least 5"):
        rater(frame, n_proxies=1)
    with pytest.raises(InputError, match="k is 301 and 300 documents"):
        rater(frame, k=N + 1).fit(frame)
    with pytest.raises(InputError, match="budget_tokens is 1e"):
        rater(frame, k=None, budget_tokens=1e6).fit(frame.with_columns(tokens=pl.lit(5)))
    with pytest.raises(InputError, match="all 80 weight vectors choose the same 300 documents"):
        rater(frame, k=N).fit(frame)
    with pytest.raises(InputError, match="proxy 0 returned nan for 60 documents"):
        MetaRater(lambda rows: float("nan"), k=60).fit(frame)
    with pytest.raises(InputError, match="exactly one of k and budget_tokens"):
        rater(frame, k=None)
    with pytest.raises(InputError, match="call fit first"):
        rater(frame).cv_report()
    with pytest.raises(InputError, match="unknown score column 'goood'"):
        rater(frame, scores=["goood", "fair"]).fit(frame)


def test_token_budgets():
    frame = table().with_columns(tokens=pl.Series(np.random.default_rng(1).integers(5, 50, N)))
    fitted = rater(frame, k=None, budget_tokens=1500).fit(frame)
    spent = frame["tokens"].gather(fitted.select(frame).indices).sum()
    assert 1450 < spent <= 1500 and "tokens" not in fitted.weights_


def test_train_rater():
    texts = [f"{word} {i}" for i in range(40) for word in ("excellent work", "zzzz qqqq")]
    scorer = train_rater(
        texts, [1, 0] * 40, small("text-encoder", "nano"), num_labels=2, epochs=6, learning_rate=3e-3, batch_size=8
    )
    high, low = scorer.score(["excellent work 7", "zzzz qqqq 7"])
    assert high > low + 0.5
    with pytest.raises(InputError, match="labels run from 0 to 7"):
        train_rater(texts, [7, 0] * 40, small("text-encoder", "nano"))
