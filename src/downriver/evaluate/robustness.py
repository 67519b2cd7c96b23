"""Misspelt input: what a model still does when a share of the characters of its texts is disturbed.

Reach for it to compare models that read text differently (words, pieces, bytes), each on the very same misspelt rows.
After the tests of "Hierarchical Autoregressive Transformers: Combining Byte- and Word-Level Processing for Robust,
Adaptable Language Models" (2025), with the kinds of noise apart.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.core.measurement import Measurement
from downriver.core.seeds import generator
from downriver.evaluate.evaluate import evaluate
from downriver.models.model import Model
from downriver.tasks.task import Task

Noise = Literal["permute", "delete", "insert", "swap", "upper"]
NOISES: tuple[Noise, ...] = get_args(Noise)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def perturb(text: str, share: float, noise: Noise, rng: np.random.Generator) -> str:
    """A text in which a share of the characters that are no white space, drawn at random, is disturbed.

    ``permute`` puts those characters in another order among themselves; ``delete`` leaves them out; ``insert`` puts a
    random letter behind each; ``swap`` exchanges each with the character behind it, once; ``upper`` makes capitals.

    Raises ``InputError`` for a share outside [0, 1] and other noise.

    >>> perturb("the river runs", 1.0, "upper", np.random.default_rng(0))
    'THE RIVER RUNS'
    """
    if noise not in NOISES:
        raise unknown("noise", noise, NOISES)
    if not 0 <= share <= 1:
        raise InputError(f"share is {share}: a number from 0 to 1 is expected")
    signs = list(text)
    places = [i for i, sign in enumerate(signs) if not sign.isspace()]
    chosen = np.sort(rng.permutation(places)[: round(share * len(places))]).astype(int).tolist()
    if noise == "permute":
        for place, sign in zip(chosen, rng.permutation(chosen).astype(int).tolist(), strict=True):
            signs[place] = text[sign]
    swapped = -1  # the place that the last exchange went to
    for place in chosen:
        if noise == "delete":
            signs[place] = ""
        elif noise == "insert":
            signs[place] += LETTERS[rng.integers(len(LETTERS))]
        elif noise == "swap" and swapped < place < len(signs) - 1:
            swapped = place + 1
            signs[place], signs[place + 1] = signs[place + 1], signs[place]
        elif noise == "upper":
            signs[place] = signs[place].upper()
    return "".join(signs)


def robustness(
    model: Model,
    task: Task,
    *,
    shares: Sequence[float] = (0.1,),
    noises: Sequence[Noise] = NOISES,
    split: str = "test",
    metrics: Sequence[str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Measurement]:
    """Score a model on a task as it is, and with each kind of noise and share of disturbed characters.

    A measurement is named by its metric, and under noise also by kind and share: ``accuracy``, ``accuracy, swap 0.1``.
    Every text of every row is disturbed; a row is disturbed alike for all models under one ``seed``.

    Raises ``InputError`` for a task without texts or without a target, unknown noise, and a share outside [0, 1].

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})
    >>> task = Task("mood", "text-classification", {"test": rows}, ("text",), "label", ("no", "yes"), ("accuracy",))
    >>> scores = robustness(small("text-encoder", "nano").with_head(task), task, noises=["swap"])
    >>> [score.metric for score in scores]
    ['accuracy', 'accuracy, swap 0.1']
    """
    if not task.kind.startswith("text-"):
        raise InputError(f"task {task.name!r} is {task.kind}: a task with texts and a target is expected")
    for noise in noises:
        for share in shares:
            perturb("", share, noise, generator("noise"))  # says what is wrong before anything is computed
    found = evaluate(model, task, split=split, metrics=metrics, batch_size=batch_size)
    for noise in noises:
        for share in shares:
            noisy = _disturbed(task, split, share, noise, seed)
            scores = evaluate(model, noisy, split=split, metrics=metrics, batch_size=batch_size)
            found += [dataclasses.replace(row, metric=f"{row.metric}, {noise} {share:g}") for row in scores]
    return found


def _disturbed(task: Task, split: str, share: float, noise: Noise, seed: int) -> Task:
    rows = task.rows(split)
    for name in task.inputs:
        texts = [
            perturb(text, share, noise, generator("noise", noise, share, name, number, seed))
            for number, text in enumerate(rows[name])
        ]
        # a text of which nothing is left stays a text
        rows = rows.remove_columns(name).add_column(name, [text or " " for text in texts])
    return dataclasses.replace(task, splits={**task.splits, split: rows})
