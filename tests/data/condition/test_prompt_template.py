"""Templates: filled once, cut in the text only, one token a label word; and balanced samples of a few rows."""

import numpy as np
import pytest
from datasets import Dataset

from downriver.core.errors import InputError
from downriver.data.condition.prompt_template import KNOWN, PromptTemplate, encode_parts, k_shot
from downriver.models import bpe_tokenizer, byte_tokenizer, word_tokenizer
from downriver.tasks.task import Task

TEXTS = ["it was great . it was terrible . a long film about a long river ? yes , no"] * 50
PAIR = PromptTemplate("{a} ? {label} , {b}", ("no", "yes"))


@pytest.fixture(scope="module", params=["words", "bpe"])
def tokenizer(request):
    return word_tokenizer(TEXTS) if request.param == "words" else bpe_tokenizer(TEXTS, 330)


def test_filled_with_the_label_word_once_between_the_texts():
    assert PAIR.fill({"a": " Is it great ", "b": "It is."}, 1) == "Is it great ? yes , It is."
    assert PAIR.fields == ("a", "b")
    parts = PAIR.parts({"a": "yes", "b": "yes"}, "yes")
    assert [p.role for p in parts].count("label") == 1 and "".join(p.text for p in parts) == "yes ? yes , yes"


@pytest.mark.parametrize("length", [12, 14, 20, None])
def test_only_texts_are_cut_and_the_longest_first(tokenizer, length):
    parts = PAIR.parts({"a": "a long film " * 9, "b": "a river"}, "yes")
    [found] = encode_parts([parts], tokenizer, length)
    assert length is None or len(found.input_ids) == length
    [whole] = encode_parts([parts], tokenizer)
    frame = [i for i, role in zip(*whole, strict=True) if role != "text"]
    assert [i for i, role in zip(*found, strict=True) if role != "text"] == frame
    assert tokenizer.decode(found.input_ids, skip_special_tokens=True).replace(" ", "").endswith("?yes,ariver")
    assert whole.input_ids == tokenizer("".join(p.text for p in parts))["input_ids"]  # encoded as one text
    with pytest.raises(InputError, match=r"the template ' \? yes , ' alone has more than 4 tokens"):
        encode_parts([parts], tokenizer, 4)


def test_label_words_are_the_tokens_that_stand_in_the_corpus():
    bpe = bpe_tokenizer(TEXTS, 330)
    spaced = PromptTemplate("{t} it was {label} .", ("great", "terrible")).label_ids(bpe)
    assert spaced == [[bpe.convert_tokens_to_ids("Ġgreat")], [bpe.convert_tokens_to_ids("Ġterrible")]]
    words = word_tokenizer(TEXTS)
    assert PAIR.label_ids(words) == [[words.convert_tokens_to_ids(w)] for w in ("no", "yes")]


def test_words_that_make_no_label():
    words = word_tokenizer(TEXTS)
    with pytest.raises(InputError, match="label word 'splendid' is not in the tokenizer's vocabulary"):
        PromptTemplate("{t} {label}", ("great", "splendid")).label_ids(words)
    with pytest.raises(InputError, match="label word 'good' is 4 tokens"):
        PromptTemplate("{t} {label}", ("good", "bad")).label_ids(byte_tokenizer(32))
    pieces = PromptTemplate("{t}:{label}", ("good", "bad"), pieces="mean").label_ids(byte_tokenizer(32))
    assert [len(ids) for ids in pieces] == [4, 3]
    with pytest.raises(InputError, match="'good' and 'great' begin with the same token"):
        PromptTemplate("{t}:{label}", ("good", "great"), pieces="mean").label_ids(byte_tokenizer(32))
    with pytest.raises(InputError, match="'Yes' and 'yes' begin with the same token"):
        PromptTemplate("{t} {label}", ("Yes", "yes")).label_ids(words)


@pytest.mark.parametrize(
    ("pattern", "words", "message"),
    [
        ("{text} It was.", ("a", "b"), r"has 0 times \{label\}"),
        ("{text} {label} {label}", ("a", "b"), r"has 2 times \{label\}"),
        ("It was {label}.", ("a", "b"), "has no field for a text"),
        ("{text:>3} {label}", ("a", "b"), "names of columns in braces"),
        ("{} {label}", ("a", "b"), "names of columns in braces"),
        ("{text {label}", ("a", "b"), "pattern"),
        ("{text} {label}", ("a", "a"), "a different word for every class"),
        ("{text} {label}", ("a", " "), "a different word for every class"),
    ],
)
def test_patterns_that_are_none(pattern, words, message):
    with pytest.raises(InputError, match=message):
        PromptTemplate(pattern, words)


def test_the_known_tasks():
    for name, (_, words) in KNOWN.items():
        template = PromptTemplate.known(name)
        assert template.words == words and set(template.fields) <= {"a", "b"}
    assert len(KNOWN) == 16 + 5 + 2
    assert PromptTemplate.known("sst2", a="sentence").fill({"sentence": "Fine film"}, 1) == "Fine film It was great ."
    assert PromptTemplate.known("soft-single", ("x", "y"), a="t").words == ("x", "y")
    with pytest.raises(InputError, match="did you mean 'sst2'"):
        PromptTemplate.known("sst-2")
    with pytest.raises(InputError, match="no field 'b'"):
        PromptTemplate.known("sst2", b="text")
    with pytest.raises(InputError, match="column 'b' of a row is None"):
        PAIR.parts({"a": "x", "b": None}, "yes")


def test_a_few_rows_of_every_class_the_same_for_a_seed():
    rows = Dataset.from_dict({"text": [str(i) for i in range(60)], "label": [0] * 40 + [1] * 15 + [2] * 5})
    task = Task("toy", "text-classification", {"train": rows, "test": rows}, ("text",), "label")
    few = k_shot(task, k=5, seed=21)
    assert np.bincount(few.targets("train")).tolist() == [5, 5, 5] and len(few.rows("test")) == 60
    assert few.texts("train") == k_shot(task, k=5, seed=21).texts("train") != k_shot(task, k=5).texts("train")
    with pytest.raises(InputError, match="class '1' has 15 rows, 16 are wanted"):
        k_shot(task)
