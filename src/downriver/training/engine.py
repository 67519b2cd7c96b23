"""Training on the Hugging Face ``Trainer``: any budget, one seed, exact cost, resumable.

Reach for ``adapt.full`` or ``adapt.lora`` to get a task done, and for this one to build a method of your own: it
takes the parameters that learn (``trainable``), the loss (``objective``) and what is added to it (``terms``), and the
order of the rows (``order``), and leaves the loop to the Trainer.
"""

import copy
import hashlib
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from downriver.core import Budget, InputError, charge, count_flops, seeded, unknown
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.rows import TokenRows
from downriver.training.trainer import (
    Bar,
    Batch,
    Batches,
    Objective,
    Spending,
    Term,
    TermTrainer,
    loss_of,
    tokens_in,
)

Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
OBJECTIVE = "objective"


def fine_tune(
    model: Model,
    task: Task | TokenRows,
    budget: Budget | str,
    *,
    learning_rate: float,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    schedule: Schedule = "linear",
    seed: int = 0,
    trainable: Callable[[str], bool] | None = None,
    terms: Sequence[Term] = (),
    validation: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    in_place: bool = False,
    objective: Objective | None = None,
    order: Callable[[int], int] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float = 1.0,
    accumulate: int = 1,
) -> Model:
    """Train a copy of the model on the task's train split until the budget is spent.

    The model must be ready for the task: with a head (``model.with_head(task)``) where the task needs one. AdamW with
    the Trainer's settings (gradients clipped to norm ``clip``, no decay on biases and norms). Rows are
    visited in a new random order every epoch and every batch is full, so that a step is ``batch_size`` examples
    whatever the size of the split. Order, dropout and masking depend on ``seed`` alone: on a CPU the same seed gives
    the same weights bit by bit.

    Parameters
    ----------
    budget
        ``Budget(2000, "examples")`` or ``"2000 examples"``: visits to rows, so 125 steps of 16. In FLOPs, one real
        step is counted. In tokens (without padding) and seconds the run itself is measured: it ends before one more
        average step would go beyond, and the schedule follows the share that is spent.
    learning_rate, warmup, schedule
        Peak rate; the share of the run over which it rises to the peak; how it falls from there to nothing (``linear``,
        ``cosine``) or does not (``constant``). A tenth and ``linear`` are the recipe of BERT (Devlin et al. 2019).
    trainable
        Which parameters learn, by name (``backbone.…``, ``head.weight``); default: those that require gradients now.
    terms
        Regularisers added to the loss.
    validation
        So many times, at equal distances, measure the loss on the validation split, and in the end return the weights
        that had the lowest. 0 (default): the last weights, and no validation split is needed.
    checkpoints
        A folder for some ten checkpoints of the run (the last two are kept). Called again with the same arguments, a
        killed run continues to the same result and a finished one is only loaded; other arguments are refused.
    precision
        ``bf16`` is mixed precision; ``auto`` takes it where a GPU can, else ``fp32``.
    callbacks
        ``TrainerCallback`` objects of your own: ``on_log`` sees loss, learning rate and every term.
    in_place
        Train the model given instead of a copy: for a method that made the copy itself.
    objective
        ``objective(model, batch)`` gives ``loss`` (and what terms read) instead of the model's own
        ``model(**batch)``. An ``nn.Module`` with parameters of its own has them trained with the model's, and kept
        in checkpoints; they are not part of the model that is returned.
    order
        The row of the train split that visit number 0, 1, 2, ... goes to, a function of that number alone: a sampler
        of mixtures, a schedule in phases. By default every row once in a random order, then once more in another.

    Charges examples, tokens, FLOPs (one counted step times the steps) and parameters to the running meters.

    Raises ``InputError`` for a missing split or head, a budget below one step and parameters out of range, and
    ``DownriverError`` naming step and learning rate when the loss is no longer finite.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["good", "bad", "fine", "poor"], "label": [1, 0, 1, 0]})
    >>> task = Task("mood", "text-classification", {"train": rows}, ("text",), "label")
    >>> model = small("text-encoder", "nano").with_head(task)
    >>> tuned = fine_tune(model, task, "8 examples", batch_size=4, learning_rate=1e-3)
    >>> torch.equal(model.head.weight, tuned.head.weight)
    False
    """
    budget = Budget.parse(budget)
    if accumulate < 1 or batch_size % accumulate:
        raise InputError(f"batch_size {batch_size}, accumulate {accumulate}: equal parts of a batch are expected")
    _check(learning_rate, batch_size, weight_decay, warmup, schedule, precision, terms, validation)
    columns = [*task.inputs, *([task.target] if task.target else [])]
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and clip > 0):
        raise InputError(f"betas {betas}, clip {clip}: two numbers from 0 to below 1 and a positive one are expected")
    rows = task.rows("train").select_columns(columns)
    held = task.rows("validation").select_columns(columns) if validation else None

    model = model if in_place else clone(model)
    device, training = model.device, model.training
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    if trainable is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(name))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise InputError("no parameter is to be trained: trainable refuses all of them, or all were frozen before")

    gpu = torch.cuda.is_available()
    bf16 = precision == "bf16" or (precision == "auto" and gpu and torch.cuda.is_bf16_supported())
    if isinstance(objective, nn.Module) and next(objective.parameters(), None) is not None:
        model.add_module(OBJECTIVE, objective)  # its parameters learn, and are kept in checkpoints, with the model's
    model.to(accelerator())
    collate = task.collate(model) if isinstance(task, TokenRows) else model.collate(task)
    with seeded("fine_tune", seed) as stream, tempfile.TemporaryDirectory() as scratch:
        visits = Batches(rows, collate, seed, order=order)
        part = batch_size // accumulate
        step = _measure(model, task, visits.__getitems__(list(range(part))), terms, bf16, objective)
        step = {name: value * accumulate for name, value in step.items()}
        steps, spending = _plan(budget, batch_size, step)
        visits.length = (steps if spending is None else 2**40) * batch_size
        every = math.ceil(steps / (validation or 10))
        args = TrainingArguments(
            output_dir=str(checkpoints or scratch),
            max_steps=steps,
            seed=stream,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            max_grad_norm=clip,
            warmup_steps=warmup,
            lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
            train_sampling_strategy="sequential",  # the order is that of the visits
            per_device_train_batch_size=part,
            per_device_eval_batch_size=part,
            gradient_accumulation_steps=accumulate,
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=gpu,
            logging_steps=math.ceil(steps / 100),
            logging_nan_inf_filter=False,
            save_strategy="steps" if checkpoints or validation else "no",
            save_steps=every,
            save_total_limit=2,
            eval_strategy="steps" if validation else "no",
            eval_steps=every,
            load_best_model_at_end=validation > 0,
            restore_callback_states_from_checkpoint=True,
            label_names=["labels"],
            prediction_loss_only=True,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        )
        if args.world_size > 1:
            raise InputError("a budget is counted in one process: start this without a distributed launcher")
        args._n_gpu = min(args.n_gpu, 1)  # several would multiply the batch
        bar = [Bar(task.name)] if sys.stderr.isatty() and multiprocessing.parent_process() is None else []
        trainer = TermTrainer(
            model=model.train(),
            args=args,
            train_dataset=visits,
            eval_dataset=Batches(held, collate, None) if held else None,
            callbacks=[*callbacks, *bar],
            terms=terms,
            objective=objective,
            spending=spending,
        )
        trainer.remove_callback(PrinterCallback)
        if checkpoints:
            asked = {
                "backbone": _hash(model.backbone),
                "task": task.fingerprint,
                "budget": f"{float(budget.amount)!r} {budget.unit}",
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "weight_decay": weight_decay,
                "warmup": warmup,
                "schedule": schedule,
                "seed": seed,
                "trainable": trained,
                "terms": [[term.name, term.weight] for term in terms],
                "validation": validation,
                "precision": "bf16" if bf16 else "fp32",
                "objective": _described(objective),
                "order": [order(visit) for visit in range(1000)] if order else None,
                "betas": list(betas),
                "clip": clip,
                "accumulate": accumulate,
            }
            trainer.train_or_continue(asked)
        else:
            trainer.train()
    model._modules.pop(OBJECTIVE, None)
    for wrapped in ("forward", "_original_forward"):  # what mixed precision put on the model
        vars(model).pop(wrapped, None)

    state = trainer.state
    validated = sum("eval_loss" in entry for entry in state.log_history) * len(held or ())
    charge(
        examples=state.global_step * batch_size,
        tokens=state.num_input_tokens_seen,
        flops=step["flops"] * state.global_step + step["forward"] / batch_size * validated,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
    return model.to(device).train(training)


def clone(model: Model) -> Model:
    """A deep copy; only the tokenizer or image processor is shared."""
    return copy.deepcopy(model, {id(model.processor): model.processor})


def accelerator() -> torch.device:
    """Where training runs: the machine's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _described(objective: Objective | None) -> str | None:
    """What two runs share when they have the same objective: its class or function, and its plain settings."""
    if objective is None:
        return None
    plain = {
        name: value
        for name, value in vars(objective).items()
        if isinstance(value, bool | int | float | str) and not name.startswith("_") and name != "training"
    }
    return f"{getattr(objective, '__qualname__', type(objective).__qualname__)} {plain}"


def _measure(
    model: Model, task: Task | TokenRows, batch: Batch, terms: Sequence[Term], bf16: bool, objective: Objective | None
) -> dict[str, float]:
    """What one real step takes: tokens, FLOPs, those of its forward pass alone, seconds. Leaves no trace in the
    model."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    out: dict[str, Any] = {}
    model.train()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            forward = count_flops(lambda: out.update(objective(model, batch) if objective else model(**inputs)))
        outputs = len(task.labels) if task.classification else 1
        if task.kind != "language-modelling" and objective is None and out["logits"].shape[-1] != outputs:
            raise InputError(
                f"the model gives {out['logits'].shape[-1]} outputs and task {task.name!r} needs {outputs}: "
                "model.with_head(task) gives it a head for the task"
            )
        started = time.perf_counter()
        flops = count_flops(lambda: loss_of(model, batch, terms, objective)[0].backward())
        seconds = time.perf_counter() - started
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    model.zero_grad(set_to_none=True)
    return {"tokens": tokens_in(batch), "flops": flops, "forward": forward, "seconds": seconds}


def _plan(budget: Budget, batch_size: int, step: dict[str, float]) -> tuple[int, Spending | None]:
    """How many steps the budget pays for; with what ends the run when that number is only an estimate."""
    price = {"steps": 1.0, "examples": float(batch_size)} | step
    if not price[budget.unit]:
        raise InputError(f"a budget of {budget}: a step of this model on this task counts no {budget.unit}")
    if budget.amount < price[budget.unit] and budget.unit != "seconds":
        raise InputError(
            f"a budget of {budget} does not pay for one step, which takes {price[budget.unit]:,.0f} {budget.unit} "
            f"with batch_size={batch_size}: give at least that, or a smaller batch_size"
        )
    steps = max(1, int(budget.amount / price[budget.unit] + 1e-9))
    return steps, Spending(budget.unit, budget.amount) if budget.unit in ("tokens", "seconds") else None


def _check(
    learning_rate: float,
    batch_size: int,
    weight_decay: float,
    warmup: float,
    schedule: str,
    precision: str,
    terms: Sequence[Term],
    validation: int,
) -> None:
    for name, value, right, expected in [
        ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "a positive number"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more"),
        ("warmup", warmup, 0 <= warmup < 1, "a share of the run, from 0 to below 1,"),
        ("validation", validation, validation >= 0, "a number of times"),
    ]:
        if not right:
            raise InputError(f"{name} is {value}: {expected} is expected")
    if schedule not in get_args(Schedule):
        raise unknown("schedule", schedule, get_args(Schedule))
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    if len({term.name for term in terms}) < len(terms):
        raise InputError(f"two terms have the same name: {', '.join(term.name for term in terms)}")


def _hash(backbone: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
