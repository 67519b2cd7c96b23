"""Talking models: student and teacher learn to exchange messages about a task's rows, and the student learns from the
answers it gets.

Reach for it when a strong frozen teacher of another architecture, width or label space is at hand, rows are many and
labels few. Zhao et al. 2023, «Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive
Communication». No code of theirs is public; this follows the abstract. Choices of this file: a talker for each level
(low, high) of each model; all weights 1; L_int grows linearly from nothing over the joint phase; a pooled message takes
the place of the pooled state in the teacher's own reading of the row, so that masks and positions stay, and what is
heard gets the mean and spread of that state; between texts of unlike tokens, messages are interpolated by position and
not by learnt attention.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from downriver.core import Budget, InputError, seeded, unknown
from downriver.merge.distill import (
    Distiller,
    Encode,
    Parts,
    Pool,
    check_pool,
    frozen,
    pooled,
    positions,
    squared,
)
from downriver.models.model import Model
from downriver.models.split import SplitModel, captured, first, named_layers, split_layers
from downriver.nn.similarity import cka
from downriver.nn.talker import COLLAPSE, Talker, info_nce, on_scale_of
from downriver.tasks.task import Task
from downriver.training.engine import Precision, Schedule
from downriver.training.trainer import Batch

WEIGHTS = {"int": 1.0, "ans": 1.0, "msg": 1.0, "rec": 1.0, "trans": 1.0}
MOST = 256
"""Rows that the report looks at."""

Head = Literal["random", "keep"]


@dataclass(frozen=True)
class DistillReport:
    """How the talk went, on rows of the training data.

    ``losses`` are the parts of the loss; ``cka`` says how alike the student's high states are to the answers it gets,
    from 0 to 1; ``message_variance`` is that of each talker's messages over rows (below 1e-4 they have collapsed: all
    are the same); ``history`` has the parts of the loss of every step.
    """

    losses: dict[str, float]
    cka: float
    message_variance: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list, repr=False)

    @property
    def collapsed(self) -> list[str]:
        """The talkers that say the same of every row."""
        return [name for name, variance in self.message_variance.items() if variance < COLLAPSE]


class InteractiveDistiller(Distiller):
    """A student that tells a frozen teacher what it reads, and learns from the answer.

    Each model is split at two layers. The student says E_S^lo(h_S^lo); the teacher hears D_T^lo of it, goes on from
    there through its upper part to h'_T, and answers E_T^hi(h'_T); the student hears ĥ_S^hi = D_S^hi of that. All
    distances are mean squared errors of layer-normalised states, so widths and scales do not matter:

    - ``int``: ‖h_S^hi − sg(ĥ_S^hi)‖², the student moves to the answer (sg: no gradient);
    - ``ans``: ‖sg(h_S^hi) − ĥ_S^hi‖², the talkers make an answer that this student can follow;
    - ``msg``: ‖E_S(h_S) − E_T(h_T)‖² at both levels, messages of one row are the same (their plain difference);
    - ``rec``: D(E(h)) is h again, for both models at both levels;
    - ``trans``: what the teacher hears is what it would have read itself, h_T^lo.

    Only the task's loss looks at labels. Talkers warm up alone by ``rec`` and ``msg``, then all learn together.
    In the end everything but the student is dropped.

    Parameters
    ----------
    student, teacher, encode, seed
        As in ``Distiller``. The teacher may also be a ``SplitModel`` of a ``Model``, split by layers or by functions.
    student_layers, teacher_layers
        The low and the high layer by name, by default the middle and the last of the stack. A late low layer of the
        teacher saves memory: its upper part is run with gradients to what it hears.
    message_dim, hidden
        Width of messages (128, the card's) and of the talkers' hidden layers (default: twice that).
    pool
        What a message is about: the ``mean`` of a row's tokens, the first one (``cls``), or every token (``tokens``).
    align
        With ``tokens``: ``same`` expects both models to read the same tokens; ``position`` interpolates messages
        between texts of unlike lengths.
    weights
        Of the five losses by name; those that are not named keep 1. With all at 0 this is supervised training.
    rounds
        K: the student hears a low state in the answer (D_S^lo) and speaks of that again, K − 1 times more.
    warmup
        The share of the budget for the talkers alone.
    contrastive
        ``msg`` by InfoNCE over the rows of a batch: a message is to find its partner, against collapse.
    share_levels
        One talker a model for both levels, the literal reading of the abstract; the widths must agree.

    After ``fit``: ``student_``, ``report_`` and ``history_``. Raises ``InputError`` for layers that are not there or
    lie inside a block, for unlike tokens, and for weights and settings out of range.

    >>> from downriver.models import small
    >>> student, teacher = small("text-encoder", "nano"), small("text-encoder", "tiny", seed=1)
    >>> student.head = nn.Linear(32, 2)
    >>> talk = InteractiveDistiller(student, teacher, message_dim=16)
    >>> batch = dict(student.processor(["a b", "c", "d e"], return_tensors="pt", padding=True))
    >>> talk.prepare(batch)
    >>> sorted(talk.loss(batch))
    ['ans', 'int', 'loss', 'msg', 'rec', 'task', 'trans']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        student_layers: tuple[str, str] | None = None,
        teacher_layers: tuple[str, str] | None = None,
        message_dim: int = 128,
        hidden: int | None = None,
        pool: Pool = "mean",
        align: Literal["same", "position"] = "same",
        weights: Mapping[str, float] | None = None,
        rounds: int = 1,
        warmup: float = 0.1,
        contrastive: bool = False,
        share_levels: bool = False,
        encode: Encode | None = None,
        seed: int = 0,
    ) -> None:
        split = teacher if isinstance(teacher, SplitModel) else None
        super().__init__(student, teacher if split is None else split.model, encode=encode, seed=seed)
        for name in weights or {}:
            if name not in WEIGHTS:
                raise unknown("loss", name, WEIGHTS)
        self.weights = WEIGHTS | dict(weights or {})
        for name, value, right, expected in [
            *((f"the weight of {n}", w, 0 <= w < float("inf"), "0 or more") for n, w in self.weights.items()),
            ("rounds", rounds, rounds >= 1, "at least 1"),
            ("warmup", warmup, 0 <= warmup < 1, "a share of the budget, from 0 to below 1,"),
            ("message_dim", message_dim, message_dim >= 1, "at least 1"),
            ("align", align, align in ("same", "position"), "same or position"),
        ]:
            if not right:
                raise InputError(f"{name} is {value}: {expected} is expected")
        self.student_layers = tuple(student_layers or split_layers(self.student))
        named_layers(self.student, self.student_layers)
        if split is None:
            at, to = teacher_layers or split_layers(self.teacher)
            split = SplitModel(self.teacher, at, to)
        elif teacher_layers is not None or (split.to is None and not callable(split.at) and split.at):
            raise InputError("a teacher that is split already brings its two layers, at and to")
        self._split = (split,)
        self.message_dim, self.hidden, self.pool, self.align = message_dim, hidden, check_pool(pool), align
        self.rounds, self.warmup, self.contrastive, self.share_levels = rounds, warmup, contrastive, share_levels
        self.talkers = nn.ModuleDict()

    def prepare(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> None:
        """Make the talkers afresh; widths are measured on a batch. To be called before a loop of your own."""
        student = student or self.student
        with torch.no_grad(), frozen(student):
            with captured(named_layers(student, self.student_layers)) as own:
                student.features(**_unlabelled(batch))
            with frozen(self.teacher):
                other = self._split[0].read(_unlabelled(teacher_batch or batch))
        with seeded("talkers", self.seed):
            for model, states in (("S", own), ("T", other)):
                widths = [positions(first(state), {})[0].shape[-1] for state in states]
                if self.share_levels and widths[0] != widths[1]:
                    raise InputError(f"share_levels: the two layers of a model are {widths[0]} and {widths[1]} wide")
                low = Talker(widths[0], self.message_dim, self.hidden)
                high = low if self.share_levels else Talker(widths[1], self.message_dim, self.hidden)
                self.talkers.update({f"{model}_lo": low, f"{model}_hi": high})
        self.to(first(own[0]).device)

    def loss(self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None) -> Parts:
        return self._talk(batch, teacher_batch, student)[0]

    def report(
        self, batch: Batch, teacher_batch: Batch | None = None, *, student: Model | None = None
    ) -> DistillReport:
        """How the talk goes on a batch, in evaluation mode; warns where messages have collapsed."""
        student = student or self.student
        with torch.no_grad(), frozen(student):
            parts, seen = self._talk(batch, teacher_batch, student)
        variance = {name: float(seen[name].flatten(0, -2).var(dim=0).mean()) for name in self.talkers if name in seen}
        alike = cka(_rows(seen["own"]), _rows(seen["answer"])) if "answer" in seen else float("nan")
        found = DistillReport({n: float(v) for n, v in parts.items()}, float(alike), variance, list(self.history_))
        if found.collapsed:
            warnings.warn(
                f"messages have collapsed ({', '.join(found.collapsed)}): they vary by less than {COLLAPSE} over rows; "
                "contrastive=True keeps them apart",
                stacklevel=2,
            )
        return found

    def phases(self, budget: Budget, rows: int) -> list[tuple[str, Budget]]:
        first_part = Budget(budget.amount * self.warmup, budget.unit)
        step = {"steps": 1, "examples": rows}.get(budget.unit, 0)
        if not self.warmup or self.weights["rec"] + self.weights["msg"] == 0 or first_part.amount < step:
            return [("joint", budget)]
        if step:  # whole steps, so that the two parts make up the budget
            first_part = Budget(first_part.amount // step * step, budget.unit)
        return [("warm-up", first_part), ("joint", Budget(budget.amount - first_part.amount, budget.unit))]

    def _finish(self, model: Model, objective: Any, rows: Task) -> None:
        if not any(self.weights.values()):
            return
        train = rows.rows("train")
        some = model.collate(rows)(list(train.select(range(min(MOST, len(train))))))
        batch, teacher_batch = objective.read({name: value.to(model.device) for name, value in some.items()})
        self.report_ = self.report(batch, teacher_batch, student=model)

    def _talk(
        self, batch: Batch, teacher_batch: Batch | None, student: Model | None
    ) -> tuple[Parts, dict[str, Tensor]]:
        """The parts of the loss, and what was said: messages by talker, the student's own high state, the answer."""
        student = student or self.student
        warm = self.phase == "warm-up"
        learns = torch.is_grad_enabled() and not warm
        with captured(named_layers(student, self.student_layers)) as found, torch.set_grad_enabled(learns):
            task, _ = self._task_loss(student, batch)
        w = self.weights
        if not any(w.values()):
            return {"loss": task, "task": task}, {}
        if not self.talkers:
            raise InputError("there are no talkers yet: prepare(batch) makes them, before the optimiser")
        said = _unlabelled(teacher_batch or batch)
        split, talk = self._split[0], cast(dict[str, Talker], self.talkers)
        with frozen(self.teacher):
            with torch.no_grad():
                heard_low, heard_high = (first(state) for state in split.read(said))
            low, mask_s = positions(first(found[0]), batch)
            high, mask_sh = positions(first(found[1]), batch)
            low_t, mask_t = positions(heard_low, said)
            high_t, mask_th = positions(heard_high, said)
            self._check_tokens(mask_s, mask_t)
            # h_S^lo, h_S^hi, h_T^lo, h_T^hi
            hs1, hs2 = pooled(low, mask_s, self.pool), pooled(high, mask_sh, self.pool)
            ht1, ht2 = pooled(low_t, mask_t, self.pool), pooled(high_t, mask_th, self.pool)
            tokens = self.pool == "tokens"
            seen_s, seen_t = (mask_sh, mask_t) if tokens else (None, None)

            messages = {
                "S_lo": talk["S_lo"].encode(hs1),
                "S_hi": talk["S_hi"].encode(hs2),
                "T_lo": talk["T_lo"].encode(ht1),
                "T_hi": talk["T_hi"].encode(ht2),
            }
            states = {"S_lo": hs1, "S_hi": hs2, "T_lo": ht1, "T_hi": ht2}
            masks = {"S_lo": mask_s, "S_hi": mask_sh, "T_lo": mask_t, "T_hi": mask_th}
            rec = sum(
                (
                    squared(talk[name].decode(messages[name]), states[name].detach(), masks[name] if tokens else None)
                    for name in messages
                ),
                start=task.new_zeros(()),
            )
            msg = sum(
                (
                    self._same(
                        self._across(messages[f"S_{level}"], masks[f"S_{level}"], masks[f"T_{level}"]),
                        messages[f"T_{level}"],
                        masks[f"T_{level}"] if tokens else None,
                    )
                    for level in ("lo", "hi")
                ),
                start=task.new_zeros(()),
            )
            if warm:
                loss = w["rec"] * rec + w["msg"] * msg
                return {"loss": loss, "task": task, "msg": msg, "rec": rec}, {}

            message, trans = messages["S_lo"], None
            for turn in range(self.rounds):
                # the teacher hears ĥ_T^lo, thinks h'_T, answers r
                a1 = on_scale_of(talk["T_lo"].decode(self._across(message, mask_s, mask_t)), ht1)
                if trans is None:
                    trans = squared(a1, ht1, seen_t)
                thought = first(split.hi(self._placed(a1, ht1, heard_low), said))
                thought = pooled(positions(thought, said)[0], mask_th, self.pool)
                answer = self._across(talk["T_hi"].encode(thought), mask_th, mask_sh)
                if turn + 1 < self.rounds:
                    message = talk["S_lo"].encode(talk["S_lo"].decode(answer))
            ans = talk["S_hi"].decode(answer)  # ĥ_S^hi
        assert trans is not None
        parts = {
            "task": task,
            "int": squared(hs2, ans.detach(), seen_s),
            "ans": squared(ans, hs2.detach(), seen_s),
            "msg": msg,
            "rec": rec,
            "trans": trans,
        }
        loss = task + self.ramp * w["int"] * parts["int"]
        loss = loss + sum((w[name] * parts[name] for name in ("ans", "msg", "rec", "trans")), start=task.new_zeros(()))
        real = messages if not tokens else {name: m[masks[name]] for name, m in messages.items()}
        kept = {"own": hs2, "answer": ans} if not tokens else {"own": hs2[mask_sh], "answer": ans[mask_sh]}
        return {"loss": loss, **parts}, {**real, **kept}

    def _check_tokens(self, mask_s: Tensor, mask_t: Tensor) -> None:
        if self.pool == "tokens" and self.align == "same" and not torch.equal(mask_s, mask_t):
            lengths = [int(mask.sum(dim=1).max()) for mask in (mask_s, mask_t)]
            raise InputError(
                f"pool='tokens': student and teacher read unlike tokens (up to {lengths[0]} and {lengths[1]} a row): "
                "align='position' interpolates messages, pool='mean' takes one message a row"
            )

    def _across(self, message: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """A message on its way to the other model: with tokens, at the positions of that model's tokens."""
        if self.pool != "tokens" or self.align == "same":
            return message
        return interpolate(message, own, other)

    def _same(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """How far messages of the same rows are from one another."""
        if self.contrastive:
            return info_nce(x if mask is None else x[mask], y if mask is None else y[mask])
        each = (x - y).square().mean(dim=-1)
        return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp(min=1)

    def _placed(self, heard: Tensor, own: Tensor, layer: Tensor) -> Tensor:
        """What the teacher goes on from, of the form its layer gives: its own tokens, with the heard state in place of
        their mean or of the first one; or every token as it was heard.
        """
        tokens = positions(layer, {})[0]
        if self.pool == "mean":
            tokens = tokens + (heard - own)[:, None]
        elif self.pool == "cls":
            tokens = torch.cat([heard[:, None], tokens[:, 1:]], dim=1)
        else:
            tokens = heard
        return (tokens.transpose(1, 2) if layer.ndim == 4 else tokens).reshape(layer.shape).to(layer.dtype)


def talking_models(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    teacher: Any,
    unlabelled: Any = None,
    head: Head = "random",
    student_layers: tuple[str, str] | None = None,
    teacher_layers: tuple[str, str] | None = None,
    message_dim: int = 128,
    hidden: int | None = None,
    pool: Pool = "mean",
    align: Literal["same", "position"] = "same",
    weights: Mapping[str, float] | None = None,
    rounds: int = 1,
    warmup: float = 0.1,
    contrastive: bool = False,
    share_levels: bool = False,
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
    """Train a copy of a model on a task's labels and in talk with a frozen teacher; the result is a plain model.

    Parameters
    ----------
    teacher
        A ``Model``, a ``SplitModel`` of one, or a folder or name to load: any architecture and label space.
    unlabelled
        More rows of the task, without labels.
    head
        ``random`` gives the model a fresh head for the task, ``keep`` takes it as it is.

    The rest as in ``InteractiveDistiller`` and ``Distiller.fit``. Charges examples (visits to rows with or without
    label), tokens, FLOPs (the teacher's too) and parameters.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> student, teacher = small("text-encoder", "nano"), small("masked-lm", "nano", seed=1)
    >>> others = ["aa", "zzzzz", "za", "azz"]
    >>> tuned = talking_models(
    ...     student, task, "3 steps", teacher=teacher, unlabelled=others, batch_size=2, ratio=1, message_dim=8
    ... )
    >>> tuned.head
    Linear(in_features=32, out_features=2, bias=True)
    """
    if head not in ("random", "keep"):
        raise unknown("start of the head", head, ("random", "keep"))
    if head == "random":
        with seeded("head", seed):
            model = model.with_head(task)
    distiller = InteractiveDistiller(
        model, teacher, student_layers=student_layers, teacher_layers=teacher_layers, message_dim=message_dim,
        hidden=hidden, pool=pool, align=align, weights=weights, rounds=rounds, warmup=warmup, contrastive=contrastive,
        share_levels=share_levels, seed=seed,
    )  # fmt: skip
    return distiller.fit(
        task, budget, unlabelled=unlabelled, learning_rate=learning_rate, batch_size=batch_size, ratio=ratio,
        weight_decay=weight_decay, schedule=schedule, seed=seed, validation=validation, checkpoints=checkpoints,
        precision=precision,
    )  # fmt: skip


def interpolate(message: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Messages (n, L, d) at the real positions of ``own`` (n, L), put linearly at those of ``other`` (n, M).

    The first and the last position of one text are those of the other; padding gets zeros.

    >>> own, other = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    >>> interpolate(torch.tensor([[[0.0], [2.0], [4.0]]]), own, other)[0, :, 0].tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    lengths, wanted = own.sum(dim=1, keepdim=True), other.sum(dim=1, keepdim=True)
    place = torch.arange(other.shape[1], device=message.device) * (lengths - 1) / (wanted - 1).clamp(min=1)
    below = torch.minimum(place.floor().long(), (lengths - 1).clamp(min=0))
    above = torch.minimum(below + 1, (lengths - 1).clamp(min=0))
    share = (place - below).clamp(0, 1)[:, :, None].to(message)
    index = [i[:, :, None].expand(-1, -1, message.shape[2]) for i in (below, above)]
    found = message.gather(1, index[0]) * (1 - share) + message.gather(1, index[1]) * share
    return found * other[:, :, None].to(message)


def _unlabelled(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])
