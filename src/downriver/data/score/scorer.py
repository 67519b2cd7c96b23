"""What every scorer is: something with a name, columns and a fingerprint that gives a number for every document.

Reach for it to write a scorer of your own; ``ScoreTable.add`` takes anything of this shape.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from downriver.core.errors import InputError
from downriver.data.documents import Document

Batch = Sequence[Document | str]


@runtime_checkable
class Scorer(Protocol):
    """Scores documents; the score of a document depends on nothing but the document.

    ``columns`` names the k numbers a document gets; ``fingerprint`` changes when the scores would. A scorer that holds
    a model may say ``executor = "serial"`` so that a table does not copy it to other processes unasked. A score that
    could not be made is NaN.
    """

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    def score(self, batch: Batch) -> np.ndarray:
        """(n,) for one column, (n, k) for k."""
        ...


def texts_of(batch: Batch, scorer: str) -> list[str]:
    """The texts of a batch; one that is empty or no string is an ``InputError`` naming the document.

    >>> texts_of([{"text": "a river", "id": "7"}, "the sea"], "words")
    ['a river', 'the sea']
    """
    texts = []
    for place, document in enumerate(batch):
        text = document.get("text") if isinstance(document, Mapping) else document
        if not isinstance(text, str) or not text or text.isspace():
            name = document.get("id", place) if isinstance(document, Mapping) else place
            what = "is empty" if isinstance(text, str) else f"is of type {type(text).__name__}"
            raise InputError(f"scorer {scorer!r}, document {name!r}: its text {what}")
        texts.append(text)
    return texts
