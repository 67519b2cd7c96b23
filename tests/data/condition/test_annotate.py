"""Segments are the text, scores belong to segments, thresholds split them."""

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downriver.core.errors import InputError
from downriver.data.condition import annotate, keep_aligned, segments
from downriver.data.score.lint import LexiconScorer, PycodestyleScorer

TEXT = st.text(st.sampled_from("ab .!?\n\t\"'”…)"), min_size=1, max_size=40)


@given(TEXT, st.sampled_from(["sentence", "line", "document"]))
def test_segments_are_the_text_and_none_is_blank(text, segment):
    found = segments(text, segment)
    assert "".join(found) == text
    assert not text.strip() or all(piece.strip() for piece in found)


def test_segments():
    text = 'He said "no." Then? Pi is 3.14. e.g\n\nNew one'
    assert segments(text, "sentence") == ['He said "no."', " Then?", " Pi is 3.14.", " e.g\n\nNew one"]
    assert segments("a = 1\r\n\n  b = 2", "line") == ["a = 1\r\n\n", "  b = 2"]
    assert segments("\n\na\n", "line") == ["\n\na\n"]


def loud(texts):
    return np.array([sum(c.isupper() for c in text) for text in texts], float)


@pytest.mark.filterwarnings("ignore:100.00% of the scores")
def test_scores_thresholds_and_columns():
    rows = [{"id": "x", "text": "Quiet. LOUD."}, {"id": "y", "text": "none. A. B."}]
    found = annotate(rows, loud)
    assert found.column_names == ["id", "text", "texts", "scores", "avg_score", "misaligned"]
    assert found["scores"][:] == [[1, 4], [0, 1, 1]] and found["avg_score"][:] == pytest.approx([2.5, 2 / 3])
    assert found["misaligned"][:] == [[False, True], [False, False, False]]  # the median is 1, and that is still fine
    assert annotate(rows, loud, threshold=0.5)["misaligned"][:] == [[True, True], [False, True, True]]
    assert keep_aligned(found)["id"][:] == ["y"] and keep_aligned(found, 2.5)["id"][:] == ["x", "y"]
    again = annotate(found, loud, threshold=0.5)  # annotated anew
    assert again.column_names == found.column_names and again["misaligned"][0] == [True, True]
    selected = annotate(datasets.Dataset.from_list(rows).select([1]), loud, segment="document")
    assert selected["scores"][:] == [[2]] and selected["id"][:] == ["y"]


def test_each_distinct_segment_is_scored_once_and_short_ones_first():
    seen = []

    def scorer(texts):
        seen.append(list(texts))
        return np.zeros(len(texts))

    with pytest.warns(UserWarning, match="100.00% of the scores are 0 or less"):
        annotate([{"text": "long line\na\na\nbb\n"}], scorer, segment="line", batch_size=2)
    assert seen == [["a\n", "bb\n"], ["long line\n"]]


def test_scorers_of_the_library():
    words = LexiconScorer(["awful"])
    assert annotate([{"text": "an awful day. fine."}], words, threshold=0.0)["misaligned"][0] == [True, False]
    pytest.importorskip("pycodestyle")
    scores = annotate([{"text": "x=1\n\n\ny = 2\n"}], PycodestyleScorer(), segment="line", threshold=0.0)["scores"][0]
    assert scores[0] > 0 and scores[1] == 0


def test_bad_input():
    rows = [{"text": "a. b."}]
    with pytest.raises(InputError, match=r"scores of shape \(1,\) for 2 texts"):
        annotate(rows, lambda texts: np.zeros(1))
    with pytest.raises(InputError, match=r"the scorer gives nan for the text 'a\.'"):
        annotate(rows, lambda texts: np.array([np.nan, 0.0]))
    with pytest.raises(InputError, match="row 1, column 'text': the text is empty"):
        annotate([*rows, {"text": " "}], loud)
    with pytest.raises(InputError, match="texts in 'body' are expected"):
        annotate(rows, loud, text="body")
    with pytest.raises(InputError, match="unknown segment 'word'"):
        annotate(rows, loud, segment="word")
    with pytest.raises(InputError, match="threshold is 'mean': a number or 'median'"):
        annotate(rows, loud, threshold="mean")
    with pytest.warns(UserWarning, match=r"0.00% of the scores are -1 or less"):
        found = annotate(rows, loud, threshold=-1)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no document has a mean score of -1 or less"):
        keep_aligned(found, -1)
