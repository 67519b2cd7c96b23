"""Rules: the formulas on plain Python, datatrove's decisions, and the whole scorer on awkward texts."""

import math
import random
import re
import string
import unicodedata
from collections import Counter

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.data.score import RuleScorer
from downriver.data.score.rules import GOPHER, REDPAJAMA
from downriver.data.score.words import split

WORDS = re.compile(r"\w+|[^\w\s]+")


def _texts(n: int = 120, seed: int = 0) -> list[str]:
    """Texts with everything the rules look for: repeats, bullets, symbols, odd characters, line breaks of all kinds."""
    rng = random.Random(seed)
    bits = re.findall(
        r"[^ ]+",
        "the river of and to that have with sea runs long Ünïcode 東京 naïve 2024 3.14 don't U.S. # ... … \u2022 - €5 _"
        " __ ( ) { } javascript lorem ipsum [12] [edit] terms of use? Yes! NO \x85 \u2028 ½ a\u0301 ǅ x\ty",
    )
    breaks = ["\n", "\n\n", "\n\n\n", " ", " ", " ", " ", " ", ". ", ".\n", "\r\n", "...\n", "\n- "]
    texts = []
    for _ in range(n):
        pieces = [rng.choice(bits) + rng.choice(breaks) for _ in range(rng.choice([1, 3, 30, 200]))]
        if rng.random() < 0.6:  # copies of stretches, copies of the copies, and copies cut short
            for _ in range(rng.choice([1, 4])):
                at, size = rng.randrange(len(pieces)), rng.choice([2, 7, 12, 40])
                to = rng.randrange(len(pieces) + 1)
                pieces[to:to] = pieces[at : at + size] * rng.choice([1, 2])
        text = "".join(pieces)
        texts.append(text if text.strip() else "x")
    return texts


def _duplicated(words: list[str], n: int) -> int:
    seen, total, at = set(), 0, 0
    while at + n <= len(words):
        run = tuple(words[at : at + n])
        total, at = (total + sum(map(len, run)), at + n) if run in seen else (total, at + 1)
        seen.add(run)
    return total


def _top(words: list[str], n: int) -> tuple[tuple[str, ...], int]:
    runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return runs.most_common(1)[0] if runs else ((), 0)


def test_gopher_repetition_is_the_formula() -> None:
    texts = _texts()
    scorer = RuleScorer.gopher()
    got = scorer.score(texts)
    for n in range(2, 11):
        column = got[:, scorer.columns.index(f"top_{n}_gram" if n < 5 else f"dup_{n}_gram")]
        for text, value in zip(texts, column, strict=True):
            words = WORDS.findall(text)
            if n < 5:
                run, times = _top(words, n)
                wanted = len(" ".join(run)) * times
            else:
                wanted = _duplicated(words, n)
            assert value == pytest.approx(wanted / len(text), abs=1e-12), (n, text)


def test_a_run_inside_a_repeat_does_not_count_as_seen() -> None:
    """The third copy's tail was only ever inside of the second copy: the stepwise search must find that out."""
    words = ["a", "b", "c", "d", "e", "f", "g"]
    text = " ".join([*words[:6], *words, *words, "x", *words[1:]])
    scorer = RuleScorer.gopher()
    got = scorer.score([text])[0, scorer.columns.index("dup_5_gram")]
    assert got * len(text) == pytest.approx(_duplicated(text.split(), 5))
    assert _duplicated(text.split(), 5) != sum(len(w) for w in text.split()[7:])


def test_redpajama_is_the_formula() -> None:
    texts = _texts(seed=1)
    table = str.maketrans("", "", string.punctuation)

    def plain_of(text: str) -> str:
        return (text if text.isascii() else unicodedata.normalize("NFD", text)).lower().translate(table)

    for text, got in zip(texts, RuleScorer.redpajama().score(texts), strict=True):
        words, raw = plain_of(text).split(), WORDS.findall(text)
        counts, n = Counter(words), max(len(words), 1)
        lines = re.findall(r"[^\n]*\n|[^\n]+$", text)
        letters = max(sum(map(len, words)), 1)

        def top(n: int, words: list[str] = words, letters: int = letters) -> float:
            run, times = _top(words, n)
            return sum(map(len, run)) * times / letters if times > 1 else 0.0

        normal = [" ".join(plain_of(line).split()) for line in lines]
        wanted = {
            "word_count": len(words),
            "mean_word_length": sum(map(len, words)) / n,
            "frac_unique_words": len(counts) / n,
            "unigram_entropy": sum(-c / n * math.log(c / n) for c in counts.values()),
            "frac_no_alph_words": 1 - sum(re.search("[a-zA-Z]", w) is not None for w in raw) / len(raw),
            "frac_all_caps_words": sum(map(str.isupper, raw)) / len(raw),
            "symbol_to_word_ratio": sum(text.count(s) for s in ("#", "...", "…")) / len(raw),
            "num_sentences": len(re.findall(r"\b[^.!?]+[.!?]*", text)),
            "frac_chars_top_2gram": top(2),
            "frac_chars_top_3gram": top(3),
            "lines_end_punctuation": np.mean([line.rstrip().endswith((".", "!", "?", "”")) for line in lines]),
            "lines_numerical_chars": np.mean([sum(map(str.isnumeric, s)) / max(len(s), 1) for s in normal]),
            "lines_uppercase_letters": np.mean(
                [sum(map(str.isupper, s)) / (len(s) + (not s.endswith("\n"))) for s in lines]
            ),
        }
        assert tuple(wanted) == REDPAJAMA
        assert got == pytest.approx(list(wanted.values()), abs=1e-9), text


def test_datatrove_decides_alike_on_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.filters.c4_filters import C4QualityFilter
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
    from datatrove.utils import word_tokenizers

    class Same:
        """Our words and sentences in the place of the language's tokenizer."""

        def word_tokenize(self, text: str) -> list[str]:
            return WORDS.findall(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [match.end() for match in re.finditer(r"[.!?]+[\"')\]]*(?:\s|$)", text)]
            return [(0, end) for end in (ends if ends and ends[-1] == len(text) else [*ends, len(text)])]

    monkeypatch.setattr(word_tokenizers, "load_word_tokenizer", lambda language: Same())
    clean = "We walked along the river and saw that people have boats with sails. "
    texts = _texts(200, seed=2)
    texts += [clean * k + "\n".join(_texts(2, seed=k)) for k in range(1, 60)]
    texts += ["\n".join(random.Random(k).sample(clean.split() * 9, 60)) + " to be with." for k in range(40)]
    words = sorted(set(re.findall(r"\w+", clean)) | {"the", "of", "blue", "town", "be", "sailors"})
    for k in range(150):
        rng = random.Random(k)
        lines = [
            " ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + "." for _ in range(rng.randint(4, 30))
        ]
        lines += rng.choices(lines, k=rng.choice([0, 0, 1, 5]))
        texts.append(rng.choice(["\n", "\n\n", " "]).join(lines))
    quality, repetition, c4 = GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter()
    got = {name: getattr(RuleScorer, name)().score(texts)[:, -1] == 0 for name in ("gopher", "c4")}
    for text, gopher_keeps, c4_keeps in zip(texts, got["gopher"], got["c4"], strict=True):
        document = Document(text=text, id="a")
        theirs = quality.filter(document), repetition.filter(document)
        assert gopher_keeps == (theirs == (True, True)), (theirs, text)
        kept = c4.filter(Document(text=text, id="a"))
        assert c4_keeps == (kept is True), (kept, text)
    for decisions in got.values():
        assert 0.05 < decisions.mean() < 0.95


def test_gopher_statistics_by_hand() -> None:
    scorer = RuleScorer.gopher()
    text = "- The sea ...\n- to be #\n\nthe SEA € __\n- to be #\n"
    row = dict(zip(scorer.columns, scorer.score([text])[0].tolist(), strict=True))
    tokens = WORDS.findall(text)
    real = ["The", "sea", "to", "be", "the", "SEA", "€", "to", "be"]
    assert row["words"] == len(real) and row["mean_word_length"] == pytest.approx(sum(map(len, real)) / len(real))
    assert row["hash_ratio"] == 2 / len(tokens) and row["ellipsis_ratio"] == 1 / len(tokens)
    assert row["bullet_lines"] == 3 / 5 and row["ellipsis_lines"] == 1 / 5
    assert row["alpha_words"] == 8 / len(tokens) and row["stop_words"] == 3
    assert row["dup_paragraphs"] == 0 and row["dup_lines"] == 1 / 5 and row["dup_line_chars"] == 9 / len(text)
    broken = [
        name
        for name, (least, most) in GOPHER.items()
        if (least is not None and row[name] < least) or (most is not None and row[name] > most)
    ]
    assert row["broken"] == len(broken) and "words" in broken


def test_scores_do_not_depend_on_the_batch() -> None:
    texts = _texts(60, seed=3)
    for scorer in (RuleScorer.gopher(), RuleScorer.c4(), RuleScorer.redpajama()):
        together = scorer.score(texts)
        assert together.shape == (60, len(scorer.columns)) and np.isfinite(together).all()
        assert np.array_equal(together, np.concatenate([scorer.score([text]) for text in texts]))
        assert np.array_equal(scorer.score([{"text": t, "id": "x"} for t in texts]), together)
        assert scorer.score([]).shape == (0, len(scorer.columns))


def test_words_are_those_of_the_regular_expression() -> None:
    texts = _texts(80, seed=4)
    found = split(texts, "words and punctuation")
    listed = [word for text in texts for word in WORDS.findall(text)]
    assert found.length.tolist() == [len(word) for word in listed]
    by_hash: dict[int, set[str]] = {}
    for word, value in zip(listed, found.hash.tolist(), strict=True):
        by_hash.setdefault(value, set()).add(word)
    assert len(by_hash) == len(set(listed)) and all(len(words) == 1 for words in by_hash.values())


def test_empty_text_and_own_rules() -> None:
    with pytest.raises(InputError, match="scorer 'gopher', document 'seven': its text is empty"):
        RuleScorer.gopher().score([{"text": " \n", "id": "seven"}])
    with pytest.raises(InputError, match="document 1: its text is of type int"):
        RuleScorer.c4().score(["a", 3])  # type: ignore[list-item]
    own = RuleScorer(
        "length", ("characters",), lambda texts: np.array([[len(t)] for t in texts]), {"characters": (3, 5)}
    )
    assert own.score(["ab", "abcd", "abcdef"]).tolist() == [[2, 1], [4, 0], [6, 1]]
    prints = [s.fingerprint for s in (own, RuleScorer.gopher(), RuleScorer.c4(), RuleScorer.redpajama())]
    assert len(set(prints)) == 4 and RuleScorer.gopher().fingerprint == prints[1]
