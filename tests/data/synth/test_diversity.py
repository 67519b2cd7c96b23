"""Self-BLEU against sacrebleu, near-copies, vectors."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.data.synth.diversity import near_duplicates, ngram_vectors, self_bleu


def test_self_bleu_agrees_with_sacrebleu_where_no_order_is_without_a_match():
    bleu = pytest.importorskip("sacrebleu").metrics.BLEU
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcd"), rng.integers(8, 14))) for _ in range(60)]
    for order in (2, 3):
        metric = bleu(max_ngram_order=order, effective_order=True, tokenize="none", smooth_method="none")
        theirs = [metric.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100 for i, text in enumerate(texts)]
        assert min(theirs) > 0
        assert self_bleu(texts, [order]) == pytest.approx(np.mean(theirs), abs=1e-9)


def test_self_bleu_rises_with_repetition():
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(list("abcdefghijklmnop"), 10)) for _ in range(50)]
    assert self_bleu(texts) < self_bleu(texts[:25] * 2) == pytest.approx(1.0)
    assert np.isnan(self_bleu(["one"])) and np.isnan(self_bleu(["", "a b"]))
    with pytest.raises(InputError, match="orders"):
        self_bleu(texts, [])


def test_planted_near_copies_are_found_and_the_first_is_kept():
    rng = np.random.default_rng(2)
    texts = ["".join(rng.choice(list("abcdefgh "), 60)) for _ in range(300)]
    copies = [text[:30] + "X" + text[31:] for text in texts[:40]]  # 53 of 61 shingles in common
    found = near_duplicates(texts + copies)
    assert not found[:300].any() and found[300:].all()
    assert near_duplicates(copies, seen=texts).all()
    assert not near_duplicates(copies, seen=texts, threshold=0.95).any()
    assert near_duplicates(["A  River", "a river"]).tolist() == [False, True]
    assert near_duplicates([]).tolist() == []
    with pytest.raises(InputError, match="threshold is 0"):
        near_duplicates(texts, threshold=0)


def test_vectors_are_of_unit_length():
    vectors = ngram_vectors(["a river", "the sea"])
    np.testing.assert_allclose(vectors.multiply(vectors).sum(axis=1), 1.0)
