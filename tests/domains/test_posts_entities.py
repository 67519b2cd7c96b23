"""BIO both ways, F1 as seqeval counts it, and windows that answer for every token once."""

import numpy as np
import pytest

from downriver.core import InputError
from downriver.domains.posts.entities import (
    Entity,
    bio,
    central,
    encode_words,
    entities,
    entity_f1,
    read_columns,
    windows,
)
from downriver.models import byte_tokenizer

TYPES = ("Class", "Library")


def random_tags(rng: np.random.Generator, n: int) -> list[str]:
    return [str(rng.choice(["O", *(f"{k}-{t}" for k in "BI" for t in TYPES)])) for _ in range(n)]


def test_decoding_and_encoding_are_inverse():
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = entities(random_tags(rng, 12))
        assert entities(bio(found, 12)) == found


def test_f1_agrees_with_seqeval():
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(1)
    for _ in range(50):
        truth, guess = ([random_tags(rng, 9) for _ in range(5)] for _ in range(2))
        assert entity_f1(truth, guess) == pytest.approx(seqeval.f1_score(truth, guess))


def test_f1_by_hand():
    truth = [["B-Class", "I-Class", "O", "B-Library"]]
    assert entity_f1(truth, truth) == 1.0
    assert entity_f1(truth, [["B-Class", "I-Class", "O", "B-Class"]]) == 0.5
    assert entity_f1(truth, [["B-Class", "O", "O", "O"]]) == 0.0
    with pytest.raises(InputError, match="different numbers of words"):
        entity_f1(truth, [["O"]])


def test_bad_tags_are_named():
    with pytest.raises(InputError, match="tag 1 is 'X'"):
        entities(["O", "X"])
    with pytest.raises(InputError, match="words of their own"):
        bio([Entity("A", 0, 2), Entity("B", 1, 3)], 4)


@pytest.mark.parametrize(("length", "size", "stride"), [(10, 6, 4), (100, 16, 8), (7, 16, 8), (16, 16, 8), (33, 8, 8)])
def test_every_token_is_answered_for_once_by_a_window_that_holds_it(length, size, stride):
    parts = windows(length, size, stride)
    assert [t for _, _, low, high in parts for t in range(low, high)] == list(range(length))
    assert all(start <= low <= high <= end and end - start <= size for start, end, low, high in parts)
    scores = [np.arange(start, end)[:, None] for start, end, _, _ in parts]
    assert central(scores, parts)[:, 0].tolist() == list(range(length))


def test_labels_stay_with_the_first_token_of_their_word():
    words = ["useState", "in", "React"]
    ids, labels, place = encode_words(words, byte_tokenizer(99), [1, 0, 2])
    assert len(ids) == len(labels) == len(place)
    assert [label for label in labels if label != -100] == [1, 0, 2]
    assert [place[labels.index(k)] for k in (1, 0, 2)] == [0, 1, 2]
    assert byte_tokenizer(99).decode(ids, skip_special_tokens=True) == "useState in React"


def test_columns_are_read_and_errors_name_the_line(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("use\tO\tuse\tO\nReact\tB-Library\tReact\tB\n\n\nok\tO\n")
    assert read_columns(path) == [(["use", "React"], ["O", "B-Library"]), (["ok"], ["O"])]
    path.write_text("use\tO\nReact\n")
    with pytest.raises(InputError, match="line 2"):
        read_columns(path)
