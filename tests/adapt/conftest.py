"""Toy tasks that a tiny model can learn in seconds, and a way to score it."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset

from downriver.models import Model, small
from downriver.models.features import inference
from downriver.tasks import Task


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_not_searched_for_garbage():
    """The Trainer collects garbage at every start, which takes a third of a second when every library is searched."""
    gc.freeze()
    yield
    gc.unfreeze()


def texts(n: int, seed: int, alphabets: tuple[str, ...] = ("abcde", "vwxyz")) -> tuple[list[str], list[int]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(alphabets), size=n)
    labels[: len(alphabets)] = np.arange(len(alphabets))
    words = ["".join(rng.choice(list(alphabets[k]), size=rng.integers(4, 12))) for k in labels]
    return words, labels.tolist()


@pytest.fixture(scope="session")
def letters() -> Task:
    """Words of early or late letters."""
    splits = {
        split: Dataset.from_dict(dict(zip(("text", "label"), texts(n, seed), strict=True)))
        for seed, (split, n) in enumerate({"train": 120, "validation": 40, "test": 80}.items())
    }
    return Task("letters", "text-classification", splits, ("text",), "label", labels=("early", "late"))


@pytest.fixture(scope="session")
def thirds() -> Task:
    """Words of early, middle or late letters."""
    words, labels = texts(150, 5, ("abcde", "klmno", "vwxyz"))
    return Task(
        "thirds",
        "text-classification",
        {"train": Dataset.from_dict({"text": words, "label": labels})},
        ("text",),
        "label",
    )


@pytest.fixture(scope="session")
def counts() -> Task:
    """Texts with the share of late letters in them: a regression."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("az"), size=12, p=[1 - p, p])) for p in rng.random(150)]
    rows = {"text": words, "share": [word.count("z") / 12 for word in words]}
    return Task("counts", "text-regression", {"train": Dataset.from_dict(rows)}, ("text",), "share")


@pytest.fixture
def encoder() -> Model:
    return small("text-encoder", "nano")


@pytest.fixture(scope="session")
def score() -> Callable[[Model, Task, str], tuple[float, float]]:
    """Accuracy (nan without classes) and mean loss on a split."""

    def measure(model: Model, task: Task, split: str = "test") -> tuple[float, float]:
        rows = list(task.rows(split))
        batch = {k: v.to(model.device) for k, v in model.collate(task)(rows).items()}
        with inference(model):
            out = model(**batch)
        right = (
            (out["logits"].argmax(1) == batch["labels"]).float().mean().item() if task.classification else float("nan")
        )
        return right, out["loss"].item()

    return measure


@pytest.fixture(scope="session")
def weights() -> Callable[[Model], dict[str, torch.Tensor]]:
    """A copy of every weight."""
    return lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()}
