"""Tokenizers made on the spot: whole vocabularies, round trips, the same from the same texts, small models on them."""

import pytest
import torch
import transformers

from downriver.core import InputError
from downriver.models import bpe_tokenizer, small_language_model, word_tokenizer

TEXTS = ["The river runs, and the sea waits.", "the sea, the sky", "a río"]


def test_words_are_ranked_by_frequency_then_alphabet():
    tokenizer = word_tokenizer(TEXTS)
    assert tokenizer.convert_ids_to_tokens(range(5, 9)) == ["the", ",", "sea", "."]
    assert word_tokenizer(list(reversed(TEXTS))).get_vocab() == tokenizer.get_vocab()
    assert tokenizer.convert_ids_to_tokens(tokenizer("THE desert")["input_ids"]) == ["<s>", "the", "<unk>", "</s>"]
    assert len(word_tokenizer(TEXTS, 8)) == 8


def test_words_as_they_stand_and_without_an_end():
    tokenizer = word_tokenizer(["s1 r2 O3 ."], lower=False, end=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer("s1 O3 o3")["input_ids"]) == ["<s>", "s1", "O3", "<unk>"]


def test_byte_pairs_read_back_any_text_and_survive_saving(tmp_path):
    tokenizer = bpe_tokenizer(TEXTS * 20, 300)
    assert len(tokenizer) <= 300
    tokenizer.save_pretrained(tmp_path)
    for other in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        ids = other("çà the sea\n")["input_ids"]
        assert other.decode(ids, skip_special_tokens=True) == "çà the sea\n"
    assert len(tokenizer("the sea")["input_ids"]) < 2 + len("the sea")


@pytest.mark.parametrize("kind", ["causal-lm", "masked-lm"])
def test_a_small_model_covers_its_vocabulary_and_repeats(kind):
    tokenizer = word_tokenizer(TEXTS)
    model = small_language_model(kind, tokenizer, width=16, heads=2, context=12, seed=3)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert model(**batch)["logits"].shape == (*batch["input_ids"].shape, len(tokenizer))
    torch.manual_seed(9)
    again = small_language_model(kind, tokenizer, width=16, heads=2, context=12, seed=3)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    other = small_language_model(kind, tokenizer, width=16, heads=2, context=12, seed=4)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="no word"):
        word_tokenizer(["", "  "])
    with pytest.raises(InputError, match="260 at least"):
        bpe_tokenizer(TEXTS, 100)
    with pytest.raises(InputError, match="width 30, heads 4"):
        small_language_model("causal-lm", word_tokenizer(TEXTS), width=30)
    with pytest.raises(InputError, match="kind of small language model"):
        small_language_model("vit", word_tokenizer(TEXTS))
