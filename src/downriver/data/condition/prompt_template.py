"""Prompt templates with label words: one way to fill, encode and cut them for classifier and corpus alike.

Reach for it when a class is to be told by a word in a sentence («… It was great.») instead of by a new head. Templates
and words of the known tasks are those of Shi and Lipani (May 2023), after Gao et al. (2021).
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.tasks.task import Task

Role = Literal["text", "label", "template"]
Pieces = Literal["refuse", "mean"]
SPECIAL = "special"

_SENTIMENT = ("terrible", "great")
_YES = ("No", "Yes")
_STARS = ("0", "1", "2", "3", "4")
_TOPICS = ("culture", "science", "health", "education", "computer", "sports", "business", "music", "family", "politics")
KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "sst2": ("{a} It was {label} .", _SENTIMENT),
    "sst5": ("{a} It was {label} .", ("terrible", "bad", "okay", "good", "great")),
    "mr": ("{a} It was {label} .", _SENTIMENT),
    "cr": ("{a} It was {label} .", _SENTIMENT),
    "mpqa": ("{a} is {label} .", ("negative", "positive")),
    "subj": ("{a} This is {label} .", ("subjective", "objective")),
    "trec": ("{label} : {a}", ("Description", "Entity", "Expression", "Human", "Location", "Number")),
    "cola": ("{a} This is {label}", ("incorrect", "correct")),
    "mrpc": ("{a} {label} , {b}", _YES),
    "qqp": ("{a} {label} , {b}", _YES),
    "stsb": ("{a} {label} , {b}", _YES),
    "mnli": ("{a} ? {label} , {b}", ("No", "Yes", "Maybe")),
    "mnli-mm": ("{a} ? {label} , {b}", ("No", "Yes", "Maybe")),
    "snli": ("{a} . {label} , in this case {b}", ("No", "Yes", "Maybe")),
    "qnli": ("{a} ? {label} , {b}", _YES),
    "rte": ("{a} . {label} , I think that {b}", ("Yet", "Clearly")),
    "imdb": ("{a} It was {label} .", ("great", "terrible")),
    "ag_news": ("{a} It was {label} .", ("world", "sports", "business", "tech")),
    "yelp_review": ("{a} It was {label} .", _STARS),
    "amazon_review": ("{a} It was {label} .", _STARS),
    "yahoo_answers": ("{a} It was {label} .", _TOPICS),
    "soft-single": ("{a} It was {label}", ()),
    "soft-pair": ("{a} {label} , {b}", ()),
}
"""Pattern and label words of the 16 + 5 tasks, in the order of the classes that the authors' files have (contradiction,
entailment, neutral for MNLI and SNLI; great first for IMDb), and the two fixed patterns of their soft variant."""


class Part(NamedTuple):
    """A stretch of a filled template: a field of the row, the label word, or the template's own words."""

    text: str
    role: Role


class Prompted(NamedTuple):
    """Token ids of a filled template, and of each the role (``special`` for what the tokenizer adds)."""

    input_ids: list[int]
    roles: list[str]


@dataclass(frozen=True)
class PromptTemplate:
    """A sentence with fields of the row in braces and ``{label}`` where the label word stands.

    Parameters
    ----------
    pattern
        ``"{text} It was {label}."``; fields are columns. What separates them, blanks included, is the pattern's: the
        same string goes to the classifier and to the corpus.
    words
        One label word a class, in the order of the classes.
    pieces
        A word of several tokens is refused (default), or stands for the ``mean`` of its tokens' logits at the mask.

    Raises ``InputError`` for a pattern without ``{label}`` or with several, without a field, and equal words.

    >>> template = PromptTemplate("{text} It was {label}.", ("bad", "good"))
    >>> template.fill({"text": "A fine river."}, 1)
    'A fine river. It was good.'
    """

    pattern: str
    words: tuple[str, ...]
    pieces: Pieces = "refuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        try:
            parsed = list(string.Formatter().parse(self.pattern))
        except ValueError as error:
            raise InputError(f"pattern {self.pattern!r}: {error}") from None
        fields = [name for _, name, _, _ in parsed if name is not None]
        if fields.count("label") != 1:
            raise InputError(f"pattern {self.pattern!r} has {fields.count('label')} times {{label}}: once is expected")
        if any(
            not name.isidentifier() or spec or conversion for _, name, spec, conversion in parsed if name is not None
        ):
            raise InputError(f"pattern {self.pattern!r}: names of columns in braces are expected, nothing else")
        if len(fields) == 1:
            raise InputError(f"pattern {self.pattern!r} has no field for a text, like {{text}}")
        if self.pieces not in get_args(Pieces):
            raise unknown("value of pieces", self.pieces, get_args(Pieces))
        if len(set(self.words)) < len(self.words) or not all(isinstance(w, str) and w.strip() for w in self.words):
            raise InputError(f"label words {self.words}: a different word for every class is expected")

    @classmethod
    def known(cls, task: str, words: Sequence[str] = (), **columns: str) -> Self:
        """The authors' template of a task, its texts taken from these columns (default: ``a`` and ``b``).

        >>> PromptTemplate.known("rte", a="premise", b="hypothesis").pattern
        '{premise} . {label} , I think that {hypothesis}'
        """
        if task not in KNOWN:
            raise unknown("task with a template", task, KNOWN)
        pattern, its = KNOWN[task]
        for name, column in columns.items():
            if f"{{{name}}}" not in pattern or name == "label":
                raise InputError(f"the template of {task} is {pattern!r}: it has no field {name!r}")
            pattern = pattern.replace(f"{{{name}}}", f"{{{column}}}")
        return cls(pattern, tuple(words) or its)

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns it reads, in their order."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.pattern) if name not in (None, "label"))

    def parts(self, row: Mapping[str, Any], word: str) -> list[Part]:
        """The filled template in parts, ``word`` in the place of the label; white space round a text is left out."""
        found = []
        for literal, name, _, _ in string.Formatter().parse(self.pattern):
            if literal:
                found.append(Part(literal, "template"))
            if name == "label":
                found.append(Part(word, "label"))
            elif name is not None:
                text = row.get(name)
                if not isinstance(text, str):
                    raise InputError(f"template {self.pattern!r}: column {name!r} of a row is {text!r}, no text")
                found.append(Part(text.strip(), "text"))
        return found

    def fill(self, row: Mapping[str, Any], label: int) -> str:
        """The template with the label word of a class."""
        return "".join(part.text for part in self.parts(row, self.words[label]))

    def label_ids(self, tokenizer: Any) -> list[list[int]]:
        """The tokens of every label word as they stand in the template: with or without a blank before them.

        Raises ``InputError`` for a word that the tokenizer does not know or cuts into pieces (where that is refused),
        and for two words with the same first token.
        """
        row = dict.fromkeys(self.fields, "x")
        encoded = encode_parts([self.parts(row, word) for word in self.words], tokenizer)
        found = [[i for i, role in zip(*both, strict=True) if role == "label"] for both in encoded]
        first: dict[int, str] = {}
        for word, ids in zip(self.words, found, strict=True):
            if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
                raise InputError(f"label word {word!r} is not in the tokenizer's vocabulary: choose another")
            if len(ids) > 1 and self.pieces == "refuse":
                cut = " ".join(tokenizer.convert_ids_to_tokens(ids))
                raise InputError(f"label word {word!r} is {len(ids)} tokens ({cut}): another, or pieces='mean'")
            if ids[0] in first:
                raise InputError(f"label words {first[ids[0]]!r} and {word!r} begin with the same token: choose others")
            first[ids[0]] = word
        return found


def encode_parts(filled: Iterable[Sequence[Part]], tokenizer: Any, max_length: int | None = None) -> list[Prompted]:
    """Encode filled templates, each as one text with the tokenizer's special tokens; cut only their texts.

    A token has the role of the part that its last character is of. What is too long loses tokens from the end of its
    longest text, so that template and label word always survive. Raises ``InputError`` when they alone do not fit, and
    for a tokenizer that cannot say where its tokens stand.

    >>> from downriver.models import word_tokenizer
    >>> words = word_tokenizer(["a long river it was good ."])
    >>> template = PromptTemplate("{text} It was {label}.", ("good",))
    >>> [found] = encode_parts([template.parts({"text": "a long long long river"}, "good")], words, max_length=8)
    >>> words.convert_ids_to_tokens(found.input_ids)
    ['<s>', 'a', 'long', 'it', 'was', 'good', '.', '</s>']
    """
    listed = [list(parts) for parts in filled]
    if not listed:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"a {type(tokenizer).__name__} does not say where its tokens stand: a fast one is expected")
    encoded = tokenizer(
        ["".join(part.text for part in parts) for parts in listed], return_offsets_mapping=True, verbose=False
    )
    return [
        _cut(parts, ids, offsets, max_length)
        for parts, ids, offsets in zip(listed, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _cut(parts: list[Part], ids: list[int], offsets: list[tuple[int, int]], max_length: int | None) -> Prompted:
    ends = np.cumsum([len(part.text) for part in parts])
    owners = [int(np.searchsorted(ends, stop)) if stop > start else -1 for start, stop in offsets]
    tokens: dict[int, list[int]] = {n: [] for n, part in enumerate(parts) if part.role == "text"}
    for place, owner in enumerate(owners):
        if owner in tokens:
            tokens[owner].append(place)
    dropped: set[int] = set()
    for _ in range(0 if max_length is None else len(ids) - max_length):
        longest = max(tokens, key=lambda n: len(tokens[n]), default=-1)
        if longest < 0 or not tokens[longest]:
            raise InputError(
                f"the template {''.join(p.text for p in parts if p.role != 'text')!r} alone has more than {max_length} "
                "tokens: nothing of the text would be left"
            )
        dropped.add(tokens[longest].pop())
    kept = [place for place in range(len(ids)) if place not in dropped]
    return Prompted([ids[p] for p in kept], [parts[owners[p]].role if owners[p] >= 0 else SPECIAL for p in kept])


def k_shot(task: Task, *, k: int = 16, seed: int = 13) -> Task:
    """The task with ``k`` rows of every class in its train split, drawn by the seed; the other splits stay as they are.

    16 a class is the paper's, 13 the first of its five seeds (13, 21, 42, 87, 100). Raises ``InputError`` for a class
    with fewer rows.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": list("abcdef"), "label": [0, 0, 0, 0, 1, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> sorted(k_shot(task, k=2).targets("train").tolist())
    [0, 0, 1, 1]
    """
    if not task.classification or k < 1:
        raise InputError(f"task {task.name!r} is {task.kind}, k is {k}: classes and at least one row each are expected")
    targets = task.targets("train")
    chosen: list[int] = []
    for number in range(len(task.labels)):
        rows = np.flatnonzero(targets == number)
        if len(rows) < k:
            raise InputError(f"task {task.name!r}: class {task.labels[number]!r} has {len(rows)} rows, {k} are wanted")
        chosen += generator("k-shot", seed, number).choice(rows, k, replace=False).tolist()
    return task.subset("train", sorted(chosen))
