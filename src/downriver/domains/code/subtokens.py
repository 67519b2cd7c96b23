"""Which subtokens of a program belong to one lexical unit: group ids for ``compress.add_token_merging``.

Reach for it to make a code model cheaper, or to see, before any training, what merging would save on your files. "On
the Effect of Token Merging on Pre-trained Models for Code" (arXiv:2507.14423, July 2025). The paper's example is the
identifier. That special tokens, white space, comments, subtokens across a border of units, and literals of several
lines stay single is assumed.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from downriver.compress.token_merging import flops
from downriver.core.errors import InputError, unknown
from downriver.domains.code.units import Kind, Lexer, check, default_lexer, split
from downriver.models.token_merging import SETTINGS

Which = Literal["identifier", "all"]
_MERGED: dict[Which, tuple[Kind, ...]] = {
    "identifier": ("identifier",),
    "all": ("identifier", "keyword", "literal", "operator"),
}


@dataclass(frozen=True)
class SubtokenGrouper:
    """Maps a tokenizer's subtokens to groups: neighbours within one unit of the program share a number.

    Parameters
    ----------
    language, lexer
        As ``domains.code.split`` takes them; by default Python with the standard library's lexer. A program that does
        not parse is read by regular expressions, and ``parse_ok(text)`` is False for it.
    units
        ``identifier`` (default): names alone are merged; ``all``: keywords, literals and operators, too.

    Raises ``InputError`` for an unknown language, lexer or kind of units, ``MissingExtra`` without the lexer's package.

    >>> grouper = SubtokenGrouper()
    >>> grouper("snake_case = 1", [(0, 0), (0, 5), (5, 6), (6, 10), (10, 12), (12, 14), (0, 0)])
    [0, 1, 1, 1, 2, 3, 4]
    """

    language: str = "python"
    lexer: Lexer | None = None
    units: Which = "identifier"

    def __post_init__(self) -> None:
        if self.units not in get_args(Which):
            raise unknown("units", self.units, get_args(Which))
        object.__setattr__(self, "lexer", self.lexer or default_lexer(self.language))
        check(self.language, str(self.lexer))

    def __call__(self, text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
        """The group of every subtoken, 0, 1, 2, ..., from its place ``(start, end)`` in the text, in characters.

        Empty places (special tokens) are groups of their own. Raises ``InputError`` for places outside the text.
        """
        return _numbered(self._keys(text, offsets))

    def parse_ok(self, text: str) -> bool:
        """Whether the lexer could read the program."""
        return split(text, self.language, self.lexer).parse_ok

    def tokenizer(self, tokenizer: Any) -> "GroupingTokenizer":
        """The tokenizer, giving ``group_ids`` beside ``input_ids``."""
        return GroupingTokenizer(tokenizer, self)

    def settings(self) -> dict[str, Any]:
        """The arguments that make an equal grouper."""
        return {"language": self.language, "lexer": self.lexer, "units": self.units}

    @classmethod
    def of(cls, model: Any) -> "SubtokenGrouper":
        """The grouper that a model was given by ``add_token_merging``, as its configuration keeps it."""
        config = getattr(getattr(model, "backbone", model), "config", None)
        settings = (getattr(config, SETTINGS, None) or {}).get("groups")
        if not settings:
            raise InputError("the model's configuration names no grouper: add_token_merging(model, grouper) keeps it")
        return cls(**settings)

    def _keys(self, text: str, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
        """The unit of every subtoken, by its number, where it is to be merged."""
        units = split(text, self.language, self.lexer).units
        starts, merged = [unit.start for unit in units], _MERGED[self.units]
        keys: list[int | None] = []
        for start, end in offsets:
            if not 0 <= start <= end <= len(text):
                raise InputError(f"offset ({start}, {end}) lies outside a text of {len(text)} characters")
            piece = text[start:end]
            core = piece.strip()
            if not core or "\n" in piece:
                keys.append(None)
                continue
            first = start + piece.index(core)  # byte-level tokenizers count the space before a word
            number = bisect_right(starts, first) - 1
            unit = units[number]
            inside = first + len(core) <= unit.end and unit.kind in merged
            keys.append(number if inside and "\n" not in text[unit.start : unit.end] else None)
        return keys


class GroupingTokenizer:
    """A fast tokenizer of transformers that gives ``group_ids`` with what it gave before, -1 where it pads.

    Everything else is the tokenizer's own, so it stands wherever a tokenizer does: in ``datasets.map``, so that groups
    are made once, or as the ``processor`` of a ``Model``. Of a pair, each text is grouped by itself.

    Raises ``InputError`` for a tokenizer that does not know where its tokens come from ("slow"), and when it is called
    with anything but a text or a list of texts.

    >>> from downriver.models import byte_tokenizer
    >>> tokenizer = SubtokenGrouper().tokenizer(byte_tokenizer(16))
    >>> tokenizer(["ab+c", "d"], padding=True)["group_ids"]
    [[0, 1, 1, 2, 3, 4], [0, 1, 2, -1, -1, -1]]
    """

    def __init__(self, tokenizer: Any, grouper: SubtokenGrouper) -> None:
        if isinstance(tokenizer, GroupingTokenizer):
            raise InputError("the tokenizer gives group_ids already")
        if not getattr(tokenizer, "is_fast", False):
            what = type(tokenizer).__name__
            raise InputError(f"a {what} does not say where its tokens come from: a fast tokenizer is expected")
        self.plain, self.grouper = tokenizer, grouper

    def __call__(self, text: Any, text_pair: Any = None, *, return_tensors: str | None = None, **settings: Any) -> Any:
        """Encode a text or texts, or pairs of them, as the tokenizer itself does, and group."""
        for name in ("is_split_into_words", "return_overflowing_tokens"):
            if settings.get(name):
                raise InputError(f"{name} is True: whole texts, one row each, are expected where subtokens are grouped")
        if return_tensors not in (None, "pt", "np"):
            raise unknown("return_tensors", return_tensors, ("pt", "np"))
        one = isinstance(text, str)
        columns = [[column] if one else column for column in ([text] if text_pair is None else [text, text_pair])]
        for column in columns:
            if not isinstance(column, Sequence) or not all(isinstance(value, str) for value in column):
                raise InputError(f"{str(column)[:80]} cannot be grouped: texts are expected (of pairs, as text_pair)")
        encoded = self.plain(text, text_pair, return_tensors=return_tensors, **settings)
        groups = [self.groups(e, texts) for e, texts in zip(encoded.encodings, zip(*columns, strict=True), strict=True)]
        if return_tensors:
            encoded["group_ids"] = torch.tensor(groups) if return_tensors == "pt" else np.array(groups)
        else:
            encoded["group_ids"] = groups[0] if one else groups
        return encoded

    def __len__(self) -> int:
        return len(self.plain)

    def __getattr__(self, name: str) -> Any:
        if name == "plain" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.plain, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("plain", "grouper"):
            super().__setattr__(name, value)
        else:
            setattr(self.plain, name, value)

    def groups(self, encoding: Any, texts: Sequence[str]) -> list[int]:
        """The groups of one encoded row of texts, -1 for padding."""
        keys: list[Any] = [None] * len(encoding)
        offsets, sequences = encoding.offsets, encoding.sequence_ids  # copied at every access
        for number, text in enumerate(texts):
            own = [at for at, of in enumerate(sequences) if of == number]
            for at, key in zip(own, self.grouper._keys(text, [offsets[at] for at in own]), strict=True):
                keys[at] = None if key is None else (number, key)
        real = [at for at, seen in enumerate(encoding.attention_mask) if seen]
        groups = [-1] * len(encoding)
        for at, group in zip(real, _numbered([keys[at] for at in real]), strict=True):
            groups[at] = group
        return groups


@dataclass
class DataCollatorWithGroups:
    """Makes a padded batch of rows that were encoded and grouped before; ``group_ids`` are padded with -1.

    ``collator`` does the rest: ``DataCollatorWithPadding`` by default, ``DataCollatorForSeq2Seq`` for translation. A
    transformers ``Trainer`` needs ``remove_unused_columns=False``, or it drops the groups.

    Raises ``InputError`` for rows without groups or with another number of them than of tokens.

    >>> from downriver.models import byte_tokenizer
    >>> rows = [{"input_ids": [1, 68, 2], "group_ids": [0, 1, 2]}, {"input_ids": [1, 2], "group_ids": [0, 1]}]
    >>> DataCollatorWithGroups(byte_tokenizer(8))(rows)["group_ids"].tolist()
    [[0, 1, 2], [0, 1, -1]]
    """

    tokenizer: Any
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None
    _rest: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plain = self.tokenizer.plain if isinstance(self.tokenizer, GroupingTokenizer) else self.tokenizer
        self._rest = self.collator or transformers.DataCollatorWithPadding(plain)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of tensors."""
        for number, row in enumerate(rows):
            if "group_ids" not in row:
                raise InputError(f"row {number} of a batch has no group_ids (it has {', '.join(row)})")
            if len(row["group_ids"]) != len(row["input_ids"]):
                lengths = f"{len(row['group_ids'])} group_ids and {len(row['input_ids'])} input_ids"
                raise InputError(f"row {number} of a batch has {lengths}: one group a token is expected")
        batch = dict(self._rest([{k: v for k, v in row.items() if k != "group_ids"} for row in rows]))
        mask = batch["attention_mask"].bool()
        groups = torch.full(mask.shape, -1)
        groups[mask] = torch.tensor([group for row in rows for group in row["group_ids"] if group >= 0])
        return batch | {"group_ids": groups}


@dataclass(frozen=True)
class MergeStats:
    """What merging saves on some texts, one row each in ``table``.

    Columns: ``subtokens`` T and ``groups`` K, special tokens among them; ``units`` that a compiler sees in the part
    that was encoded; ``saving``, the share of the encoder's FLOPs; ``parse_ok``.
    """

    table: pl.DataFrame

    @property
    def ratio(self) -> float:
        """Groups over subtokens, over all texts: below 1."""
        return float(np.sum(self.table["groups"].to_numpy()) / np.sum(self.table["subtokens"].to_numpy()))

    @property
    def saving(self) -> dict[str, float]:
        """The mean saving of a text, the median, and what 95 % of the texts stay below."""
        values = self.table["saving"].to_numpy()
        found = values.mean(), np.median(values), np.quantile(values, 0.95)
        return {name: float(v) for name, v in zip(("mean", "median", "95 %"), found, strict=True)}


def merge_stats(
    texts: Iterable[str],
    tokenizer: Any,
    grouper: SubtokenGrouper | None = None,
    *,
    model: Any = None,
    max_length: int | None = None,
    progress: bool = True,
) -> MergeStats:
    """Count subtokens, units and groups, and predict the FLOPs saved, before anything is trained.

    Parameters
    ----------
    tokenizer
        A fast one.
    grouper
        Default: identifiers of Python.
    model
        Whose FLOPs are predicted, by ``compress.flops``: a ``Model``, a transformers model or a configuration. Default:
        one of CodeBERT's size that merges before its first layer.
    max_length
        Cut the texts at so many subtokens, with and without merging alike. Default: not at all.

    Raises ``InputError`` when there is no text or one text in the place of several, and for a slow tokenizer.

    >>> from downriver.models import byte_tokenizer
    >>> stats = merge_stats(["number = other", "x"], byte_tokenizer(64))
    >>> stats.table.select("subtokens", "units", "groups").rows()
    [(16, 3, 7), (3, 1, 3)]
    """
    if isinstance(texts, str):
        raise InputError("texts is a text: several are expected")
    grouper = grouper or SubtokenGrouper()
    grouping = tokenizer if isinstance(tokenizer, GroupingTokenizer) else grouper.tokenizer(tokenizer)
    rows = []
    for text in tqdm(texts, desc="subtokens", disable=not progress, delay=2):
        encoded = grouping(text, truncation=max_length is not None, max_length=max_length, verbose=False)
        units, parse_ok = split(text, grouping.grouper.language, grouping.grouper.lexer)
        end = max((end for _, end in encoded.encodings[0].offsets), default=0)
        seen = sum(unit.kind != "other" and unit.start < end for unit in units)
        rows.append((len(encoded["input_ids"]), max(encoded["group_ids"], default=-1) + 1, seen, parse_ok))
    if not rows:
        raise InputError("texts are empty: at least one is expected")
    table = pl.DataFrame(rows, schema=["subtokens", "groups", "units", "parse_ok"], orient="row")
    size = transformers.RobertaConfig() if model is None else model
    before, after = table["subtokens"].to_list(), table["groups"].to_list()
    whole = flops(size, before)
    saving = (whole - flops(size, before, after)) / np.maximum(whole, 1)
    return MergeStats(table.with_columns(saving=pl.Series(saving)))


def _numbered(keys: Sequence[Any]) -> list[int]:
    """0, 1, 2, ... for runs of equal keys; every ``None`` is a run of its own."""
    groups: list[int] = []
    for at, key in enumerate(keys):
        same = at > 0 and key is not None and key == keys[at - 1]
        groups.append((groups[-1] if groups else -1) + (not same))
    return groups
