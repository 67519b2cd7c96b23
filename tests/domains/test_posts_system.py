"""Tasks on posts: they are learnt, long posts keep both ends, windows equal one pass, everything survives saving."""

import numpy as np
import pytest
import torch

from downriver.core import InputError
from downriver.domains.posts import PostSystem
from downriver.domains.posts.entities import encode_words
from downriver.domains.posts.sobert import SIZES, VOCABULARY, sobert, train_tokenizer
from downriver.domains.posts.system import head_tail
from downriver.models import byte_tokenizer, small
from downriver.models.features import inference

QUALITY = [{"title": c * 3, "body": c * 5, "label": "early" if c < "m" else "late"} for c in "abcdeuvwxyz" * 4]
NAMES = [{"words": [a, b], "tags": ["B-X" if w < "m" else "O" for w in (a, b)]} for a in "abcxyz" for b in "abcxyz"]


@pytest.fixture(scope="module")
def system() -> PostSystem:
    found = PostSystem(small("text-encoder", "nano"))
    found.add_task("quality", ("early", "late")).add_task("names", ("O", "B-X"), token=True)
    found.fit("quality", QUALITY, "400 examples", learning_rate=5e-3)
    return found.fit("names", NAMES, "600 examples", learning_rate=5e-3)


def test_both_kinds_of_task_are_learnt(system):
    said = system.predict({"title": "bbb", "body": "ccccc", "words": ["a", "z"]})
    assert said["quality"] == "early" and len(said["names"]) == 2
    tags = system.predict_many("names", NAMES)
    assert np.mean([t == row["tags"] for t, row in zip(tags, NAMES, strict=True)]) > 0.9
    right = [p == row["label"] for p, row in zip(system.predict_many("quality", QUALITY), QUALITY, strict=True)]
    assert np.mean(right) > 0.95


def test_windows_over_long_lists_of_words(system):
    model, tokenizer = system.fitted["names"], system.encoder.processor

    def one_pass(words: list[str], start: int, end: int) -> dict[int, str]:
        ids, _, place = encode_words(words, tokenizer)
        with inference(model):
            best = model(input_ids=torch.tensor([ids[start:end]]))["logits"][0].argmax(dim=1).tolist()
        found: dict[int, str] = {}
        for token, label in zip(range(start, end), best, strict=True):
            found.setdefault(place[token], ("O", "B-X")[label])
        return found

    short = ["a", "z", "b"] * 10  # one window
    assert system.predict_many("names", [{"words": short}])[0] == [
        tag for word, tag in sorted(one_pass(short, 0, 61).items()) if word >= 0
    ]
    words = ["a", "z", "b", "y"] * 40  # 321 tokens: windows of 128, each answering for its middle
    tags = system.predict_many("names", [{"words": words}])[0]
    assert len(tags) == 160
    first, last = one_pass(words, 0, 128), one_pass(words, 193, 321)
    assert tags[:40] == [first[word] for word in range(40)]
    assert tags[-40:] == [last[word] for word in range(120, 160)]
    assert system.predict_many("names", [{"words": []}]) == [[]]


def test_a_system_survives_saving(system, tmp_path):
    loaded = PostSystem.load(system.save(tmp_path / "posts"))
    post = {"title": "www", "body": "x", "words": ["c", "y"]}
    assert loaded.predict(post) == system.predict(post)
    assert loaded.tasks == system.tasks
    with pytest.raises(InputError, match=r"no posts\.json"):
        PostSystem.load(tmp_path)


def test_long_texts_keep_both_ends():
    tokenizer = byte_tokenizer(64)
    text = "".join(chr(97 + i % 26) for i in range(100))
    cut = head_tail(text, tokenizer, 42)
    assert len(tokenizer(cut)["input_ids"]) <= 42
    head, tail = cut.split("\n")
    assert text.startswith(head) and text.endswith(tail) and abs(len(head) - len(tail)) <= 1
    assert head_tail("short", tokenizer, 42) == "short"
    with pytest.raises(InputError, match="leaves no room"):
        head_tail(text, tokenizer, 4)


def test_bad_rows_are_named(system):
    with pytest.raises(InputError, match="row 1: label 'bad'"):
        system.fit("quality", [QUALITY[0], {"title": "", "body": "", "label": "bad"}], "16 examples")
    with pytest.raises(InputError, match="row 0: the field 'body'"):
        system.fit("quality", [{"title": "x", "label": "early"}], "16 examples")
    with pytest.raises(InputError, match="2 words and 1 tags"):
        system.fit("names", [{"words": ["a", "b"], "tags": ["O"]}], "16 examples")
    with pytest.raises(InputError, match="tag 'B-Y'"):
        system.fit("names", [{"words": ["a"], "tags": ["B-Y"]}], "16 examples")
    with pytest.raises(InputError, match="there already"):
        system.add_task("names", ("O", "B"))
    with pytest.raises(InputError, match="two different labels"):
        PostSystem(system.encoder).add_task("one", ("a",))
    with pytest.raises(InputError, match="not fitted yet"):
        PostSystem(system.encoder).add_task("two", ("a", "b")).predict_many("two", [])
    with pytest.raises(InputError, match="an encoder is expected"):
        PostSystem(small("causal-lm", "nano"))


def test_the_published_sizes():
    def parameters(size: str) -> float:
        width, layers, _ = SIZES[size]
        block = 12 * width**2 + 13 * width  # attention, MLP, biases and norms
        return (VOCABULARY + 2048 + 2) * width + layers * block + width**2 + 4 * width + VOCABULARY

    assert parameters("base") == pytest.approx(125e6, rel=0.02)
    assert parameters("large") == pytest.approx(762e6, rel=0.02)


def test_sobert_learns_a_corpus_and_keeps_white_space():
    texts = [f"def f{i}(x):\n    return x + {i % 7}\n" for i in range(120)]
    tokenizer = train_tokenizer(texts, 300)
    first = sobert(texts, "1 steps", size="tiny", tokenizer=tokenizer, context=32, batch_tokens=256, learning_rate=3e-3)
    later = sobert(
        texts, "60 steps", size="tiny", tokenizer=tokenizer, context=32, batch_tokens=256, learning_rate=3e-3
    )
    batch = first.collate(_Texts())([{"text": t} for t in texts[:20]])
    assert later(**batch)["loss"] < 0.7 * first(**batch)["loss"]
    assert tokenizer.decode(tokenizer(texts[3])["input_ids"], skip_special_tokens=True) == texts[3]


class _Texts:
    name, kind, inputs, target, labels = "texts", "language-modelling", ("text",), None, ()
