"""Put where a document comes from before it: an input that the model reads and does not learn to write.

Reach for it before pretraining on documents of known sources (``pretrain.meco`` runs both phases), and to steer a
model so trained by naming a source. Gao et al. (2025), «Metadata Conditioning Accelerates Language Model Pre-training».
Departures: hosts are lower-cased, rid of port and user, and written in their own script, so that one source has one
name (the authors keep all up to the first slash); the random identity of a host is derived from its name and stays the
same between runs.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import datasets
import pyarrow as pa
import torch
import torch.nn.functional as F

from downriver.core import InputError, charge
from downriver.core.errors import require, unknown
from downriver.data.condition.encode import IGNORED, encode, encode_all
from downriver.data.condition.generate import continue_ids
from downriver.models.model import Model
from downriver.tasks.task import Task

View = Literal["host", "domain", "suffix", "full", "uuid"]
Missing = Literal["fail", "unknown", "drop"]
TEMPLATE = "URL: {meta}\n\n"  # MeCo's


@dataclass(frozen=True)
class MetadataFormatter:
    """Turns a document into the text that goes before it.

    Parameters
    ----------
    field
        The column, or the entry of the column ``metadata``, that names the source.
    view
        What of it is shown: the ``host`` (MeCo's; ``en.wikipedia.org``), the registered ``domain``
        (``wikipedia.org``), its public ``suffix`` (``org``), the ``full`` string, a ``uuid`` for each host (whether
        what a name means matters, or only whose it is), or a function of the string: ``lambda url: "web"`` shows
        the same to all.
    template
        Holds ``{meta}``.
    min_count
        Sources with fewer documents are shown as ``unknown``; ``fit`` counts them. 0 (default) shows all.
    missing
        A document without a source is an error (``fail``), is shown as ``unknown``, or is left out (``drop``).

    ``domain`` and ``suffix`` go by the list of public suffixes that tldextract brings along; nothing is fetched. A
    name without a public suffix (``localhost``) is its own domain and has no suffix.

    >>> page = {"text": "...", "url": "https://en.Wikipedia.org/wiki/River"}
    >>> MetadataFormatter().prefix(page)
    'URL: en.wikipedia.org\\n\\n'
    >>> MetadataFormatter(template="[{meta}] ", missing="unknown").prefix({"text": "..."})
    '[unknown] '
    """

    field: str = "url"
    view: View | Callable[[str], str | None] = "host"
    template: str = TEMPLATE
    unknown: str = "unknown"
    min_count: int = 0
    missing: Missing = "fail"
    known: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if "{meta}" not in self.template:
            raise InputError(f"template {self.template!r}: it must hold {{meta}}, the place of the source")
        if not callable(self.view) and self.view not in get_args(View):
            raise unknown("view of metadata", self.view, get_args(View))
        if self.missing not in get_args(Missing):
            raise unknown("rule for missing metadata", self.missing, get_args(Missing))
        if self.min_count < 0:
            raise InputError(f"min_count is {self.min_count}: 0 or more is expected")

    def fit(self, documents: Iterable[Mapping[str, Any]]) -> "MetadataFormatter":
        """The same formatter knowing the sources that have ``min_count`` documents or more."""
        free = dataclasses.replace(self, min_count=0, missing="drop")
        counts = collections.Counter(meta for meta in map(free.meta, documents) if meta is not None)
        known = frozenset(meta for meta, count in counts.items() if count >= self.min_count)
        return dataclasses.replace(self, known=known)

    def meta(self, document: Mapping[str, Any]) -> str | None:
        """What is shown as the document's source; ``None`` when it is to be left out."""
        value = document.get(self.field)
        if value is None and isinstance(document.get("metadata"), Mapping):
            value = document["metadata"].get(self.field)
        found = self._viewed(str(value)) if value is not None else None
        if not found:
            if self.missing == "fail":
                name = document.get("id", "without an id")
                what = f"no source in {value!r}" if value is not None else "no such entry"
                raise InputError(
                    f"document {name}, metadata field {self.field!r}: {what} (missing= says what to do with it)"
                )
            return self.unknown if self.missing == "unknown" else None
        if self.min_count and self.known is None:
            raise InputError(f"min_count is {self.min_count}: fit(documents) must count the sources first")
        return found if not self.min_count or found in (self.known or ()) else self.unknown

    def prefix(self, document: Mapping[str, Any]) -> str | None:
        """The text that goes before the document; ``None`` when the document is to be left out."""
        meta = self.meta(document)
        return None if meta is None else self.of(meta)

    def of(self, meta: str) -> str:
        """The text for a source by its name, invented ones too."""
        return self.template.replace("{meta}", meta)

    def _viewed(self, value: str) -> str | None:
        if callable(self.view):
            return self.view(value)
        return _VIEWS[self.view](value)


def host(url: str) -> str | None:
    """The host of a URL in small letters, without scheme, user and port; ``None`` when there is none.

    An internationalised name is given in its own script, whichever way it was written.

    >>> host("HTTP://me:secret@EN.Wikipedia.org:8080/wiki?a=b"), host("xn--mnchen-3ya.de"), host("file:///tmp")
    ('en.wikipedia.org', 'münchen.de', None)
    """
    rest = re.sub(r"^(?:[a-z][a-z0-9+.-]*:)?//", "", url.strip(), flags=re.IGNORECASE)
    place = re.split(r"[/?#\\]", rest, maxsplit=1)[0].rpartition("@")[2]
    if place.startswith("["):
        return place[1:].partition("]")[0].lower() or None  # an IPv6 address
    name = re.sub(r":\d*$", "", place).rstrip(".").lower()
    try:
        return ".".join(_script(label) for label in name.split(".")) or None
    except UnicodeError:
        return name or None


def condition(
    rows: datasets.Dataset | Iterable[Mapping[str, Any]],
    formatter: MetadataFormatter | None,
    tokenizer: Any,
    *,
    text: str = "text",
    mask_metadata: bool = True,
) -> datasets.Dataset:
    """Token rows of documents with their metadata before them: start token, prefix, text, end token.

    Prefix and text are encoded each by itself, so that the text's tokens are those it has without metadata. No loss
    is taken on start token and prefix (``mask_metadata=False``: only on the start token). ``formatter=None`` gives
    plain rows, for a baseline and for the cooldown.

    Gives ``input_ids``, ``labels`` and ``doc_id``, the number of the row. Raises ``InputError`` naming the row that
    has no text or no source.

    >>> from downriver.models.tokenizers import word_tokenizer
    >>> words = word_tokenizer(["url : sea . org the tide comes"])
    >>> page = {"text": "the tide comes", "url": "http://sea.org/"}
    >>> row = condition([page], MetadataFormatter(), words)[0]
    >>> words.convert_ids_to_tokens(row["input_ids"])
    ['<s>', 'url', ':', 'sea', '.', 'org', 'the', 'tide', 'comes', '</s>']
    >>> row["labels"][:7].count(-100)
    6
    """
    tables = []
    documents = _prefixed(rows, formatter, text)
    while chunk := list(itertools.islice(documents, 1000)):
        examples = [[*([(prefix, not mask_metadata)] if prefix else []), (body, True)] for _, prefix, body in chunk]
        encoded = encode_all(examples, tokenizer, joint=False)
        ids, labels = [list(column) for column in zip(*encoded, strict=True)]
        tables.append(pa.table({"input_ids": ids, "labels": labels, "doc_id": [number for number, _, _ in chunk]}))
    if not tables:
        raise InputError("no document is left to condition: rows with text, and with a source, are expected")
    return datasets.Dataset(pa.concat_tables(tables))


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    metadata: str | None = None,
    template: str = TEMPLATE,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """Continue prompts as a source would: ``metadata`` names it, real or invented; without it as usual.

    Settings are those of ``continue_ids``. Gives one continuation a prompt, without the prompt.

    >>> from downriver.models import small
    >>> lm = small("causal-lm", "nano")
    >>> [type(text) for text in generate(lm, ["the river"], metadata="en.wikipedia.org", max_new_tokens=4)]
    [<class 'str'>]
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    before = [] if metadata is None else [(MetadataFormatter(template=template).of(metadata), False)]
    ids = [encode([*before, (prompt, False)], model.processor, joint=False, end=False).input_ids for prompt in prompts]
    found = continue_ids(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    )
    return model.processor.batch_decode(found, skip_special_tokens=True)


def text_loss(
    model: Model,
    rows: datasets.Dataset | Iterable[Mapping[str, Any]],
    formatter: MetadataFormatter | None = None,
    *,
    text: str = "text",
    tokens: int | None = None,
    batch_size: int = 32,
) -> float:
    """The mean loss, in nats a token, on the texts alone, with what the formatter puts before them.

    ``tokens`` is how many tokens of each text count, its end token among them (default: as many as fit with the
    longest prefix); give it to compare losses with and without metadata on the very same tokens.

    >>> from downriver.models import small
    >>> pages = [{"text": "the tide comes and goes", "url": "sea.org"}]
    >>> round(text_loss(small("causal-lm", "nano"), pages, MetadataFormatter()))  # log of 260 tokens
    6
    """
    if model.kind != "causal-lm":
        raise InputError(f"{model.source or 'the model'} is a {model.kind}: a causal-lm is expected")
    encoded = condition(rows, formatter, model.processor, text=text)
    prefixes = [next(i for i, label in enumerate(labels) if label != IGNORED) for labels in encoded["labels"][:]]
    room = model.max_length - max(prefixes)
    tokens = room if tokens is None else tokens
    if not 1 <= tokens <= room:
        raise InputError(
            f"{tokens} tokens of every text, up to {max(prefixes)} before them: the model reads {model.max_length}"
        )
    kept = [
        (ids[: prefix + tokens], [*[IGNORED] * prefix, *ids[prefix : prefix + tokens]])
        for ids, prefix in zip(encoded["input_ids"][:], prefixes, strict=True)
    ]
    kept.sort(key=lambda row: len(row[0]))  # rows of one length lie together: hardly any padding
    total, counted, training = 0.0, 0, model.training
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(kept), batch_size):
                inputs, targets = zip(*kept[first : first + batch_size], strict=True)
                ids = _padded(inputs, 0).to(model.device)  # on the right, where nothing looks
                labels = _padded(targets, IGNORED).to(model.device)[:, 1:]
                logits = model(input_ids=ids)["logits"][:, :-1].float()
                total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
                counted += int((labels != IGNORED).sum())
    finally:
        model.train(training)
    charge(tokens=sum(len(ids) for ids, _ in kept))
    return total / counted


def sweep_metadata(
    model: Model,
    task: Task,
    candidates: Sequence[str],
    *,
    template: str = TEMPLATE,
    split: str = "validation",
    score: Callable[[Model, Task, str], float] | None = None,
) -> dict[str | None, float]:
    """What each source named before the texts of a split is worth, and (under ``None``) naming none.

    By default the value is the ``text_loss`` of the task's texts, on the same tokens for all: lower is better.
    ``score(model, task, prefix)`` puts a measure of your own in its place; ``prefix`` is empty for no source.

    A source is a hyper-parameter: choose it here, and report on the test split, which is refused.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> task = Task("toy", "language-modelling", {"validation": Dataset.from_dict({"text": ["a b"]})}, ("text",), None)
    >>> list(sweep_metadata(small("causal-lm", "nano"), task, ["sea.org"]))
    [None, 'sea.org']
    """
    if split == "test":
        raise InputError("split is 'test': choose the source on a validation split and report on the test split")
    if not candidates:
        raise InputError("candidates is empty: one source at least is expected")
    formatter = MetadataFormatter(template=template)
    named: dict[str | None, str] = {None: "", **{name: formatter.of(name) for name in candidates}}
    if score is not None:
        return {name: float(score(model, task, prefix)) for name, prefix in named.items()}
    column = task.inputs[0]
    longest = max(len(model.processor(prefix, add_special_tokens=False)["input_ids"]) for prefix in named.values())
    tokens = model.max_length - longest - 1
    rows = [{"text": value} for value in task.rows(split)[column][:]]

    def loss(name: str | None) -> float:
        shown = None if name is None else dataclasses.replace(formatter, field="text", view=lambda _: name)
        return text_loss(model, rows, shown, tokens=tokens)

    return {name: loss(name) for name in named}


def _prefixed(
    rows: datasets.Dataset | Iterable[Mapping[str, Any]], formatter: MetadataFormatter | None, text: str
) -> Iterator[tuple[int, str, str]]:
    """Number, prefix and text of every document that is not left out."""
    documents = (
        itertools.chain.from_iterable(map(_rows, rows.iter(1000))) if isinstance(rows, datasets.Dataset) else rows
    )
    for number, row in enumerate(documents):
        body = row.get(text)
        if not isinstance(body, str) or not body.strip():
            what = "is empty" if isinstance(body, str) else f"is {body!r}"
            raise InputError(f"row {number}, column {text!r}: the text {what}")
        prefix = "" if formatter is None else formatter.prefix({"id": number, **row})
        if prefix is not None:
            yield number, prefix, body


def _rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _script(label: str) -> str:
    return label.encode("ascii").decode("idna") if label.startswith("xn--") else label


@cache
def _suffixes() -> Any:
    return require("tldextract", "data").TLDExtract(suffix_list_urls=(), cache_dir=None)


def _domain(url: str) -> str | None:
    name = host(url)
    return name and (_suffixes()(name).top_domain_under_public_suffix or name)


def _suffix(url: str) -> str | None:
    name = host(url)
    return (_suffixes()(name).suffix or None) if name else None


def _identity(url: str) -> str | None:
    name = host(url)
    return str(uuid.UUID(bytes=hashlib.sha256(name.encode()).digest()[:16], version=4)) if name else None


_VIEWS: dict[str, Callable[[str], str | None]] = {
    "host": host,
    "domain": _domain,
    "suffix": _suffix,
    "full": lambda value: value.strip() or None,
    "uuid": _identity,
}
