"""LoRA: the pretrained weights stay, beside every linear layer a product of two thin matrices learns.

Reach for it when many tasks share one base, memory is short, or what the model could do must mostly stay: an adapter
is a few megabytes, can be taken off again, and can be merged. Hu et al. 2021, through peft; all linear layers rather
than the paper's attention projections only (Dettmers et al. 2023 found that needed to reach full fine-tuning).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from downriver.adapt.heads import HeadStart, ready
from downriver.core import Budget, InputError, seeded
from downriver.models.adapted import in_wrapper
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import Precision, Schedule, clone, fine_tune
from downriver.training.trainer import Term


def lora(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: str | list[str] | None = None,
    head: HeadStart = "probe",
    learning_rate: float = 4e-4,
    batch_size: int = 16,
    weight_decay: float = 0.1,
    warmup: float = 0.06,
    schedule: Schedule = "linear",
    seed: int = 0,
    terms: Sequence[Term] = (),
    validation: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Train a LoRA adapter and the head; the model given stays as it is.

    The backbone of the returned model is a ``PeftModel`` round the same base weights; ``model.save`` writes it as a
    peft adapter and ``merge_adapter`` folds it in.

    Parameters
    ----------
    rank, alpha, learning_rate, weight_decay, warmup
        W becomes W + alpha / rank · B A with A (rank, inputs) random and B (outputs, rank) zero. Defaults are the
        authors' settings for RoBERTa-large on GLUE (their public scripts).
    dropout
        On the adapter's input.
    target_modules
        Layers to adapt, as peft reads it: name endings in a list, or one regular expression. Default: every linear
        layer but an LM head, or in a backbone without linear layers (ResNet) every convolution.
    head
        Where the head starts, as in ``full``: ``probe`` (default), ``random`` or ``keep``.
    budget, batch_size, schedule, terms, validation, checkpoints, precision
        As in ``fine_tune``; the visits of the head's probe are part of the budget.

    An adapter that the model carries is merged into its weights first. Charges examples, tokens, FLOPs and parameters
    (trained: those of adapter and head).

    Raises ``InputError`` for a rank below 1, and for target modules that the backbone lacks, naming those it has.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> tuned = lora(small("text-encoder", "nano"), task, "16 examples", batch_size=4, rank=2)
    >>> type(tuned.backbone).__name__, type(merge_adapter(tuned).backbone).__name__
    ('PeftModel', 'BertModel')
    """
    _check(rank, alpha, dropout)
    model = merge_adapter(model) if hasattr(model.backbone, "merge_and_unload") else model
    model, left = ready(model, task, Budget.parse(budget), head=head, batch_size=batch_size, seed=seed)
    add_adapter(model, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, seed=seed)
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
        trainable=lambda name: name.startswith("head.") or "lora_" in name,
        terms=terms,
        validation=validation,
        checkpoints=checkpoints,
        precision=precision,
        in_place=True,
    )


def add_adapter(
    model: Model,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: str | list[str] | None = None,
    seed: int = 0,
) -> None:
    """Put a fresh LoRA adapter round the backbone, in place: for a method that trains in its own way.

    Parameters and errors are those of ``lora``; a new adapter changes no output.
    """
    _check(rank, alpha, dropout)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or linear_layers(model.backbone),
        task_type="CAUSAL_LM" if model.kind == "causal-lm" else None,
    )
    with seeded("lora", seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's use of an old name
        try:
            model.backbone = get_peft_model(model.backbone, settings)
        except ValueError as error:
            known = sorted({name.split(".")[-1] for name in linear_layers(model.backbone)})
            raise InputError(
                f"target_modules {target_modules!r}: {error} (layers there are: {', '.join(known)})"
            ) from None


def merge_adapter(model: Model) -> Model:
    """A copy of an adapted model whose backbone has plain weights with the adapter folded in; its outputs are the same.

    For merging and compressing, which work on plain weights. Raises ``InputError`` when the model carries no adapter,
    and when its adapter cannot be merged, as one that works on the data (a router, prompts) cannot.
    """
    if not hasattr(model.backbone, "merge_and_unload"):
        raise InputError(f"the model {model.source or type(model.backbone).__name__} carries no adapter to merge")
    merged = clone(model)
    adapted: Any = merged.backbone
    if in_wrapper(adapted):
        raise InputError(f"an adapter of type {adapted.active_peft_config.peft_type.value} cannot be merged")
    try:
        merged.backbone = adapted.merge_and_unload()
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"this adapter cannot be merged: {' '.join(str(error).split())}") from None
    return merged.requires_grad_(True)


def _check(rank: int, alpha: int, dropout: float) -> None:
    if rank < 1:
        raise InputError(f"rank is {rank}: at least 1 is expected")
    if alpha < 1:
        raise InputError(f"alpha is {alpha}: at least 1 is expected")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}: from 0 to below 1 is expected")


def linear_layers(backbone: Any) -> list[str]:
    """The names of all linear layers but the LM head; of all convolutions where there is no linear layer.

    >>> from downriver.models import small
    >>> len(linear_layers(small("causal-lm", "nano").backbone))
    14
    """
    lm_head = backbone.get_output_embeddings() if hasattr(backbone, "get_output_embeddings") else None
    for types in ((nn.Linear, Conv1D), (nn.Conv2d,)):
        found = [name for name, layer in backbone.named_modules() if isinstance(layer, types) and layer is not lm_head]
        if found:
            return found
    raise InputError(f"{type(backbone).__name__} has no linear layer and no convolution: nothing for LoRA to adapt")
