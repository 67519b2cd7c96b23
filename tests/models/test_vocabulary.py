"""Another tokenizer's vocabulary: shared tokens keep their logits, the rest is drawn like the rows there were."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from downriver.core.errors import InputError
from downriver.models import bpe_tokenizer, byte_tokenizer, small_language_model, word_tokenizer
from downriver.models.vocabulary import shared_tokens, swap_vocabulary

OLD = word_tokenizer(["the red square and the blue circle"])
NEW = word_tokenizer(["un cercle red , the circle est blue , un deux trois quatre cinq six"])


@pytest.mark.parametrize("tied", [True, False])
def test_shared_tokens_keep_their_logits(tied: bool) -> None:
    model = small_language_model("causal-lm", OLD, width=16, heads=2).backbone.eval()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    elif model.lm_head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    ids = OLD("the red circle", add_special_tokens=False, return_tensors="pt")["input_ids"]
    before = model(input_ids=ids).logits
    shared = swap_vocabulary(model, OLD, NEW)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(input_ids=NEW("the red circle", add_special_tokens=False, return_tensors="pt")["input_ids"]).logits
    assert after.shape[-1] == len(NEW) == model.config.vocab_size and len(shared) == 9
    torch.testing.assert_close(after[..., list(shared)], before[..., list(shared.values())], rtol=1e-5, atol=1e-6)
    assert {NEW.convert_ids_to_tokens(i) for i in shared} >= {"the", "red", "circle", "blue", "</s>"}


def test_new_rows_are_drawn_like_the_old_ones() -> None:
    model = small_language_model("causal-lm", OLD, width=4, heads=2).backbone
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(5.0)
    many = word_tokenizer([" ".join(f"w{i}" for i in range(2000))])
    swap_vocabulary(model, OLD, many, seed=3)
    assert model.get_input_embeddings().weight[10:].mean().item() == pytest.approx(5.0, abs=0.1)


def test_a_masked_models_output_bias_moves_with_its_token() -> None:
    config = BertConfig(
        vocab_size=len(OLD), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().bias.copy_(torch.arange(len(OLD)))
    shared = swap_vocabulary(model, OLD, NEW)
    bias = model.get_output_embeddings().bias
    assert all(bias[new] == old for new, old in shared.items())


def test_tokens_are_the_text_they_stand_for() -> None:
    bpe = bpe_tokenizer(["the café the café the café"] * 5, 280)
    both = shared_tokens(byte_tokenizer(8), bpe)
    assert len(both) >= 256 + 4  # every byte, and padding, start, end and mask
    words = word_tokenizer(["the café"])
    assert {words.convert_ids_to_tokens(i) for i in shared_tokens(bpe, words)} >= {"the", "</s>"}


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no embeddings"):
        swap_vocabulary(_Bare(), OLD, NEW)
    other = word_tokenizer(["zzz"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("downriver.models.vocabulary.shared_tokens", lambda old, new: {})
        with pytest.raises(InputError, match="no token in common"):
            swap_vocabulary(small_language_model("causal-lm", OLD, width=4, heads=2).backbone, OLD, other)


class _Bare(torch.nn.Module):
    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None


def test_special_tokens_without_a_role_are_compared_by_spelling():
    old, new = word_tokenizer(["red square"]), word_tokenizer(["red circle"])
    for tokenizer in (old, new):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    new.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|new|>"]})
    turn, other = new.convert_tokens_to_ids(["<|turn|>", "<|new|>"])
    shared = shared_tokens(old, new)
    assert shared[turn] == old.convert_tokens_to_ids("<|turn|>") and other not in shared
