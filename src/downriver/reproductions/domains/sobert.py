"""Paper 75: an encoder pretrained on one domain, text and code together, beats a general one there.

The paper trains on Stack Overflow. Here posts are the documented functions and classes of five installed libraries, a
docstring with its code as one text; their versions decide the texts, so figures move a little between machines. The
general texts are the posts of 20 newsgroups. Three encoders of the same size and tokenizer, two pretrained on equally
many tokens and one not at all, are fine-tuned equally to three tasks whose labels are in the texts:

- *names*: words in back-ticks in a docstring, ticks removed, are to be tagged (stands for named entities);
- *outdated*: does the function carry a deprecation marker, the lines with the marker removed (stands for obsoletion);
- *library*: which of the five it comes from.

Files are in the pretraining texts or in the tasks, never in both; deprecated functions are in the tasks only.
"""

import ast
import functools
import importlib.util
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from downriver.core import Budget, InputError, Measurement, generator
from downriver.domains.posts import PostSystem, entity_f1
from downriver.domains.posts.sobert import train_tokenizer, untrained
from downriver.models.model import Model
from downriver.pretrain.masked_lm import masked_lm
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, better, shared, study
from downriver.tasks import load

paper = Paper(
    number=75,
    slug="sobert",
    title="Stack Over-Flowing with Results: The Case for Domain-Specific Pre-Training Over One-Size-Fits-All Models",
    date="2023-06",
    room="domains",
    claim="A modest encoder pretrained on whole posts of one domain, text with code, beats a general one of its size.",
)

LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "polars")
OUTDATED = re.compile(r"deprecated::|DeprecationWarning|FutureWarning|@deprecat|deprecated", re.IGNORECASE)
VOCABULARY, BATCH_TOKENS = 2048, 2048
CHARACTERS = 5  # a token has fewer on average: so much text is read once, no text twice


@dataclass(frozen=True)
class Scale:
    """Steps of pretraining; rows to fit a task to, rows to test it on, visits to them; the longest text in tokens, and
    the short one that it is compared with; one file of ``every`` is read."""

    steps: int
    train: int
    test: int
    visits: int
    context: int
    short: int
    every: int


SCALES = {"small": Scale(300, 600, 300, 1200, 256, 64, 1), "tiny": Scale(2, 30, 20, 16, 32, 8, 12)}


@dataclass(frozen=True)
class Function:
    """A documented function or class: its text with code, its docstring, where it comes from."""

    library: str
    file: str
    docstring: str
    text: str

    @property
    def outdated(self) -> bool:
        return OUTDATED.search(self.text) is not None

    @property
    def pretraining(self) -> bool:
        """Whether its file is for pretraining: two of three are."""
        return zlib.crc32(self.file.encode()) % 3 > 0


@study(
    "sobert",
    title="Encoders of docstrings with code, of newsgroup posts, and of nothing",
    claims=[
        better("domain", than="general", on="macro"),
        better("general", than="scratch", on="macro"),
        better("domain", than="domain, short", on="outdated"),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the rows of the tasks, the pretraining's order and all weights anew."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    size = SCALES[scale]

    @shared
    def tokenizer() -> object:
        rng = generator(paper.slug, "tokenizer", seed)
        both = [*rng.permutation(domain_texts(size.every))[:600], *rng.permutation(general_texts())[:600]]
        return train_tokenizer(map(str, both), VOCABULARY, context=size.context)

    @shared
    def scratch() -> Model:
        return untrained("tiny", tokenizer(), context=size.context, seed=seed)

    def pretrained(texts: Sequence[str]) -> Model:
        order = generator(paper.slug, "texts", seed).permutation(len(texts))
        return masked_lm(
            scratch(),
            enough([texts[i] for i in order], size.steps * BATCH_TOKENS * CHARACTERS),
            f"{size.steps} steps",
            batch_tokens=BATCH_TOKENS,
            learning_rate=2e-3,
            seed=seed,
        )

    @shared
    def domain() -> Model:
        return pretrained(domain_texts(size.every))

    @shared
    def general() -> Model:
        return pretrained(general_texts())

    def short() -> list[Measurement]:
        encoder = domain()
        cut = Model(
            encoder.backbone, kind="masked-lm", processor=encoder.processor, pooling="mean", max_length=size.short
        )
        return [outdated(cut, seed, size)]

    def all_three(encoder: Model) -> list[Measurement]:
        found = [task(encoder, seed, size) for task in (names, outdated, library)]
        return [*found, Measurement("macro", float(np.mean([m.value for m in found])))]

    yield Arm("domain", lambda: all_three(domain()))
    yield Arm("general", lambda: all_three(general()))
    yield Arm("scratch", lambda: all_three(scratch()))
    yield Arm("domain, short", short)


def names(encoder: Model, seed: int, size: Scale) -> Measurement:
    """F1 of the names tagged in docstrings."""
    rows = [tagged(f.docstring) for f in held(size.every) if f.docstring.count("`") >= 4]
    rows = [row for row in rows if "B-name" in row["tags"]]
    fitting, rest = drawn(rows, seed, "names", size.train, size.test)
    system = PostSystem(encoder).add_task("names", ("O", "B-name", "I-name"), token=True)
    system.fit("names", fitting, f"{size.visits} examples", learning_rate=1e-3, seed=seed)
    predicted = system.predict_many("names", rest)
    return Measurement("names", entity_f1([row["tags"] for row in rest], predicted))


def outdated(encoder: Model, seed: int, size: Scale) -> Measurement:
    """Accuracy on deprecated functions and equally many others, without the lines that say so."""
    marked = [f for f in functions(size.every) if f.outdated]
    plain = [f for f in held(size.every) if not f.outdated]
    rng = generator(paper.slug, "outdated", seed)
    plain = [plain[i] for i in rng.permutation(len(plain))[: len(marked)]]
    rows = [
        {"post": unmarked(f.text), "label": label} for label, some in (("yes", marked), ("no", plain)) for f in some
    ]
    fitting, rest = drawn(rows, seed, "outdated", len(rows) * 2 // 3, size.test)
    return scored("outdated", encoder, ("no", "yes"), fitting, rest, size, seed)


def library(encoder: Model, seed: int, size: Scale) -> Measurement:
    """Accuracy of the library that a function comes from; its name, wherever it stands, is hidden."""
    hide = re.compile("|".join(LIBRARIES) + r"|\bnp\b|\bplt\b|\bpl\b", re.IGNORECASE)
    rows = [{"post": hide.sub("X", f.text), "label": f.library} for f in held(size.every) if not f.outdated]
    fitting, rest = drawn(rows, seed, "library", size.train, size.test)
    return scored("library", encoder, LIBRARIES, fitting, rest, size, seed)


def scored(
    name: str,
    encoder: Model,
    labels: Sequence[str],
    fitting: Sequence[dict[str, str]],
    rest: Sequence[dict[str, str]],
    size: Scale,
    seed: int,
) -> Measurement:
    """Fine-tune to a task of whole posts and take its accuracy."""
    system = PostSystem(encoder).add_task(name, labels, fields=("post",))
    system.fit(name, fitting, f"{size.visits} examples", learning_rate=1e-3, seed=seed)
    right = [label == row["label"] for label, row in zip(system.predict_many(name, rest), rest, strict=True)]
    return Measurement(name, float(np.mean(right)))


def drawn(rows: Sequence[Any], seed: int, name: str, train: int, test: int) -> tuple[list[Any], list[Any]]:
    """Rows to fit and rows to test, in a random order."""
    order = generator(paper.slug, "rows", name, seed).permutation(len(rows))
    if len(rows) < train + 10:
        raise InputError(f"task {name!r} has {len(rows)} rows: more than {train} are expected")
    return [rows[i] for i in order[:train]], [rows[i] for i in order[train : train + test]]


def enough(texts: Sequence[str], characters: int) -> list[str]:
    """The first texts that have so many characters together."""
    ends = np.cumsum([len(text) for text in texts])
    return list(texts[: int(np.searchsorted(ends, characters)) + 1])


def tagged(docstring: str) -> dict[str, list[str]]:
    """The words of a docstring and whether each stood in back-ticks, the ticks removed."""
    words: list[str] = []
    tags: list[str] = []
    for number, part in enumerate(re.split(r"`+", docstring)[:120]):
        found = part.split()[:80]
        words += found
        tags += ["B-name", *["I-name"] * (len(found) - 1)][: len(found)] if number % 2 else ["O"] * len(found)
    return {"words": words[:200], "tags": tags[:200]}


def unmarked(text: str) -> str:
    """The text without the lines that speak of deprecation."""
    return "\n".join(line for line in text.splitlines() if not OUTDATED.search(line))


def held(every: int) -> list[Function]:
    """The functions whose files are not in the pretraining texts."""
    return [f for f in functions(every) if not f.pretraining]


@functools.cache
def domain_texts(every: int) -> list[str]:
    """Functions with their docstrings, none of them outdated."""
    return [f.text for f in functions(every) if f.pretraining and not f.outdated]


@functools.cache
def general_texts() -> list[str]:
    """The posts of 20 newsgroups."""
    return load("20newsgroups").texts("train")


@functools.cache
def functions(every: int) -> list[Function]:
    """The documented functions and classes of one file in ``every``, tests aside."""
    found: list[Function] = []
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InputError(f"{name} is not installed: its source is one of the texts")
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py"))[::every]:
            inside = path.relative_to(root).as_posix()
            if "test" not in inside:
                found += _documented(name, inside, path.read_text(encoding="utf-8", errors="replace"))
    return found


def _documented(library: str, file: str, source: str) -> Iterator[Function]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 100:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                text = "\n".join(lines[first - 1 : node.end_lineno])[:4000]
                yield Function(library, f"{library}/{file}", docstring, text)


studies: tuple[Study, ...] = (reproduction,)
