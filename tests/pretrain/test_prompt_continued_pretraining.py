"""The corpus is the template with pseudo-labels, masking treats label words as told, and the recipe runs end to end."""

import numpy as np
import pytest
import torch

from downriver.adapt import PromptClassifier
from downriver.core.errors import InputError
from downriver.data.condition.prompt_template import PromptTemplate
from downriver.models import small, small_language_model, word_tokenizer
from downriver.pretrain import PCP, continued_pretrain, pcp_corpus, tapt_corpus
from downriver.pretrain.prompt_continued_pretraining import _encoded, _Lines, masked_loss

VOCABULARY = [f"w{i}" for i in range(40)]
WORDS = word_tokenizer([" ".join(VOCABULARY), "it was bad good ."])
TEMPLATE = PromptTemplate("{text} it was {label} .", ("bad", "good"))
RNG = np.random.default_rng(0)
# words 0 to 19 are bad, 20 to 39 good
ROWS = [{"text": " ".join(RNG.choice(VOCABULARY[20 * (i % 2) :][:20], 8)), "label": i % 2} for i in range(200)]
FAST = {"steps": 30, "learning_rate": 5e-3, "batch_size": 8}


def lm(kind="masked-lm", width=16):
    return small_language_model(kind, WORDS, width=width, heads=2, context=24, seed=1)


def masked(mask_label, training=True):
    long = [{"text": " ".join([row["text"]] * 7)} for row in ROWS * 5]  # a short line has one masked token at least
    model = small_language_model("masked-lm", WORDS, width=4, heads=1, context=80)
    rows = _encoded(pcp_corpus(long, [row["label"] for row in ROWS * 5], TEMPLATE), model, "corpus")
    batch = _Lines("lines", {"train": rows}, mask_label=mask_label).collate(model.train(training))(list(rows))
    role = torch.tensor([[*r, *[0] * (batch["input_ids"].shape[1] - len(r))] for r in rows["role"]])
    return batch, role


def test_a_line_is_the_text_the_template_and_the_word_of_the_label():
    corpus = pcp_corpus(ROWS, [row["label"] for row in ROWS], TEMPLATE)
    plain = tapt_corpus(ROWS, TEMPLATE)
    assert len(corpus) == len(plain) == 200
    for line, bare, row in zip(corpus, plain, ROWS, strict=True):
        word = TEMPLATE.words[row["label"]]
        assert line["line"] == f"{row['text']} it was {word} ." and line["line"].count(word) == 1
        without = "".join(t for t, r in zip(line["parts"], line["roles"], strict=True) if r == "text")
        assert without == bare["line"] == row["text"]
    pair = PromptTemplate("{a} ? {label} , {b}", ("no", "yes"))
    assert tapt_corpus([{"a": "x y", "b": "z"}], pair)["line"][0] == "x y z"


def test_pseudo_labels_from_probabilities_and_classifiers():
    sure = np.array([[0.9, 0.1], [0.45, 0.55], [0.2, 0.8]])
    assert pcp_corpus(ROWS[:3], sure, TEMPLATE)["label"][:] == [0, 1, 1]
    assert pcp_corpus(ROWS[:3], sure, TEMPLATE, confidence=0.6)["label"][:] == [0, 1]
    classifier = PromptClassifier(lm(), TEMPLATE)
    assert pcp_corpus(ROWS, classifier, TEMPLATE)["label"][:] == classifier.predict(ROWS).tolist()
    with pytest.raises(InputError, match="2 labels for 3 rows"):
        pcp_corpus(ROWS[:3], [0, 1], TEMPLATE)
    with pytest.raises(InputError, match="label 2: a class from 0 to 1"):
        pcp_corpus(ROWS[:3], [0, 1, 2], TEMPLATE)
    with pytest.raises(InputError, match="labels are classes: probabilities are expected"):
        pcp_corpus(ROWS[:3], [0, 1, 1], TEMPLATE, confidence=0.5)
    with pytest.raises(InputError, match=r"of 3 rows none has a confidence of 0\.95"):
        pcp_corpus(ROWS[:3], sure, TEMPLATE, confidence=0.95)
    with pytest.raises(InputError, match="there is no row"):
        tapt_corpus([], TEMPLATE)


def test_fifteen_per_cent_are_masked_and_label_words_like_any_other():
    batch, role = masked("random")
    chosen = (batch["labels"] != -100).float()
    assert abs(chosen[role > 0].mean() - 0.15) < 0.01
    assert abs(chosen[role == 2].mean() - 0.15) < 0.04  # a thousand of them
    assert (batch["labels"][role == 0] == -100).all()  # never the tokenizer's own tokens or padding
    assert "role" not in batch


@pytest.mark.parametrize("training", [True, False])
def test_label_words_are_always_or_never_masked(training):
    batch, role = masked("always", training)
    assert (batch["labels"][role == 2] != -100).all()
    assert (batch["input_ids"][role == 2] == WORDS.mask_token_id).all()
    assert set(batch["labels"][role == 2].tolist()) == set(WORDS.convert_tokens_to_ids(["bad", "good"]))
    rest = (batch["labels"] != -100)[role == 1].float().mean()
    assert abs(rest - 0.15) < 0.03
    batch, role = masked("never", training)
    assert (batch["labels"][role == 2] == -100).all()
    assert set(batch["input_ids"][role == 2].tolist()) == set(WORDS.convert_tokens_to_ids(["bad", "good"]))


def test_the_loss_is_that_of_the_whole_forward_pass():
    model = lm()
    rows = _encoded(pcp_corpus(ROWS, [row["label"] for row in ROWS], TEMPLATE), model, "corpus")
    batch = _Lines("lines", {"train": rows}).collate(model)(list(rows))
    assert torch.allclose(masked_loss(model, batch)["loss"], model(**batch)["loss"], atol=1e-5)


def test_lines_that_are_too_long_keep_template_and_label():
    corpus = pcp_corpus([{"text": "w1 " * 99}], [1], TEMPLATE)
    [row] = _encoded(corpus, lm(), "corpus")
    assert len(row["input_ids"]) == 24
    assert WORDS.convert_ids_to_tokens(row["input_ids"])[-5:] == ["it", "was", "good", ".", "</s>"]
    assert row["role"].count(2) == 1


def test_pretraining_on_labels_teaches_them():
    corpus = pcp_corpus(ROWS, [row["label"] for row in ROWS], TEMPLATE)
    model = lm(width=32)
    settings = {"mask_label": "always", "learning_rate": 5e-3, "batch_size": 16, "accumulate": 1, "seed": 1}
    tuned = continued_pretrain(model, corpus, "10 epochs", **settings)
    assert PromptClassifier(model, TEMPLATE).score(ROWS) < 0.8 < PromptClassifier(tuned, TEMPLATE).score(ROWS)
    best = continued_pretrain(model, corpus, "4 steps", dev=corpus, validations=2, batch_size=8, accumulate=2)
    assert best.kind == "masked-lm"


def test_a_causal_model_reads_on():
    corpus = pcp_corpus(ROWS[:16], [row["label"] for row in ROWS[:16]], TEMPLATE)
    model = lm("causal-lm")
    tuned = continued_pretrain(model, corpus, "2 steps", batch_size=8, accumulate=1)
    assert not torch.equal(tuned.backbone.lm_head.weight, model.backbone.lm_head.weight)
    with pytest.raises(InputError, match="a causal model masks nothing"):
        continued_pretrain(model, corpus, "2 steps", mask_label="always")


def test_what_cannot_be_pretrained_on():
    corpus = pcp_corpus(ROWS[:4], [0] * 4, TEMPLATE)
    with pytest.raises(InputError, match="unknown value of mask_label 'often'"):
        continued_pretrain(lm(), corpus, mask_label="often")
    with pytest.raises(InputError, match="text-encoder model"):
        continued_pretrain(small("text-encoder", "nano"), corpus)
    with pytest.raises(InputError, match="corpus lacks the column 'parts'"):
        continued_pretrain(lm(), corpus.remove_columns("parts"))
    with pytest.raises(InputError, match="budget 'many epochs'"):
        continued_pretrain(lm(), corpus, "many epochs")


def test_the_whole_recipe():
    more = {"budget": "8 steps", "batch_size": 16, "accumulate": 1, "learning_rate": 5e-3}
    pcp = PCP(lm(), TEMPLATE, lambda model: PromptClassifier(model, TEMPLATE), fit=FAST, pretrain=more)
    result = pcp.run(ROWS[:16], ROWS[40:120], ROWS[16:40], test=ROWS[120:], rounds=2)
    assert set(result.scores) == {"ft", "tapt+ft", "pcp+ft"} == set(result.classifiers)
    assert all(set(scores) == {"dev", "test"} for scores in result.scores.values())
    assert len(result.corpus) == 80 and result.scores["ft"]["test"] > 0.7
    with pytest.raises(InputError, match=r"1 test rows stand among the unlabelled ones \(first: test row 1\)"):
        pcp.run(ROWS[:16], ROWS[40:120], ROWS[16:40], test=[ROWS[0], {"text": ROWS[50]["text"].upper() + " "}])
    with pytest.raises(InputError, match="rounds is 0"):
        pcp.run(ROWS[:16], ROWS[40:120], ROWS[16:40], rounds=0)
