"""Paper 52: a prompt and labels learnt together from queries, on a small model that needs both prompt and examples.

The paper asks GPT-3 and others. Here a Llama of three layers, one token a word, has learnt a language of its own: texts
of three words of a topic and three of a tone, whose label is the topic if one of two words stands in the instruction.
For any other instruction a fifth of the labels are drawn at random, and most of the others follow the tone; unless the
examples before are labelled by topic: then this text is, too. Of 20 candidates for the prompt, two work. The learner
gets 300 texts without labels, in a third of which tone and topic differ.
"""

import functools
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np

from downriver.adapt import UnsupervisedPromptLearner
from downriver.adapt.unsupervised_prompts import LabelScorer
from downriver.core import Budget, InputError, Measurement, generator
from downriver.models import Model, small_language_model, word_tokenizer
from downriver.models.chat import HFChat
from downriver.reproductions.paper import Paper
from downriver.study import Arm, better, keeps, shared, study
from downriver.training import TokenRows
from downriver.training.engine import fine_tune

paper = Paper(
    number=52,
    slug="unsupervised_prompts",
    title="On Unsupervised Prompt Learning for Classification with Black-box Language Models",
    date="2024-10",
    room="adapt",
    claim="Without labels, a prompt learnt together with pseudo labels, and examples in the prompt already while it is "
    "learnt, classifies better than earlier black-box prompting.",
)

TOPICS = {"down": [f"a{i}" for i in range(12)], "up": [f"b{i}" for i in range(12)]}
TONES = {"down": [f"c{i}" for i in range(12)], "up": [f"d{i}" for i in range(12)]}
LABELS = list(TOPICS)
INSTRUCTIONS = [f"i{i}" for i in range(20)]
WORKING = INSTRUCTIONS[:2]
WORDS, MISLED, BY_TONE, RANDOM, DEMOS, TOKENS = 3, 1 / 3, 0.85, 0.2, 4, 3
# steps of training, texts, epochs
SCALES = {"small": (400, 300, 8), "tiny": (5, 20, 1)}
BATCH = 64
FORMAT: dict[str, Any] = {"template": "{prompt} | {demos}{text} =>", "demo": "{text} => {label} ; "}


@study(
    "unsupervised_prompts",
    title="Sorting 300 texts without a label by a small model behind queries",
    claims=[
        better("prompt and examples", than="zero-shot", on="accuracy"),
        keeps("prompt and examples", than="prompt alone", on="accuracy", within=0.01),
        better("prompt and examples", than="examples alone", on="accuracy"),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed trains the model anew and draws the texts and all prompts."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    steps, count, epochs = SCALES[scale]

    @shared
    def model() -> Model:
        content = [word for lists in (TOPICS, TONES) for label in LABELS for word in lists[label]]
        words = [*content, *INSTRUCTIONS, *LABELS, "|", "=>", ";"]
        lm = small_language_model("causal-lm", word_tokenizer([" ".join(words)]), layers=3, context=96, seed=seed)
        settings: Any = {"learning_rate": 2e-3, "batch_size": BATCH, "schedule": "cosine", "seed": seed}
        return fine_tune(lm, lessons(lm, steps * BATCH, seed), f"{steps} steps", **settings)

    @shared
    def texts() -> tuple[list[str], list[str]]:
        rng = generator("unsupervised_prompts texts", seed)
        drawn = [text(rng) for _ in range(count)]
        return [words for words, _, _ in drawn], [topic for _, topic, _ in drawn]

    def measured(name: str) -> list[Measurement]:
        lm = HFChat(model(), strings="text", progress=False)
        asked, right = texts()
        if name == "zero-shot":
            words = [f" {label}" for label in LABELS]
            queries = [FORMAT["template"].format(prompt="", demos="", text=each).lstrip() for each in asked]
            said = [LABELS[k] for k in LabelScorer(lm, words)(queries).argmax(axis=1)]
            return [Measurement("accuracy", float(np.mean(np.array(said) == np.array(right))))]
        learner = UnsupervisedPromptLearner(
            lm,
            LABELS,
            n_tokens=TOKENS,
            candidates=[INSTRUCTIONS[-1]] if name == "examples alone" else INSTRUCTIONS,
            k_demos=0 if name == "prompt alone" else DEMOS,
            learning_rate=0.1,
            epochs=1 if name == "examples alone" else epochs,
            samples=2 if name == "examples alone" else 10,
            budget=60_000,
            calibrate=False,
            seed=seed,
            progress=False,
            **FORMAT,
        ).fit(asked)
        said = learner.pseudo_labels_["label"].to_list()
        return [
            Measurement("accuracy", float(np.mean(np.array(said) == np.array(right)))),
            Measurement("calls", learner.calls_, direction="lower"),
            Measurement("working words", sum(word in WORKING for word in learner.prompt_.split())),
        ]

    for name in ("zero-shot", "examples alone", "prompt alone", "prompt and examples"):
        yield Arm(name, functools.partial(measured, name))


def text(rng: np.random.Generator) -> tuple[str, str, str]:
    """Words, the label that their topic has, and that of their tone."""
    topic = int(rng.integers(2))
    tone = 1 - topic if rng.random() < MISLED else topic
    words = [*rng.choice(TOPICS[LABELS[topic]], size=WORDS), *rng.choice(TONES[LABELS[tone]], size=WORDS)]
    return " ".join(rng.permutation(words).tolist()), LABELS[topic], LABELS[tone]


def lesson(rng: np.random.Generator) -> list[str]:
    """An instruction, up to four examples and a text, each with its label, as words."""
    size = int(rng.integers(0, TOKENS + 1))
    instruction = rng.choice(INSTRUCTIONS, size=size).tolist()
    if size and rng.random() < 0.3:
        instruction[int(rng.integers(size))] = str(rng.choice(WORKING))
    clean = any(word in WORKING for word in instruction) or rng.random() < 0.2
    said = [*instruction, "|"]
    number = int(rng.integers(0, DEMOS + 1))
    if not number:
        clean = any(word in WORKING for word in instruction)
    for place in range(number + 1):
        words, topic, tone = text(rng)
        if not clean:
            topic = tone if rng.random() < BY_TONE else topic
            topic = str(rng.choice(LABELS)) if rng.random() < RANDOM else topic
        said += [*words.split(), "=>", topic]
        said += [";"] if place < number else []
    return said


def lessons(model: Model, count: int, seed: int) -> TokenRows:
    """Token rows with the loss on the labels."""
    rng = generator("unsupervised_prompts lessons", seed)
    tokenizer: Any = model.processor
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    vocabulary = tokenizer.get_vocab()
    for _ in range(count):
        words = lesson(rng)
        ids = start + [vocabulary[word] for word in words]
        asked = [False] * len(start) + [word in LABELS for word in words]
        rows["input_ids"].append(ids)
        rows["labels"].append([i if own else -100 for i, own in zip(ids, asked, strict=True)])
    return TokenRows("lessons", {"train": datasets.Dataset.from_dict(rows)}, pad=tokenizer.pad_token_id)


studies = (reproduction,)
