"""Half-document retrieval: does an encoder still know which text goes with which, without any label?

Reach for it as the reference score of a text encoder, before and after it was adapted to something else.
"""

from collections.abc import Sequence

import numpy as np

from downriver.core.errors import InputError
from downriver.core.seeds import generator
from downriver.models.features import extract
from downriver.models.model import Model

FEWEST_WORDS = 16


def half_document_retrieval(
    model: Model, texts: Sequence[str], seed: int = 0, *, documents: int = 500, words: int = 64, batch_size: int = 64
) -> dict[str, float]:
    """``{"recall@1": ..., "mrr": ...}`` of finding each document's second half among all by its first half.

    Of the texts with at least 16 words, ``documents`` are drawn by ``seed`` (all when there are fewer), so two models
    see the same ones. The halves are the first ``words`` words and as many after them (or the two halves of a shorter
    text); they are compared by the cosine of the backbone's pooled features, whatever head the model has.
    ``recall@1`` is the share of first halves whose own second half comes first, ``mrr`` the mean of 1 / rank. Equal
    cosines count against the model, so an encoder that says the same of every text gets 1 / n.

    Raises ``InputError`` when fewer than two texts are long enough.

    >>> from downriver.models import small
    >>> texts = [f"{w} " * 20 for w in ("river", "mountain")]
    >>> sorted(half_document_retrieval(small("text-encoder", "nano"), texts))
    ['mrr', 'recall@1']
    """
    split = [text.split()[: 2 * words] for text in texts]
    usable = [i for i, found in enumerate(split) if len(found) >= FEWEST_WORDS]
    if len(usable) < 2:
        raise InputError(
            f"half-document retrieval: {len(usable)} of {len(texts)} texts have {FEWEST_WORDS} words, "
            "two at least are expected"
        )
    if len(usable) > documents:
        usable = sorted(generator("half-document retrieval", seed).choice(usable, size=documents, replace=False))
    halves = [half for i in usable for half in (split[i][: len(split[i]) // 2], split[i][len(split[i]) // 2 :])]
    features = extract(model, [" ".join(half) for half in halves], batch_size=batch_size)
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosines = features[0::2] @ features[1::2].T
    rank = (cosines >= np.diag(cosines)[:, None]).sum(axis=1)
    return {"recall@1": float(np.mean(rank == 1)), "mrr": float(np.mean(1 / rank))}
