"""WordNet's database files as synsets: words, definition, lexicographer class, hypernyms; and pairs made of them.

Format: the manual page wndb(5WN) of WordNet 3.0.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLASSES = (
    "adj.all",
    "adj.pert",
    "adv.all",
    "noun.Tops",
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.attribute",
    "noun.body",
    "noun.cognition",
    "noun.communication",
    "noun.event",
    "noun.feeling",
    "noun.food",
    "noun.group",
    "noun.location",
    "noun.motive",
    "noun.object",
    "noun.person",
    "noun.phenomenon",
    "noun.plant",
    "noun.possession",
    "noun.process",
    "noun.quantity",
    "noun.relation",
    "noun.shape",
    "noun.state",
    "noun.substance",
    "noun.time",
    "verb.body",
    "verb.change",
    "verb.cognition",
    "verb.communication",
    "verb.competition",
    "verb.consumption",
    "verb.contact",
    "verb.creation",
    "verb.emotion",
    "verb.motion",
    "verb.perception",
    "verb.possession",
    "verb.social",
    "verb.stative",
    "verb.weather",
    "adj.ppl",
)
"""The lexicographer files in the order of their numbers."""


@dataclass(frozen=True)
class Synset:
    """One meaning: its part of speech and offset in the file, its words, its definition, and its hypernyms' offsets."""

    pos: str
    offset: int
    lexicographer: int
    words: tuple[str, ...]
    definition: str
    hypernyms: tuple[int, ...]


def read(folder: Path) -> list[Synset]:
    """The synsets of ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv``, in the order of the files."""
    synsets = []
    for pos in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{pos}").read_text("latin-1").splitlines():
            if not line.startswith("  "):  # the licence
                synsets.append(parse(line, pos))
    return synsets


def parse(line: str, pos: str) -> Synset:
    """One line of a data file.

    >>> s = parse("00001740 03 n 02 thing 0 living_thing 0 001 @ 00001930 n 0000 | what is; \\"a thing\\"", "noun")
    >>> s.words, s.definition, CLASSES[s.lexicographer], s.hypernyms
    (('thing', 'living thing'), 'what is', 'noun.Tops', (1930,))
    """
    head, _, gloss = line.partition("|")
    fields = head.split()
    count = int(fields[3], 16)
    words = tuple(re.sub(r"\(.*?\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2])
    first = 5 + 2 * count  # after the number of pointers; a pointer is symbol, offset, part of speech, source/target
    pointers = [fields[i : i + 2] for i in range(first, first + 4 * int(fields[first - 1]), 4)]
    hypernyms = tuple(int(offset) for symbol, offset in pointers if symbol in ("@", "@i"))
    definition = gloss.split('; "')[0].strip().strip(";").strip() or gloss.strip()
    return Synset(pos, int(fields[0]), int(fields[1]), words, definition, hypernyms)


def similar_pairs(synsets: Sequence[Synset], count: int, rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """``count`` pairs of noun definitions with their path similarity: half at random, half one to six steps apart."""
    nouns = {s.offset: s for s in synsets if s.pos == "noun"}
    neighbours: dict[int, list[int]] = {offset: list(s.hypernyms) for offset, s in nouns.items()}
    for s in nouns.values():
        for above in s.hypernyms:
            neighbours[above].append(s.offset)
    offsets = sorted(nouns)
    pairs: dict[tuple[int, int], float] = {}
    while len(pairs) < count:
        a = offsets[rng.integers(len(offsets))]
        b = offsets[rng.integers(len(offsets))]
        if len(pairs) % 2:
            b = a
            for _ in range(rng.integers(1, 7)):
                b = neighbours[b][rng.integers(len(neighbours[b]))]
        if a != b and nouns[a].definition != nouns[b].definition:
            pairs[a, b] = 1 / (1 + _distance(nouns, a, b))
    return [(nouns[a].definition, nouns[b].definition, score) for (a, b), score in pairs.items()]


def definition_pairs(synsets: Sequence[Synset], count: int, rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """``count`` pairs of a term and a definition: by turns its own (1) and that of another term of its class (0)."""
    classes: dict[int, list[Synset]] = {}
    for s in synsets:
        classes.setdefault(s.lexicographer, []).append(s)
    pairs: dict[tuple[str, str], float] = {}
    while len(pairs) < count:
        own = synsets[int(rng.integers(len(synsets)))]
        other = classes[own.lexicographer][rng.integers(len(classes[own.lexicographer]))]
        word = own.words[rng.integers(len(own.words))]
        if len(pairs) % 2 == 0:
            pairs[word, own.definition] = 1.0
        elif word not in other.words:
            pairs.setdefault((word, other.definition), 0.0)
    return [(word, definition, score) for (word, definition), score in pairs.items()]


def _distance(nouns: dict[int, Synset], a: int, b: int) -> int:
    """The fewest steps from one noun to the other by way of a common hypernym (all nouns have one)."""
    above_a, above_b = _above(nouns, a), _above(nouns, b)
    return min(steps + above_b[top] for top, steps in above_a.items() if top in above_b)


def _above(nouns: dict[int, Synset], start: int) -> dict[int, int]:
    steps = {start: 0}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for up in nouns[here].hypernyms:
            if up not in steps:
                steps[up] = steps[here] + 1
                queue.append(up)
    return steps
