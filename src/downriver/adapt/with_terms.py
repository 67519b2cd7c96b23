"""Regularisers in the trainers of transformers and trl: a mix-in that adds terms to whatever loss they compute.

Reach for it when training is done by ``transformers.Trainer``, ``trl.SFTTrainer``, ``DPOTrainer`` or another of their
kind; ``adapt.fine_tune`` and the methods of this room take ``terms`` themselves.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from downriver.core import InputError
from downriver.training.trainer import Term

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class WithTerms(Base):
    """Put it first: ``class Guarded(WithTerms, SFTTrainer): pass``, then ``Guarded(..., terms=guard.terms())``.

    Every training step adds Σ weight · ``fn(model, batch, outputs)``, with the bare model (unwrapped of what spreads it
    over devices), once whatever the number of accumulated batches. Each term's mean since the last log is logged under
    its name, without the weight. In evaluation the loss is the trainer's own.

    Raises ``InputError`` for a term that gives no single number.

    >>> import tempfile, transformers
    >>> from torch import nn
    >>> class Line(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w = nn.Parameter(torch.ones(1))
    ...     def forward(self, x):
    ...         return {"loss": (self.w * x).square().mean()}
    >>> class Guarded(WithTerms, transformers.Trainer):
    ...     pass
    >>> size = Term("size", 0.5, lambda model, batch, outputs: model.w.square().sum())
    >>> line, arguments = Line(), transformers.TrainingArguments(
    ...     tempfile.mkdtemp(), max_steps=1, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    ... )
    >>> trainer = Guarded(line, arguments, train_dataset=[{"x": torch.tensor([2.0])}], terms=[size])
    >>> trainer.compute_loss(line.train(), {"x": torch.tensor([2.0])}).item()
    4.5
    """

    def __init__(self, *arguments: Any, terms: Sequence[Term] = (), **settings: Any) -> None:
        self.terms = tuple(terms)
        self._values: dict[str, list[Tensor]] = {}
        super().__init__(*arguments, **settings)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.terms and model.training:
            bare = self.accelerator.unwrap_model(model)
            total = loss.new_zeros(())
            for term in self.terms:
                value = term.fn(bare, inputs, outputs)
                if not (isinstance(value, Tensor) and value.numel() == 1):
                    raise InputError(
                        f"term {term.name!r} gives {getattr(value, 'shape', value)}: a tensor of one number is expected"
                    )
                self._values.setdefault(term.name, []).append(value.detach().squeeze())
                total = total + term.weight * value.squeeze()
            loss = loss + total / self._batches(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._values.items()}
            self._values = {}
        super().log(logs, *arguments, **settings)

    def _batches(self, num_items_in_batch: Any) -> int:
        """By what to divide a term: the batches of a step, where the trainer does not divide the loss by them."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.19
        if scaled is None:
            whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = whole or self.compute_loss_func is not None
        return getattr(self, "current_gradient_accumulation_steps", 1) if scaled else 1
