"""Paper 82: a few labels a class go further when pretraining goes on with texts in the prompt template first.

The paper tunes RoBERTa-large on 21 tasks. Here a BERT of one layer and width 64, one token a word, is pretrained for
3000 steps on newsgroup posts and Reuters articles and tuned to six topics of Reuters R8 by the template «... this is
about [mask]», with 16 labels and up to 284 unlabelled articles a topic. The base has read none of the articles that
the ways are tuned or tested on. All learning rates were set beforehand and are the same for every way.

Two arms beyond the paper's: self-training spends the continued pretraining's steps on the same pseudo-labels as
labels, so that what the masked objective adds can be told from what the pseudo-labels do; and the ways' common start
can be held against random weights, without which a gain over a base that is no use would go unnoticed.
"""

import functools
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import polars as pl

from downriver.adapt.prompt_ft import PromptClassifier
from downriver.core import Budget, InputError, Measurement, assets, generator
from downriver.data.condition.prompt_template import PromptTemplate
from downriver.models import Model, small_language_model, word_tokenizer
from downriver.pretrain.prompt_continued_pretraining import (
    continued_pretrain,
    pcp_corpus,
    refuse_leaks,
    tapt_corpus,
)
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, better, keeps, shared, study
from downriver.tasks import load as load_task

paper = Paper(
    number=82,
    slug="prompt_continued_pretraining",
    title="Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner",
    date="2023-05",
    room="pretrain",
    claim="Pretraining on task texts in the prompt template with pseudo-labels makes prompt-based tuning better.",
)

TOPICS = {
    "earn": "profit",
    "acq": "merger",
    "crude": "oil",
    "trade": "trade",
    "money-fx": "currency",
    "interest": "rates",
}
TEMPLATE = PromptTemplate("{text} this is about {label}", tuple(TOPICS.values()))
WORDS, VOCABULARY, CONTEXT = 36, 3000, 48
SHOTS, UNLABELLED, HELD = 16, 284, 75
BASE_RATE, MORE_RATE, TUNE_RATE = 2e-3, 1e-3, 1e-3
# steps of pretraining, of going on, of tuning
SCALES = {"small": (3000, 250, 80), "tiny": (2, 2, 2)}


@study(
    "prompt-continued-pretraining",
    title="Six topics of Reuters from sixteen labels each",
    claims=[
        better("PCP + FT", than="prompt-FT", on="accuracy", margin=0.02),
        keeps("PCP + FT", than="TAPT + FT", on="accuracy", within=0.0),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the articles, the base and all that is random in training anew."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    before, more, steps = SCALES[scale]

    @shared
    def rows() -> dict[str, list[dict[str, Any]]]:
        return draw(seed)

    @shared
    def base() -> Model:
        return pretrained(rows()["others"], before, seed)

    @shared
    def tuned() -> PromptClassifier:
        return fit(base())

    @shared
    def corpus() -> datasets.Dataset:
        return pcp_corpus(rows()["unlabelled"], tuned(), TEMPLATE)

    @shared
    def prompted() -> Model:
        return go_on(base(), corpus(), more, seed)

    def fit(model: Model) -> PromptClassifier:
        classifier = PromptClassifier(model, TEMPLATE)
        return classifier.fit(rows()["labelled"], steps=steps, learning_rate=TUNE_RATE, batch_size=16, seed=seed)

    def measure(classifier: PromptClassifier) -> list[Measurement]:
        return [Measurement("accuracy", classifier.score(rows()["test"]), task="reuters")]

    def self_trained() -> PromptClassifier:
        taught = [
            {"text": row["text"], "label": c} for row, c in zip(rows()["unlabelled"], corpus()["label"], strict=True)
        ]
        student = PromptClassifier(base(), TEMPLATE)
        student.fit(taught, steps=more, learning_rate=MORE_RATE, batch_size=32, seed=seed)
        return fit(student.model)

    def first() -> list[Measurement]:
        right = tuned().score(rows()["unlabelled"])  # their labels are looked at here and nowhere else
        return [*measure(tuned()), Measurement("pseudo-label accuracy", right, task="reuters")]

    yield Arm("prompt-FT", first)
    yield Arm("TAPT + FT", lambda: measure(fit(go_on(base(), tapt_corpus(rows()["unlabelled"], TEMPLATE), more, seed))))
    yield Arm("PCP zero-shot", lambda: measure(PromptClassifier(prompted(), TEMPLATE)))
    yield Arm("PCP + FT", lambda: measure(fit(prompted())))
    yield Arm("self-training", lambda: measure(self_trained()))
    yield Arm("random init + FT", lambda: measure(fit(untrained(seed))))


studies: tuple[Study, ...] = (reproduction,)


def draw(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Labelled, unlabelled and test rows of the six topics; the other articles and the posts, for the base."""
    rng = generator("pcp", seed)
    train, test = articles("train"), articles("test")
    found: dict[str, list[dict[str, Any]]] = {"labelled": [], "unlabelled": [], "test": [], "others": []}
    for number, topic in enumerate(TOPICS):
        its = [{"text": text, "label": number} for text in train[topic]]
        order = rng.permutation(len(its))
        found["labelled"] += [its[i] for i in order[:SHOTS]]
        found["unlabelled"] += [its[i] for i in order[SHOTS : SHOTS + UNLABELLED]]
        found["others"] += [its[i] for i in order[SHOTS + UNLABELLED :]]
    seen = {row["text"] for name in ("labelled", "unlabelled", "others") for row in found[name]}
    for number, topic in enumerate(TOPICS):
        its = [{"text": text, "label": number} for text in test[topic] if text not in seen]
        found["test"] += [its[i] for i in rng.permutation(len(its))[:HELD]]
    found["others"] += [{"text": text} for text in posts()]
    refuse_leaks([*found["unlabelled"], *found["others"]], found["test"], TEMPLATE)
    return found


def pretrained(others: list[dict[str, Any]], steps: int, seed: int) -> Model:
    """The base: texts alone, articles and posts in turn, so that the few articles are read as often as the posts."""
    texts = tapt_corpus(others, TEMPLATE)
    labelled = np.array(["label" in row for row in others])
    rng = generator("pcp base", seed)
    kinds = [np.flatnonzero(labelled), np.flatnonzero(~labelled)]
    chosen = [int(rng.choice(kinds[visit % 2])) for visit in range(16 * steps)]
    return continued_pretrain(
        untrained(seed),
        texts.select(chosen),
        f"{steps} steps",
        learning_rate=BASE_RATE,
        batch_size=16,
        accumulate=1,
        seed=seed,
    )


def go_on(model: Model, corpus: datasets.Dataset, steps: int, seed: int) -> Model:
    """Continued pretraining, the same for every corpus."""
    return continued_pretrain(
        model, corpus, f"{steps} steps", learning_rate=MORE_RATE, batch_size=32, accumulate=1, seed=seed
    )


def untrained(seed: int) -> Model:
    """Random weights."""
    return small_language_model("masked-lm", tokenizer(), width=64, layers=1, heads=4, context=CONTEXT, seed=seed)


@functools.cache
def tokenizer() -> Any:
    """The commonest words of articles and posts, and those of the template."""
    texts = [text for its in articles("train").values() for text in its]
    return word_tokenizer([*texts, *posts(), *[TEMPLATE.fill({"text": ""}, c) for c in range(6)] * 1000], VOCABULARY)


@functools.cache
def articles(split: str) -> dict[str, list[str]]:
    """topic → the first words of its articles; a beginning that stands twice counts once, under the topic met first."""
    path = assets.path("reuters-r8") / f"reuters-r8-{split}.tab"
    table = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False, skip_rows_after_header=2)
    topics: dict[str, str] = {}
    for topic, text in table.drop_nulls().select("Category", "Text").iter_rows():
        topics.setdefault(first_words(text), topic)
    return {topic: [text for text, its in topics.items() if its == topic] for topic in set(topics.values())}


@functools.cache
def posts() -> list[str]:
    """The first words of the newsgroups' training posts."""
    return [first_words(text) for text in load_task("20newsgroups").texts("train")]


def first_words(text: str) -> str:
    return " ".join(text.split()[:WORDS])
