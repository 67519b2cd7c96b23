"""DSIR: how much more likely a text's n-grams are in the target than in the pool (Xie et al. 2023).

Reach for it to find text like a sample you have, at the cost of counting words. As in the authors' package
(data-selection): lower-cased words and bigrams hashed into 10 000 buckets by sha256, two bags of buckets, importance
log p_target - log p_raw summed over a text. Importance resampling itself is a rule of ``data.select``.
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from downriver.core.errors import InputError
from downriver.core.io import fingerprint
from downriver.data.score.scorer import Batch, texts_of

_WORDS = re.compile(r"\w+|[^\w\s]+")
SMOOTH = 1e-8  # added to both probabilities, as in the package


class DSIRScorer:
    """The log importance of every document: Σ over its n-grams of log p(n-gram's bucket | target) − log p(… | raw).

    Parameters
    ----------
    target
        Texts like those that are wanted.
    raw
        Texts of the pool, or a sample of it. Without: ``fit`` takes them, and ``ScoreTable.add`` calls it with the
        whole source.
    buckets, ngrams
        10 000 and words with bigrams by default, as the authors have it.

    Higher is more like the target; the score grows with the length of a text (divide by the words for a rate).
    Raises ``InputError`` for texts without a word, and when asked for a score before there are raw texts.

    >>> scorer = DSIRScorer(["the river runs"], ["the stock market", "the river runs dry"])
    >>> river, market = scorer.score(["a river", "a market"])
    >>> bool(river > market)
    True
    """

    columns = ("log_importance",)

    def __init__(
        self,
        target: Iterable[str],
        raw: Iterable[str] | None = None,
        *,
        buckets: int = 10_000,
        ngrams: int = 2,
        name: str = "dsir",
    ) -> None:
        if buckets < 2 or ngrams < 1:
            raise InputError(f"buckets is {buckets} and ngrams {ngrams}: at least 2 and 1 are expected")
        self.name, self.buckets, self.ngrams = name, buckets, ngrams
        self.target = self._shares(target, "target")
        self.log_ratio: np.ndarray | None = None
        if raw is not None:
            self.fit(raw)

    @property
    def fitted(self) -> bool:
        """Whether the raw texts are known."""
        return self.log_ratio is not None

    @property
    def fingerprint(self) -> str:
        return fingerprint("dsir", self.buckets, self.ngrams, hashlib.sha256(self._ratio().tobytes()).hexdigest())

    def fit(self, raw: Iterable[str]) -> "DSIRScorer":
        """Take the raw texts' distribution; returns the scorer."""
        self.log_ratio = np.log(self.target + SMOOTH) - np.log(self._shares(raw, "raw") + SMOOTH)
        return self

    def score(self, batch: Batch) -> np.ndarray:
        """(n,), natural logarithms."""
        ratio = self._ratio()
        scores = np.empty(len(batch))
        for place, text in enumerate(texts_of(batch, self.name)):
            scores[place] = ratio[self._places(text)].sum()
        return scores

    def counts(self, text: str) -> np.ndarray:
        """How many n-grams of a text fall into each bucket, (buckets,).

        >>> int(DSIRScorer(["x"]).counts("a b a").sum())  # three words, two bigrams
        5
        """
        return np.bincount(self._places(text), minlength=self.buckets)

    def _places(self, text: str) -> list[int]:
        words = _WORDS.findall(text.lower())
        found = [_bucket(word, self.buckets) for word in words]
        for n in range(2, self.ngrams + 1):
            found += [_bucket(" ".join(run), self.buckets) for run in _runs(words, n)]
        return found

    def _shares(self, texts: Iterable[str], what: str) -> np.ndarray:
        total = np.zeros(self.buckets, np.int64)
        waiting: Counter[int] = Counter()
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"the {what} texts hold a {type(text).__name__}: strings are expected")
            waiting.update(self._places(text))
        np.add.at(total, list(waiting), list(waiting.values()))
        if not total.any():
            raise InputError(f"the {what} texts hold no word")
        return total / total.sum()

    def _ratio(self) -> np.ndarray:
        if self.log_ratio is None:
            raise InputError(f"scorer {self.name!r} needs texts of the pool: give raw=, or call fit")
        return self.log_ratio


@functools.lru_cache(maxsize=1 << 18)
def _bucket(ngram: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(ngram.encode()).digest(), "big") % buckets


def _runs(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return pairwise(words) if n == 2 else zip(*(words[i:] for i in range(n)), strict=False)
