"""Classes as words: the logits are the language model's own, hard and soft, masked and causal; it learns."""

import numpy as np
import pytest
import torch

from downriver.adapt import PromptClassifier
from downriver.core.errors import InputError
from downriver.data.condition.prompt_template import PromptTemplate
from downriver.models import byte_tokenizer, small, small_language_model, word_tokenizer

WARM, COLD = ["sun light fire", "fire sun", "light fire sun"], ["snow ice wind", "ice snow", "wind ice snow"]
ROWS = [{"text": t, "label": 1} for t in WARM] + [{"text": t, "label": 0} for t in COLD]
TEMPLATE = PromptTemplate("{text} it was {label} .", ("cold", "warm"))
WORDS = word_tokenizer([*WARM, *COLD, "it was cold warm . very"])
FAST = {"steps": 20, "learning_rate": 1e-2, "batch_size": 6}


def lm(kind="masked-lm", tokenizer=WORDS, context=24):
    return small_language_model(kind, tokenizer, width=16, heads=2, context=context, seed=1)


def test_logits_are_transformers_own_at_the_mask():
    model = lm()
    found = PromptClassifier(model, TEMPLATE).logits(ROWS, batch_size=4)
    labels = WORDS.convert_tokens_to_ids(["cold", "warm"])
    for row, mine in zip(ROWS, found, strict=True):
        ids = WORDS(f"{row['text']} it was <mask> .", return_tensors="pt")
        with torch.no_grad():
            full = model.backbone(**ids).logits[0, (ids["input_ids"][0] == WORDS.mask_token_id).nonzero().item()]
        assert np.allclose(mine, full[labels].numpy(), atol=1e-5)


def test_a_causal_model_is_asked_for_the_next_token():
    model = lm("causal-lm")
    template = PromptTemplate("{text} it was {label} .", ("cold", "warm"))
    found = PromptClassifier(model, template).logits(ROWS[:1])
    ids = WORDS("sun light fire it was", return_tensors="pt")["input_ids"][:, :-1]
    with torch.no_grad():
        full = model.backbone(input_ids=ids).logits[0, -1, WORDS.convert_tokens_to_ids(["cold", "warm"])]
    assert np.allclose(found[0], full.numpy(), atol=1e-5)
    with pytest.raises(InputError, match="a causal model reads only what stands before the label"):
        PromptClassifier(model, PromptTemplate("{label} : {text}", ("cold", "warm")))


@pytest.mark.parametrize(("kind", "soft"), [("masked-lm", False), ("masked-lm", True), ("causal-lm", False)])
def test_it_learns_and_leaves_the_model_given_as_it_was(kind, soft):
    model = lm(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classifier = PromptClassifier(model, TEMPLATE, soft=soft).fit(ROWS, ROWS, validations=3, **FAST)
    assert classifier.score(ROWS) == 1 and classifier.predict(ROWS[:2]).tolist() == [1, 1]
    assert np.allclose(classifier.predict_proba(ROWS).sum(axis=1), 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_equal_seeds_give_equal_classifiers():
    one, two = (PromptClassifier(lm(), TEMPLATE).fit(ROWS, **FAST, seed=3).logits(ROWS) for _ in range(2))
    assert np.array_equal(one, two)


def test_soft_tokens_start_as_the_words_and_part_from_them():
    hard, soft = PromptClassifier(lm(), TEMPLATE), PromptClassifier(lm(), TEMPLATE, soft=True)
    assert np.allclose(hard.logits(ROWS), soft.logits(ROWS), atol=1e-5)
    table = soft.model.backbone.get_input_embeddings().weight
    assert len(table) == len(WORDS) + 5  # it, was, the full stop; cold, warm
    soft.fit(ROWS, **FAST)
    table = soft.model.backbone.get_input_embeddings().weight
    its, own = WORDS.convert_tokens_to_ids("it"), soft.own[WORDS.convert_tokens_to_ids("it")]
    assert not torch.allclose(table[its], table[own])


def test_a_word_of_several_tokens_is_the_mean_of_their_logits():
    tokenizer = byte_tokenizer(64)
    model = lm(tokenizer=tokenizer, context=64)
    template = PromptTemplate("{text}:{label}", ("cold", "warm"), pieces="mean")
    found = PromptClassifier(model, template).logits(ROWS[:1])
    ids = torch.tensor([[*tokenizer("sun light fire:")["input_ids"][:-1], tokenizer.mask_token_id, 2]])
    with torch.no_grad():
        full = model.backbone(input_ids=ids).logits[0, -2]
    words = [tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("cold", "warm")]
    assert np.allclose(found[0], [full[w].mean().item() for w in words], atol=1e-5)
    assert len(PromptClassifier(model, template, soft=True).word_ids[0]) == 1


def test_a_long_text_is_cut_and_template_and_mask_are_not():
    long = [{"text": "snow " * 90, "label": 0}]
    classifier = PromptClassifier(lm(), TEMPLATE)
    [row] = classifier._rows(long)
    assert len(row["input_ids"]) == 24 and row["input_ids"][row["position"]] == WORDS.mask_token_id
    assert WORDS.convert_ids_to_tokens(row["input_ids"][-5:]) == ["it", "was", "<mask>", ".", "</s>"]


@pytest.mark.parametrize("bad", [2, -1, None, "warm", 0.5])
def test_labels_out_of_range(bad):
    with pytest.raises(InputError, match="row 1, column 'label'"):
        PromptClassifier(lm(), TEMPLATE).fit([ROWS[0], {"text": "x", "label": bad}])


def test_what_cannot_be_used():
    with pytest.raises(InputError, match="text-encoder model: a masked-lm or causal-lm is expected"):
        PromptClassifier(small("text-encoder", "nano"), TEMPLATE)
    with pytest.raises(InputError, match="1 label words: two at least"):
        PromptClassifier(lm(), PromptTemplate("{text} {label}", ("warm",)))
    with pytest.raises(InputError, match="there is no row"):
        PromptClassifier(lm(), TEMPLATE).predict([])
