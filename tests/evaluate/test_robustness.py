"""Misspelt input: what each kind of noise does, the same rows for all models, a model that falls back, bad input."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downriver.adapt import full
from downriver.core.errors import InputError
from downriver.evaluate.robustness import NOISES, perturb, robustness
from downriver.models import small

TEXT = "The river runs to the sea, slowly."


def disturbed(noise, share=0.3, seed=0, text=TEXT):
    return perturb(text, share, noise, np.random.default_rng(seed))


@given(st.text(), st.sampled_from(NOISES), st.floats(0, 1), st.integers(0, 5))
def test_sizes_and_signs(text, noise, share, seed):
    found = perturb(text, share, noise, np.random.default_rng(seed))
    chosen = round(share * sum(not sign.isspace() for sign in text))
    if noise in ("permute", "swap"):
        assert Counter(found) == Counter(text)
    if noise in ("delete", "insert"):
        assert len(found) == len(text) + chosen * (1 if noise == "insert" else -1)
    if noise == "upper" and text.isascii():
        assert found.lower() == text.lower()
        assert sum(a != b for a, b in zip(found, text, strict=True)) <= chosen
    assert perturb(text, 0, noise, np.random.default_rng(seed)) == text


@pytest.mark.parametrize("noise", NOISES)
def test_the_seed_draws_the_places(noise):
    assert disturbed(noise) == disturbed(noise) != TEXT
    assert disturbed(noise) != disturbed(noise, seed=1)


def test_by_hand():
    assert disturbed("delete", 1.0, text="a b") == " "
    assert disturbed("swap", 1.0, text="ab") == "ba"
    assert disturbed("upper", 1.0) == TEXT.upper()
    spaces = [i for i, sign in enumerate(disturbed("permute", 1.0)) if sign == " "]
    assert spaces == [i for i, sign in enumerate(TEXT) if sign == " "]
    assert re.fullmatch("1[a-z] 2[a-z]", disturbed("insert", 1.0, text="1 2"))
    assert disturbed("swap", 1.0, text="abcd") == "badc"  # no sign is carried on


def test_a_model_that_reads_letters_falls_back(letters):
    model = full(small("text-encoder", "nano"), letters, "800 examples", learning_rate=3e-3)
    scores = {m.metric: m.value for m in robustness(model, letters, shares=(0.0, 1.0), metrics=["accuracy"])}
    assert set(scores) == {"accuracy", *(f"accuracy, {noise} {share}" for noise in NOISES for share in (0, 1))}
    assert all(scores[f"accuracy, {noise} 0"] == scores["accuracy"] for noise in NOISES)
    assert scores["accuracy"] > 0.9 and scores["accuracy, delete 1"] < 0.75  # nothing is left to read
    again = {m.metric: m.value for m in robustness(model, letters, shares=(1.0,), metrics=["accuracy"])}
    assert again.items() <= scores.items()


def test_bad_input(letters):
    model = small("text-encoder", "nano").with_head(letters)
    with pytest.raises(InputError, match="unknown noise 'swop': did you mean 'swap'"):
        robustness(model, letters, noises=["swop"])
    with pytest.raises(InputError, match="share is 2"):
        robustness(model, letters, shares=[2])
    with pytest.raises(InputError, match="is language-modelling: a task with texts and a target"):
        robustness(model, dataclasses.replace(letters, kind="language-modelling", target=None, labels=()))
