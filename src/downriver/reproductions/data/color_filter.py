"""Paper 12: text that a model tuned on the target finds easier than before is the text to train on.

The paper selects web text for a model of 1.2 billion parameters by two of 150 million. Here the pool is passages of
twenty newsgroups, a tenth of them about hockey and baseball; the target sample are later posts of these two groups, and
what counts is the loss on further such posts. Prior and conditional are Llamas of one layer and width 48, the model to
be trained has width 64. Each arm keeps an eighth of the pool and trains as many steps from the same initialisation.
"""

import tempfile
from collections.abc import Iterator
from functools import partial

import numpy as np
import polars as pl

from downriver import tasks
from downriver.core import Budget, InputError, Measurement, generator
from downriver.data.score import LossScorer, ScoreTable
from downriver.data.select.color_filter import RULES, ColorFilter, fit_conditional
from downriver.data.select.select import select
from downriver.models import small_language_model, word_tokenizer
from downriver.models.model import Model
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, above, better, shared, study
from downriver.training import TokenRows, fine_tune

paper = Paper(
    number=12,
    slug="color_filter",
    title="CoLoR-Filter: Conditional Loss Reduction Filtering for Targeted Language Model Pre-training",
    date="2024-06",
    room="data",
    claim="Documents whose loss falls most when a small model is tuned on the target teach the target best; those "
    "that the tuned model finds easy do not.",
)

TARGETS = ("rec.sport.hockey", "rec.sport.baseball")
WORDS, TAU, BATCH, VOCABULARY = 31, 8, 32, 2000
ARMS = {"random": "random", "conditional only": "cond", "CoLoR": "color"}
LOSS, RICHER = "validation loss", "share of the target over its share of the pool"
# passages of the pool, of the target sample and to validate on, steps of prior and of the model to be trained
SCALES = {"small": (17_877, 1195, 1000, 150), "tiny": (400, 60, 30, 6)}


@study(
    "color_filter",
    title="Which newsgroup passages teach hockey and baseball",
    claims=[
        better("CoLoR", than="random", on=LOSS, margin=0.05),
        better("CoLoR", than="conditional only", on=LOSS),
        above("CoLoR", on=RICHER, value=3.0),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """One pool, one prior and one conditional a seed; the arms differ in what they keep of the pool."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    steps = SCALES[scale][-1]

    @shared
    def world() -> "World":
        return World(seed, *SCALES[scale][:-1])

    @shared
    def losses() -> pl.DataFrame:
        return scored(world(), steps, seed)

    def measured(rule: str) -> list[Measurement]:
        chosen = select(losses(), RULES[rule], tau=TAU, seed=seed).indices
        model = train(world(), [world().pool[i] for i in chosen], 64, steps, seed)
        loss = LossScorer(model, context=WORDS + 1).score(world().held).mean()
        share = world().on_target[chosen].mean() / world().on_target.mean()
        return [Measurement(LOSS, loss, direction="lower"), Measurement(RICHER, share)]

    for name, rule in ARMS.items():
        yield Arm(name, partial(measured, rule))


studies: tuple[Study, ...] = (reproduction,)


class World:
    """A pool of passages, a tenth of it of the target groups; the target sample; passages of others to validate on."""

    def __init__(self, seed: int, size: int, sample: int, held: int) -> None:
        task = tasks.load("20newsgroups")
        rng = generator("color_filter passages", seed)
        targets = np.isin(task.labels, TARGETS)
        ours, others = (passages(task, "train", rng, keep) for keep in (targets, ~targets))
        mine = round(size / 10)
        pool = [(text, True) for text in ours[:mine]] + [(text, False) for text in others[: size - mine]]
        order = rng.permutation(len(pool))
        self.pool = [pool[i][0] for i in order]
        self.on_target = np.array([pool[i][1] for i in order])
        half = rng.permutation(np.flatnonzero(targets[task.targets("test")]))
        cut = len(half) // 2
        self.target = cut_up(task, "test", half[:cut], rng)[:sample]
        self.held = cut_up(task, "test", half[cut:], rng)[:held]
        self.tokenizer = word_tokenizer(self.pool, VOCABULARY, context=WORDS + 1, end=False)


def passages(task: tasks.Task, split: str, rng: np.random.Generator, groups: np.ndarray) -> list[str]:
    """All passages of the posts of these groups, in a random order."""
    return cut_up(task, split, np.flatnonzero(groups[task.targets(split)]), rng)


def cut_up(task: tasks.Task, split: str, posts: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Whole passages of these posts, in a random order."""
    texts = list(task.texts(split))
    found = []
    for post in posts:
        words = texts[int(post)].split()
        found += [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]
    return [found[i] for i in rng.permutation(len(found))]


def train(world: World, texts: list[str], width: int, steps: int, seed: int) -> Model:
    """A model of one layer from its initialisation."""
    import datasets

    model = small_language_model(
        "causal-lm", world.tokenizer, width=width, layers=1, heads=4, context=WORDS + 1, seed=seed
    )
    ids = world.tokenizer(texts, truncation=True, max_length=WORDS + 1)["input_ids"]
    return fine_tune(
        model,
        TokenRows("passages", {"train": datasets.Dataset.from_dict({"input_ids": ids})}),
        Budget(steps, "steps"),
        learning_rate=3e-3,
        batch_size=BATCH,
        schedule="cosine",
        betas=(0.9, 0.95),
        seed=seed,
        in_place=True,
    )


def scored(world: World, steps: int, seed: int) -> pl.DataFrame:
    """The two losses of every passage of the pool, under a prior that was trained on a random part of it."""
    part = generator("color_filter prior", seed).permutation(len(world.pool))[: steps * BATCH]
    prior = train(world, [world.pool[i] for i in part], 48, steps, seed)
    conditional = fit_conditional(prior, world.target, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        table = ScoreTable(folder)
        ColorFilter(prior, conditional, tau=TAU, context=WORDS + 1).select(world.pool, table=table)
        return table.frame(["prior", "conditional"]).collect()
