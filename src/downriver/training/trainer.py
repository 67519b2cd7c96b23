"""The Hugging Face ``Trainer`` as ``fine_tune`` uses it: regularisers, exact counts, budgets that a run measures.

Reach for ``adapt.fine_tune``; a method that needs another training step subclasses ``TermTrainer``.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback

from downriver.core import DownriverError, InputError, atomic_write, canonical, derive_seed, generator
from downriver.models.model import Model

Batch = Mapping[str, Tensor]
Objective = Callable[[Model, Batch], Mapping[str, Tensor]]
RUN, FINISHED, STATE, WEIGHTS = "run.json", "finished.json", "trainer_state.json", "model.safetensors"
DELAY = 2.0
"""Seconds that a run takes at least before it shows a progress bar."""


@dataclass(frozen=True)
class Term:
    """A regulariser: ``weight * fn(model, batch, outputs)`` is added to the loss of every training step.

    ``fn`` gets the model in training, the batch (``labels`` included) and the model's outputs (``loss`` and
    ``logits``), and gives a scalar. The mean of that scalar since the last log, without the weight, is logged under
    ``name``.

    >>> def size(model, batch, outputs):
    ...     return sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    >>> Term("size", 0.01, size).name
    'size'
    """

    name: str
    weight: float
    fn: Callable[[Model, Batch, Batch], Tensor]


def loss_of(
    model: Model, batch: Batch, terms: Sequence[Term], objective: Objective | None = None
) -> tuple[Tensor, Batch, dict[str, Tensor]]:
    """The loss with all terms, the model's (or objective's) outputs, and the value of every term without its weight."""
    outputs = model(**batch) if objective is None else objective(model, batch)
    values = {}
    loss = outputs["loss"]
    for term in terms:
        values[term.name] = value = term.fn(model, batch, outputs)
        if not (isinstance(value, Tensor) and value.numel() == 1):
            raise InputError(
                f"term {term.name!r} gives {getattr(value, 'shape', value)}: a tensor of one number is expected"
            )
        loss = loss + term.weight * value.squeeze()
    return loss, outputs, values


def tokens_in(batch: Batch) -> int:
    """The tokens of a batch without padding; 0 for images and tables. Packed rows, which have positions instead of a
    mask, are padded behind the last position above 0."""
    if "position_ids" in batch and "attention_mask" not in batch:
        return int((batch["position_ids"].flip(1).cumsum(1) > 0).sum())
    return sum(int(mask.sum()) for name, mask in batch.items() if name.endswith("attention_mask"))


class Batches(torch.utils.data.Dataset):
    """Visits number 0, 1, 2, ... to the rows: each once in a random order, then each once more in another, and so on;
    or wherever ``order`` sends a visit.

    A whole batch is fetched and collated at once. Its rows and whatever collating draws (masks) depend on ``seed``
    and the number of its first visit alone, so a run that continues sees what it would have seen. ``seed=None`` keeps
    the rows' own order.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        collate: Callable[..., Batch],
        seed: int | None,
        length: int = 0,
        order: Callable[[int], int] | None = None,
    ) -> None:
        self.rows, self.collate, self.seed, self.length = rows, collate, seed, length or len(rows)
        self.order = order
        self._order: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, visits: list[int]) -> Batch:
        columns = self.rows[[self._row(visit) for visit in visits]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(derive_seed("collate", self.seed, visits[0]))
        try:
            return self.collate(rows)
        finally:
            torch.set_rng_state(state)

    def _row(self, visit: int) -> int:
        if self.order is not None:
            row = int(self.order(visit))
            if not 0 <= row < len(self.rows):
                raise InputError(f"order sends visit {visit} to row {row}: there are {len(self.rows)} rows")
            return row
        epoch, place = divmod(visit, len(self.rows))
        if self.seed is None:
            return place
        if self._order[0] != epoch:
            self._order = epoch, generator("order", self.seed, epoch).permutation(len(self.rows))
        return int(self._order[1][place])


class Spending(TrainerCallback, ExportableState):
    """Ends a run before one more average step would exceed an amount of tokens or seconds."""

    def __init__(self, unit: str, amount: float) -> None:
        self.unit, self.amount, self.used, self._last = unit, amount, 0.0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.max_steps = sys.maxsize  # until now an estimate, good enough for the progress bar
        self._last = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.perf_counter()
        self.used = state.num_input_tokens_seen if self.unit == "tokens" else self.used + now - self._last
        self._last = now
        if self.used * (1 + 1 / state.global_step) > self.amount:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
            control.should_evaluate = args.eval_strategy != "no"

    def state(self) -> dict[str, Any]:
        return {"args": {"unit": self.unit, "amount": self.amount}, "attributes": {"used": self.used}}


class Bar(ProgressCallback):
    """The Trainer's progress bar on standard error, once a run has taken longer than ``DELAY``."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training_bar = tqdm(total=state.max_steps, desc=self.title, delay=DELAY, leave=False, dynamic_ncols=True)
        self.current_step = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3g}", refresh=False)


class TermTrainer(Trainer):
    """A ``Trainer`` for a ``Model``: adds terms to the loss, counts tokens, refuses a loss that is not finite.

    ``spending`` is the callback of a budget in tokens or seconds: the schedule then follows the share that is spent.
    """

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        *,
        terms: Sequence[Term] = (),
        objective: Objective | None = None,
        spending: Spending | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, args, data_collator=_as_it_is, **settings)
        self._learner, self._folder = model, Path(str(args.output_dir))
        self.terms = tuple(terms)
        self.objective: Objective | None = objective
        self._values: dict[str, list[Tensor]] = {}
        if spending is not None:
            self.add_callback(spending)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs, values = loss_of(model, inputs, self.terms if model.training else (), self.objective)
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.state.num_input_tokens_seen += tokens_in(inputs)
        scheduler: Any = self.lr_scheduler
        _finite("loss", loss.item(), self.state.global_step + 1, scheduler.get_last_lr()[0])
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        spending = next((c for c in self.callback_handler.callbacks if isinstance(c, Spending)), None)
        if spending is None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler: Any = super().create_scheduler(1000, optimizer)
        scheduler.lr_lambdas = [
            lambda _, shape=shape: shape(1000 * spending.used / spending.amount) for shape in scheduler.lr_lambdas
        ]
        return scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs:  # clipping makes nothing of an infinite gradient, without a word
            _finite("gradient's norm", logs["grad_norm"], self.state.global_step, logs["learning_rate"])
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._values.items()}
            self._values = {}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **settings: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **settings)
        self._learner.train()  # the next batch is collated before the next step begins
        return metrics

    def train_or_continue(self, asked: Mapping[str, Any]) -> None:
        """Train with checkpoints in ``args.output_dir``, from the last whole one there; a finished run is only loaded.

        ``asked`` is all that decides the result. Raises ``InputError`` when the folder's run was asked something else.
        """
        folder = self._folder
        _claim(folder, json.loads(canonical(asked)))
        last, finished = _last_whole(folder), folder / FINISHED
        if last is not None and finished.exists():
            self._load_from_checkpoint(str(folder / json.loads(finished.read_text())["weights"]))
            self.state = TrainerState.load_from_json(str(last / STATE))
            return
        self.train(resume_from_checkpoint=None if last is None else str(last))
        weights = Path(self.state.best_model_checkpoint or f"checkpoint-{self.state.global_step}")
        with atomic_write(finished, "w") as file:
            json.dump({"weights": weights.name}, file)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only what training changes, in safetensors; nothing pickled."""
        folder = Path(output_dir) if output_dir else self._folder
        folder.mkdir(parents=True, exist_ok=True)
        changing = [(name, p) for name, p in self._learner.named_parameters() if p.requires_grad]
        tensors = {name: t.detach().cpu().contiguous() for name, t in [*changing, *self._learner.named_buffers()]}
        save_file(tensors, folder / WEIGHTS)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that do not change are not in a checkpoint: nothing to warn of."""


def _as_it_is(batch: Any) -> Any:
    return batch


def _finite(what: str, value: float, step: int, rate: float) -> None:
    if not math.isfinite(value):
        raise DownriverError(
            f"the {what} is {value} at step {step}, where the learning rate is {rate:.3g}: lower the learning rate, or "
            "look for extreme values in data and weights"
        )


def _claim(folder: Path, asked: dict[str, Any]) -> None:
    """Write down what the run in this folder is, or make sure that it is the same."""
    try:
        known = json.loads((folder / RUN).read_text())
    except FileNotFoundError:
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run to continue: choose another folder") from None
        with atomic_write(folder / RUN, "w") as file:
            json.dump(asked, file, indent=1)
        return
    except ValueError:
        raise InputError(f"{folder / RUN} is damaged: the run cannot be continued, choose another folder") from None
    if different := [name for name in asked if known.get(name) != asked[name]]:
        raise InputError(f"{folder} holds another run (it differs in {', '.join(different)}): choose another folder")


def _last_whole(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: its state is what the Trainer writes last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / STATE))
            with safetensors.safe_open(path / WEIGHTS, "pt"):
                return path
        except (OSError, ValueError, TypeError, safetensors.SafetensorError):
            continue
    return None
