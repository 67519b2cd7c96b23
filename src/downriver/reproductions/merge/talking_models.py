"""Paper 3: a small student of handwritten digits in talk with a large teacher, against plain ways of distilling.

The paper distils large vision and text models into small ones for downstream tasks. Here the teacher is a perceptron
(256-256) that learnt to name the digits on half of the images, each shifted in four directions. The student (24-24)
is to tell four groups of digits apart, drawn by the seed, from 40 labelled images of the other half and 340 without
labels; the teacher knows nothing of the groups and stays as it is. Every arm takes as many steps with the same
optimiser. Settings were chosen on seeds that the study does not use.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor, nn

from downriver.adapt import full
from downriver.core import Budget, InputError, Measurement, generator, seeded
from downriver.evaluate.evaluate import evaluate
from downriver.merge.distill import Distiller, HintDistiller, LabelDistiller, RelationDistiller
from downriver.merge.talking_models import InteractiveDistiller
from downriver.models import Model
from downriver.reproductions.paper import Paper
from downriver.study import Arm, better, keeps, shared, study
from downriver.tasks.task import Task
from downriver.training.engine import clone, fine_tune

paper = Paper(
    number=3,
    slug="talking_models",
    title="Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive Communication",
    date="2023-10",
    room="merge",
    claim="A student that tells a frozen pretrained teacher what it reads, and learns from answers made for it, "
    "becomes better at a downstream task than by ordinary distillation or without a teacher.",
)

STEPS = {"small": (600, 400), "tiny": (20, 12)}  # of the teacher, of a student
LABELLED, UNLABELLED, GROUPS = 40, 340, 4
LAYERS = ("1", "3")  # what the two hidden layers give
SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 16, "ratio": 3}
TALK: dict[str, Any] = {"message_dim": 64, "student_layers": LAYERS, "teacher_layers": LAYERS}


@study(
    "talking-models",
    title="Forty labels and a teacher that knows digits",
    claims=[
        better("interactive", than="hint", on="accuracy"),
        keeps("interactive", than="no teacher", on="accuracy", within=0.01),
        better("interactive", than="no teacher", on="accuracy"),
        better("interactive", than="relations", on="accuracy"),
        better("interactive", than="soft labels", on="accuracy"),
    ],
    seeds=10,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the halves, the groups, the labelled images and all weights."""
    if scale not in STEPS:
        raise InputError(f"scale {scale!r} is not one of {', '.join(STEPS)}")
    pretraining, steps = STEPS[scale]

    @shared
    def tasks() -> tuple[Task, Task, Dataset]:
        return digits(seed)

    @shared
    def teacher() -> Model:
        source, _, _ = tasks()
        made = perceptron(256, len(source.labels), seed)
        return fine_tune(made, source, f"{pretraining} steps", learning_rate=1e-3, batch_size=64, seed=seed)

    @shared
    def student() -> Model:
        return perceptron(24, GROUPS, seed)

    @shared
    def probed() -> Model:
        """The teacher with a head for the groups, fitted to the labelled images; the teacher itself stays."""
        _, task, _ = tasks()
        with seeded("probe", seed):
            headed = Model(clone(teacher()).backbone, head=nn.Linear(256, GROUPS), labels=task.labels)
        settings: Any = {"learning_rate": 1e-2, "batch_size": 16, "seed": seed}
        return fine_tune(headed, task, f"{steps} steps", trainable=lambda name: name.startswith("head"), **settings)

    def made(name: str) -> Distiller:
        if name == "hint":
            return HintDistiller(student(), teacher(), layers=(LAYERS[1], LAYERS[1]), seed=seed)
        if name == "relations":
            return RelationDistiller(student(), teacher(), layers=(LAYERS[1], LAYERS[1]), seed=seed)
        if name == "soft labels":
            return LabelDistiller(student(), probed(), seed=seed)
        return InteractiveDistiller(student(), teacher(), seed=seed, **TALK)

    def measured(name: str) -> list[Measurement]:
        _, task, more = tasks()
        extra: Mapping[str, float] = {}
        if name == "no teacher":
            settings: Any = {"learning_rate": SETTINGS["learning_rate"], "batch_size": SETTINGS["batch_size"]}
            tuned = full(student(), task, f"{steps} steps", head="keep", weight_decay=0.0, seed=seed, **settings)
        elif name == "teacher's probe":
            tuned = probed()
        else:
            distiller = made(name)
            tuned = distiller.fit(task, f"{steps} steps", unlabelled=more, seed=seed, **SETTINGS)
            if isinstance(distiller, InteractiveDistiller):
                report = distiller.report_
                extra = {"CKA of state and answer": report.cka} | {
                    f"variance of {talker}": variance for talker, variance in report.message_variance.items()
                }
        rows = [row for row in evaluate(tuned, task, split="test", metrics=("accuracy",)) if row.metric == "accuracy"]
        return rows + [Measurement(metric, value) for metric, value in extra.items()]

    for name in ("no teacher", "teacher's probe", "soft labels", "hint", "relations", "interactive"):
        yield Arm(name, functools.partial(measured, name))


studies = (reproduction,)


def digits(seed: int) -> tuple[Task, Task, Dataset]:
    """The teacher's task (ten digits, shifted images), the student's (groups, forty labels) and its unlabelled rows."""
    bundle = load_digits()
    rng = generator("talking-models", "digits", seed)
    images, order = torch.tensor(bundle.data / 16, dtype=torch.float32), rng.permutation(len(bundle.target))
    group = rng.permutation([d % GROUPS for d in range(10)])[bundle.target]
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    few, more, test = rest[:LABELLED], rest[LABELLED : LABELLED + UNLABELLED], rest[LABELLED + UNLABELLED :]

    def rows(pixels: Tensor, labels: Any) -> Dataset:
        return Dataset.from_dict({"pixels": pixels.tolist(), "label": [int(label) for label in labels]})

    moved = torch.cat([shifted(images[half], dy, dx) for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))])
    names = tuple(f"group {g}" for g in range(GROUPS))
    splits = {"train": rows(images[few], group[few]), "test": rows(images[test], group[test])}
    source = {"train": rows(moved, [*bundle.target[half]] * 4)}
    ten = tuple(str(d) for d in range(10))
    return (
        Task("digits", "tabular-classification", source, ("pixels",), "label", ten),
        Task("groups of digits", "tabular-classification", splits, ("pixels",), "label", names),
        rows(images[more], [0] * UNLABELLED).select_columns(["pixels"]),
    )


def perceptron(hidden: int, classes: int, seed: int) -> Model:
    """Two hidden ReLU layers on the 64 pixels, and a head."""
    with seeded("perceptron", hidden, classes, seed):
        trunk = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        return Model(trunk, head=nn.Linear(hidden, classes))


def shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """Images (n, 64) moved by so many pixels; what comes in is blank."""
    image = nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    return image[:, 1 - dy : 9 - dy, 1 - dx : 9 - dx].flatten(1)
