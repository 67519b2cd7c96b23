"""HAT's streams: words and bytes as a tokenizer of transformers, and whole models that come back from disk."""

import pytest
import torch
import transformers
from datasets import Dataset

from downriver.adapt import full
from downriver.evaluate import evaluate
from downriver.models import HATConfig, HATForCausalLM, HATStreamTokenizer, HATTokenizer, Model, load
from downriver.models.hat_tokenizer import END, PAD, WORD
from downriver.tasks.task import Task

PART = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["The river runs, slowly.", "né [W] and [PAD]", "how_are_you  now?\n\tYes", "x" * 100]


@pytest.fixture
def hat():
    torch.manual_seed(0)
    lm = HATForCausalLM(HATConfig(encoder=PART, backbone=PART, decoder=PART)).eval()
    return Model(lm, kind="causal-lm", pooling="mean", source="hat", processor=HATStreamTokenizer(), max_length=200)


@pytest.mark.parametrize("text", TEXTS)
def test_it_is_the_stream_of_words_and_gives_the_text_back(text):
    tokenizer = HATStreamTokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == HATTokenizer().stream(text, end=True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:-2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("length", range(4, 27))
def test_words_are_not_cut(length):
    tokenizer = HATStreamTokenizer()
    whole = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    ids = tokenizer(TEXTS[0], truncation=True, max_length=length)["input_ids"]
    assert len(ids) <= length and ids[-2:] == [WORD, END]
    kept = ids[:-2]
    assert kept == whole[: len(kept)]
    if length >= 6:  # "The" and the end
        assert len(kept) == len(whole) or whole[len(kept)] == WORD
    else:  # no word has room: the first one is cut
        assert kept == whole[: length - 2]


def test_padding_and_pairs():
    tokenizer = HATStreamTokenizer()
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt", return_special_tokens_mask=True)
    assert ((batch["input_ids"] == PAD) == (batch["attention_mask"] == 0)).all()
    assert batch["special_tokens_mask"].sum(1).tolist()[0] == 2 + int((batch["attention_mask"][0] == 0).sum())
    assert tokenizer("a", "b")["input_ids"] == [WORD, 97, WORD, END, WORD, 98, WORD, END]


def test_it_is_saved_and_loaded_by_auto(tmp_path):
    HATConfig(encoder=PART, backbone=PART, decoder=PART).save_pretrained(tmp_path)
    HATStreamTokenizer("whitespace", 8).save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, HATStreamTokenizer)
    assert (again.splitter.rule, again.splitter.max_bytes) == ("whitespace", 8)
    assert again(TEXTS[0])["input_ids"] == HATStreamTokenizer("whitespace", 8)(TEXTS[0])["input_ids"]


def test_a_model_is_trained_evaluated_saved_and_loaded(tmp_path, hat):
    rows = Dataset.from_dict({"text": ["the river runs", "a mill stands", "the sea", "the river"] * 4})
    task = Task("rivers", "language-modelling", {"train": rows, "test": rows}, ("text",), None)
    tuned = full(hat, task, "64 examples", batch_size=8, learning_rate=1e-2)
    before, after = ({m.metric: m.value for m in evaluate(model, task)} for model in (hat, tuned))
    assert after["loss"] < before["loss"] - 0.5
    tuned.save(tmp_path / "hat")
    again = load(tmp_path / "hat")
    assert isinstance(again.processor, HATStreamTokenizer) and isinstance(again.backbone, HATForCausalLM)
    assert {m.metric: m.value for m in evaluate(again, task)} == pytest.approx(after, rel=1e-5)


def test_a_classifier_reads_its_words(hat):
    rows = Dataset.from_dict({"text": ["aaa b", "zzz y"] * 8, "label": [0, 1] * 8})
    task = Task("letters", "text-classification", {"train": rows, "test": rows}, ("text",), "label", ("a", "z"))
    tuned = full(hat, task, "128 examples", batch_size=8, learning_rate=1e-2)
    assert {m.metric: m.value for m in evaluate(tuned, task)}["accuracy"] == 1
    batch = hat.processor(["aaa b"], return_tensors="pt")
    states = hat.backbone.model(**batch).last_hidden_state
    words = hat.backbone.model(**HATTokenizer()(["aaa b"], end=True)).last_hidden_state
    torch.testing.assert_close(states[:, [0, 4, 7]], words[:, [0, 1, 2]])
    assert torch.equal(states[0, 1], states[0, 0])
