"""Fill blocks of one length with documents, without padding between them and without one seeing another.

Reach for it before training on rows of very different lengths. Packing as in MeCo (Gao et al. 2025) and OPT-IML (Iyer
et al. 2022); best-fit decreasing as in Ding et al. (2024), «Fewer Truncations Improve Language Modeling».
"""

import bisect
import collections
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from downriver.core.errors import InputError, unknown
from downriver.models.model import Model

Strategy = Literal["complete", "truncate", "bfd"]
IGNORED = -100
RESTORED = 10  # labels given back to a block without any


@dataclass(frozen=True)
class Packer:
    """Packs rows of ``input_ids`` (and ``labels``, and other lists as long) into blocks of at most ``block`` tokens.

    Parameters
    ----------
    block
        Tokens a block (MeCo: 8192, OPT-IML: 2048).
    strategy
        ``complete`` (default, MeCo's): documents follow one another, a document cut at the end of a block goes on in
        the next, and every block but the last is full. ``truncate``: the rest of a cut document is dropped, so that
        every block begins with the beginning of a document. ``bfd``: a document goes where it leaves the least room;
        only one that is longer than a block is cut, and blocks may be a little shorter.
    isolate
        Gives ``position_ids`` that start again at 0 for every document, from which attention is kept within
        documents (see ``isolates``), and takes no loss on a document's first token, which nothing could predict.
        Without it blocks are plain text with everything in sight, as GPT-2 was trained.
    repeat_prefix
        Put the unlearnt beginning of a document (start token, metadata) again before what goes on in another block.
        Default: no, what goes on has lost it; say in a report which one was used.

    >>> rows = [{"input_ids": [1, 7, 8, 9]}, {"input_ids": [1, 5]}]
    >>> Packer(block=4, strategy="bfd").pack(rows).to_dict()["labels"]
    [[-100, 7, 8, 9], [-100, 5]]
    >>> Packer(block=3).pack(rows).to_dict()["position_ids"]
    [[0, 1, 2], [0, 0, 1]]
    """

    block: int
    strategy: Strategy = "complete"
    isolate: bool = True
    repeat_prefix: bool = False

    def __post_init__(self) -> None:
        if self.block < 2:
            raise InputError(f"block is {self.block}: at least two tokens are expected")
        if self.strategy not in get_args(Strategy):
            raise unknown("packing strategy", self.strategy, get_args(Strategy))

    def pack(self, rows: datasets.Dataset | Iterable[Mapping[str, Any]]) -> datasets.Dataset:
        """The blocks, as rows of ``TokenRows``: ``input_ids``, ``labels``, with ``isolate`` ``position_ids``, and every
        other list of numbers that was as long as its row. Other columns are left out: a block has many documents.

        Rows without ``labels`` are learnt whole. A block in which nothing is learnt gets its last ten labels back, so
        that its loss is a number.

        Raises ``InputError`` naming the row: no tokens, lists of different lengths, a prefix that fills a block.
        """
        columns, starts = _flat(rows)
        lengths = np.diff(starts)
        prefixes = _prefixes(columns["labels"], starts)
        prefixes[prefixes == lengths] = 0  # nothing is learnt: there is nothing to lead up to
        for row in np.flatnonzero(prefixes >= self.block):
            raise InputError(
                f"row {row}: {prefixes[row]} tokens stand before the first that is learnt, which fills a block of "
                f"{self.block}: a larger block, or shorter metadata, is expected"
            )
        repeated = prefixes if self.repeat_prefix else np.zeros_like(prefixes)
        blocks = list(_STRATEGIES[self.strategy](self.block, lengths, prefixes, repeated))
        where, first = _places(blocks, starts, repeated)
        packed = {name: values[where] for name, values in columns.items()}
        ends = np.cumsum([0, *(sum(_size(piece, repeated) for piece in pieces) for pieces in blocks)])
        if self.isolate:
            packed["labels"][first] = IGNORED
            packed["position_ids"] = _positions(first, len(where))
        _restore(packed["labels"], packed["input_ids"], first if self.isolate else ends[:-1], ends)
        lists = {name: pa.LargeListArray.from_arrays(ends, values) for name, values in packed.items()}
        return datasets.Dataset(pa.table(lists))


class _Piece(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document."""

    document: int
    start: int
    stop: int


def cu_seqlens(position_ids: Tensor) -> tuple[Tensor, int]:
    """What kernels of variable lengths want of a packed batch: where documents begin and end in the flattened batch,
    int32 (documents + 1,), and the longest document's tokens.

    >>> cu_seqlens(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]))
    (tensor([ 0,  3,  5,  7, 10], dtype=torch.int32), 3)
    """
    begins = position_ids == 0
    begins[:, 0] = True
    bounds = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([begins.numel()], device=begins.device)])
    return bounds.to(torch.int32), int(bounds.diff().max())


def document_mask(position_ids: Tensor, *, causal: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """The additive attention mask (n, 1, tokens, tokens) that keeps each document to itself: 0 where a token may look,
    the type's smallest number elsewhere. ``causal=False`` for masked language models.

    >>> (document_mask(torch.tensor([[0, 1, 0]]))[0, 0] == 0).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    document = (position_ids == 0).cumsum(dim=1)
    seen = document[:, :, None] == document[:, None, :]
    if causal:
        seen = seen.tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def isolated(model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ``objective`` for ``fine_tune``: the model's own loss under an explicit ``document_mask``, for models that do
    not take the documents of a block from ``position_ids`` (see ``isolates``)."""
    dtype = next(model.backbone.parameters()).dtype
    mask = document_mask(batch["position_ids"], causal=model.kind == "causal-lm", dtype=dtype)
    return model(**batch, attention_mask=mask)


def isolates(model: Model) -> bool:
    """Whether ``position_ids`` alone keep the documents of a block apart in this model; measured on two documents.

    transformers makes the block-diagonal mask for Llama, Qwen, GPT-2, GPT-NeoX and others; OPT and encoders of the
    BERT family do not ask for it and need ``isolated``. Raises ``InputError`` where not even the explicit mask helps
    (BLOOM, whose positions are a bias of its own).

    >>> from downriver.models import small
    >>> isolates(small("causal-lm", "nano")), isolates(small("masked-lm", "nano"))
    (True, False)
    """
    backbone: Any = model.backbone
    if not hasattr(getattr(backbone, "config", None), "vocab_size"):
        raise InputError(f"a {type(backbone).__name__} is no language model: one of transformers' is expected")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(backbone.config.vocab_size, (1, 12), generator=generator).to(model.device)
    batch = {"input_ids": ids, "position_ids": torch.tensor([[*range(5), *range(7)]], device=model.device)}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([model(input_ids=part)["logits"] for part in (ids[:, :5], ids[:, 5:])], dim=1)
            if _same(model(**batch)["logits"], alone):
                return True
            with contextlib.suppress(ValueError, RuntimeError, TypeError):
                if _same(isolated(model, batch)["logits"], alone):
                    return False
    finally:
        model.train(training)
    raise InputError(
        f"documents of a block cannot be kept apart in a {type(backbone).__name__}: use isolate=False, or one document "
        "a row"
    )


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to 1e-4 of the largest logit, or to the rounding of a coarser type."""
    tolerance = max(1e-4, 4 * torch.finfo(found.dtype).eps) * max(1.0, expected.abs().max().item())
    return (found - expected).abs().max().item() <= tolerance


def _flat(rows: datasets.Dataset | Iterable[Mapping[str, Any]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The list columns end to end, and where each row starts, (rows + 1,)."""
    if not isinstance(rows, datasets.Dataset):
        rows = datasets.Dataset.from_list([dict(row) for row in rows])
    if not len(rows) or "input_ids" not in rows.column_names:
        raise InputError(f"{len(rows)} rows with the columns {rows.column_names}: rows with input_ids are expected")
    table = rows.with_format("arrow")[:]
    columns, starts = {}, None
    for name in ["input_ids", *(c for c in table.column_names if c != "input_ids")]:
        column = table[name].combine_chunks()
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            continue
        if column.null_count:
            raise InputError(f"column {name!r}, row {column.is_null().index(True).as_py()}: a list is missing")
        lengths = column.value_lengths().to_numpy()
        if starts is None:
            starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            if (lengths == 0).any():
                raise InputError(f"row {int(np.argmin(lengths))}: no token")
        elif (lengths != np.diff(starts)).any():
            row = int(np.flatnonzero(lengths != np.diff(starts))[0])
            raise InputError(
                f"row {row}: column {name!r} has {lengths[row]} values and input_ids {np.diff(starts)[row]}"
            )
        columns[name] = column.flatten().to_numpy(zero_copy_only=False)
    assert starts is not None  # input_ids comes first
    columns.setdefault("labels", columns["input_ids"])
    columns.pop("position_ids", None)  # made anew
    return columns, starts


def _prefixes(labels: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many tokens of each row come before the first that is learnt; all of them when none is."""
    learnt = np.flatnonzero(labels != IGNORED)
    found = np.append(learnt, len(labels))[np.searchsorted(learnt, starts[:-1])]
    return np.minimum(found, starts[1:]) - starts[:-1]


def _complete(block: int, lengths: np.ndarray, prefixes: np.ndarray, repeated: np.ndarray) -> Iterator[list[_Piece]]:
    pieces: list[_Piece] = []
    room = block
    for document, (length, prefix) in enumerate(zip(lengths.tolist(), repeated.tolist(), strict=True)):
        start = 0
        if pieces and room <= prefix and room < length:  # only the prefix would fit, and it comes again
            yield pieces
            pieces, room = [], block
        while start < length:
            again = prefix if start else 0
            stop = min(length, start + room - again)
            pieces.append(_Piece(document, start, stop))
            room -= stop - start + again
            start = stop
            if not room:
                yield pieces
                pieces, room = [], block
    if pieces:
        yield pieces


def _truncate(block: int, lengths: np.ndarray, prefixes: np.ndarray, repeated: np.ndarray) -> Iterator[list[_Piece]]:
    pieces: list[_Piece] = []
    room = block
    for document, (length, prefix) in enumerate(zip(lengths.tolist(), prefixes.tolist(), strict=True)):
        if pieces and room <= prefix:  # nothing of it would be learnt
            yield pieces
            pieces, room = [], block
        pieces.append(_Piece(document, 0, min(length, room)))
        room -= min(length, room)
        if not room:
            yield pieces
            pieces, room = [], block
    if pieces:
        yield pieces


def _best_fit(block: int, lengths: np.ndarray, prefixes: np.ndarray, repeated: np.ndarray) -> Iterator[list[_Piece]]:
    """Longest piece first, each into the block that it leaves with the least room; blocks in the order of their
    earliest document."""
    pieces = []
    for document, length in enumerate(lengths.tolist()):
        start = 0
        while start < length:
            stop = min(length, start + block - (int(repeated[document]) if start else 0))
            pieces.append(_Piece(document, start, stop))
            start = stop
    blocks: list[list[_Piece]] = []
    by_room: dict[int, list[int]] = collections.defaultdict(list)
    rooms: list[int] = []  # sorted; each has a block at least
    for piece in sorted(pieces, key=lambda piece: -_size(piece, repeated)):
        size = _size(piece, repeated)
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            chosen, room = len(blocks), block
            blocks.append([])
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        blocks[chosen].append(piece)
        if room > size:
            if not by_room[room - size]:
                bisect.insort(rooms, room - size)
            by_room[room - size].append(chosen)
    yield from sorted((sorted(pieces) for pieces in blocks), key=lambda pieces: pieces[0])


_STRATEGIES = {"complete": _complete, "truncate": _truncate, "bfd": _best_fit}


def _size(piece: _Piece, repeated: np.ndarray) -> int:
    return piece.stop - piece.start + (int(repeated[piece.document]) if piece.start else 0)


def _places(
    blocks: Sequence[Sequence[_Piece]], starts: np.ndarray, repeated: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For every token of the blocks, end to end, where it comes from; and where in the blocks documents begin."""
    ranges, first, at = [], [], 0
    for piece in (piece for pieces in blocks for piece in pieces):
        begin = int(starts[piece.document])
        first.append(at)
        at += _size(piece, repeated)
        if piece.start:
            ranges.append(np.arange(begin, begin + int(repeated[piece.document])))
        ranges.append(np.arange(begin + piece.start, begin + piece.stop))
    return np.concatenate(ranges), np.array(first)


def _positions(first: np.ndarray, tokens: int) -> np.ndarray:
    lengths = np.diff(np.append(first, tokens))
    return np.arange(tokens) - np.repeat(first, lengths)


def _restore(labels: np.ndarray, ids: np.ndarray, first: np.ndarray, ends: np.ndarray) -> None:
    """In place: the last labels of blocks without any, but not those of tokens that nothing predicts."""
    learnt = np.add.reduceat(labels != IGNORED, ends[:-1])
    predicted = np.ones(len(labels), dtype=bool)
    predicted[first] = False
    for block in np.flatnonzero(learnt == 0):
        last = np.arange(max(ends[block], ends[block + 1] - RESTORED), ends[block + 1])
        last = last[predicted[last]]
        labels[last] = ids[last]
