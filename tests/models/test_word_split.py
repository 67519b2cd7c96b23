"""Cutting text into words: nothing is lost, the paper's examples, and another implementation of the rule."""

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downriver.core.errors import InputError
from downriver.models.word_split import WordSplitter

RULES = ["hat", "whitespace", "uax29", list]  # list: every character is a word


def words(text, rule="hat", **settings):
    return [word.decode() for word in WordSplitter(rule, **settings).split(text)]


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=150, deadline=None)
@given(text=st.text(), limit=st.integers(1, 9))
def test_the_pieces_are_the_text(rule, text, limit):
    for max_bytes in (limit, 64):
        pieces = WordSplitter(rule, max_bytes).split(text)
        assert b"".join(pieces) == text.encode()
        assert all(0 < len(piece) <= max_bytes for piece in pieces)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=100, deadline=None)
@given(raw=st.binary())
def test_bytes_of_any_kind(rule, raw):
    assert b"".join(WordSplitter(rule).split(raw)) == raw


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", ["Hello,", " world!"]),
        ("howAreYou", ["how", "Are", "You"]),
        ("how_are_you", ["how_", "are_", "you"]),
        ("HTTPServer", ["HTTPServer"]),
        ("can't 3.14", ["can'", "t", " 3.", "14"]),
        ("a  b", ["a", "  ", "b"]),
        ("a   ,b", ["a", "   ", ",", "b"]),
        (" , b", [" ,", " b"]),
        ("(x) ...", ["(", "x)", " ..."]),
        ("\n\n    return x\n", ["\n", "\n", "    ", "return", " x", "\n"]),
        ("a \tb", ["a", " ", "\t", "b"]),
        ("x + 5€", ["x", " +", " 5", "€"]),
        ("日本 né", ["日", "本", " né"]),
        ("", []),
    ],
)
def test_the_rule_of_the_paper(text, expected):
    assert words(text) == expected


def test_the_other_rules():
    assert words("def f(x):\n    return x \n", "whitespace") == ["def", " f(x):", "\n    return", " x", " \n"]
    assert words("Hello, my_var can't", "uax29") == ["Hello", ",", " ", "my_var", " ", "can't"]
    assert words("ab,c", lambda text: text.partition(",")) == ["ab", ",", "c"]


def test_words_too_long_are_cut_between_characters():
    assert words("abcdefghij", max_bytes=4) == ["abcd", "efgh", "ij"]
    assert words("aéééé", max_bytes=4) == ["aé", "éé", "é"]
    assert WordSplitter(max_bytes=1).split("é") == [b"\xc3", b"\xa9"]  # no bound within the limit
    assert WordSplitter(max_bytes=4, too_long="raise").split("abcd efg") == [b"abcd", b" efg"]
    with pytest.raises(InputError, match=r"b'abcde'.* has 5 bytes: at most 4"):
        WordSplitter(max_bytes=4, too_long="raise").split("abcde")


def sources():
    return [p.read_text("utf-8", "replace") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]]


def test_agrees_with_the_authors_splitter():
    authors = pytest.importorskip("hat_splitter").HATSplitter()
    unlimited = WordSplitter(max_bytes=10**6)
    texts = [*sources(), "naïve Ελλάδα, Москва! 東京 カタカナ 한국어 ไทย 👩‍👩‍👧 x\u3000\u2009 \xa0y e\u0301A"]
    for text in texts:
        assert [word.decode() for word in unlimited.split(text)] == authors.split(text)
        assert WordSplitter().split(text) == authors.split_with_limit(text, 64)


@settings(max_examples=1000, deadline=None)
@given(text=st.text("aAbB zZ  1_.,'\"-:;\n\t\r+$éÉßñ日カا€\u3000\u2009"))
def test_agrees_with_the_authors_splitter_on_any_text(text):
    authors = pytest.importorskip("hat_splitter").HATSplitter()
    assert words(text) == authors.split(text)


def test_what_is_refused():
    with pytest.raises(InputError, match="unknown rule of words 'hats': did you mean 'hat'"):
        WordSplitter("hats")
    with pytest.raises(InputError, match="max_bytes is 0"):
        WordSplitter(max_bytes=0)
    with pytest.raises(InputError, match="unknown too_long 'cut'"):
        WordSplitter(too_long="cut")
    with pytest.raises(InputError, match="are not the text"):
        WordSplitter(str.split).split("two words")
    with pytest.raises(InputError, match="half a surrogate pair"):
        WordSplitter().split("a\ud800")
