"""Full fine-tuning: every weight of backbone and head learns.

Reach for it when there are thousands of rows and what the model could do before need not stay as it was; it is the
baseline of every other method of this room. BERT's recipe (Devlin et al. 2019), with the head fitted first (Kumar et
al. 2022).
"""

from collections.abc import Sequence
from pathlib import Path

from downriver.adapt.heads import HeadStart, ready
from downriver.adapt.lora import merge_adapter
from downriver.core import Budget
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import Precision, Schedule, fine_tune
from downriver.training.trainer import Term


def full(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    head: HeadStart = "probe",
    learning_rate: float = 5e-5,
    batch_size: int = 16,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    schedule: Schedule = "linear",
    seed: int = 0,
    terms: Sequence[Term] = (),
    validation: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Fine-tune all weights on the task's train split; the model given stays as it is.

    Parameters
    ----------
    budget
        ``"2000 examples"`` are 2000 visits to rows, those of the probe included; also steps, tokens, FLOPs, seconds.
    head
        ``probe`` (default): a quarter of the budget at most goes to a linear probe, whose head training starts from.
        ``random``: a fresh head. ``keep``: the head that the model has, to continue or to give several runs one start.
        Within one small budget the probe pays: 1 000 visits of 32 tokens of 20 newsgroups took all-MiniLM-L6-v2 to an
        accuracy of 0.64, from a random head to 0.35 (to 0.64 and 0.58 with a learning rate of 2e-4; one seed).
    learning_rate, batch_size, weight_decay, warmup, schedule
        From the grid of Devlin et al. 2019 (appendix A.3: 2e-5 to 5e-5, batches of 16 or 32, decay 0.01, a linear
        schedule with warm-up). Weights that were never pretrained want 1e-3 or so.
    terms, validation, checkpoints, precision
        As in ``fine_tune``.

    An adapter that the model carries is merged into its weights first. Charges examples, tokens, FLOPs and parameters.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> tuned = full(small("text-encoder", "nano"), task, "16 examples", batch_size=4, learning_rate=1e-3)
    >>> tuned.head
    Linear(in_features=32, out_features=2, bias=True)
    """
    if hasattr(model.backbone, "merge_and_unload"):
        model = merge_adapter(model)
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
        trainable=lambda name: True,
        terms=terms,
        validation=validation,
        checkpoints=checkpoints,
        precision=precision,
        in_place=True,
    )
