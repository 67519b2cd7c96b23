"""Distillation from a frozen teacher of any architecture, on a task's few labels and on rows without labels; with three
plain methods that need no message: hints, soft labels, relations.

Reach for them as the baselines of ``merge.talking_models``, or where a student is to come close to a teacher at one
point. Romero et al. 2015 (hints), Hinton et al. 2015 (soft labels), Park et al. 2019 (distances between rows). Hints
are trained together with the task and not before it, and states are compared after layer normalisation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from downriver.core import Budget, InputError, generator, seeded, unknown
from downriver.models.features import Inputs
from downriver.models.load import load
from downriver.models.model import Model
from downriver.models.split import captured, first, named_layers, split_layers
from downriver.nn.talker import normalised
from downriver.tasks.task import Task
from downriver.training.engine import OBJECTIVE, Precision, Schedule, accelerator, clone, fine_tune
from downriver.training.trainer import Batch

Pool = Literal["mean", "cls", "tokens"]
Parts = dict[str, Tensor]
Encode = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]
ROW, UNLABELLED = "downriver row", -100


class Distiller(nn.Module):
    """What every method of distillation shares: a student, a frozen teacher, and training on rows that both read.

    A subclass makes what learns beside the student in ``prepare`` and says in ``loss`` what is minimised; its own
    modules are trained with the student and are no part of it.

    Parameters
    ----------
    student
        A ``Model`` with a head for the task, or an ``nn.Module`` that gives logits. ``fit`` trains a copy.
    teacher
        A ``Model``, an ``nn.Module``, or a folder or name to load. It runs in evaluation mode, without gradients for
        its weights, and is left as it is.
    encode
        How rows (dictionaries of the task's input columns) become the teacher's inputs by name; by default as the
        ``Model`` reads them, with its own tokenizer or image processor.
    seed
        Draws what learns beside the student.

    After ``fit``: ``student_`` and ``history_``, the parts of the loss a step.
    """

    def __init__(self, student: nn.Module, teacher: Any, *, encode: Encode | None = None, seed: int = 0) -> None:
        super().__init__()
        # in a tuple: no parts of this module, whose parameters are those that learn beside the student
        self._pair = (_model(student), _model(teacher))
        self.encode, self.seed, self.phase, self.ramp = encode, seed, "joint", 1.0
        self.history_: list[dict[str, float]] = []

    @property
    def student(self) -> Model:
        """The student as it was given."""
        return self._pair[0]

    @property
    def teacher(self) -> Model:
        """The teacher as it was given."""
        return self._pair[1]

    def prepare(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> None:
        """Make what learns beside the student, afresh, with widths measured on a batch: before a loop of your own."""

    def loss(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> Parts:
        """The parts of the loss on a batch of rows, ``loss`` (what is minimised) and ``task`` among them.

        ``batch`` is what the student reads, with ``labels`` (-100 for a row without one); ``teacher_batch`` the same
        rows as the teacher reads them, by default the same tensors.
        """
        raise NotImplementedError

    def phases(self, budget: Budget, rows: int) -> list[tuple[str, Budget]]:
        """The parts of the training, with their budgets; a step visits so many rows."""
        return [("joint", budget)]

    def fit(
        self,
        task: Task,
        budget: Budget | str,
        *,
        unlabelled: Any = None,
        learning_rate: float = 1e-4,
        batch_size: int = 16,
        ratio: int = 3,
        weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        seed: int = 0,
        validation: int = 0,
        checkpoints: str | Path | None = None,
        precision: Precision = "auto",
    ) -> Model:
        """Train a copy of the student until the budget is spent, and give it back: a plain model, as it was before.

        Parameters
        ----------
        task
            A classification, or without ``unlabelled`` a regression.
        unlabelled
            More rows with the task's input columns, without labels: a task (its train split), a data set, a list of
            rows or texts.
        batch_size, ratio
            A step visits ``batch_size`` labelled rows and ``ratio`` times as many unlabelled ones. An example of a
            budget is a visit to either; the teacher's work is part of a budget in FLOPs or seconds.
        learning_rate, weight_decay, schedule, seed, validation, checkpoints, precision
            As in ``fine_tune``; the validation looks at the task's loss alone.

        Raises ``InputError`` for a student whose outputs do not fit the task, for other kinds of task, and for
        unlabelled rows of another form.
        """
        budget = Budget.parse(budget)
        rows, labels = _together(task, unlabelled, validation > 0)
        if ratio < 1:
            raise InputError(f"ratio is {ratio}: at least 1 is expected")
        size = batch_size * (1 + (ratio if unlabelled is not None else 0))
        model = clone(self.student)
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        objective = _Objective(self, rows, labels, self._encoder(task))
        # of the step's rows, the first are labelled
        counts = len(task.rows("train")), len(rows.rows("train")) - len(task.rows("train"))
        order = None if unlabelled is None else _Order(counts, batch_size, ratio * batch_size, seed)
        self.history_ = []
        with frozen(self.teacher, accelerator()):
            model.to(accelerator()).eval()
            self._start(model, objective, rows, task)
            beside = {f"{OBJECTIVE}.{name}" for name, _ in objective.named_parameters()}
            for phase, part in self.phases(budget, size):
                self.phase, self.ramp = phase, 0.0
                alone = phase == "warm-up"
                model.add_module(OBJECTIVE, objective)  # before the training, for ``trainable`` to choose from
                fine_tune(
                    model,
                    rows,
                    part,
                    learning_rate=learning_rate,
                    batch_size=size,
                    weight_decay=weight_decay,
                    schedule=schedule,
                    seed=seed,
                    trainable=beside.union(() if alone else learning).__contains__,
                    validation=0 if alone else validation,
                    checkpoints=None if checkpoints is None else Path(checkpoints) / phase,
                    precision=precision,
                    callbacks=[_Follow(self)],
                    in_place=True,
                    objective=objective,
                    order=order,
                )
            self.phase, self.ramp = "joint", 1.0
            self._finish(model.eval(), objective, rows)
        self.student_ = model.to(self.student.device).train(self.student.training)
        self.to(self.student.device)
        return self.student_

    def _start(self, model: Model, objective: "_Objective", rows: Task, task: Task) -> None:
        """Make what learns beside the student, and see on two rows whether student and task fit."""
        some = model.collate(rows)(list(rows.rows("train").select(range(2))))
        batch, teacher_batch = objective.read({k: v.to(model.device) for k, v in some.items()})
        with torch.no_grad():
            outputs = model(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
        needed = len(task.labels) if task.classification else 1
        if outputs.ndim != 2 or outputs.shape[1] != needed:
            raise InputError(
                f"the student gives outputs of shape {tuple(outputs.shape[1:])} and task {task.name!r} needs {needed}: "
                "model.with_head(task) gives it a head for the task"
            )
        with seeded("distiller", type(self).__name__, self.seed):
            self.prepare(batch, teacher_batch, student=model)

    def _finish(self, model: Model, objective: "_Objective", rows: Task) -> None:
        """What is looked at when training is over."""

    def _encoder(self, task: Task) -> Encode:
        if self.encode is not None:
            return self.encode
        return self.teacher.collate(Inputs(task.inputs, task.kind, task.name))

    def _task_loss(self, student: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's own loss on the labelled rows (0 without any), and its logits."""
        labels = batch.get("labels")
        if labels is None or (not labels.is_floating_point() and not (labels != UNLABELLED).any()):
            logits = student(**{name: value for name, value in batch.items() if name != "labels"})["logits"]
            return logits.new_zeros(()), logits
        outputs = student(**batch)  # cross-entropy passes over the labels -100
        return outputs["loss"], outputs["logits"]


class HintDistiller(Distiller):
    """Hints: a linear map P of the student's state at one layer is to be the teacher's state at one of its own.

    The loss is the task's plus ``weight`` · ‖LN(P h_S) − LN(h_T)‖², a mean over rows and width. ``layers`` are the
    student's and the teacher's layer by name, by default the last of each stack; ``pool`` as in
    ``InteractiveDistiller``. Other parameters as in ``Distiller``.

    >>> from downriver.models import small
    >>> student, teacher = small("text-encoder", "nano"), small("text-encoder", "nano", seed=1)
    >>> hints = HintDistiller(student, teacher)
    >>> batch = dict(student.processor(["a b", "c"], return_tensors="pt", padding=True))
    >>> hints.states(student, batch, 0).shape
    torch.Size([2, 32])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        layers: tuple[str, str] | None = None,
        pool: Pool = "mean",
        weight: float = 1.0,
        encode: Encode | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student, teacher, encode=encode, seed=seed)
        self.layers = layers or (split_layers(self.student)[1], split_layers(self.teacher)[1])
        self.pool, self.weight = check_pool(pool), _weight(weight)
        for model, name in zip(self._pair, self.layers, strict=True):
            named_layers(model, [name])

    def states(self, model: Model, batch: Batch, which: int) -> Tensor:
        """The pooled states of student (0) or teacher (1)."""
        with captured(named_layers(model, [self.layers[which]])) as found:
            model.features(**{name: value for name, value in batch.items() if name != "labels"})
        return pooled(*positions(first(found[0]), batch), self.pool)

    def prepare(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> None:
        with torch.no_grad():
            own = self.states(student or self.student, batch, 0)
            other = self.states(self.teacher, teacher_batch or batch, 1)
        self.map = nn.Linear(own.shape[-1], other.shape[-1]).to(own.device)

    def loss(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> Parts:
        student = student or self.student
        with captured(named_layers(student, [self.layers[0]])) as found:
            task, _ = self._task_loss(student, batch)
        own, mask = positions(first(found[0]), batch)
        with frozen(self.teacher), torch.no_grad():
            other = self.states(self.teacher, teacher_batch or batch, 1)
        own = pooled(own, mask, self.pool)
        if own.shape[:-1] != other.shape[:-1]:
            raise InputError(
                f"student and teacher read {own.shape[1]} and {other.shape[1]} tokens: pool='mean' is able"
            )
        apart = self.apart(own, other, mask if own.ndim == 3 else None)
        return {"loss": task + self.weight * apart, "task": task, "teacher": apart}

    def apart(self, own: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        """How far the student's states are from the teacher's."""
        return squared(self.map(own), other, mask)


class RelationDistiller(HintDistiller):
    """Relations: distances between the rows of a batch are to be the teacher's, each over their mean.

    The loss is the task's plus ``weight`` times the smooth L1 distance of the two matrices; nothing is learnt beside
    the student. Parameters as in ``HintDistiller``, without ``pool="tokens"``.

    >>> from downriver.models import small
    >>> student = small("text-encoder", "nano")
    >>> student.head = nn.Linear(32, 2)
    >>> batch = dict(student.processor(["a b", "c", "d e"], return_tensors="pt", padding=True))
    >>> RelationDistiller(student, student).loss(batch)["teacher"].item()
    0.0
    """

    def __init__(self, student: nn.Module, teacher: Any, **settings: Any) -> None:
        super().__init__(student, teacher, **settings)
        if self.pool == "tokens":
            raise InputError("relations are between rows: pool 'mean' or 'cls' is expected")

    def prepare(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> None:
        """Nothing is learnt beside the student."""

    def apart(self, own: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        if len(own) < 2:
            return own.new_zeros(())
        mine, its = (F.pdist(states) for states in (own, other))  # every pair of rows once
        return F.smooth_l1_loss(mine / mine.mean().clamp(min=1e-9), its / its.mean().clamp(min=1e-9))


class LabelDistiller(Distiller):
    """Soft labels: the student's outputs are to be those of a teacher with a head for the very same classes.

    The loss is the task's plus ``weight`` · T² · KL(σ(z_T / T) ‖ σ(z_S / T)), a mean over rows (T is ``temperature``).
    Other parameters as in ``Distiller``. Raises ``InputError`` where the numbers of classes differ.

    >>> x = {"inputs": torch.randn(4, 3), "labels": torch.tensor([0, 1, -100, -100])}
    >>> net = nn.Linear(3, 2)
    >>> parts = LabelDistiller(net, net).loss(x)
    >>> bool(parts["teacher"].abs() < 1e-6)
    True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        encode: Encode | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student, teacher, encode=encode, seed=seed)
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature is {temperature}: a positive number is expected")
        self.weight, self.temperature = _weight(weight), temperature

    def loss(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> Parts:
        task, own = self._task_loss(student or self.student, batch)
        read = {name: value for name, value in (teacher_batch or batch).items() if name != "labels"}
        with frozen(self.teacher), torch.no_grad():
            other = self.teacher(**read)["logits"]
        if own.shape != other.shape:
            raise InputError(f"the teacher gives {other.shape[-1]} outputs and the student {own.shape[-1]}")
        said, given = (F.log_softmax(z.float() / self.temperature, dim=-1) for z in (other, own))
        apart = self.temperature**2 * F.kl_div(given, said, reduction="batchmean", log_target=True)
        return {"loss": task + self.weight * apart, "task": task, "teacher": apart}


def positions(state: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """A layer's state as (n, positions, width) in float32, and which positions are real, (n, positions).

    Vectors (n, d) have one position, maps (n, d, h, w) one a place.

    >>> positions(torch.zeros(2, 8, 3, 3), {})[0].shape
    torch.Size([2, 9, 8])
    """
    if state.ndim == 2:
        state = state[:, None]
    elif state.ndim == 4:
        state = state.flatten(2).transpose(1, 2)
    if state.ndim != 3:
        raise InputError(f"a layer gives a state of shape {tuple(state.shape)}: (n, d), tokens or maps are expected")
    mask = batch.get("attention_mask")
    if mask is None or mask.shape[1] != state.shape[1]:
        if mask is not None and state.shape[1] != 1:
            raise InputError(f"a layer gives {state.shape[1]} positions, the attention mask has {mask.shape[1]}")
        return state.float(), state.new_ones(state.shape[:2], dtype=torch.bool)
    return state.float(), mask.bool()


def pooled(state: Tensor, mask: Tensor, pool: Pool) -> Tensor:
    """(n, positions, d) → (n, d): the mean of real positions, the first one, or with ``tokens`` all as they are."""
    if pool == "tokens":
        return state
    if pool == "cls":
        return state[:, 0]
    weight = mask[:, :, None].to(state)
    return (state * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def squared(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared difference of states after layer normalisation, over real positions where there is a mask.

    >>> squared(torch.tensor([[1.0, 3.0]]), torch.tensor([[10.0, 20.0]])) < 1e-9
    tensor(True)
    """
    each = (normalised(x) - normalised(y)).square().mean(dim=-1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp(min=1)


def check_pool(pool: str) -> Pool:
    """The pooling, if it is one."""
    if pool not in get_args(Pool):
        raise unknown("pool", pool, get_args(Pool))
    return pool  # type: ignore[return-value]


@contextmanager
def frozen(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """A model in evaluation mode, whose parameters take no gradient, for a while (on ``device``)."""
    modes = {module: module.training for module in model.modules()}
    asked = {p: p.requires_grad for p in model.parameters()}
    home = next((p.device for p in model.parameters()), None)
    model.eval().requires_grad_(False)
    try:
        if device is not None:
            model.to(device)
        yield
    finally:
        if device is not None and home is not None:
            model.to(home)
        for module, mode in modes.items():
            module.training = mode
        for parameter, grad in asked.items():
            parameter.requires_grad_(grad)


class _Objective(nn.Module):
    """A distiller as ``fine_tune`` takes it: finds labels and the teacher's inputs by the numbers of a batch's rows."""

    def __init__(self, distiller: Distiller, rows: Task, labels: Tensor, encode: Encode) -> None:
        super().__init__()
        self.distiller = distiller
        self.values, self.encode, self.start = labels, encode, len(rows.rows("train"))
        self.rows = {split: rows.rows(split).select_columns(list(rows.inputs)) for split in rows.splits}

    def read(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's batch with its labels, and the teacher's batch of the same rows."""
        numbers = batch["labels"].round().long().cpu()
        columns = self.rows["train"][numbers.tolist()]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        device = batch["labels"].device
        said = {name: value.to(device) for name, value in self.encode(rows).items() if name != "labels"}
        return {**batch, "labels": self.values[numbers].to(device)}, said

    def forward(self, model: Model, batch: Batch) -> Mapping[str, Tensor]:
        """The loss of a step, or of the task alone while it is validated."""
        if not self.training:
            return model(**{**batch, "labels": self.values[batch["labels"].round().long().cpu()].to(model.device)})
        own, other = self.read(batch)
        parts = self.distiller.loss(own, other, student=model)
        self.distiller.history_.append({name: float(value.detach()) for name, value in parts.items()})
        return parts


class _Follow(TrainerCallback):
    """Tells a distiller how far its training is, and keeps what the measuring of a step left out of its log."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller, self.before, self.total = distiller, len(distiller.history_), 1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del self.distiller.history_[self.before :]
        self.total = state.max_steps  # an estimate for a budget in tokens or seconds

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.distiller.ramp = min(1.0, state.global_step / self.total)


class _Order:
    """Which row a visit goes to: in every step first labelled rows, then unlabelled ones, each stream in random order.

    Both streams visit each row once, then each once more in another order, and so on.
    """

    def __init__(self, counts: tuple[int, int], few: int, many: int, seed: int) -> None:
        self.counts, self.few, self.many, self.seed = counts, few, many, seed
        self._known: dict[tuple[int, int], Any] = {}

    def __call__(self, visit: int) -> int:
        step, place = divmod(visit, self.few + self.many)
        stream = int(place >= self.few)
        number = step * self.many + place - self.few if stream else step * self.few + place
        epoch, at = divmod(number, self.counts[stream])
        if (stream, epoch) not in self._known:
            self._known = {key: value for key, value in self._known.items() if key[0] != stream}
            draw = generator("distil", stream, self.seed, epoch)
            self._known[stream, epoch] = draw.permutation(self.counts[stream])
        return int(self._known[stream, epoch][at]) + stream * self.counts[0]


def _together(task: Task, unlabelled: Any, validation: bool) -> tuple[Task, Tensor]:
    """The rows to train on as a task whose target is a row's number, and the true labels by number.

    Labelled rows come first, then unlabelled ones, then those of the validation split.
    """
    if not task.kind.endswith(("classification", "regression")):
        raise InputError(f"task {task.name!r} is {task.kind}: a classification or a regression is expected")
    few = task.rows("train").select_columns(list(task.inputs))
    labels = [torch.from_numpy(task.targets("train"))]
    if unlabelled is not None:
        if not task.classification:
            raise InputError(f"task {task.name!r} is {task.kind}: unlabelled rows are for a classification")
        many = _unlabelled(unlabelled, few, task)
        few = datasets.concatenate_datasets([few, many])
        labels.append(torch.full((len(many),), UNLABELLED))
    splits = {"train": few}
    if validation:
        splits["validation"] = task.rows("validation").select_columns(list(task.inputs))
        labels.append(torch.from_numpy(task.targets("validation")))
    if len(few) < 2:
        raise InputError(f"task {task.name!r} has one row to train on: two at least are expected")
    start, numbered = 0, {}
    for split, rows in splits.items():
        numbered[split] = rows.add_column(ROW, list(range(start, start + len(rows))))
        start += len(rows)
    values = torch.cat(labels)
    values = values if task.classification else values.float()
    return Task(task.name, task.kind, numbered, task.inputs, ROW), values


def _unlabelled(data: Any, like: datasets.Dataset, task: Task) -> datasets.Dataset:
    rows = data.rows("train") if isinstance(data, Task) else data
    if isinstance(rows, Sequence) and not isinstance(rows, str | datasets.Dataset):
        named = [{task.inputs[0]: row} if isinstance(row, str) else dict(row) for row in rows]
        rows = datasets.Dataset.from_list(named)
    if not isinstance(rows, datasets.Dataset) or not len(rows):
        raise InputError("unlabelled rows: a task, a data set or a list, with a row at least, is expected")
    for name in task.inputs:
        if name not in rows.column_names:
            raise unknown("column of the unlabelled rows", name, rows.column_names)
    rows = rows.select_columns(list(task.inputs))
    try:
        return rows if rows.features == like.features else rows.cast(like.features)
    except (TypeError, ValueError) as error:
        raise InputError(f"the unlabelled rows are not of the form of task {task.name!r}: {error}") from None


def _model(given: Any) -> Model:
    if isinstance(given, Model):
        return given
    return Model(given) if isinstance(given, nn.Module) else load(given)


def _weight(weight: float) -> float:
    if not 0 <= weight < float("inf"):
        raise InputError(f"weight is {weight}: 0 or more is expected")
    return weight
