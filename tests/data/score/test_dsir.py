"""DSIR: equal to the authors' package, and what it must tell apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.data.score import DSIRScorer, ScoreTable

TARGET = ["The river runs down to the sea, slowly.", "Boats on the river; boats on the sea!"]
RAW = ["Stocks fell in the market.", "The market's price of boats", "a river ran", "Ünïcode 東京 runs"]


def test_equal_to_the_authors_package(tmp_path: Path) -> None:
    pytest.importorskip("data_selection")
    from data_selection import HashedNgramDSIR

    for name, texts in (("target", TARGET), ("raw", RAW)):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    theirs = HashedNgramDSIR([str(tmp_path / "raw")], [str(tmp_path / "target")], str(tmp_path / "cache"), num_proc=1)
    theirs.fit_importance_estimator(num_tokens_to_fit="all")
    ours = DSIRScorer(TARGET, RAW)
    assert np.allclose(ours.log_ratio, theirs.log_diff, rtol=0, atol=1e-12)
    for text in (*TARGET, *RAW, "wholly new words here"):
        assert np.array_equal(ours.counts(text), theirs.featurizer(text))
    wanted = [theirs.importance_estimator(theirs.featurizer(text)) for text in RAW]
    assert np.allclose(ours.score(RAW), wanted, rtol=1e-12)


def test_the_target_wins_and_equal_bags_are_zero() -> None:
    scorer = DSIRScorer(TARGET, RAW)
    river, market = scorer.score(["the river runs to the sea", "the price of stocks"])
    assert river > 0 > market
    assert np.allclose(DSIRScorer(RAW, RAW).score(RAW), 0)
    assert np.allclose(scorer.score(["the river", "sea"]), [scorer.score([t])[0] for t in ("the river", "sea")])
    assert DSIRScorer(TARGET, RAW, ngrams=3).counts("a b c d").sum() == 4 + 3 + 2


def test_without_raw_texts_the_table_takes_the_source(tmp_path: Path) -> None:
    source = [{"text": text, "id": str(i)} for i, text in enumerate(RAW)]
    scorer = DSIRScorer(TARGET)
    with pytest.raises(InputError, match="needs texts of the pool"):
        scorer.score(["x"])
    table = ScoreTable(tmp_path)
    table.add("dsir", scorer, source, executor="serial")
    got = table.frame().collect()["dsir"].to_numpy()
    assert np.array_equal(got, DSIRScorer(TARGET, RAW).score(RAW))
    assert scorer.fingerprint == DSIRScorer(TARGET, RAW).fingerprint != DSIRScorer(TARGET, RAW[:2]).fingerprint


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"target": []}, "the target texts hold no word"),
        ({"target": [" "]}, "the target texts hold no word"),
        ({"target": ["a", 3]}, "the target texts hold a int"),
        ({"target": ["a"], "raw": []}, "the raw texts hold no word"),
        ({"target": ["a"], "buckets": 1}, "buckets is 1"),
    ],
)
def test_bad_input(given: dict, why: str) -> None:
    with pytest.raises(InputError, match=why):
        DSIRScorer(**given)
