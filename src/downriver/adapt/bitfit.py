"""BitFit: the bias terms learn, every matrix stays as it is.

Reach for it when thousands of tasks share one encoder and a task may take a tenth of a percent of its parameters; the
result is an ordinary model without any adapter. Ben Zaken, Goldberg and Ravfogel 2022.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from downriver.adapt.heads import HeadStart, ready
from downriver.adapt.lora import merge_adapter
from downriver.core import Budget, InputError
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import Precision, Schedule, fine_tune
from downriver.training.trainer import Term


@dataclass(frozen=True)
class BitFitConfig:
    """BitFit has nothing to choose."""


def bitfit(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    head: HeadStart = "probe",
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    schedule: Schedule = "linear",
    seed: int = 0,
    terms: Sequence[Term] = (),
    validation: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Train the biases and the head; the model given stays as it is.

    Parameters
    ----------
    learning_rate
        The largest of the paper's grid (1e-4 to 1e-3): biases want more than matrices.
    head, budget, batch_size, weight_decay, warmup, schedule, terms, validation, checkpoints, precision
        As in ``lora``.

    An adapter that the model carries is merged into its weights first. Charges examples, tokens, FLOPs and parameters
    (trained: biases and head).

    Raises ``InputError`` for a model without biases, as Llama is one: ``adapt.peft(..., tuner="beft")`` adds some.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> model = small("text-encoder", "nano")
    >>> tuned = bitfit(model, task, "16 examples", batch_size=4)
    >>> pairs = zip(model.backbone.named_parameters(), tuned.backbone.parameters(), strict=True)
    >>> {name.split(".")[-1] for (name, old), new in pairs if not old.equal(new)}
    {'bias'}
    """
    if hasattr(model.backbone, "merge_and_unload"):
        model = merge_adapter(model)
    biases = {f"backbone.{name}" for name in bias_names(model.backbone)}
    if not biases:
        raise InputError(f"{model.source or type(model.backbone).__name__} has no biases: another method is expected")
    model, left = ready(model, task, Budget.parse(budget), head=head, batch_size=batch_size, seed=seed)
    return fine_tune(
        model,
        task,
        left,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        seed=seed,
        trainable=lambda name: name.startswith("head.") or name in biases,
        terms=terms,
        validation=validation,
        checkpoints=checkpoints,
        precision=precision,
        in_place=True,
    )


def bias_names(backbone: nn.Module) -> list[str]:
    """The names of all biases of a module: of linear layers, convolutions and norms.

    >>> bias_names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.LayerNorm(2)))
    ['0.bias', '2.bias']
    """
    return [name for name, _ in backbone.named_parameters() if name.split(".")[-1] == "bias"]
