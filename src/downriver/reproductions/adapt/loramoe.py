"""Paper 81: experts that are kept for knowledge keep it while ever more instruction data is learnt.

The paper tunes Llama-2-7B and asks it questions of closed-book benchmarks. Here a Llama of two layers and width 64, one
token a word, learns 300 facts (subject and relation → object) by heart, and to copy, sort and reverse lists. Then it is
tuned on one, five and twenty portions of three new tasks on lists, every row visited once; a tenth of the rows ask for
facts, always the same 100, and are marked as knowledge. It is asked for the other 200.

Fixed beforehand on another seed (100), which the study never sees, by how well the new tasks were learnt: the size of a
portion and the learning rates.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import polars as pl
import torch

from downriver.adapt.lora import add_adapter
from downriver.adapt.loramoe import LoRAMoE, loramoe, routing_report
from downriver.core import Budget, InputError, generator
from downriver.data.condition.encode import encode_all
from downriver.models import Model, small_language_model, word_tokenizer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, above, better, keeps, shared, study
from downriver.training import TokenRows, fine_tune
from downriver.training.engine import clone

paper = Paper(
    number=81,
    slug="loramoe",
    title="LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model Alignment",
    date="2023-12",
    room="adapt",
    claim="LoRA experts with a router, some of them kept for knowledge, let a model learn much instruction data "
    "without losing what it knows.",
)

FACTS, ASKED_IN_TUNING, RELATIONS, OBJECTS, LETTERS, LENGTH = 300, 100, 4, 40, 8, 3
EXPERTS, RANK = 6, 4
LORA_RANK = 26
"""As many parameters as six experts of rank 4 and their routers have, on the same layers."""
KNOWN = {"copy": lambda x: x, "sort": sorted, "reverse": lambda x: x[::-1]}
NEW = {
    "rotate": lambda x: [*x[1:], x[0]],
    "swap": lambda x: [x[1], x[0], x[2]],
    "next": lambda x: [f"l{(int(letter[1:]) + 1) % LETTERS}" for letter in x],
}
PORTIONS = (1, 5, 20)
BATCH = 64
# facts, steps that memorise, rows of a portion
SCALES = {"small": (FACTS, 800, 1600), "tiny": (30, 20, 64)}
MEMORISE_RATE, FULL_RATE, LORA_RATE, EXPERTS_RATE = 5e-3, 1e-3, 1e-2, 1e-2
Example = tuple[str, str]


@study(
    "loramoe",
    title="What is left of 200 facts after one, five and twenty portions of new tasks",
    claims=[
        better("LoRAMoE, 20", than="full, 20", on="facts"),
        keeps("LoRAMoE, 20", than="LoRA, 20", on="facts", within=0.02),
        above("LoRAMoE, 20", on="reserved share, facts over tasks", value=0.0),
        above("LoRAMoE, 20", on="tasks", value=0.95),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """One base model a seed; every arm sees the same rows in the same order."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    facts, memorise, portion = SCALES[scale]
    asked = facts * ASKED_IN_TUNING // FACTS
    known = facts_of(seed, facts)
    held = lists(seed + 10_000, 300, NEW)

    @shared
    def base() -> Model:
        return memorised(known, memorise, seed)

    def mix(portions: int) -> list[tuple[Example, int]]:
        """Rows with their type; nine in ten are lists."""
        rows = lists(seed, portion * portions, NEW)
        rng = generator("loramoe mix", seed, portions)
        return [
            (known[rng.integers(asked)], 1) if rng.random() < 0.1 else (rows[i], 0) for i in range(portion * portions)
        ]

    def measure(model: Model) -> dict[str, float]:
        return {"facts": accuracy(model, known[asked:]), "tasks": accuracy(model, held)}

    def plain(portions: int, rank: int | None) -> dict[str, float]:
        model = clone(base())
        if rank is not None:
            add_adapter(
                model, rank=rank, alpha=2 * rank, target_modules=["gate_proj", "up_proj", "down_proj"], seed=seed
            )
        rows = token_rows(model, [example for example, _ in mix(portions)])
        rate = FULL_RATE if rank is None else LORA_RATE
        return measure(
            fine_tune(
                model,
                rows,
                f"{portion * portions} examples",
                learning_rate=rate,
                batch_size=BATCH,
                schedule="cosine",
                warmup=0.03,
                seed=seed,
                trainable=(lambda name: True) if rank is None else (lambda name: "lora_" in name),
                in_place=True,
            )
        )

    def experts(portions: int, **settings: Any) -> dict[str, float]:
        examples, types = zip(*mix(portions), strict=True)
        tuned = loramoe(
            base(),
            token_rows(base(), examples, types),
            f"{portion * portions} examples",
            num_experts=EXPERTS,
            r=RANK,
            alpha=2 * RANK,
            dropout=0.0,
            learning_rate=EXPERTS_RATE,
            batch_size=BATCH,
            seed=seed,
            **settings,
        )
        return measure(tuned) | reserved(tuned, known[asked:], held)

    yield Arm("base", lambda: measure(base()))
    for n in PORTIONS:
        yield Arm(f"full, {n}", lambda n=n: plain(n, None))  # type: ignore[misc]
        yield Arm(f"LoRA, {n}", lambda n=n: plain(n, LORA_RANK))  # type: ignore[misc]
        yield Arm(f"LoRAMoE, {n}", lambda n=n: experts(n))  # type: ignore[misc]
    yield Arm(f"LoRAMoE, δ 0, {PORTIONS[-1]}", lambda: experts(PORTIONS[-1], delta=0.0))


studies: tuple[Study, ...] = (reproduction,)


def facts_of(seed: int, n: int) -> list[Example]:
    """Questions and their answers, in a random order."""
    rng = generator("loramoe facts", seed)
    subjects = -(-n // RELATIONS)
    found = [(f"s{s} r{r} :", f" o{rng.integers(OBJECTS)}") for s in range(subjects) for r in range(RELATIONS)]
    return [found[i] for i in rng.permutation(len(found))[:n]]


def lists(seed: int, n: int, tasks: dict[str, Any]) -> list[Example]:
    """Lists of letters, each with what a task makes of it."""
    rng = generator("loramoe lists", seed, *tasks)
    names, found = list(tasks), []
    for i in range(n):
        letters = [f"l{k}" for k in rng.integers(LETTERS, size=LENGTH)]
        name = names[i % len(names)]
        found.append((f"{name} {' '.join(letters)} :", " " + " ".join(tasks[name](letters))))
    return found


def token_rows(model: Model, examples: Sequence[Example], types: Sequence[int] | None = None) -> TokenRows:
    """Examples with the loss on their answers."""
    encoded = encode_all([[(question, False), (answer, True)] for question, answer in examples], model.processor)
    columns: dict[str, list[Any]] = {
        "input_ids": [one.input_ids for one in encoded],
        "labels": [one.labels for one in encoded],
    }
    if types is not None:
        columns["data_types"] = list(types)
    return TokenRows("mix", {"train": datasets.Dataset.from_dict(columns)}, pad=model.processor.pad_token_id)


def memorised(known: list[Example], steps: int, seed: int) -> Model:
    """A model that has learnt the facts by heart and three tasks on lists."""
    words = [" ".join(pair) for pair in [*known, *lists(0, 600, KNOWN | NEW)]]
    words.append(" ".join(f"o{i}" for i in range(OBJECTS)) + " " + " ".join(f"l{i}" for i in range(LETTERS)))
    tokenizer = word_tokenizer(words, context=32)
    model = small_language_model("causal-lm", tokenizer, width=64, layers=2, heads=4, context=32, seed=seed)
    skills = lists(seed, len(known) * 4, KNOWN)
    rows = token_rows(model, [*known * 4, *skills])
    return fine_tune(
        model, rows, f"{steps} steps", learning_rate=MEMORISE_RATE, batch_size=BATCH, seed=seed, in_place=True
    )


@torch.no_grad()
def accuracy(model: Model, examples: list[Example]) -> float:
    """The share of answers that greedy decoding gives word for word."""
    rows = token_rows(model, examples)
    batch = rows.collate(model)(list(rows.rows("train")))
    labels = batch.pop("labels")[:, 1:]
    right = (model(**batch)["logits"][:, :-1].argmax(-1) == labels) | (labels < 0)
    return float(right.all(1).float().mean())


def reserved(model: LoRAMoE, facts: list[Example], others: list[Example]) -> dict[str, float]:
    """What the experts kept for knowledge get, of tokens of facts and of tokens of lists."""
    rows = token_rows(model, [*facts, *others], [1] * len(facts) + [0] * len(others))
    table = routing_report(model, rows, batch_size=500).filter(pl.col("expert_type") == 1)
    share = dict(
        table.group_by("layer", "data_type")
        .agg(pl.col("gate").sum())
        .group_by("data_type")
        .agg(pl.col("gate").mean())
        .iter_rows()
    )
    return {
        "reserved share of facts": share[1],
        "reserved share of tasks": share[0],
        "reserved share, facts over tasks": share[1] - share[0],
    }
