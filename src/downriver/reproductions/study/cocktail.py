"""Paper 41: does a second task help a task that has few labels, and which one?

The paper tunes models of 3.8B parameters and more on financial tasks. Here a Llama of two layers and width 64 learns to
continue newsgroup posts for some hundred steps and is then tuned to name the group of a post, one of six, from 16 posts
a group. Added to that are, one at a time: posts of the fourteen other groups (related), Reuters articles with their
topic (unrelated), passages of books for children or adults (unrelated), and quotations to be continued (general text,
a tenth of the draws). All mixtures take the same steps from the same model; every task is drawn as often as the target.
«chosen» is the mixture that answers most validation posts of its seed right; the target alone may be chosen.

Helper texts that share 13 words with, or equal, a validation or test post are left out.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from downriver.core import Budget, InputError, Measurement, assets, generator
from downriver.data.condition import Packer, encode_all
from downriver.models import Model, small_language_model, word_tokenizer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, better, shared, study
from downriver.study.cocktail import CocktailDesign, Evaluate, Split, Train, cocktail_arms
from downriver.study.ingredients import Ingredient, instruction_cocktail
from downriver.tasks import InstructionTask, Template
from downriver.tasks import load as load_task
from downriver.tasks.builtin import SOURCES, passages
from downriver.tasks.generalization import shared_ngrams
from downriver.training import TokenRows, fine_tune

paper = Paper(
    number=41,
    slug="cocktail",
    title="Mixing It Up: The Cocktail Effect of Multi-Task Fine-Tuning on LLM Performance — A Case Study in Finance",
    date="2024-10",
    room="study",
    claim="A task is often learnt better together with related tasks than alone.",
)

GROUPS = {
    "comp.graphics": "graphics",
    "rec.autos": "autos",
    "sci.space": "space",
    "soc.religion.christian": "christianity",
    "talk.politics.mideast": "mideast",
    "misc.forsale": "forsale",
}
WORDS, VOCABULARY, CONTEXT, BATCH = 28, 3000, 36, 16
LABELS, HELD, HELPER = 16, 100, 1400  # posts a group to train on, posts a group to measure by, examples of a helper
RATE, RATE_BEFORE = 3e-3, 3e-3
SCALES = {"small": (200, 150), "tiny": (3, 2)}  # steps before, and of every mixture

TARGET, RELATED = "posts", "groups"
DESIGN = CocktailDesign(
    tasks=(TARGET, RELATED, "reuters", "books"),
    target=TARGET,
    regularizers=("quotations",),
    design=[(TARGET, helper) for helper in (RELATED, "reuters", "books", "quotations")],
)
SCORE = "test exact_match"


@study(
    "cocktail",
    title="Six newsgroups from 16 labels each, alone and with a second task",
    claims=[
        better("chosen", than=TARGET, on=SCORE, task=TARGET),
        better(f"{TARGET} + {RELATED}", than=f"{TARGET} + reuters", on=SCORE, task=TARGET),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """Five mixtures from one pretrained model; a seed draws labelled posts, helpers, weights and order anew."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    before, steps = SCALES[scale]

    @shared
    def ingredients() -> dict[str, Ingredient]:
        return draw(seed, HELD if scale == "small" else 4)

    @shared
    def base() -> Model:
        return pretrained(before, seed)

    @shared
    def tuned(mixture: tuple[str, ...]) -> tuple[Model, int]:
        return methods()[0](mixture, seed)

    @shared
    def scores(mixture: tuple[str, ...], split: Split) -> Mapping[str, float]:
        return methods()[1](tuned(mixture)[0], TARGET, split)

    def methods() -> tuple[Train, Evaluate]:
        return instruction_cocktail(
            DESIGN,
            ingredients(),
            base(),
            f"{steps} steps",
            cap=LABELS * len(GROUPS),
            extra={"quotations": 0.1},
            lora=None,
            block=CONTEXT,
            batch_size=BATCH,
            learning_rate=RATE,
            warmup=steps // 20,
        )

    def chosen() -> list[Measurement]:
        best = max(DESIGN.mixtures.values(), key=lambda mixture: scores(mixture, "validation")["exact_match"])
        return [Measurement(f"test {name}", value, task=TARGET) for name, value in scores(best, "test").items()]

    yield from cocktail_arms(
        DESIGN,
        lambda mixture, seed: (mixture, tuned(mixture)[1]),  # the mixture stands for its model
        lambda mixture, task, split: scores(mixture, split),
        seed,
    )
    yield Arm("chosen", chosen)


studies: tuple[Study, ...] = (reproduction,)


def draw(seed: int, held: int = HELD) -> dict[str, Ingredient]:
    """The target's posts and the helpers' examples of one seed."""
    rng = generator("cocktail", seed)
    posts = newsgroups()
    validation, test, left = [], [], {}
    for group, label in GROUPS.items():
        order = rng.permutation(len(posts["train"][group]))
        of = [_example(posts["train"][group][i], label) for i in order]
        validation += of[:held]
        left[group] = of[held : held + 10 * LABELS]
        of = [_example(text, label) for text in posts["test"][group]]
        test += [of[i] for i in rng.permutation(len(of))[:held]]
    seen = [example["text"] for example in (*validation, *test)]
    train = [example for of in left.values() for example in _without(of, seen)[:LABELS]]

    def helper(name: str, examples: Sequence[dict[str, str]], template: Template) -> Ingredient:
        some = [examples[i] for i in rng.permutation(len(examples))[: 2 * HELPER]]
        return Ingredient(InstructionTask(name, name, name, _without(some, seen)[:HELPER], (template,)))

    ask = Template("{text} . group", "{label}")
    target = [InstructionTask(TARGET, "topic", TARGET, rows, (ask,)) for rows in (train, validation, test)]
    more = Template("{text} . forum", "{label}")
    others = [_example(t, g.split(".")[-1]) for g, of in posts["train"].items() if g not in GROUPS for t in of]
    return {
        TARGET: Ingredient(*target),
        RELATED: helper(RELATED, others, more),
        "reuters": helper("reuters", reuters(), Template("{text} . topic", "{label}")),
        "books": helper("books", books(), Template("{text} . reader", "{label}")),
        "quotations": helper("quotations", quotations(), Template("", "{text}")),
    }


def pretrained(steps: int, seed: int) -> Model:
    """A small model that has read the training posts of all groups, without their labels."""
    texts = [text for of in newsgroups()["train"].values() for text in of]
    model = small_language_model("causal-lm", tokenizer(), width=64, layers=2, heads=4, context=CONTEXT, seed=seed)
    order = generator("cocktail", "read", seed).permutation(len(texts))[: 2 * steps * BATCH]
    encoded = encode_all([[(texts[i], True)] for i in order], model.processor, max_length=None)
    rows = Packer(CONTEXT, "bfd").pack([found._asdict() for found in encoded])
    read = TokenRows("posts without labels", {"train": rows}, pad=model.processor.pad_token_id)
    return fine_tune(model, read, f"{steps} steps", learning_rate=RATE_BEFORE, batch_size=BATCH, seed=seed)


@functools.cache
def tokenizer() -> Any:
    """The commonest words of the training posts, and all labels."""
    texts = [text for of in newsgroups()["train"].values() for text in of]
    labels = [*GROUPS.values(), *(g.split(".")[-1] for g in newsgroups()["train"]), "children", "adult"]
    labels += [*sorted({example["label"] for example in reuters()}), "group", "forum", "topic", "reader", "."]
    return word_tokenizer([*texts, *([" ".join(labels)] * 10_000)], VOCABULARY, context=CONTEXT)


@functools.cache
def newsgroups() -> dict[str, dict[str, list[str]]]:
    """split → group → the first words of its posts."""
    task = load_task("20newsgroups")
    found: dict[str, dict[str, list[str]]] = {}
    for split in ("train", "test"):
        found[split] = {name: [] for name in task.labels}
        for text, label in zip(task.texts(split), task.targets(split), strict=True):
            found[split][task.labels[label]].append(_first(text))
    return found


@functools.cache
def reuters() -> list[dict[str, str]]:
    return [_example(_first(text), label) for label, text in _table(assets.path("reuters-r8") / "reuters-r8-train.tab")]


@functools.cache
def books() -> list[dict[str, str]]:
    found = []
    for label, text in _table(assets.path("book-excerpts") / "book-excerpts.tab"):
        words = re.findall(r"\w+", text.lower())
        found += [_example(" ".join(words[i : i + WORDS]), label) for i in range(0, len(words) - WORDS, WORDS)]
    return found


@functools.cache
def quotations() -> list[dict[str, str]]:
    return [{"text": _first(part)} for text in SOURCES["quotations"]() for part in passages(text, 300)]


def _table(path: Path) -> list[tuple[str, str]]:
    """Labels and texts of a file in Orange's format."""
    table = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False, skip_rows_after_header=2)
    return [(label.replace("-", ""), text) for label, text in table.drop_nulls().select("Category", "Text").iter_rows()]


def _first(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())[:WORDS])


def _example(text: str, label: str) -> dict[str, str]:
    return {"text": text, "label": label}


def _without(examples: Sequence[dict[str, str]], seen: Sequence[str]) -> list[dict[str, str]]:
    there = shared_ngrams([example["text"] for example in examples], seen)
    return [examples[int(i)] for i in np.flatnonzero(~there)]
