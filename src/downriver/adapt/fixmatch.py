"""FixMatch: the model labels unlabelled rows itself and learns those it is sure of under strong augmentation.

Reach for it as the baseline of methods that use unlabelled rows: it needs no other model, but augmentations that keep
the class. Sohn et al. 2020; without the moving average of the weights that they evaluate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.adapt.multi_teacher import SourceModel, encode, labelled
from downriver.adapt.multi_teacher import unlabelled as without_labels
from downriver.adapt.two_streams import Draw, Optimizer, Recipe, forward, train
from downriver.core import Budget, InputError
from downriver.models.model import Model
from downriver.training.engine import clone
from downriver.training.trainer import Batch


def fixmatch(
    student: Model | tuple[nn.Module, nn.Module],
    rows: Any,
    budget: Budget | str,
    *,
    unlabelled: Any,
    strong: Callable[[Any], Any],
    weak: Callable[[Any], Any] | None = None,
    threshold: float = 0.95,
    weight: float = 1.0,
    optimizer: Optimizer = "sgd",
    learning_rate: float = 0.03,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    ratio: int = 7,
    seed: int = 0,
    validation: Any = None,
) -> Model:
    """Train a copy of the student on CE(labelled) + ``weight`` · CE(strong view of a row, its label by the weak view).

    Parameters
    ----------
    student
        A ``Model`` with a head for the task, or a pair of modules (backbone, head).
    rows, unlabelled, validation
        As in ``MultiSourceDistiller.fit``.
    strong, weak
        Map a batch of rows (a tensor, or rows of a task as dictionaries) to augmented ones; without ``weak`` the weak
        view is the row as it is. Labelled rows are seen weakly augmented.
    threshold
        An unlabelled row counts when the model's largest probability reaches it; 0.95 and the settings of the
        optimiser are those of the paper for CIFAR-10.

    Charges examples, tokens, FLOPs and parameters, as ``distill_weighted`` does.

    >>> x, y = torch.randn(40, 4), torch.arange(40) % 2
    >>> pair = nn.Linear(4, 5), nn.Linear(5, 2)
    >>> noisy = lambda rows: rows + 0.1 * torch.randn_like(rows)
    >>> fixmatch(pair, (x[:10], y[:10]), "2 steps", unlabelled=x[10:], strong=noisy).head
    Linear(in_features=5, out_features=2, bias=True)
    """
    if not (0 < threshold <= 1 and weight >= 0):
        raise InputError(f"threshold is {threshold} and weight {weight}: within (0, 1], and 0 or more, are expected")
    few = labelled(rows)
    many = without_labels(unlabelled, few)
    held = None if validation is None else labelled(validation, "validation")
    learner = clone(student if isinstance(student, Model) else SourceModel(*student).model)

    def loss(draw: Draw) -> tuple[dict[str, Tensor], Sequence[Batch]]:
        other = many.take(draw.unlabelled)
        weakly = [part if weak is None else weak(part) for part in (few.take(draw.labelled), other)]
        views = [encode(learner, part, few.view) for part in (*weakly, strong(other))]
        own, sure, hard = (forward(learner, view)[1].float() for view in views)
        assert few.targets is not None
        labels = F.cross_entropy(own, few.targets[draw.labelled].to(own.device))
        confidence, guess = torch.softmax(sure.detach(), dim=1).max(dim=1)
        mask = (confidence >= threshold).float()
        consistency = (mask * F.cross_entropy(hard, guess, reduction="none")).mean()
        parts = {"loss": labels + weight * consistency, "labels": labels, "others": consistency, "sure": mask.mean()}
        return parts, views

    recipe = Recipe(batch_size, ratio, optimizer, learning_rate, weight_decay, seed)
    train(learner, nn.ModuleList(), (few, many), loss, Budget.parse(budget), recipe, validation=held)
    return learner.eval()
