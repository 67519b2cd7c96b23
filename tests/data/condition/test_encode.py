"""Parts become ids and labels: the seam, what is learnt, what is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downriver.core.errors import InputError
from downriver.data.condition import Part, encode, encode_all
from downriver.models.tokenizers import bpe_tokenizer, byte_tokenizer, word_tokenizer

BPE = bpe_tokenizer(["the river and the sea", "the sea and the rivers"] * 9, 300)
WORDS = word_tokenizer(["a b c d e f"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


def ids_of(text):
    return BPE(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=4), st.booleans())
def test_the_text_is_whole_and_labels_are_ids_or_nothing(parts, joint):
    parts = [*parts, ("end", True)]
    encoded = encode(parts, BPE, joint=joint)
    assert BPE.decode(encoded.input_ids, skip_special_tokens=True) == "".join(text for text, _ in parts)
    assert encoded.input_ids[0] == BPE.bos_token_id and encoded.labels[0] == -100
    assert encoded.input_ids[-1] == encoded.labels[-1] == BPE.eos_token_id
    assert all(label in (-100, i) for i, label in zip(*encoded, strict=True))
    if joint:
        assert encoded.input_ids[1:-1] == ids_of("".join(text for text, _ in parts))
    else:
        assert encoded.input_ids[1:-1] == [i for text, _ in parts for i in ids_of(text)]


def test_a_joint_encoding_may_merge_across_the_seam_and_the_token_is_learnt():
    assert len(ids_of("the")) == 1 and ids_of("the") != ids_of("th") + ids_of("e")
    parts = [Part("th", loss=False), Part("e sea")]
    together, apart = encode(parts, BPE), encode(parts, BPE, joint=False)
    assert together.input_ids[1:-1] == ids_of("the sea")
    assert together.labels[1:-1] == ids_of("the sea")  # "the" ends in the second part
    assert apart.labels[1:-1] == [-100] * len(ids_of("th")) + ids_of("e sea")
    learnt_first = encode([Part("the s"), Part("ea", loss=False)], BPE)
    assert learnt_first.labels[1:-1] == [*ids_of("the"), *[-100] * len(ids_of(" sea"))]


def test_characters_of_several_bytes_belong_to_their_part():
    tokenizer = byte_tokenizer(64)
    labels = encode([("é", False), ("ñ", True)], tokenizer).labels
    assert labels[:3] == [-100] * 3 and len(labels) == 6 and -100 not in labels[3:]


def test_special_tokens_are_put_once_and_can_be_left_out():
    assert encode([("a", True)], WORDS).input_ids == [1, WORDS.convert_tokens_to_ids("a"), 2]
    assert encode([("a", True)], WORDS, start=False, end=False).input_ids == [WORDS.convert_tokens_to_ids("a")]
    assert encode([("a", True), (" b", False)], WORDS).labels[-1] == -100  # the end belongs to the last part


def test_what_is_too_long_loses_the_left_of_what_is_not_learnt():
    parts = [("a b c", False), (" d", True), (" e", False), (" f", True)]
    words = WORDS.convert_ids_to_tokens(encode(parts, WORDS, max_length=6).input_ids)
    assert words == ["<s>", "c", "d", "e", "f", "</s>"]
    words = WORDS.convert_ids_to_tokens(encode(parts, WORDS, max_length=4, joint=False).input_ids)
    assert words == ["<s>", "d", "f", "</s>"]
    with pytest.raises(InputError, match=r"example 0: 3 tokens are learnt .* does not fit into max_length 3"):
        encode(parts, WORDS, max_length=3)


def test_many_at_once_are_the_same_as_one_by_one():
    examples = [[("the ri", False), ("ver", True)], [("sea", True)], [("", False), ("the", True)]]
    for joint in (True, False):
        assert encode_all(examples, BPE, joint=joint) == [encode(parts, BPE, joint=joint) for parts in examples]
    assert encode_all([], BPE) == []


def test_bad_input():
    with pytest.raises(InputError, match="example 1 has no part"):
        encode_all([[("a", True)], []], BPE)
    with pytest.raises(InputError, match="example 0: None is not a text"):
        encode([(None, True)], BPE)
    with pytest.raises(InputError, match="example 0: no token of what is to be learnt"):
        encode([("a", False), ("  ", True)], WORDS)

    class Slow:
        is_fast, bos_token_id, eos_token_id = False, 1, 2

    with pytest.raises(InputError, match=r"a Slow does not say which characters .* joint=False"):
        encode([("a", True)], Slow())
