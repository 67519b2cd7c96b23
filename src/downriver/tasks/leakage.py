"""Rows that two splits share, word for word or nearly: what makes a test score too good.

Reach for it before believing a score. Near duplicates of texts are found by MinHash signatures of their runs of five
words in bands (Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman,
"Mining of massive datasets", chapter 3), and every candidate is checked by the true Jaccard similarity, so that none
is reported by chance. Images and table rows are compared exactly, by their pixels and values.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from downriver.core.errors import InputError
from downriver.core.minhash import BANDS, WORD, Prints, jaccard
from downriver.tasks.task import SPLITS, Task, arrow

MOST_CANDIDATES = 32


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The rows of ``later`` that ``earlier`` holds too: ``exact`` and ``near`` count rows of ``later``, each once.

    ``examples`` are the first few as pairs (row of ``later``, row of ``earlier``), counted from 0.
    """

    earlier: str
    later: str
    rows: int
    exact: int
    near: int
    examples: tuple[tuple[int, int], ...]

    @property
    def rate(self) -> float:
        """The share of ``later`` that is a duplicate, exact or near."""
        return (self.exact + self.near) / self.rows


@dataclasses.dataclass(frozen=True)
class LeakageReport:
    """What ``leakage`` found, a pair of splits at a time."""

    task: str
    threshold: float
    overlaps: tuple[Overlap, ...]

    @property
    def clean(self) -> bool:
        """Whether no split repeats a row of another."""
        return not any(o.exact or o.near for o in self.overlaps)

    @property
    def text(self) -> str:
        """The report in words; it names rows by number and shows no content."""
        lines = []
        for o in self.overlaps:
            line = (
                f"{self.task}: of {o.rows} {o.later} rows {o.exact} ({o.exact / o.rows:.2%}) also stand in {o.earlier}"
            )
            if o.near:
                line += f" and {o.near} ({o.near / o.rows:.2%}) nearly so (similarity of {self.threshold:g} or more)"
            if o.examples:
                line += "; first: " + ", ".join(f"{o.later} {i} = {o.earlier} {j}" for i, j in o.examples)
            lines.append(line)
        return "\n".join(lines) or f"{self.task}: one split only, nothing to compare"


def leakage(task: Task, *, threshold: float = 0.8, seed: int = 0) -> LeakageReport:
    """Count the exact and near duplicates between every two splits of a task.

    Two texts are equal when their words are (case, punctuation and white space do not count), and near when the Jaccard
    similarity of their sets of five-word runs is at least ``threshold`` (0.8, usual for web text). A pair at the
    threshold is met with probability 1 - (1 - 0.8**5)**16 = 99.8 %. A row with several inputs is compared by all of
    them together.

    >>> from datasets import Dataset
    >>> words = "the quick brown fox jumps over the lazy dog near the old mill by the river every single day".split()
    >>> train = Dataset.from_dict({"text": [" ".join(words), "nothing of the kind"], "y": [0, 1]})
    >>> test = Dataset.from_dict({"text": ["something else", " ".join(words).upper() + "!"], "y": [1, 0]})
    >>> report = leakage(Task("demo", "text-classification", {"train": train, "test": test}, ("text",), "y"))
    >>> print(report.text)
    demo: of 2 test rows 1 (50.00%) also stand in train; first: test 1 = train 0
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold {threshold}: a similarity above 0 and up to 1 is expected")
    present = [split for split in SPLITS if split in task.splits]
    keys = {split: row_keys(task.rows(split), task.inputs) for split in present}
    prints = {}
    if task.kind.startswith(("text", "language")):
        prints = {split: Prints(task.texts(split), seed) for split in present}
    overlaps = []
    for earlier, later in itertools.combinations(present, 2):
        found = _exact(keys[earlier], keys[later])
        near = np.full(len(keys[later]), -1)
        if prints:
            near = _near(prints[earlier], prints[later], threshold, skip=found >= 0)
        partner = np.where(found >= 0, found, near)
        examples = tuple((int(i), int(partner[i])) for i in np.flatnonzero(partner >= 0)[:5])
        counts = int((found >= 0).sum()), int((near >= 0).sum())
        overlaps.append(Overlap(earlier, later, len(found), *counts, examples))
    return LeakageReport(task.name, threshold, tuple(overlaps))


def row_keys(rows: datasets.Dataset, inputs: Sequence[str]) -> np.ndarray:
    """A 64-bit key a row: equal for rows whose inputs are equal (texts by their words, images by their pixels)."""
    pictures = [name for name in inputs if isinstance(rows.features[name], datasets.Image)]
    table = arrow(rows, [name for name in inputs if name not in pictures])
    columns = [
        (_pixels(row[name]) for row in rows.select_columns([name]))
        if name in pictures
        else table.column(name).to_pylist()
        for name in inputs
    ]
    keys = (
        hashlib.blake2b(
            "\0".join(_plain(cell) for cell in cells).encode("utf-8", "surrogatepass"), digest_size=8
        ).digest()
        for cells in zip(*columns, strict=True)
    )
    return np.frombuffer(b"".join(keys), dtype=np.uint64)


def duplicate_groups(texts: Sequence[str], *, threshold: float = 0.8, seed: int = 0) -> np.ndarray:
    """The number of the group of each text: texts linked by near duplication share one.

    Two texts are linked by the rule of ``leakage``: a split that keeps groups whole is clean by it.

    >>> a = "we are pleased to offer you this week only a very cheap watch from our own shop in the old town"
    >>> duplicate_groups([a, "a short and honest letter to a good old friend of mine", a + " today"]).tolist()
    [0, 1, 0]
    """
    prints = Prints(texts, seed)
    pairs = _candidates(prints.bands, prints.bands)
    similar = [
        (i, j)
        for i, j in pairs[pairs[:, 0] > pairs[:, 1]]
        if jaccard(prints.shingles[i], prints.shingles[j]) >= threshold
    ]
    edges = np.array(similar, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(len(texts), len(texts)))
    return connected_components(graph, directed=False)[1]


def _exact(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """For each key of ``later`` the first row of ``earlier`` that has it, or -1."""
    order = np.argsort(earlier, kind="stable")
    at = np.minimum(np.searchsorted(earlier[order], later), len(earlier) - 1)
    return np.where(earlier[order[at]] == later, order[at], -1)


def _near(earlier: Prints, later: Prints, threshold: float, skip: np.ndarray) -> np.ndarray:
    """For each row of ``later`` a row of ``earlier`` that is at least as similar as the threshold, or -1."""
    pairs = _candidates(earlier.bands, later.bands)
    partner = np.full(len(skip), -1)
    for i, j in pairs[~skip[pairs[:, 0]]]:
        if partner[i] < 0 and jaccard(later.shingles[i], earlier.shingles[j]) >= threshold:
            partner[i] = j
    return partner


def _candidates(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """The pairs (row of ``later``, row of ``earlier``) that agree in all of a band; of a crowd the first few rows."""
    pairs = []
    for band in range(BANDS):
        order = np.argsort(earlier[:, band], kind="stable")
        ranked = earlier[order, band]
        low = np.searchsorted(ranked, later[:, band], "left")
        high = np.searchsorted(ranked, later[:, band], "right")
        count = np.minimum(high - low, MOST_CANDIDATES)
        rows = np.repeat(np.arange(len(count)), count)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        pairs.append(np.stack([rows, order[low[rows] + within]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _pixels(image: Any) -> str:
    return f"{image.mode} {image.size} {image.tobytes().hex()}"


def _plain(cell: Any) -> str:
    return " ".join(WORD.findall(cell.casefold())) or cell if isinstance(cell, str) else repr(cell)
