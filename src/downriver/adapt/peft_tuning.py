"""Any parameter-efficient method by name, under equal conditions: same layers, same budget, its own learning rate.

Reach for it to compare methods in a study, or to train with one that has no function of its own here. Methods differ by
a factor of a hundred in the learning rate they want (see the public comparison of peft), so that three rates round the
method's own are tried, and the one with the lowest loss on the validation split is kept. Harness of «Parameter-
Efficient Fine-Tuning for Foundation Models» (2025); AdamW for all, without weight decay, which would pull scales and
gates that start at one to zero.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from downriver.adapt.bitfit import bitfit
from downriver.adapt.fish_mask import train_fish_mask
from downriver.adapt.full import full
from downriver.adapt.heads import HeadStart, ready
from downriver.adapt.lora import merge_adapter
from downriver.adapt.loramoe import loramoe
from downriver.adapt.peft_catalogue import Method, method
from downriver.core import Budget, DownriverError, InputError, charge, count_flops
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import Precision, Schedule, fine_tune
from downriver.training.trainer import Term

FULL, FULL_RATE = "full", 5e-5
STEP = math.sqrt(10)
"""Between two learning rates of the grid."""


@dataclass(frozen=True)
class Sweep:
    """The model that was kept; by learning rate the loss on the validation split, infinite where it was not finite and
    missing (``nan``) where a single rate was tried; the method's configuration, with the size that was chosen."""

    model: Model
    losses: Mapping[float, float]
    config: Any = None

    @property
    def rate(self) -> float:
        """The learning rate that was kept."""
        return min(self.losses, key=lambda rate: self.losses[rate])


def peft(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    tuner: str = "lora",
    budget_params: float | None = None,
    learning_rates: Sequence[float] | None = None,
    settings: Mapping[str, Any] | None = None,
    target_modules: str | list[str] | None = None,
    head: HeadStart = "probe",
    batch_size: int = 16,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    schedule: Schedule = "linear",
    seed: int = 0,
    terms: Sequence[Term] = (),
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Train a copy of the model by a method of the catalogue, with the best of some learning rates.

    Parameters
    ----------
    tuner
        A method's name in ``catalogue()``, or ``full`` for all weights.
    budget
        Of every learning rate's run. The head's probe is part of it, and done once. All runs are charged.
    budget_params
        At most so many parameters of the backbone are trained: the method's size is chosen to fit.
    learning_rates
        Peak rates to try. Default: the method's own (``catalogue()``; 5e-5 for ``full``) divided by √10, as it is, and
        times √10. More than one needs a validation split.
    settings, target_modules
        As in ``Method.config``. CPT starts from the first text of the train split unless told otherwise. LoRAMoE
        trains without its balance of data types, which a task lacks (``adapt.loramoe`` has it).
    head, batch_size, weight_decay, warmup, schedule, seed, terms, checkpoints, precision
        As in ``lora``.

    The result carries the adapter; ``save``, ``merge_adapter`` and the rest work as after ``lora``, where the method
    merges. AdaLoRA, KaSA and MonteCLoRA get the regularisers of their papers, AdaLoRA its schedule of ranks too.

    Raises ``InputError`` for an unknown method or setting, a kind of model that the method does not work on, a budget
    of parameters below its minimum, and several rates without a validation split; ``DownriverError`` when the loss of
    every rate's run was not finite.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> tuned = peft(small("text-encoder", "nano"), task, "16 examples", tuner="ia3", learning_rates=[1e-2],
    ...     batch_size=4)
    >>> tuned.backbone.get_nb_trainable_parameters()[0]
    768
    """
    return sweep(
        model,
        task,
        budget,
        tuner=tuner,
        budget_params=budget_params,
        learning_rates=learning_rates,
        settings=settings,
        target_modules=target_modules,
        head=head,
        terms=terms,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        seed=seed,
        checkpoints=checkpoints,
        precision=precision,
    ).model


def sweep(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    tuner: str = "lora",
    budget_params: float | None = None,
    learning_rates: Sequence[float] | None = None,
    settings: Mapping[str, Any] | None = None,
    target_modules: str | list[str] | None = None,
    head: HeadStart = "probe",
    batch_size: int = 16,
    seed: int = 0,
    terms: Sequence[Term] = (),
    checkpoints: str | Path | None = None,
    **how: Any,
) -> Sweep:
    """As ``peft``, with what every learning rate came to; ``how`` goes to ``fine_tune``."""
    rates = _rates(tuner, learning_rates)
    if len(rates) > 1 and "validation" not in task.splits:
        raise InputError(
            f"{len(rates)} learning rates are compared on the validation split, which task {task.name!r} has not: "
            f"give it one, or a single rate such as learning_rates=[{rates[len(rates) // 2]:g}]"
        )
    if hasattr(model.backbone, "merge_and_unload"):
        model = merge_adapter(model)
    found = None if tuner == FULL else method(tuner)
    given = dict(settings or {})
    if tuner == "cpt" and "cpt_token_ids" not in given:
        given["cpt_token_ids"] = _first_text(model, task)
    config = None
    if found is not None:
        config = found.config(model, budget_params=budget_params, target_modules=target_modules, **given)
    elif given or target_modules or budget_params is not None:
        raise InputError("full trains all weights: no settings, target_modules or budget_params are expected")
    model, left = ready(model, task, Budget.parse(budget), head=head, batch_size=batch_size, seed=seed)
    how = {"weight_decay": 0.0, "warmup": 0.06, "schedule": "linear"} | how | {"batch_size": batch_size, "seed": seed}
    best: Model | None = None
    losses: dict[float, float] = {}
    failed: DownriverError | None = None
    for rate in rates:
        place = None if checkpoints is None else Path(checkpoints) / f"{rate:g}"
        one = {**how, "learning_rate": rate, "checkpoints": place}
        try:
            tuned = _run(model, task, left, found, config, list(terms), one)
        except InputError:
            raise
        except DownriverError as error:  # the loss was not finite
            failed, losses[rate] = error, math.inf
            continue
        loss = _held_out(tuned, task, batch_size) if len(rates) > 1 else math.nan
        if best is None or loss < min(losses.values()):
            best = tuned
        losses[rate] = loss
    if best is None or min(losses.values()) == math.inf:
        raise failed or DownriverError(f"{tuner}: no learning rate gave a finite loss on the validation split")
    return Sweep(best, losses, config)


def _run(
    model: Model, task: Task, budget: Budget, found: Method | None, config: Any, terms: list[Term], how: dict[str, Any]
) -> Model:
    """Train by the method with one learning rate."""
    if found is None:
        return full(model, task, budget, head="keep", terms=terms, **how)
    if found.entry.name == "bitfit":
        return bitfit(model, task, budget, head="keep", terms=terms, **how)
    if found.entry.name == "fish_mask":
        chosen = {"keep": config.keep, "samples": config.samples}
        return train_fish_mask(model, task, budget, head="keep", terms=terms, **chosen, **how)
    if found.entry.name == "loramoe":
        return loramoe(model, task, budget, head="keep", terms=terms, **dataclasses.asdict(config), **how)
    adapted = found.add(model, config, task=task, seed=how["seed"])
    if adapted.head is not None:
        adapted.head.requires_grad_(True)
    layers: Any = getattr(adapted.backbone, "base_model", None)
    callbacks: list[TrainerCallback] = []
    if found.entry.name == "adalora":
        callbacks.append(_Ranks(layers))
        terms.append(Term("orthogonality", config.orth_reg_weight, _orthogonality))
    elif found.entry.name in ("kasa", "monteclora"):
        terms.append(Term(found.entry.name, 1.0, _own_loss(found.entry.name)))
    tuned = fine_tune(adapted, task, budget, terms=terms, callbacks=callbacks, in_place=True, **how)
    if found.entry.name == "xlora":
        layers.internal_xlora_scalings = None  # of the last step: its graph would hinder copies
    return tuned


class _Ranks(TrainerCallback):
    """AdaLoRA's schedule: all ranks for a tenth of the run, the least dropped until half of it (the paper's GLUE runs
    have similar shares), the target from then on."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The run's length is known only now."""
        steps = state.max_steps
        config = self.tuner.peft_config[self.tuner.trainable_adapter_name]
        config.total_step, config.tinit, config.tfinal = steps, steps // 10, steps // 2
        self.tuner.rankallocator.set_total_step(steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Importance is read from the gradients."""
        self.tuner.update_and_allocate(state.global_step)


def _orthogonality(model: Model, batch: Any, outputs: Any) -> torch.Tensor:
    """Mean over AdaLoRA's factors of ‖PᵀP - I‖ and ‖Q Qᵀ - I‖."""
    found = []
    for name, p in model.backbone.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            found.append((gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm())
    return torch.stack(found).mean()


def _own_loss(name: str) -> Any:
    def loss(model: Model, batch: Any, outputs: Any) -> torch.Tensor:
        tuner: Any = model.backbone.base_model
        return torch.as_tensor(getattr(tuner, f"_get_{name}_loss")(), device=model.device)

    return loss


def _held_out(model: Model, task: Task, batch_size: int) -> float:
    """Mean loss on the validation split, in evaluation mode; infinite where it is not finite."""
    rows, collate = task.rows("validation"), model.collate(task)
    total, flops = 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = {name: value.to(model.device) for name, value in collate(part).items()}
        losses: list[float] = []

        def step(batch: Any = batch, losses: list[float] = losses) -> None:
            with torch.no_grad():
                losses.append(float(model(**batch)["loss"]))

        if start == 0:
            flops = count_flops(step)
        else:
            step()
        total += losses[0] * len(part)
    charge(flops=flops * len(rows) / min(batch_size, len(rows)))
    return total / len(rows) if math.isfinite(total) else math.inf


def _rates(tuner: str, given: Sequence[float] | None) -> list[float]:
    if given is None:
        middle = FULL_RATE if tuner == FULL else method(tuner).entry.learning_rate
        return [middle / STEP, middle, middle * STEP]
    if not given:
        raise InputError("learning_rates is empty: at least one is expected")
    return [float(rate) for rate in given]


def _first_text(model: Model, task: Task) -> list[int]:
    row = task.rows("train")[0]
    if model.processor is None:
        raise InputError(f"cpt needs a tokenizer, and {model.source} has none")
    return model.processor(" ".join(str(row[name]) for name in task.inputs), add_special_tokens=False)["input_ids"][:64]
