"""Paper 27: three specialists as one mixture, with their attentions in it or only their feed-forward blocks.

The paper upcycles models of 590 million and of 2 billion parameters. Here a Llama of two layers and width 96 reads
bytes of three domains (Python sources, English prose, tables of numbers); three copies of it are trained further on one
domain each; the mixtures made of them are trained on all three, on the same texts in the same order. Every mixture
takes two feed-forward experts for a token, Branch-Train-MiX's number, so that nothing but the attention differs. What
counts is bits per byte on held-out passages, the mean over the domains. The ensemble is Branch-Train-Merge's, weighted
at every token by how well each specialist foretold the text so far.

Sizes and steps were chosen for the time that they take, learning rates beforehand; none for its results.
"""

import csv
import functools
import io
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from torch import Tensor

from downriver.core import Budget, InputError, Measurement, generator
from downriver.core.cost import metered
from downriver.evaluate.evaluate import evaluate
from downriver.merge import average, bam
from downriver.models import Model, byte_tokenizer, small_language_model
from downriver.models.features import inference
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, better, keeps, shared, study
from downriver.tasks.task import Task
from downriver.training.engine import clone, fine_tune

paper = Paper(
    number=27,
    slug="bam",
    title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    date="2024-08",
    room="merge",
    claim="A mixture that starts from the attentions of its dense experts as well as from their feed-forward blocks is "
    "better than one that averages the attentions, at equal data and at equal compute.",
)

DOMAINS = ("code", "prose", "tables")
CHARACTERS, CONTEXT, BATCH = 120, 128, 8
# width, steps of the seed, of every specialist, of every mixture, held-out passages of a domain
SCALES = {"small": (96, 160, 70, 40, 60), "tiny": (32, 4, 2, 2, 4)}
SEED_RATE, RATE = 3e-3, 2e-3
BITS, START = "bits per byte", "bits per byte before training"
MIXTURES: dict[str, dict[str, Any]] = {
    "BAM": {"attention": "experts"},
    "BAM, shared keys": {"attention": "kv_shared"},
    "BTX": {"attention": "average"},
    "sparse upcycling": {"attention": "average", "ffn": "copy", "others": "seed"},
}


@study(
    "bam",
    title="Three specialists as one mixture of two layers",
    claims=[
        better("BAM", than="BTX", on=BITS),
        better("BAM, BTX's compute", than="BTX", on=BITS),
        keeps("BAM, shared keys", than="BTX", on=BITS, within=0.01),
        better("BAM", than="BTX", on=START),
        better("BAM", than="sparse upcycling", on=BITS),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the passages held out, the model and the order of the texts."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    width, first, further, last, held = SCALES[scale]

    @shared
    def task() -> Task:
        return domains(seed, held)

    def trained(model: Model, name: str, spend: str, rate: float) -> Model:
        settings: Any = {"learning_rate": rate, "batch_size": BATCH, "schedule": "cosine", "seed": seed}
        return fine_tune(model, only(task(), name), spend, **settings)

    @shared
    def base() -> Model:
        model = small_language_model(
            "causal-lm", byte_tokenizer(CONTEXT), width=width, layers=2, heads=4, context=CONTEXT, seed=seed
        )
        return trained(model, "all", f"{first} steps", SEED_RATE)

    @shared
    def specialists() -> list[Model]:
        return [trained(base(), name, f"{further} steps", RATE) for name in DOMAINS]

    @shared
    def start(name: str) -> Model:
        return bam(specialists(), base(), ffn_top_k=2, expert_names=DOMAINS, seed=seed, **MIXTURES[name])

    @shared
    def btx() -> tuple[Model, float]:
        """Branch-Train-MiX after its training, and the FLOPs of that."""
        with metered() as meter:
            model = trained(start("BTX"), "all", f"{last} steps", RATE)
        return model, meter.cost.flops

    def mixture(name: str) -> list[Measurement]:
        model = btx()[0] if name == "BTX" else trained(start(name), "all", f"{last} steps", RATE)
        return [score(BITS, model, task()), score(START, start(name), task())]

    def equal_compute() -> list[Measurement]:
        return [score(BITS, trained(start("BAM"), "all", f"{btx()[1]} flops", RATE), task())]

    def plain(name: str) -> list[Measurement]:
        if name == "average":
            return [score(BITS, average(specialists(), base()), task())]
        return [score(BITS, trained(clone(base()), "all", f"{last} steps", RATE), task())]

    yield Arm("dense", functools.partial(plain, "dense"))
    yield Arm("average", functools.partial(plain, "average"))
    yield Arm("ensemble", lambda: [Measurement(BITS, ensemble(specialists(), task()), direction="lower")])
    for name in MIXTURES:
        yield Arm(name, functools.partial(mixture, name))
    yield Arm("BAM, BTX's compute", equal_compute)


studies: tuple[Study, ...] = (reproduction,)


def domains(seed: int, held: int) -> Task:
    """Language modelling over the three domains, with ``held`` passages of each for validation.

    Whole stretches (a file, an entry of the manual, a twentieth of a table) are trained on or held out.
    """
    splits: dict[str, dict[str, list[str]]] = {name: {"text": [], "domain": []} for name in ("train", "validation")}
    for domain, stretches in zip(DOMAINS, (sources(), prose(), tables()), strict=True):
        rng = generator("bam", domain, seed)
        order = rng.permutation(len(stretches))
        cut = max(1, len(order) // 10)
        seen: set[str] = set()
        for split, chosen, most in (("train", order[cut:], 4000), ("validation", order[:cut], held)):
            found = [
                s[i : i + CHARACTERS] for s in (stretches[n] for n in chosen) for i in range(0, len(s), CHARACTERS)
            ]
            unseen = [text for text in found if len(text) == CHARACTERS and text not in seen]
            seen.update(unseen)
            kept = [unseen[i] for i in rng.permutation(len(unseen))[:most]]
            splits[split]["text"] += kept
            splits[split]["domain"] += [domain] * len(kept)
    rows = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    return Task("three domains", "language-modelling", rows, ("text",), None, group="domain")


@functools.cache
def sources() -> tuple[str, ...]:
    """The files of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)


@functools.cache
def prose() -> tuple[str, ...]:
    """Paragraphs of Python's built-in manual and of the standard library's docstrings, without examples of code."""
    from pydoc_data.topics import topics

    texts = [str(text) for _, text in sorted(topics.items())]
    for source in sources():
        texts += re.findall(r'"""(.+?)"""', source, re.DOTALL)
    words = re.compile(r"^[A-Z][^>=*|_{}]+[.]$", re.DOTALL)
    found = []
    for text in texts:
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        found.append("\n".join(part for part in paragraphs if len(part) > 60 and words.match(part)))
    return tuple(text for text in found if len(text) >= CHARACTERS)


@functools.cache
def tables() -> tuple[str, ...]:
    """The tables that scikit-learn brings, as lines of comma-separated values, twenty stretches of each."""
    found = []
    for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine):
        bundle: Any = load(scaled=False) if load is load_diabetes else load()
        rows = np.column_stack([bundle.data, bundle.target])
        for part in np.array_split(rows, 20):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([f"{value:g}" for value in row] for row in part)
            found.append(text.getvalue())
    return tuple(found)


def only(task: Task, domain: str) -> Task:
    """The training texts of one domain, or of ``all`` in equal parts."""
    rows = task.rows("train")
    names = np.array(rows["domain"][:])
    if domain == "all":
        least = min(int((names == name).sum()) for name in DOMAINS)
        chosen = np.concatenate([np.flatnonzero(names == name)[:least] for name in DOMAINS])
    else:
        chosen = np.flatnonzero(names == domain)
    return Task(domain, "language-modelling", {"train": rows.select(chosen)}, ("text",), None, group="domain")


def score(metric: str, model: Model, task: Task) -> Measurement:
    """Bits per byte of held-out passages, the mean over the domains."""
    rows = evaluate(model, task, split="validation", metrics=["bits_per_byte"])
    found = [row.value for row in rows if "/" in row.metric]
    return Measurement(metric, float(np.mean(found)), unit="bits per byte", direction="lower")


def ensemble(models: list[Model], task: Task) -> float:
    """Branch-Train-Merge: Σ_n p(n | text so far) · p_n(next byte), from equal chances at the start of every text."""
    rows, found = task.rows("validation"), []
    for domain in DOMAINS:
        texts = [row for row in rows if row["domain"] == domain]
        batch = models[0].collate(task)(texts)
        labels = batch["labels"][:, 1:]
        each = torch.stack([log_likelihoods(model, batch) for model in models])  # (N, texts, bytes)
        before = each.cumsum(-1) - each
        nats = -((before.log_softmax(0) + each).logsumexp(0) * (labels >= 0)).sum()
        size = sum(len(row["text"].encode()) for row in texts)
        found.append(float(nats) / np.log(2) / size)
    return float(np.mean(found))


def log_likelihoods(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Of every token after the first, (texts, tokens - 1); 0 for padding."""
    labels = batch["labels"][:, 1:]
    with inference(model):
        p = model(**{name: value for name, value in batch.items() if name != "labels"})["logits"][:, :-1].log_softmax(
            -1
        )
    return p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
