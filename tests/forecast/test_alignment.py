"""Nearness of texts before training: shares of languages and an n-gram model, against what was planted."""

import math

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast.alignment import language_shares, ngram_cross_entropy, translation_alignment


def chain(seed: int, n: int, letters: str = "abcdef", table: int = 0) -> list[str]:
    """Texts of a Markov chain of letters; ``table`` chooses which."""
    P = np.random.default_rng(table).dirichlet(np.full(len(letters), 0.3), size=len(letters))
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        state, text = int(rng.integers(len(letters))), ""
        for _ in range(100):
            state = int(rng.choice(len(letters), p=P[state]))
            text += letters[state]
        texts.append(text)
    return texts


def test_the_planted_source_is_the_nearest_and_near_its_entropy() -> None:
    task = chain(1, 60)
    same = ngram_cross_entropy(chain(2, 20), task, 2)
    P = np.random.default_rng(0).dirichlet(np.full(6, 0.3), size=6)
    pi = np.linalg.matrix_power(P, 200)[0]
    entropy = float(-(pi[:, None] * P * np.log(np.maximum(P, 1e-300))).sum())
    assert same == pytest.approx(entropy, rel=0.1)
    other, far = (ngram_cross_entropy(text, task, 2) for text in (chain(2, 20, table=5), chain(2, 20, "uvwxyz")))
    assert same < other < far


def test_a_mixture_is_as_far_as_its_share_says() -> None:
    task, near, far = chain(1, 40), chain(2, 20), chain(3, 20, "uvwxyz")
    found = [ngram_cross_entropy([*near[: 20 - k], *far[:k]], task, 3) for k in (0, 5, 10, 20)]
    assert found == sorted(found) and found[-1] > found[0] + 1


def test_it_is_the_formula() -> None:
    # task "ab": start → a, a → b; scored on "ab" with characters {newline, a, b}; only unigrams have two followers
    unigram = [(1 + 2 / 3) / (2 + 2)] * 2
    expected = -sum(math.log((1 + p) / (1 + 1)) for p in unigram) / 2
    assert ngram_cross_entropy(["ab"], ["ab"], 2) == pytest.approx(expected)


def test_unseen_text_costs_no_more_than_what_backing_off_gives() -> None:
    found = ngram_cross_entropy(["xyz"], ["ab"], 3)
    assert math.isfinite(found) and found > math.log(6)


def test_shares_and_their_weights() -> None:
    texts = ["one two three", "eins", "zwei drei vier fünf"]
    shares = language_shares(texts, lambda text: "en" if text.startswith("one") else "de")
    assert shares == {"de": 0.625, "en": 0.375}
    assert translation_alignment(shares, "en", "de") == pytest.approx(0.7 * 0.375 + 0.3 * 0.625)
    assert language_shares(["ab", "c"], ["zh", "en"], size=len)["zh"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: language_shares(["a"], ["en", "de"]), "1 texts and 2 languages"),
        (lambda: language_shares([], []), "at least one text"),
        (lambda: language_shares([""], ["en"]), "not one of them"),
        (lambda: translation_alignment({"en": 0.5}, "en", "de"), "sum to 1"),
        (lambda: translation_alignment({"en": 1.0}, "en", "de", (-1, 1)), "weights"),
        (lambda: ngram_cross_entropy(["a"], [""]), "task holds no text"),
        (lambda: ngram_cross_entropy([], ["a"]), "pretraining holds no text"),
        (lambda: ngram_cross_entropy(["a"], ["a"], 0), "order 0"),
    ],
)
def test_bad_input(call, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call()
