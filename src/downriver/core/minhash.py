"""Texts as sets of hashed runs of words or characters: shingles, MinHash signatures in bands, true similarity.

Reach for it to find near duplicates (Broder 1997, "On the resemblance and containment of documents"; Leskovec,
Rajaraman and Ullman, "Mining of massive datasets", chapter 3). Two texts of similarity s share a band with
probability 1 - (1 - s**5)**16; whoever reports a pair checks it by ``jaccard`` first.
"""

import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

BANDS, BAND_ROWS = 16, 5
WORD = re.compile(r"\w+")


class Prints:
    """Of a list of texts the shingles (a set of 32-bit hashes of five-word runs each) and the keys of their bands.

    ``bands`` is (n, 16), 64 bits each; equal keys mean equal signatures in that band. They depend on ``seed`` and the
    text alone, so that texts may be read in portions. For short texts give another set ``of`` each text
    (``character_shingles``), and the number of ``bands`` and of signatures a band, ``rows``.

    >>> words = "the river runs to the sea and the sea runs to the shore where all the rivers end"
    >>> prints = Prints([words, words.upper(), "nothing of the kind"], seed=0)
    >>> (prints.bands[0] == prints.bands[1]).all().item(), (prints.bands[0] == prints.bands[2]).any().item()
    (True, False)
    """

    def __init__(
        self,
        texts: Sequence[str],
        seed: int = 0,
        of: Callable[[str], np.ndarray] | None = None,
        bands: int = BANDS,
        rows: int = BAND_ROWS,
    ) -> None:
        self.shingles = [(of or shingles)(text) for text in texts]
        count = bands * rows
        rng = np.random.default_rng(seed)
        a = rng.integers(0, 2**31, size=count, dtype=np.uint32) * np.uint32(2) + np.uint32(
            1
        )  # odd: h -> a h + b permutes
        b = rng.integers(0, 2**32, size=count, dtype=np.uint32)
        self.signatures = np.empty((len(texts), count), dtype=np.uint32)
        for start in range(0, len(texts), 1000):
            part = self.shingles[start : start + 1000]
            h = np.concatenate(part)
            offsets = np.cumsum([0, *(len(s) for s in part[:-1])])
            for k in range(count):
                self.signatures[start : start + len(part), k] = np.minimum.reduceat(a[k] * h + b[k], offsets)
        power = rng.integers(0, 2**63, size=rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.bands = (self.signatures.reshape(-1, bands, rows) * power).sum(axis=2, dtype=np.uint64)


def word_runs(text: str, size: int, *, short: bool = True) -> np.ndarray:
    """The 64-bit hashes of the text's runs of ``size`` words, in their order; case and punctuation do not count.

    A shorter text is one run, or none with ``short=False``.

    >>> bool((word_runs("The river, the sea", 2) == word_runs("the RIVER the sea!", 2)).all())
    True
    """
    words = WORD.findall(text.casefold())
    w = np.fromiter((_hash_word(word) for word in words), dtype=np.uint64, count=len(words))
    n = max(int(short), len(w) - size + 1)
    runs = np.zeros(n, dtype=np.uint64)
    for k in range(min(size, len(w)) if n else 0):  # Σ_k w_{i+k} B^(size-k), modulo 2^64
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + w[k : k + n]
    runs ^= runs >> np.uint64(31)
    return runs * np.uint64(0xBF58476D1CE4E5B9)


def shingles(text: str) -> np.ndarray:
    """The set of 32-bit hashes of the text's runs of five words, ascending.

    >>> len(shingles("one two three four five six")), len(shingles("short"))
    (2, 1)
    """
    return np.unique((word_runs(text, 5) >> np.uint64(32)).astype(np.uint32))


def character_shingles(text: str, size: int = 4) -> np.ndarray:
    """The set of 32-bit hashes of the text's runs of ``size`` characters (lower case, single spaces), ascending.

    >>> len(character_shingles("A  river")), len(character_shingles("a"))
    (4, 1)
    """
    text = " ".join(text.lower().split())
    runs = {text[i : i + size] for i in range(max(1, len(text) - size + 1))}
    return np.unique(np.fromiter((zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs), dtype=np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a ∩ b| / |a ∪ b| of two sets of shingles; 0 when one is empty.

    >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    if min(len(a), len(b)) == 0:
        return 0.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


@functools.lru_cache(maxsize=2**20)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
