"""Token ids that are ready to train on, in the place of a task: packed, masked or weighted as a method made them.

Reach for it where a method decides itself what every token of a row is (a prefix without loss, several documents in a
block); a task with texts goes to ``fine_tune`` as it is.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor

from downriver.core.errors import InputError, unknown
from downriver.models.model import Model, hide_tokens

IGNORED = -100
_FILL: dict[str, float] = {"labels": IGNORED}


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Splits of token rows; ``fine_tune`` takes it where it takes a ``Task``.

    ``input_ids`` (a list of ids a row) is required. ``labels`` (as long; -100 where no loss is taken) default to the
    ids; for a masked LM 15 % of the ordinary tokens are hidden by BERT's rule, afresh for every batch in training.
    ``position_ids`` (as long) that start again at 0 for every document of a block keep attention within documents:
    transformers then builds the block-diagonal mask itself, and no ``attention_mask`` is given. Every further column
    is a number a row or a list of numbers as long as the row, for an objective to read. Rows of a batch are padded on
    the right to the longest: ids with ``pad``, labels with -100, other lists with 0.

    Raises ``InputError`` naming split, column and row: no ``input_ids``, an empty row, lists of different lengths.

    >>> from downriver.models import small
    >>> ids, labels = [[1, 7, 8, 2], [1, 9, 2]], [[-100, 7, 8, 2], [1, 9, 2]]
    >>> rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    >>> batch = TokenRows("toy", {"train": rows}).collate(small("causal-lm", "nano"))(list(rows))
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].sum().item()
    ([[1, 7, 8, 2], [1, 9, 2, 0]], [[-100, 7, 8, 2], [1, 9, 2, -100]], 7)
    """

    name: str
    splits: Mapping[str, datasets.Dataset]
    pad: int = 0

    kind: ClassVar[str] = "language-modelling"
    target: ClassVar[None] = None
    labels: ClassVar[tuple[str, ...]] = ()
    classification: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.splits:
            raise InputError(f"token rows {self.name!r} have no split: train at least is expected")
        for split, rows in self.splits.items():
            self._check(split, rows)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(next(iter(self.splits.values())).column_names)

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split; an unknown split is an ``InputError`` that lists those there are."""
        if split not in self.splits:
            raise unknown(f"split of token rows {self.name!r}", split, self.splits)
        return self.splits[split]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twenty hexadecimal digits of the content, but not of the name."""
        digest = hashlib.sha256(repr(self.pad).encode())
        for split, rows in self.splits.items():
            digest.update(f"{split}:{len(rows)}".encode())
            for name in rows.column_names:
                digest.update(name.encode())
                for value in rows.with_format("numpy")[name][:]:
                    digest.update(value.tobytes())
                    digest.update(b";")
        return digest.hexdigest()[:20]

    def collate(self, model: Model) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """A function that turns rows into a padded batch, (rows, longest)."""
        if model.kind == "vision-encoder":
            raise InputError(f"token rows {self.name!r} are for a model of texts: {model.source} is a {model.kind}")

        def batch_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            longest = max(len(row["input_ids"]) for row in rows)
            batch = {}
            for name in rows[0]:
                if not isinstance(rows[0][name], Sequence):
                    batch[name] = torch.as_tensor([row[name] for row in rows])
                    continue
                fill = self.pad if name == "input_ids" else _FILL.get(name, 0)
                batch[name] = torch.as_tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])
            length = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < length[:, None]).long()
            if "labels" not in batch and model.kind == "masked-lm":
                special = torch.tensor(model.processor.all_special_ids)
                batch["special_tokens_mask"] = torch.isin(batch["input_ids"], special)
                hide_tokens(batch, model.processor, afresh=model.training)
            elif "labels" not in batch:
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            if "position_ids" in batch:
                del batch["attention_mask"]  # transformers makes its own from the positions
            return batch

        return batch_of

    def _check(self, split: str, rows: datasets.Dataset) -> None:
        where = f"token rows {self.name!r}, split {split!r}"
        if "input_ids" not in rows.column_names:
            raise InputError(f"{where}: the column input_ids is expected (there are: {', '.join(rows.column_names)})")
        if len(rows) == 0:
            raise InputError(f"{where} is empty")
        import pyarrow.compute as pc

        table = rows.with_format("arrow")[:]
        length = pc.list_value_length(table["input_ids"])
        if pc.min(length).as_py() < 1:
            raise InputError(f"{where}, row {length.to_pylist().index(0)}: no token")
        for name in table.column_names:
            if not _is_list(table[name].type):
                continue
            same = pc.equal(pc.list_value_length(table[name]), length)
            if not pc.all(same).as_py():
                row = same.to_pylist().index(False)
                raise InputError(
                    f"{where}, row {row}: column {name!r} has {len(table[name][row])} values"
                    f" and input_ids {length[row].as_py()}"
                )


def in_blocks(texts: Iterable[str], tokenizer: Any, size: int, batch: int = 1000) -> Iterator[list[int]]:
    """The texts' tokens, special ones included, one after the other in blocks of ``size``.

    >>> from downriver.models import byte_tokenizer
    >>> list(in_blocks(["ab", "c"], byte_tokenizer(9), 3))
    [[1, 68, 69], [2, 1, 70]]
    """
    waiting: list[int] = []
    several: list[str] = []

    def encoded() -> Iterator[list[int]]:
        for ids in tokenizer(several, truncation=False, verbose=False)["input_ids"] if several else ():
            waiting.extend(ids)
        whole = len(waiting) // size * size
        yield from (waiting[i : i + size] for i in range(0, whole, size))
        del waiting[:whole]
        several.clear()

    for text in texts:
        several.append(text)
        if len(several) == batch:
            yield from encoded()
    yield from encoded()


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind)
