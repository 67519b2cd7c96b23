"""Quality rules that need no model: the statistics of Gopher, C4 and RedPajama, for every document of a corpus.

Reach for it first: it is three orders of magnitude cheaper than any model. Gopher (Rae et al. 2021, sections A1.1 and
table A1), C4 (Raffel et al. 2020, section 2.2; lines as in its code), RedPajama-V2 (Weber et al. 2024), of whose
signals those that Meta-rater learns from are here. Words are runs of letters, digits and underscores, or of anything
else but space, as RedPajama splits them; Gopher and C4 leave the split open. Runs of words are compared word by word.
"""

import re
import string
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from downriver.core.io import fingerprint
from downriver.data.score.scorer import Batch, texts_of
from downriver.data.score.words import (
    ALPHA,
    LATIN,
    LOWER,
    NUMERIC,
    SYMBOL,
    UPPER,
    Repeats,
    Words,
    chunks,
    hash_of,
    repeats,
    within,
)
from downriver.data.score.words import split as split_words

VERSION = 1  # of the numbers: scores of another version are made anew

GOPHER: dict[str, tuple[float | None, float | None]] = {
    "words": (50, 100_000),
    "mean_word_length": (3, 10),
    "hash_ratio": (None, 0.1),
    "ellipsis_ratio": (None, 0.1),
    "bullet_lines": (None, 0.9),
    "ellipsis_lines": (None, 0.3),
    "alpha_words": (0.8, None),
    "stop_words": (2, None),
    "dup_paragraphs": (None, 0.3),
    "dup_paragraph_chars": (None, 0.2),
    "dup_lines": (None, 0.3),
    "dup_line_chars": (None, 0.2),
    "top_2_gram": (None, 0.2),
    "top_3_gram": (None, 0.18),
    "top_4_gram": (None, 0.16),
    "dup_5_gram": (None, 0.15),
    "dup_6_gram": (None, 0.14),
    "dup_7_gram": (None, 0.13),
    "dup_8_gram": (None, 0.12),
    "dup_9_gram": (None, 0.11),
    "dup_10_gram": (None, 0.1),
}
"""Gopher's statistics and what each may be at least and at most."""
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
C4: dict[str, tuple[float | None, float | None]] = {
    "sentences": (5, None),
    "lorem_ipsum": (None, 0),
    "curly_bracket": (None, 0),
}
"""C4's rules for whole documents."""
C4_LINES = ("long_word_lines", "unpunctuated_lines", "short_lines", "javascript_lines", "policy_lines")
REDPAJAMA = (
    "word_count",
    "mean_word_length",
    "frac_unique_words",
    "unigram_entropy",
    "frac_no_alph_words",
    "frac_all_caps_words",
    "symbol_to_word_ratio",
    "num_sentences",
    "frac_chars_top_2gram",
    "frac_chars_top_3gram",
    "lines_end_punctuation",
    "lines_numerical_chars",
    "lines_uppercase_letters",
)

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_SENTENCE = re.compile(r"[.!?]+[\"')\]]*(?:\s|$)")
_SENTENCE_REDPAJAMA = re.compile(r"\b[^.!?]+[.!?]*")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class RuleScorer:
    """A family of rules: one number a document and column.

    ``RuleScorer.gopher()``, ``.c4()`` and ``.redpajama()`` are the families there are; ``rules`` of your own takes
    texts and gives (texts, columns). ``limits`` says what a column may be at least and at most; where there are any,
    the last column, ``broken``, counts the rules that a document breaks: ``broken == 0`` is the family's filter.

    >>> scorer = RuleScorer.gopher()
    >>> row = dict(zip(scorer.columns, scorer.score(["The river runs to the sea. " * 3])[0].tolist(), strict=True))
    >>> row["words"], round(row["dup_5_gram"], 2), row["stop_words"], row["broken"]
    (18.0, 0.41, 2.0, 10.0)
    """

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        rules: Callable[[Sequence[str]], np.ndarray],
        limits: dict[str, tuple[float | None, float | None]] | None = None,
        version: object = VERSION,
    ) -> None:
        self.name = name
        self.limits = dict(limits or {})
        self.columns = (*columns, *(("broken",) if limits else ()))
        self.rules = rules
        self.fingerprint = fingerprint("rules", name, self.columns, self.limits, version)

    @classmethod
    def gopher(cls) -> "RuleScorer":
        """Length, word length, symbols, bullets, letters, stop words; repeated lines, paragraphs and runs of words."""
        return cls("gopher", tuple(GOPHER), _gopher, GOPHER)

    @classmethod
    def c4(cls) -> "RuleScorer":
        """The share of lines that C4 keeps and drops, by reason (the first that holds); sentences in the kept lines."""
        return cls("c4", ("kept_lines", *C4_LINES, *C4), _c4, C4)

    @classmethod
    def redpajama(cls) -> "RuleScorer":
        """Counts and shares of words, entropy, the top runs of words; signals of lines as their mean over the lines."""
        return cls("redpajama", REDPAJAMA, _redpajama)

    def score(self, batch: Batch) -> np.ndarray:
        """(n, columns), float64; a text that is empty is an ``InputError``."""
        texts = texts_of(batch, self.name)
        found = [self.rules(chunk) for chunk in chunks(texts)]
        values = np.concatenate(found) if found else np.empty((0, len(self.columns) - bool(self.limits)))
        if not self.limits:
            return values
        broken = np.zeros(len(values))
        for column, (least, most) in self.limits.items():
            value = values[:, self.columns.index(column)]
            broken += (value < least if least is not None else False) | (value > most if most is not None else False)
        return np.column_stack([values, broken])


def _gopher(texts: Sequence[str]) -> np.ndarray:
    words = split_words(texts, "words and punctuation")
    size = np.array([len(text) for text in texts], np.float64)
    count = words.count()
    real = words.characters(SYMBOL) < words.length  # a word of symbols alone is none
    stop = sum(words.count(words.hash == np.uint64(hash_of(word))) > 0 for word in STOP_WORDS)
    lines = np.array([_lines_of(text) for text in texts])
    columns = [
        words.count(real),
        words.total(words.length * real) / np.maximum(words.count(real), 1),
        np.array([text.count("#") for text in texts]) / count,
        np.array([text.count("...") + text.count("…") for text in texts]) / count,
        lines[:, 0],
        lines[:, 1],
        words.count(words.characters(ALPHA) > 0) / count,
        stop,
        *lines[:, 2:].T,
    ]
    for found in repeats(words, 2, 10):
        if found.n in (2, 3, 4):
            most, times = _top(words, found)
            joined = words.letters(most, found.n) + found.n - 1  # with a space between the words
            columns.append(np.where(count >= found.n, joined * times / size, 0))
        elif found.n >= 5:
            columns.append(_duplicated(words, found) / size)
    return np.column_stack(columns)


def _lines_of(text: str) -> tuple[float, float, float, float, float, float]:
    """Shares of bullet and ellipsis lines; shares of repeated paragraphs and lines, by number and by characters."""
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines) if "-" in text or "•" in text else 0
    dots = sum(line.rstrip().endswith(("...", "…")) for line in lines) if "..." in text or "…" in text else 0
    paragraphs = text.strip().split("\n\n")
    if len(paragraphs) > 1:  # three line breaks and more are one border
        paragraphs = [part for part in (part.lstrip("\n") for part in paragraphs) if part]
    parts = list(filter(None, text.split("\n")))
    parts += [""] * (text.startswith("\n") + text.endswith("\n"))  # borders of the text count as those of lines
    (again, letters), (line_again, line_letters) = _seen_before(paragraphs), _seen_before(parts)
    return (
        bullets / len(lines),
        dots / len(lines),
        again / len(paragraphs),
        letters / len(text),
        line_again / len(parts),
        line_letters / len(text),
    )


def _seen_before(parts: list[str]) -> tuple[int, int]:
    """How many parts came before in the list, and their characters."""
    different = set(parts)
    again = len(parts) - len(different)
    return again, sum(map(len, parts)) - sum(map(len, different)) if again else 0


def _top(words: Words, found: Repeats) -> tuple[np.ndarray, np.ndarray]:
    """The run that each text has most often (the first of them, if several): where it starts, and how often."""
    most = np.minimum(np.searchsorted(words.text, np.arange(words.n)), max(len(words.text) - 1, 0))
    times = np.ones(words.n)
    order = np.lexsort((found.first, -found.size, words.text[found.first]))
    text = words.text[found.first][order]
    best = order[np.concatenate([[True], text[1:] != text[:-1]])] if len(order) else order
    where = words.text[found.first[best]]
    most[where], times[where] = found.first[best], found.size[best]
    return most, times


def _duplicated(words: Words, found: Repeats) -> np.ndarray:
    """The characters in runs of n words that came before in their text; the search goes on behind a run that did.

    A run that begins inside another one is not looked at, so that it does not count as having come before either. This
    is rare: first all runs are taken to have been looked at, then the texts where that is wrong are done step by step.
    """
    n, text = found.n, words.text
    later = found.place != found.first[found.group]
    place, group = found.place[later], found.group[later]
    first = found.first[group]
    behind = np.searchsorted(place, place + n).tolist()
    hits: list[int] = []
    at = 0
    while at < len(behind):
        hits.append(at)
        at = behind[at]
    where, begun = place[hits], first[hits]
    before = np.searchsorted(where, begun)
    inside = (before > 0) & (begun < where[before - 1] + n)
    if inside.any():
        wrong = np.zeros(words.n, bool)
        wrong[text[where[inside]]] = True
        redo = wrong[text[place]]
        where = np.concatenate([where[~wrong[text[where]]], _stepwise(place[redo], group[redo], first[redo], n)])
    return np.bincount(text[where], words.letters(where, n), words.n)


def _stepwise(place: np.ndarray, group: np.ndarray, first: np.ndarray, n: int) -> np.ndarray:
    """The places, in order, whose run was looked at before, where runs inside of such a place are not looked at."""
    hits: list[int] = []
    seen: set[int] = set()  # runs that were looked at, but not at their first place
    free = 0
    for here, run, begun in zip(place.tolist(), group.tolist(), first.tolist(), strict=True):
        if here < free:
            continue
        before = bisect_left(hits, begun)
        if before and begun < hits[before - 1] + n and run not in seen:
            seen.add(run)
        else:
            hits.append(here)
            free = here + n
    return np.array(hits, np.int64)


def _c4(texts: Sequence[str]) -> np.ndarray:
    return np.array([_c4_of(text) for text in texts], np.float64)


def _c4_of(text: str) -> tuple[float, ...]:
    lower, lines = text.lower(), text.splitlines()
    cited, coded, lorem = "[" in text, "javascript" in lower, "lorem ipsum" in lower
    policy = [phrase for phrase in _POLICY if phrase in lower]
    dropped = [0, 0, 0, 0, 0]
    kept = sentences = filler = bracket = 0
    for line in lines:
        line = line.strip()
        if len(line) > 1000 and any(len(word) > 1000 for word in line.split()):
            dropped[0] += 1
            continue
        few = len(line.split(None, 2)) < 3
        if cited:
            line = _CITATION.sub("", line)
        if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."):
            dropped[1] += 1
            continue
        if few:
            dropped[2] += 1
            continue
        if lorem and "lorem ipsum" in line.lower():
            filler = 1
            continue
        if coded and "javascript" in line.lower():
            dropped[3] += 1
            continue
        if "{" in line:
            bracket = 1
            continue
        if policy and any(phrase in line.lower() for phrase in policy):
            dropped[4] += 1
            continue
        kept += 1
        parts = _SENTENCE.split(line)
        sentences += len(parts) - (not parts[-1])
    n = len(lines)
    return (kept / n, *(number / n for number in dropped), sentences, filler, bracket)


def _redpajama(texts: Sequence[str]) -> np.ndarray:
    raw = split_words(texts, "words and punctuation")
    plain = [
        (text if text.isascii() else unicodedata.normalize("NFD", text)).lower().translate(_NO_PUNCTUATION)
        for text in texts
    ]
    words = split_words(plain, "spaces")
    count, raw_count = words.count(), raw.count()
    some = np.maximum(count, 1)
    letters = np.maximum(words.total(words.length), 1)
    columns = [count, words.total(words.length) / some]
    tops = []
    for found in repeats(words, 1, 3):
        if found.n == 1:
            again = words.text[found.first]
            columns.append((count - np.bincount(again, found.size - 1, words.n)) / some)
            share = found.size / some[again]
            once = (count - np.bincount(again, found.size, words.n)) / some  # the mass of words that come once
            entropy = once * np.log(some) - np.bincount(again, share * np.log(share), words.n)
            columns.append(entropy)
        else:
            most, times = _top(words, found)
            tops.append(np.where(times > 1, words.letters(most, found.n) * times / letters, 0))
    symbols = [text.count("#") + text.count("...") + text.count("…") for text in texts]
    cased = raw.characters(UPPER)
    columns += [
        1 - raw.count(raw.characters(LATIN) > 0) / raw_count,
        raw.count((cased > 0) & (raw.characters(LOWER) == 0)) / raw_count,
        np.array(symbols) / raw_count,
        np.array([len(_SENTENCE_REDPAJAMA.findall(text)) for text in texts], np.float64),
        *tops,
        *_line_signals(texts, plain, raw, words),
    ]
    return np.column_stack(columns)


def _line_signals(texts: Sequence[str], plain: Sequence[str], raw: Words, words: Words) -> list[np.ndarray]:
    """The means over the lines of a text: whether they end in punctuation, their shares of digits and of capitals."""
    lines = [text.removesuffix("\n").split("\n") for text in texts]
    n = np.array([len(each) for each in lines])
    ends = [sum(line.rstrip().endswith((".", "!", "?", "”")) for line in each) for each in lines]
    text, start, length = _line_places(plain, n)
    first = np.searchsorted(words.start, start)
    held = np.searchsorted(words.start, start + length) - first
    size = np.maximum(within(words.length, first, held) + held - 1, 1)  # words with one space between them
    digits = within((words.kind & NUMERIC) != 0, start, length) / size
    text, start, length = _line_places(texts, n)
    capitals = within((raw.kind & UPPER) != 0, start, length) / length
    return [np.array(ends) / n, *(np.bincount(text, values, len(texts)) / n for values in (digits, capitals))]


def _line_places(texts: Sequence[str], n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every line: its text, and where in the joined texts it starts and how long it is, its line break included."""
    pieces = [text.split("\n")[:many] for text, many in zip(texts, n.tolist(), strict=True)]
    length = np.array([len(line) + 1 for lines in pieces for line in lines])
    text = np.repeat(np.arange(len(texts)), n)
    size = np.array([len(text) + 1 for text in texts])  # with the line break between the texts
    start = np.cumsum(length) - length
    first = np.cumsum(n) - n
    return text, start + (np.cumsum(size) - size - start[first])[text], length
