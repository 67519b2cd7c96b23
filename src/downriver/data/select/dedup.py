"""Find copies and near copies of documents; of each family the document with the smallest id stays.

Reach for it before any choice by quality: copies share their scores and crowd the top. Exact copies have the same
content hash; near ones are met by MinHash bands (Broder 1997) and confirmed by the Jaccard similarity of their
five-word runs. The source is read twice. A document is a near copy of one that *stays*, so that no chain of small
changes leads from what is dropped to what is kept; ids alone decide, and shuffling changes nothing.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from downriver.core.errors import InputError
from downriver.core.minhash import BANDS, Prints, jaccard, shingles
from downriver.data.documents import shards

BATCH = 1000


@dataclass(frozen=True)
class Duplicates:
    """``reasons`` by id of every document that is a copy (``duplicate of <id>``, ``near-duplicate of <id>``), in the
    order of ids; it goes into ``select(..., drop=found.reasons)``. Of ``documents`` read, ``exact`` and ``near`` are
    copies."""

    reasons: dict[str, str]
    documents: int
    exact: int
    near: int


def dedup(
    source: Any, *, near: bool = True, threshold: float = 0.8, seed: int = 0, text: str = "text", id: str = "id"
) -> Duplicates:
    """Find the documents of a source that copy another one.

    Parameters
    ----------
    source
        As for ``documents.shards``: files, a dataset or rows; it is read twice, in portions. What is held meanwhile
        are ids, a content hash and 128 bytes of band keys a document, and the runs of the possible near copies.
    near, threshold
        Whether, and from which Jaccard similarity of their sets of five-word runs, two texts are near copies. A pair
        at 0.8 (usual for web text) is met with probability 99.8 %, at 0.5 with 40 %: a low threshold misses pairs.

    Broken records are passed over (``read_documents`` and ``ScoreTable`` name them). Raises ``InputError`` for an id
    that stands for several documents and a threshold out of range.

    >>> runs = "the quick brown fox jumps over the lazy dog near the old mill by the river every single day"
    >>> rows = [{"id": "c", "text": runs + " now"}, {"id": "a", "text": runs}, {"id": "b", "text": runs}]
    >>> dedup(rows).reasons
    {'b': 'duplicate of a', 'c': 'near-duplicate of a'}
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold {threshold}: a similarity above 0 and up to 1 is expected")
    parts = shards(source, text=text, id=id)

    def documents() -> Iterator[dict[str, Any]]:
        for shard in parts:
            yield from (document for _, document in shard.documents(lambda problem: None))

    ids, contents, bands = _read(documents(), near, seed)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    for before, after in pairwise(order):
        if ids[before] == ids[after]:
            raise InputError(f"id {ids[before]!r} stands for several documents: ids of their own are expected")
    ids, contents, bands = [ids[i] for i in order], contents[order], bands[order]
    _, first = np.unique(contents, return_index=True)  # the smallest id of each content
    kept = np.zeros(len(ids), dtype=bool)
    kept[first] = True
    original = dict(zip(contents[first].tolist(), first.tolist(), strict=True))
    reasons = {i: f"duplicate of {ids[original[contents[i].item()]]}" for i in np.flatnonzero(~kept).tolist()}
    exact = len(reasons)
    if near:
        unique = np.flatnonzero(kept)
        for i, j in _near(documents(), ids, unique, bands[unique], threshold).items():
            reasons[i] = f"near-duplicate of {ids[j]}"
            kept[i] = False
        for i in np.flatnonzero(~kept).tolist():  # an exact copy names the one that stays
            twin = original[contents[i].item()]
            if twin != i and not kept[twin]:
                reasons[i] = reasons[twin]
    return Duplicates({ids[i]: reasons[i] for i in sorted(reasons)}, len(ids), exact, len(reasons) - exact)


def _read(documents: Iterable[dict[str, Any]], near: bool, seed: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The first pass: ids, content hashes (n,), band keys (n, bands)."""
    ids: list[str] = []
    contents: list[bytes] = []
    bands = [np.empty((0, BANDS), dtype=np.uint64)]
    rest = iter(documents)
    while batch := list(islice(rest, BATCH)):
        texts = [document["text"] for document in batch]
        ids += [document["id"] for document in batch]
        contents += [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        bands.append(Prints(texts, seed).bands if near else np.empty((len(batch), BANDS), dtype=np.uint64))
    return ids, np.array(contents, dtype="V16"), np.concatenate(bands)


def _near(
    documents: Iterable[dict[str, Any]], ids: list[str], rows: np.ndarray, bands: np.ndarray, threshold: float
) -> dict[int, int]:
    """The second pass: row → row that stays, for near copies among ``rows``, which are in the order of their ids."""
    shared = np.zeros(len(rows), dtype=bool)
    buckets = np.empty(bands.shape, dtype=np.int64)
    for band in range(bands.shape[1]):
        _, buckets[:, band], size = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        shared |= size[buckets[:, band]] > 1
    possible = {ids[row]: row for row in rows[shared].tolist()}
    runs = {possible[d["id"]]: shingles(d["text"]) for d in documents if d["id"] in possible}
    staying: dict[tuple[int, int], list[int]] = {}
    found: dict[int, int] = {}
    for place in np.flatnonzero(shared).tolist():
        row, own = int(rows[place]), list(enumerate(buckets[place].tolist()))
        for other in sorted({other for bucket in own for other in staying.get(bucket, ())}):
            if jaccard(runs[row], runs[other]) >= threshold:
                found[row] = other
                break
        else:
            for bucket in own:
                staying.setdefault(bucket, []).append(row)
    return found
