"""How alike generated texts are: Self-BLEU, near-copies by MinHash, and vectors of character n-grams.

Reach for it to watch a generator for collapse. Zhu et al. (2018), «Texygen», for Self-BLEU; Broder (1997) for MinHash.
"""

import collections
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from downriver.core.errors import InputError
from downriver.core.minhash import Prints, character_shingles, jaccard

BANDS, BAND_ROWS = 32, 4  # a pair of similarity .78 shares no band with probability 4e-7


def self_bleu(texts: Sequence[str], orders: Sequence[int] = (2, 3, 4, 5)) -> float:
    """Self-BLEU in [0, 1]: every text's BLEU against all others, mean over texts and over BLEU-2 to BLEU-5.

    1 means that every text has a copy, 0 that no two share words. Each BLEU is the geometric mean of the clipped
    n-gram precisions up to its order (up to the text's length), times the brevity penalty against the nearest length;
    an order without any match counts as half a match. Words and punctuation marks are tokens. NaN for fewer than two
    texts. Linear in the number of texts: of every n-gram the two largest counts are enough.

    >>> self_bleu(["a b c d e", "a b c d e"]), round(self_bleu(["a b c d e f", "u v w x y z"]), 2)
    (1.0, 0.11)
    """
    rows = [words for text in texts if (words := re.findall(r"\w+|[^\w\s]", text))]
    if not orders or min(orders) < 1:
        raise InputError(f"orders are {tuple(orders)}: numbers of at least 1 are expected")
    if len(rows) < 2:
        return float("nan")
    lengths = collections.Counter(len(row) for row in rows)
    grams = [
        [collections.Counter(zip(*(row[i:] for i in range(n)), strict=False)) for n in range(1, max(orders) + 1)]
        for row in rows
    ]
    most: dict[Any, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for row in grams:
        for counts in row:
            for gram, count in counts.items():
                most[gram] = tuple(sorted((*most[gram], count))[-2:][::-1])  # type: ignore[assignment]
    scores = []
    for words, row in zip(rows, grams, strict=True):
        logs = []
        for counts in row[: len(words)]:
            matched = 0
            for gram, count in counts.items():
                first, second = most[gram]
                matched += min(count, second if count == first else first)  # the most that another text has
            logs.append(np.log(max(matched, 0.5) / sum(counts.values())))
        others = [n for n in lengths if n != len(words) or lengths[n] > 1]
        nearest = min(others, key=lambda n: (abs(n - len(words)), n))
        penalty = min(0.0, 1 - nearest / len(words))
        scores += [np.exp(penalty + np.mean(logs[:order])) for order in orders]
    return float(np.mean(scores))


def near_duplicates(texts: Sequence[str], seen: Sequence[str] = (), threshold: float = 0.78) -> np.ndarray:
    """Which texts, (n,) bool, nearly repeat one of ``seen`` or an earlier one that is no repetition itself.

    Two texts are near-copies when their sets of four-character shingles (lower case, single spaces) have a Jaccard
    similarity of at least ``threshold`` (0.78, ReverseGen's). Candidates come from MinHash with 32 bands of 4; their
    similarity is then computed exactly.

    >>> near_duplicates(["Name a long river.", "Name a long river!", "What is 2+2?"]).tolist()
    [False, True, False]
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold is {threshold}: a similarity above 0 and up to 1 is expected")
    if not (everything := [*seen, *texts]):
        return np.zeros(0, dtype=bool)
    prints = Prints(everything, of=character_shingles, bands=BANDS, rows=BAND_ROWS)
    buckets: dict[tuple[int, int], list[int]] = {}
    found = np.zeros(len(everything), dtype=bool)
    for i, (mine, bands) in enumerate(zip(prints.shingles, prints.bands.tolist(), strict=True)):
        near = {j for key in enumerate(bands) for j in buckets.get(key, ())}
        found[i] = i >= len(seen) and any(jaccard(mine, prints.shingles[j]) >= threshold for j in near)
        if not found[i]:
            for key in enumerate(bands):
                buckets.setdefault(key, []).append(i)
    return found[len(seen) :]


def ngram_vectors(texts: Sequence[str]) -> Any:
    """Unit vectors of hashed counts of character 2- to 4-grams, a sparse (n, 4096) matrix.

    >>> ngram_vectors(["a river", "a river"]).shape
    (2, 4096)
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(analyzer="char", ngram_range=(2, 4), n_features=4096, alternate_sign=False).transform(
        texts
    )
