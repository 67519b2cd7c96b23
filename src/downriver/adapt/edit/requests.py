"""What an edit is asked for, and how it becomes tokens: where the subject ends, where the target begins.

Reach for ``recalls`` to see which facts a model completes rightly: the edited ones (efficacy), their paraphrases
(generalisation), all others (locality). Every text begins as the model's tokenizer begins one, in edits and in tests.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.models.features import inference
from downriver.models.language import language_model
from downriver.models.model import Model


class Request(TypedDict):
    """An edit: ``prompt`` with ``{}`` (or the subject itself) where ``subject`` stands, to be continued by
    ``target_new``."""

    prompt: str
    subject: str
    target_new: str


@dataclass(frozen=True)
class Fact:
    """A checked request: ``before`` + ``subject`` + ``after``, then ``target`` with the space that goes before it."""

    before: str
    subject: str
    after: str
    target: str

    def within(self, context: str) -> "Fact":
        """The same fact in a context, a text with ``{}`` where the prompt stands."""
        prefix, _, suffix = context.partition("{}")
        return Fact(prefix + self.before, self.subject, self.after + suffix, self.target)


@dataclass(frozen=True, eq=False)
class Encoded:
    """n facts as a right-padded batch: ``ids`` and ``mask`` (n, t), ``subject`` (n,) the place of its last token,
    ``target`` (n, t) where a token of the target stands."""

    ids: Tensor
    mask: Tensor
    subject: Tensor
    target: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def select(self, rows: slice) -> "Encoded":
        return Encoded(self.ids[rows], self.mask[rows], self.subject[rows], self.target[rows])


def recalls(
    model: nn.Module, requests: Sequence[Mapping[str, str]], tokenizer: Any = None, *, batch_size: int = 64
) -> np.ndarray:
    """For every request (n,) bool: is each token of its target the most probable one after those before it?

    >>> from downriver.models import small
    >>> recalls(small("causal-lm", "nano"), [{"prompt": "{} runs to the", "subject": "a river", "target_new": "sea"}])
    array([False])
    """
    lm = language_model(model, tokenizer)
    batch = encode(lm, parse(requests))
    backbone: Any = lm.backbone
    found = []
    with inference(lm):
        for start in range(0, len(batch.ids), batch_size):
            part = batch.select(slice(start, start + batch_size))
            right = backbone(**part.inputs).logits[:, :-1].argmax(dim=-1) == part.ids[:, 1:]
            found.append((right | ~part.target[:, 1:]).all(dim=1).cpu().numpy())
    return np.concatenate(found)


def parse(requests: Sequence[Mapping[str, str]]) -> list[Fact]:
    """Check requests; ``InputError`` names the request and what it lacks."""
    if isinstance(requests, Mapping) or not requests:
        raise InputError("requests: a list of at least one request (prompt, subject, target_new) is expected")
    facts = []
    for number, request in enumerate(requests, start=1):
        for key in ("prompt", "subject", "target_new"):
            if not isinstance(request.get(key), str):
                raise InputError(f"request {number} has no text {key!r}: prompt, subject and target_new are expected")
        prompt, subject, target = request["prompt"], request["subject"], request["target_new"]
        mark = "{}" if "{}" in prompt else subject
        if not subject.strip() or mark not in prompt:
            raise InputError(f"request {number}: the subject {subject!r} is not in the prompt {prompt!r}, nor is {{}}")
        before, _, after = prompt.partition(mark)
        if not target.strip():
            raise InputError(f"request {number}: the target {target!r} gives no token")
        if not target[0].isspace() and not (after or subject)[-1].isspace():
            target = f" {target}"
        facts.append(Fact(before, subject, after, target))
    return facts


def encode(lm: Model, facts: Sequence[Fact], with_target: bool = True) -> Encoded:
    """Facts as one batch on the model's device, by the offsets that the tokenizer gives."""
    start, rows = start_ids(lm.processor), []
    for fact in facts:
        stem = fact.before + fact.subject
        prompt = stem + fact.after
        text = prompt + fact.target if with_target else prompt
        tokens = lm.processor(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        subject = [i for i, (a, b) in enumerate(offsets) if a < len(stem) and b > len(fact.before)]
        target = [b > len(prompt) for _, b in offsets]
        if not subject:
            raise InputError(f"the subject {fact.subject!r} gives no token")
        if with_target and not any(target):
            raise InputError(f"the target {fact.target!r} gives no token")
        if with_target and lm.processor.unk_token_id in itertools.compress(ids, target):
            raise InputError(f"the target {fact.target!r} has a word that the tokenizer does not know")
        if len(start) + len(ids) > lm.max_length:
            raise InputError(f"{text[:60]!r} has {len(start) + len(ids)} tokens, the model takes {lm.max_length}")
        rows.append(([*start, *ids], len(start) + subject[-1], [*[False] * len(start), *target]))
    width = max(len(ids) for ids, _, _ in rows)

    def padded(values: list[list[Any]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in values], device=lm.device)

    return Encoded(
        padded([ids for ids, _, _ in rows]),
        padded([[1] * len(ids) for ids, _, _ in rows]),
        torch.tensor([subject for _, subject, _ in rows], device=lm.device),
        padded([target for _, _, target in rows]).bool(),
    )


def start_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"a {type(tokenizer).__name__} gives no offsets: a fast tokenizer is expected")
    begun = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(begun["input_ids"], begun["special_tokens_mask"], strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1] == 1, pairs)]
