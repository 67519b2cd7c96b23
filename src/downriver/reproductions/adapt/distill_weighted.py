"""Distilling from similar tasks, on handwritten digits: which sources to learn from when there are twenty labels.

The paper distils image classifiers into MobileNetV3 on eight targets. Here the target is to tell 5, 6, 7, 8 and 9 apart
from four labelled images each and 250 without labels. Six small networks trained on the other half of the images are
the sources: five on other questions about digits, one on random labels. The student is smaller than they.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from downriver.adapt import MultiSourceDistiller, SourceModel, fixmatch
from downriver.core import Budget, InputError, charge, generator
from downriver.reproductions.paper import Paper
from downriver.study import Arm, better, keeps, shared, study

paper = Paper(
    number=83,
    slug="distill_weighted",
    title="Distilling from Similar Tasks for Transfer Learning on a Budget",
    date="2023-04",
    room="adapt",
    claim="With few labels, a small model that also learns what models of similar tasks say of unlabelled data beats "
    "transfer from pretrained weights and FixMatch; weighing the sources by similarity matters, a wrong one does not "
    "help.",
)

# what a source was trained to say of a digit; -1: it never saw the digit
QUESTIONS: dict[str, Callable[[int], int]] = {
    "0 to 4": lambda d: d if d < 5 else -1,
    "5 to 7": lambda d: d - 5 if 5 <= d <= 7 else -1,
    "1, 8 or 9": lambda d: (1, 8, 9).index(d) if d in (1, 8, 9) else -1,
    "parity": lambda d: d % 2,
    "above 4": lambda d: int(d > 4),
}
RANDOM = "random labels"
TARGET, LABELLED, UNLABELLED = range(5, 10), 4, 250
TEACHER, STUDENT = 64, 24  # hidden units
STEPS, EPOCHS = {"small": 200, "tiny": 10}, {"small": 30, "tiny": 2}  # of the student, of a source
SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 16, "ratio": 5}


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) in [0, 1] and classes: for the sources; labelled, unlabelled and held-out ones of the target."""

    source: tuple[Tensor, np.ndarray]
    few: tuple[Tensor, Tensor]
    many: Tensor
    test: tuple[Tensor, Tensor]


@study(
    "distill-weighted",
    title="Twenty labels and six models of other tasks",
    claims=[
        better("weighted", than="supervised", on="accuracy"),
        better("weighted", than="transfer", on="accuracy"),
        better("weighted", than="FixMatch", on="accuracy"),
        better("nearest", than="supervised", on="accuracy"),
        better("nearest", than="random teacher", on="accuracy"),
        keeps("weighted", than="uniform", on="accuracy", within=0.005),
    ],
    seeds=10,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the split, the labels and all weights; every arm takes as many steps with the same optimiser."""
    if scale not in STEPS:
        raise InputError(f"scale {scale!r} is not one of {', '.join(STEPS)}")
    steps = Budget(STEPS[scale], "steps")

    @shared
    def data() -> Digits:
        return digits(seed)

    @shared
    def sources() -> list[SourceModel]:
        x, digit = data().source
        answers = {name: np.array([ask(int(d)) for d in digit]) for name, ask in QUESTIONS.items()}
        answers[RANDOM] = generator("distill-weighted", RANDOM, seed).integers(5, size=len(digit))
        return [SourceModel(*fit(x, y, TEACHER, EPOCHS[scale]), name=name) for name, y in answers.items()]

    @shared
    def fresh() -> tuple[nn.Module, nn.Module]:
        return mlp(STUDENT, len(TARGET))

    def measured(model: nn.Module) -> dict[str, float]:
        x, y = data().test
        with torch.no_grad():
            return {"accuracy": float((model(inputs=x)["logits"].argmax(dim=1) == y).float().mean())}

    def distilled(weights: Any, only: str | None = None) -> dict[str, float]:
        chosen = [s for s in sources() if only in (None, s.name)]
        distiller = MultiSourceDistiller(fresh(), chosen, weights=weights, optimizer="adam", seed=seed, **SETTINGS)
        found = distiller.fit(data().few, data().many, steps)
        alpha = {
            f"similarity of {n}": float(a) for n, a in zip(found.weights_.names, found.weights_.alpha, strict=True)
        }
        return measured(found.student_) | (alpha if weights == "auto" else {})

    def supervised(student: tuple[nn.Module, nn.Module]) -> dict[str, float]:
        distiller = MultiSourceDistiller(student, [], lam=1.0, optimizer="adam", seed=seed, **SETTINGS)
        return measured(distiller.fit(data().few, data().many, steps).student_)

    def transferred() -> dict[str, float]:
        x, digit = data().source
        trunk, _ = fit(x, np.array([QUESTIONS["0 to 4"](int(d)) for d in digit]), STUDENT, EPOCHS[scale])
        return supervised((trunk, fresh()[1]))

    def self_labelled() -> dict[str, float]:
        settings = SETTINGS | {"optimizer": "adam", "weight_decay": 0.0, "seed": seed}
        views: dict[str, Any] = {"weak": shifted, "strong": lambda x: damaged(shifted(x))}
        return measured(fixmatch(fresh(), data().few, steps, unlabelled=data().many, **views, **settings))

    yield Arm("supervised", lambda: supervised(fresh()))
    yield Arm("transfer", transferred)
    yield Arm("FixMatch", self_labelled)
    yield Arm("random teacher", lambda: distilled("uniform", RANDOM))
    yield Arm("nearest", lambda: distilled("nearest"))
    yield Arm("uniform", lambda: distilled("uniform"))
    yield Arm("weighted", lambda: distilled("auto"))


studies = (reproduction,)


def digits(seed: int) -> Digits:
    """Half of the images for the sources; of the other half's 5 to 9, four a class labelled, 250 without labels."""
    bundle = load_digits()
    rng = generator("distill-weighted", "digits", seed)
    x, order = torch.tensor(bundle.data / 16, dtype=torch.float32), rng.permutation(len(bundle.target))
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    rest = rest[np.isin(bundle.target[rest], TARGET)]
    few = np.concatenate([rest[bundle.target[rest] == d][:LABELLED] for d in TARGET])
    others = rest[~np.isin(rest, few)]

    def labelled(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return x[rows], torch.tensor(bundle.target[rows] - TARGET[0])

    return Digits((x[half], bundle.target[half]), labelled(few), x[others[:UNLABELLED]], labelled(others[UNLABELLED:]))


def mlp(hidden: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """One hidden ReLU layer on the 64 pixels, and a head."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU()), nn.Linear(hidden, classes)


def fit(x: Tensor, y: np.ndarray, hidden: int, epochs: int) -> tuple[nn.Module, nn.Module]:
    """A network trained on the rows with an answer."""
    x, target = x[torch.tensor(y >= 0)], torch.tensor(y[y >= 0])
    trunk, head = mlp(hidden, int(target.max()) + 1)
    optimiser = torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            loss = F.cross_entropy(head(trunk(x[rows])), target[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    charge(examples=epochs * len(x))
    return trunk.eval(), head.eval()


def shifted(x: Tensor) -> Tensor:
    """Every image moved by at most one pixel up, down, left or right."""
    dy, dx = torch.randint(-1, 2, (2, len(x)))
    padded = F.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    i, j = torch.arange(8), torch.arange(8)
    rows, columns = (1 + i + dy[:, None])[:, :, None], (1 + j + dx[:, None])[:, None, :]
    return padded[torch.arange(len(x))[:, None, None], rows, columns].flatten(1)


def damaged(x: Tensor) -> Tensor:
    """Every image with noise and a blank square of three pixels."""
    image = (x + 0.2 * torch.randn_like(x)).view(-1, 8, 8).clone()
    top, left = torch.randint(0, 6, (2, len(x)))
    i = torch.arange(8)
    inside = lambda start: (i >= start[:, None]) & (i < start[:, None] + 3)  # noqa: E731
    image[inside(top)[:, :, None] & inside(left)[:, None, :]] = 0
    return image.flatten(1)
