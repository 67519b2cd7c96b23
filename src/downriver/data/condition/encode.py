"""From parts of text to token ids and labels: which part a token belongs to decides whether it is learnt.

Reach for it wherever something stands before a text that the model reads but is not taught: metadata, an instruction,
demonstrations, a context. Parts are encoded one by one and joined (MeCo: nothing merges across the seam), or as one
text whose tokens are then told apart by their characters (instructions: what the model will meet when it is asked).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from downriver.core.errors import InputError

IGNORED = -100


class Part(NamedTuple):
    """A stretch of text, and whether its tokens are learnt; a plain pair does as well."""

    text: str
    loss: bool = True


class Encoded(NamedTuple):
    """Token ids, and as many labels: the id where loss is taken, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def encode(
    parts: Sequence[tuple[str, bool]],
    tokenizer: Any,
    *,
    joint: bool = True,
    start: bool = True,
    end: bool = True,
    max_length: int | None = None,
) -> Encoded:
    """Encode the parts of one example, in their order.

    Parameters
    ----------
    parts
        ``Part(text, loss)`` or pairs. Nothing is put between them: blanks and line breaks belong to their texts.
    tokenizer
        Of transformers. Its own special tokens are not added; ``start`` and ``end`` say what is.
    joint
        ``True``: the texts are encoded as one, and a token belongs to the part of its last character, so that one
        that straddles a seam is learnt when the part it ends in is. ``False``: each part is encoded by itself.
    start, end
        Put ``bos_token`` first (never learnt) and ``eos_token`` last (learnt when the last part is), where the
        tokenizer has them.
    max_length
        A longer example loses tokens from the left of its parts without loss, the first of them first: the oldest
        demonstration, the head of a context. What is learnt is never cut.

    Raises ``InputError`` for no part, no token that is learnt although a part is to be, learnt tokens that alone
    exceed ``max_length``, and a tokenizer that cannot say where its tokens stand when ``joint``.

    >>> from downriver.models.tokenizers import word_tokenizer
    >>> words = word_tokenizer(["translate : river rio"])
    >>> ids, labels = encode([("Translate: river", False), (" rio", True)], words)
    >>> words.convert_ids_to_tokens(ids)
    ['<s>', 'translate', ':', 'river', 'rio', '</s>']
    >>> [i if i < 0 else words.convert_ids_to_tokens(i) for i in labels]
    [-100, -100, -100, -100, 'rio', '</s>']
    """
    return encode_all([parts], tokenizer, joint=joint, start=start, end=end, max_length=max_length)[0]


def encode_all(
    examples: Iterable[Sequence[tuple[str, bool]]],
    tokenizer: Any,
    *,
    joint: bool = True,
    start: bool = True,
    end: bool = True,
    max_length: int | None = None,
) -> list[Encoded]:
    """``encode`` for many examples, with one call of the tokenizer; an error names the example by its number."""
    listed = [[Part(*part) for part in parts] for parts in examples]
    for number, parts in enumerate(listed):
        if not parts:
            raise InputError(f"example {number} has no part: a text at least is expected")
        for part in parts:
            if not isinstance(part.text, str):
                raise InputError(f"example {number}: {part.text!r} is not a text")
    if not listed:
        return []
    pieces = _together(listed, tokenizer) if joint else _one_by_one(listed, tokenizer)
    first = [tokenizer.bos_token_id] if start and tokenizer.bos_token_id is not None else []
    last = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    return [
        _assembled(number, parts, ids, owners, first, last, max_length)
        for number, (parts, (ids, owners)) in enumerate(zip(listed, pieces, strict=True))
    ]


def _one_by_one(listed: list[list[Part]], tokenizer: Any) -> Iterable[tuple[list[int], list[int]]]:
    """For every example its ids, and the number of the part that each is of."""
    flat = iter(tokenizer([part.text for parts in listed for part in parts], add_special_tokens=False)["input_ids"])
    for parts in listed:
        each = list(itertools.islice(flat, len(parts)))
        yield [i for ids in each for i in ids], [n for n, ids in enumerate(each) for _ in ids]


def _together(listed: list[list[Part]], tokenizer: Any) -> Iterable[tuple[list[int], list[int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"a {type(tokenizer).__name__} does not say which characters a token stands for: "
            "a fast tokenizer is expected, or joint=False"
        )
    texts = ["".join(part.text for part in parts) for parts in listed]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for parts, ids, offsets in zip(listed, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = list(itertools.accumulate(len(part.text) for part in parts))
        owners, owner, reached = [], 0, 0
        for _, stop in offsets:
            reached = max(reached, stop)  # a token without characters of its own goes with the one before
            while owner + 1 < len(ends) and reached > ends[owner]:
                owner += 1
            owners.append(owner)
        yield ids, owners


def _assembled(
    number: int,
    parts: list[Part],
    ids: list[int],
    owners: list[int],
    first: list[int],
    last: list[int],
    max_length: int | None,
) -> Encoded:
    learnt = [parts[owner].loss for owner in owners]
    if any(part.loss for part in parts) and not any(learnt):
        raise InputError(f"example {number}: no token of what is to be learnt (its text is empty or blank)")
    ids, learnt = [*ids, *last], [*learnt, *[parts[-1].loss] * len(last)]
    over = 0 if max_length is None else len(first) + len(ids) - max_length
    if over > 0:
        kept = sum(learnt)
        if len(learnt) - kept < over:
            raise InputError(
                f"example {number}: {kept} tokens are learnt and {len(first)} stand before them, which does not fit "
                f"into max_length {max_length}"
            )
        spare = itertools.count()
        keep = [loss or next(spare) >= over for loss in learnt]
        ids = list(itertools.compress(ids, keep))
        learnt = list(itertools.compress(learnt, keep))
    labels = [i if loss else IGNORED for i, loss in zip(ids, learnt, strict=True)]
    return Encoded([*first, *ids], [*[IGNORED] * len(first), *labels])
