"""The words of many texts at once, as arrays: where they start, how long they are, a hash of each, and their repeats.

Reach for it to write a rule over words that has to run over a whole corpus. Everything is done on the code points of
the joined texts with numpy; no word ever becomes a Python string.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from downriver.core.seeds import generator

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
SPACE, WORD, OTHER = 0, 1, 2  # what a character is to a word
CLASS, ALPHA, UPPER, LOWER, SYMBOL, NUMERIC, LATIN = 3, 4, 8, 16, 32, 64, 128
CHUNK = 1 << 18
"""Characters that are looked at together: their arrays stay in the processor's cache."""


@dataclass(frozen=True)
class Words:
    """The words of ``n`` texts, one after the other, and the characters they were found in.

    ``text`` says which text a word is of, ``start`` where it begins in ``kind`` (one entry a character), ``length``
    how many characters it has; equal words have equal ``hash`` (64 bits: unequal ones practically never).
    """

    n: int
    text: np.ndarray
    start: np.ndarray
    length: np.ndarray
    hash: np.ndarray
    kind: np.ndarray

    def count(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """How many (chosen) words every text has, (n,)."""
        return np.bincount(self.text if chosen is None else self.text[chosen], minlength=self.n).astype(np.float64)

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of a value of every word by text, (n,)."""
        return np.bincount(self.text, weights=values, minlength=self.n)

    def characters(self, mark: int) -> np.ndarray:
        """How many characters of every word have the mark."""
        return within((self.kind & mark) != 0, self.start, self.length)

    def letters(self, first: np.ndarray, n: int) -> np.ndarray:
        """The characters of the ``n`` words from each of the ``first`` on (fewer at the end), without spaces."""
        return within(self.length, first, np.minimum(n, len(self.length) - first))


def split(texts: Sequence[str], how: Literal["words and punctuation", "spaces"]) -> Words:
    r"""Find the words of the texts: runs of ``\w`` and runs of anything else but space (the split of RedPajama and
    DSIR, nltk's ``wordpunct_tokenize``), or whatever stands between spaces.

    >>> found = split(["It's up.", "up"], "words and punctuation")
    >>> found.count().tolist(), found.length.tolist(), bool(found.hash[3] == found.hash[5])
    ([5.0, 1.0], [2, 1, 1, 2, 1, 2], True)
    """
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), np.uint32)
    bounds = np.concatenate([[0], np.cumsum([len(text) + 1 for text in texts])])
    kind = _kinds()[codes]
    run = kind & CLASS if how == "words and punctuation" else (kind & CLASS) != SPACE
    edges = np.concatenate([[0], np.flatnonzero(run[1:] != run[:-1]) + 1, [len(run)]])
    filled = run[edges[:-1]] != SPACE
    start, length = edges[:-1][filled], np.diff(edges)[filled]
    per_text = np.diff(np.searchsorted(start, bounds))
    powers, inverse = _powers(1 << len(codes).bit_length())
    with np.errstate(over="ignore"):
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_marks()[codes] * powers[: len(codes)])])
        hashes = (sums[start + length] - sums[start]) * inverse[start]
        hashes ^= hashes >> np.uint64(32)  # the low bits of a product know only the low bits of its factors
    return Words(len(texts), np.repeat(np.arange(len(texts)), per_text), start, length, hashes, kind)


def within(values: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The sums of ``values[start : start + length]`` for every start and length.

    >>> within(np.array([1, 2, 3, 4]), np.array([0, 2]), np.array([2, 1])).tolist()
    [3, 3]
    """
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[start + length] - sums[start]


@dataclass(frozen=True)
class Repeats:
    """Runs of ``n`` words that a text has more than once. ``place`` are the words they start at, in order; ``group``
    tells which of them are the same run; ``size`` and ``first`` are by group: how often, and the first place."""

    n: int
    place: np.ndarray
    group: np.ndarray
    size: np.ndarray
    first: np.ndarray


def repeats(words: Words, shortest: int, longest: int) -> Iterator[Repeats]:
    """The repeated runs of ``shortest``, ... ``longest`` words of every text.

    A run of n + 1 words repeats only where its first n do: from one length to the next, only what repeated is looked
    at again.
    """
    place = np.arange(len(words.hash))
    with np.errstate(over="ignore"):
        key = (words.text.astype(np.uint64) + np.uint64(1)) * BASE  # runs of different texts never are the same
        for n in range(1, longest + 1):
            last = np.minimum(place + n - 1, len(words.text) - 1)
            inside = (last == place + n - 1) & (words.text[last] == words.text[place])
            place, key, last = place[inside], key[inside], last[inside]
            key = (key ^ words.hash[last]) * BASE
            key ^= key >> np.uint64(29)
            if n < shortest:
                continue
            order = np.argsort(key)
            sorted_key = key[order]
            start = np.flatnonzero(np.concatenate([[True], sorted_key[1:] != sorted_key[:-1]])[: len(order)])
            size = np.diff(np.concatenate([start, [len(order)]]))
            first = np.minimum.reduceat(place[order], start) if len(start) else place
            again = size > 1
            number = np.empty(len(order), np.int64)
            rank = np.full(len(size), -1)
            groups = np.flatnonzero(again)[np.argsort(first[again])]  # in the order of the texts, so that sums are, too
            rank[groups] = np.arange(len(groups))
            number[order] = np.repeat(rank, size)
            place, key, number = place[number >= 0], key[number >= 0], number[number >= 0]
            yield Repeats(n, place, number, size[groups], first[groups])


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in portions of about ``CHUNK`` characters."""
    begin = characters = 0
    for place, text in enumerate(texts):
        characters += len(text)
        if characters >= CHUNK:
            yield texts[begin : place + 1]
            begin, characters = place + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def hash_of(word: str) -> int:
    """The hash that a word has in ``Words.hash``."""
    return int(split([word], "spaces").hash[0])


@functools.cache
def _kinds() -> np.ndarray:
    """What every code point is: its class for words, and marks."""
    import unicodedata

    every = [chr(code) for code in range(0x110000)]

    def marked(mark: int, has: Iterable[bool]) -> np.ndarray:
        return np.where(np.fromiter(has, bool, len(every)), np.uint8(mark), np.uint8(0))

    word = np.fromiter(map(str.isalnum, every), bool, len(every))
    word[ord("_")] = True
    space = np.fromiter(map(str.isspace, every), bool, len(every))
    kinds = np.where(space, SPACE, np.where(word, WORD, OTHER)).astype(np.uint8)
    kinds |= marked(ALPHA, map(str.isalpha, every)) | marked(NUMERIC, map(str.isnumeric, every))
    kinds |= marked(UPPER, map(str.isupper, every)) | marked(LOWER, map(str.islower, every))
    kinds |= marked(SYMBOL, (unicodedata.category(c)[0] == "P" or (c < "\x7f" and not c.isalnum()) for c in every))
    for first, last in ("AZ", "az"):
        kinds[ord(first) : ord(last) + 1] |= LATIN
    return kinds


@functools.cache
def _marks() -> np.ndarray:
    """A random number for every code point."""
    return generator("words").integers(0, 2**64, 0x110000, dtype=np.uint64)


@functools.lru_cache(maxsize=4)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first powers of the base, and of its inverse, modulo 2**64."""
    found = []
    for base in (BASE, np.uint64(pow(int(BASE), -1, 2**64))):
        row = np.full(length, base)
        row[0] = 1
        found.append(np.cumprod(row))
    return found[0], found[1]
