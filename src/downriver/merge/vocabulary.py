"""Models with different vocabularies, seen as if they had one: every token's row in one place, read as it is needed.

Reach for ``merge(..., vocabulary="base")`` where fine-tuned models added tokens or renumbered them, and ``"union"``
where the result is to know all of them. Tokens are compared as ``models.vocabulary.shared_tokens`` does: by the text
they stand for, special ones by their role. A row that a model lacks is the base's there, so that it moves nothing; one
that the base lacks, too, is the mean of those that the other models have.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
import transformers
from torch import Tensor

from downriver.core.errors import InputError, unknown
from downriver.merge.plan import Vocabulary, of_tokens, rows_of_tokens
from downriver.merge.stores import Source, Store, open_store
from downriver.models.vocabulary import shared_tokens

_Placed = tuple[Store, np.ndarray]
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Aligned:
    """What ``align_vocabularies`` gives; ``tokenizer`` is the new one, None where the base's own still holds."""

    models: list[Store]
    base: Store
    tokenizer: Any = None


def align_vocabularies(models: Sequence[Source], base: Source, to: Vocabulary = "base") -> Aligned:
    """Stores of the models and of the base whose embeddings and output layers have one row a token of one vocabulary.

    Parameters
    ----------
    models, base
        As in ``merge``; each with its tokenizer (a ``Model``'s, or the one in its folder). A model without one is taken
        to have the base's when it has as many rows.
    to
        ``base``: its vocabulary, and its further rows. ``union``: the tokens that models have besides follow after it,
        as added tokens, so that the base's text is cut as before, but for words that were added.

    Raises ``InputError`` for a base without a tokenizer, and for a model without one that has other rows than the base.

    Example
    -------
    >>> from downriver.models import small_language_model, word_tokenizer
    >>> base = small_language_model("causal-lm", word_tokenizer(["red square"]), width=8, heads=2)
    >>> other = small_language_model("causal-lm", word_tokenizer(["a red circle"]), width=8, heads=2)
    >>> aligned = align_vocabularies([other], base, "union")
    >>> len(base.processor), len(other.processor), aligned.base.shape("model.embed_tokens.weight")
    (7, 8, (9, 8))
    """
    if to not in get_args(Vocabulary):
        raise unknown("vocabulary", to, get_args(Vocabulary))
    ground, stores = open_store(base), [open_store(model) for model in models]
    own = tokenizer_of(base, ground)
    if own is None:
        raise InputError(f"the base {ground.label} has no tokenizer: vocabularies cannot be compared")
    theirs = [tokenizer_of(model, store) for model, store in zip(models, stores, strict=True)]
    mine: dict[str, int] = own.get_vocab()
    for store, tokenizer in zip(stores, theirs, strict=True):
        found, expected = rows_of_tokens(store), rows_of_tokens(ground)
        if tokenizer is None and found != expected:
            raise InputError(
                f"{store.label} has {found} rows of tokens, the base {ground.label} {expected}: "
                "it has no tokenizer that says which is which"
            )
    if all(tokenizer is None or tokenizer.get_vocab() == mine for tokenizer in theirs):
        return Aligned(stores, ground)
    target = _union(own, theirs) if to == "union" else own
    rows = max(rows_of_tokens(ground), 1 + max(target.get_vocab().values()))
    places = [
        _places(store, shared_tokens(tokenizer or own, target), rows)
        for store, tokenizer in zip(stores, theirs, strict=True)
    ]
    of_base = np.full(rows, -1)
    of_base[: rows_of_tokens(ground)] = np.arange(rows_of_tokens(ground))
    if to == "union":
        of_base[[i for token, i in target.get_vocab().items() if token not in mine]] = -1

    def aligned(store: Store, place: np.ndarray) -> Store:
        others = [(s, p) for s, p in zip(stores, places, strict=True) if s is not store]
        return dataclasses.replace(store, tensors=_Aligned(store, place, (ground, of_base), others))

    moved = [aligned(store, place) for store, place in zip(stores, places, strict=True)]
    return Aligned(moved, aligned(ground, of_base), target) if to == "union" else Aligned(moved, ground)


def tokenizer_of(source: Any, store: Store) -> Any:
    """The tokenizer of a ``Model`` or of a folder, None where there is none."""
    if hasattr(source, "processor"):
        return source.processor if hasattr(source.processor, "get_vocab") else None
    if store.folder is None or not any((store.folder / name).is_file() for name in _FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(store.folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{store.label}: its tokenizer cannot be read ({error})") from None


def _union(base: Any, others: Sequence[Any]) -> Any:
    """The base's tokenizer and, after its tokens, those that only others have, in their order."""
    union = copy.deepcopy(base)
    for other in others:
        if other is None:
            continue
        shared = set(shared_tokens(other, union).values())
        settings: Mapping[int, Any] = other.added_tokens_decoder
        missing = sorted((i, token) for token, i in other.get_vocab().items() if i not in shared)
        union.add_tokens([settings.get(i, token) for i, token in missing])
    return union


def _places(store: Store, shared: Mapping[int, int], rows: int) -> np.ndarray:
    """For each row of the result the store's own, -1 where it has none."""
    found, own = np.full(rows, -1), rows_of_tokens(store)
    for new, old in shared.items():
        if old < own:
            found[new] = old
    return found


class _Aligned:
    """A store's tensors with the rows of tokens where ``place`` says; a row that it lacks is the base's, or the mean of
    those that the others have."""

    def __init__(
        self,
        store: Store,
        place: np.ndarray,
        base: tuple[Store, np.ndarray],
        others: Sequence[tuple[Store, np.ndarray]],
    ) -> None:
        self._store, self._place, self._base, self._others = store, place, base, others
        shapes = {name: store.shape(name) for name in store.names() if of_tokens(name)}
        self._shapes = {name: shape for name, shape in shapes.items() if shape and shape[0] == rows_of_tokens(store)}

    def names(self) -> list[str]:
        return self._store.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return (len(self._place), *self._shapes[name][1:]) if name in self._shapes else self._store.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._store.dtype(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._shapes:
            return self._store.read(name, start, stop)
        width = math.prod(self._shapes[name][1:])
        first, last = start // width, -(-stop // width)
        rows = _gathered(self._store, name, self._place[first:last], width)
        lacking = np.flatnonzero(self._place[first:last] < 0)
        if len(lacking):
            rows[lacking] = self._filled(name, first + lacking, width).to(rows)
        return rows.view(-1)[start - first * width : stop - first * width]

    def _filled(self, name: str, tokens: np.ndarray, width: int) -> Tensor:
        base, place = self._base
        rows = _gathered(base, name, place[tokens], width).float()
        unknown_to_base = np.flatnonzero(place[tokens] < 0)
        total, count = torch.zeros(len(unknown_to_base), width), torch.zeros(len(unknown_to_base), 1)
        for store, place in self._others:
            own = place[tokens[unknown_to_base]]
            total += _gathered(store, name, own, width)
            count += torch.from_numpy(own >= 0)[:, None]
        rows[unknown_to_base] = total / count.clamp(min=1)
        return rows


def _gathered(store: Store, name: str, rows: np.ndarray, width: int) -> Tensor:
    """Rows of a tensor one after the other, each run of neighbours in one read; zeros for -1."""
    found = torch.zeros(len(rows), width, dtype=store.dtype(name))
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    for at, run in zip((0, *cuts), np.split(rows, cuts), strict=True):
        if len(run) and run[0] >= 0:
            found[at : at + len(run)] = store.read(name, int(run[0]) * width, (int(run[-1]) + 1) * width).view(
                -1, width
            )
    return found
