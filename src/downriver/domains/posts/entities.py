"""Entities in texts as labels of tokens: BIO and back, sub-words, windows over long texts, and F1 of whole entities.

Reach for it to fit or score a tagger of names, here of software: ``read_columns`` reads the annotated Stack Overflow
posts of Tabassum et al. 2020 (github.com/jeniyat/StackOverflowNER).
"""

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from downriver.core.errors import InputError


class Entity(NamedTuple):
    """A run of words with one type: from word ``start`` to before word ``end``."""

    type: str
    start: int
    end: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of BIO tags; an ``I-`` that continues nothing begins an entity, as seqeval has it.

    >>> entities(["B-Class", "I-Class", "O", "I-Library"])
    [Entity(type='Class', start=0, end=2), Entity(type='Library', start=3, end=4)]
    """
    found: list[Entity] = []
    for place, tag in enumerate(tags):
        kind, _, name = tag.partition("-")
        if tag == "O":
            continue
        if kind not in ("B", "I") or not name:
            raise InputError(f"tag {place} is {tag!r}: O, B-type or I-type is expected")
        if kind == "I" and found and found[-1].end == place and found[-1].type == name:
            found[-1] = found[-1]._replace(end=place + 1)
        else:
            found.append(Entity(name, place, place + 1))
    return found


def bio(found: Iterable[Entity], words: int) -> list[str]:
    """BIO tags of so many words; raises ``InputError`` for entities that overlap or lie outside.

    >>> bio([Entity("Class", 1, 3)], 4)
    ['O', 'B-Class', 'I-Class', 'O']
    """
    tags = ["O"] * words
    for entity in found:
        if not 0 <= entity.start < entity.end <= words or any(t != "O" for t in tags[entity.start : entity.end]):
            raise InputError(f"{entity}: words of their own among {words} are expected")
        tags[entity.start] = f"B-{entity.type}"
        tags[entity.start + 1 : entity.end] = [f"I-{entity.type}"] * (entity.end - entity.start - 1)
    return tags


def entity_f1(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Micro-averaged F1 of whole entities with their types, as seqeval counts; 0 when nothing is right.

    >>> entity_f1([["B-Class", "I-Class", "O"]], [["B-Class", "O", "O"]])
    0.0
    """
    if [len(t) for t in truth] != [len(p) for p in predicted]:
        raise InputError("truth and prediction have different numbers of words")
    wanted = {(i, e) for i, tags in enumerate(truth) for e in entities(tags)}
    found = {(i, e) for i, tags in enumerate(predicted) for e in entities(tags)}
    right = len(wanted & found)
    return 2 * right / (len(wanted) + len(found)) if right else 0.0


def encode_words(
    words: Sequence[str], tokenizer: Any, labels: Sequence[int] | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of words (between the tokenizer's special tokens), the label of each token, the word of each token.

    Words are encoded one by one, all but the first with a space before them, as they stood in the text. A word's first
    token has the word's label, its others and the special tokens -100; the word of a special token is -1. A word that
    the tokenizer drops (a lone accent, say) has no token.

    >>> from downriver.models import byte_tokenizer
    >>> encode_words(["ab", "c"], byte_tokenizer(9), [4, 5])
    ([1, 68, 69, 224, 70, 2], [-100, 4, -100, 5, -100, -100], [-1, 0, 0, 1, 1, -1])
    """
    ids, marks, place = [], [], []
    spaced = [word if number == 0 else " " + word for number, word in enumerate(words)]
    for number, pieces in enumerate(tokenizer(spaced, add_special_tokens=False)["input_ids"]):
        ids += pieces
        marks += [labels[number] if labels is not None else 0, *[-100] * (len(pieces) - 1)][: len(pieces)]
        place += [number] * len(pieces)
    start, end = (
        [token] if token is not None else []
        for token in (
            tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id,
            tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id,
        )
    )
    return (
        [*start, *ids, *end],
        [*[-100] * len(start), *marks, *[-100] * len(end)],
        [*[-1] * len(start), *place, *[-1] * len(end)],
    )


def windows(length: int, size: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Windows of ``size`` over ``length`` tokens, a new one every ``stride``: where each starts and ends, and the part
    of it that it answers for, which is what lies nearer to its middle than to its neighbours'.

    >>> windows(10, 6, 4)
    [(0, 6, 0, 5), (4, 10, 5, 10)]
    """
    if not 0 < stride <= size:
        raise InputError(f"stride {stride}, size {size}: a stride from 1 to the size is expected")
    starts = [0]
    while starts[-1] + size < length:
        starts.append(min(starts[-1] + stride, length - size))
    edges = [0, *((b + a + size) // 2 for a, b in pairwise(starts)), length]
    return [(s, min(s + size, length), edges[i], edges[i + 1]) for i, s in enumerate(starts)]


def read_columns(path: str | os.PathLike[str]) -> list[tuple[list[str], list[str]]]:
    """Words and BIO tags of the blocks of a file with a word and its tag a line, between tabs; an empty line ends a
    block, and further columns are passed over.

    Raises ``InputError`` naming file and line.
    """
    blocks: list[tuple[list[str], list[str]]] = []
    words: list[str] = []
    tags: list[str] = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\n").split("\t")
            if line.strip() == "":
                if words:
                    blocks.append((words, tags))
                words, tags = [], []
            elif len(cells) < 2:
                raise InputError(f"{path}, line {number}: a word and its tag between tabs are expected")
            else:
                words.append(cells[0])
                tags.append(cells[1])
    return [*blocks, (words, tags)] if words else blocks


def central(scores: Sequence[np.ndarray], parts: Sequence[tuple[int, int, int, int]]) -> np.ndarray:
    """The scores of all tokens, each from the window that answers for it."""
    return np.concatenate(
        [s[low - start : high - start] for s, (start, _, low, high) in zip(scores, parts, strict=True)]
    )
