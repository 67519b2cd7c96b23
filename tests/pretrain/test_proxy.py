"""Proxies: the bigram's probabilities by hand, mixtures that matter, seeds that pair, bad input."""

import math

import pytest

from downriver.core import InputError
from downriver.core.cost import metered
from downriver.pretrain.proxy import NgramProxy, ProxyTrainer

A, B = ["a b a b a b a b"] * 30, ["x y x y x y x y"] * 30


def test_the_bigram_by_hand():
    proxy = NgramProxy({"d": ["a b"]}, {"v": ["a b"]}, kappa=2.0, beta=4.0)
    size = proxy.size
    assert size == 7 and proxy.tokens == 4  # <s> a b </s>, and five special tokens in the vocabulary
    unigram = (1 + 4 / size) / (4 + 4)
    pair = (1 + 2 * unigram) / (1 + 2)
    assert proxy({"d": 1.0}).losses["v"] == pytest.approx(-math.log(pair))


def test_probabilities_sum_to_one_over_the_vocabulary():
    proxy = NgramProxy({"a": A, "b": B}, {"v": ["a"]})
    c_first, tokens = 30 * 4 * 0.5, proxy.tokens  # of "b", half of the run on A at its share
    scale = 0.5 * tokens / proxy.available["a"]
    c_first *= scale / 0.5
    counts = {"a": 30 * 4 * scale, "b": 30 * 4 * scale, "x": 120 * scale, "y": 120 * scale}
    starts = 30 * scale * 2
    unigrams = {w: (c + proxy.beta / proxy.size) / (tokens + proxy.beta) for w, c in counts.items()}
    rest = 2 * (starts + proxy.beta / proxy.size) / (tokens + proxy.beta)
    rest += (proxy.size - 6) * (proxy.beta / proxy.size) / (tokens + proxy.beta)
    assert sum(unigrams.values()) + rest == pytest.approx(1.0)


def test_more_of_a_domain_is_better_for_it_and_worse_for_the_other():
    proxy = NgramProxy({"a": A, "b": B}, {"a": A[:2], "b": B[:2]})
    found = [proxy({"a": share, "b": 1 - share}).losses for share in (0.1, 0.5, 0.9)]
    assert found[0]["a"] > found[1]["a"] > found[2]["a"]
    assert found[0]["b"] < found[1]["b"] < found[2]["b"]
    assert proxy({"b": 0.9, "a": 0.1}).losses == found[0]  # by name, not by position
    assert proxy({"a": 0.9, "b": 0.1}).epochs["a"] == pytest.approx(1.8)


def test_a_transformer_prefers_the_mixture_with_the_domain():
    proxy = ProxyTrainer({"a": A, "b": B}, {"a": A[:4]}, steps=25, batch_size=8, width=16, context=16)
    with metered() as meter:
        much, little = (proxy({"a": share, "b": 1 - share}, seed=1).losses["a"] for share in (0.9, 0.1))
    assert much < little
    assert meter.cost.tokens == 2 * 25 * 8 * 16
    assert proxy({"a": 0.9, "b": 0.1}, seed=1).losses["a"] == much
    assert proxy({"a": 0.9, "b": 0.1}, seed=2).losses["a"] != much


def test_bad_input_is_named():
    with pytest.raises(InputError, match="'b' holds no words"):
        NgramProxy({"a": A, "b": ["  "]}, {"a": A})
    proxy = NgramProxy({"a": A, "b": B}, {"a": A})
    with pytest.raises(InputError, match="domain 'b' is missing"):
        proxy({"a": 1.0})
    with pytest.raises(InputError, match=r"sums to 1\.5"):
        proxy({"a": 1.0, "b": 0.5})
    with pytest.raises(InputError, match="fills no block of 64 tokens"):
        ProxyTrainer({"a": ["x"]}, {"a": A})
