"""Distil from similar tasks: a small model learns few labels of its own, and what models of other tasks say of
unlabelled rows, each weighted by how similar its task is.

Reach for it when labels are few, unlabelled rows are many, and several fine-tuned models of other tasks are at hand;
their training data is not needed. Borup et al. 2023, «Distilling from Similar Tasks for Transfer Learning on a
Budget» (DistillNearest, DistillWeighted). Their code is not public: the power 4, λ = 0.2, five unlabelled rows for a
labelled one, Adam and the cosine are this file's choices. Sources whose weight is 0.01 or less are not run at all.
"""

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from downriver.adapt.heads import HeadStart, ready
from downriver.adapt.multi_teacher import (
    Examples,
    Mode,
    Rows,
    SourceModel,
    as_sources,
    distillation,
    encode,
    extra_heads,
    labelled,
    unlabelled,
)
from downriver.adapt.two_streams import Draw, Optimizer, Recipe, forward, train
from downriver.core import Budget, InputError, metered, unknown
from downriver.models.model import Model
from downriver.nn.similarity import cka, class_ids, parc, rsa
from downriver.tasks.task import Task
from downriver.training.engine import clone
from downriver.training.trainer import Batch

Similarity = Literal["parc", "cka", "rsa"]
Score = Callable[[NDArray[np.float64], NDArray[np.int64]], float]
BLOCKS, MOST = 20, 1000
"""The similarity's standard error comes from leaving out a twentieth of the rows in turn, up to so many rows."""


@dataclass(frozen=True)
class Weights:
    """Weights ``w`` of S sources (they sum to one), their similarities ``alpha`` with standard errors, and names."""

    w: NDArray[np.float64]
    alpha: NDArray[np.float64]
    error: NDArray[np.float64]
    names: tuple[str, ...]

    @property
    def nearest(self) -> int:
        """The number of the most similar source."""
        return int(self.alpha.argmax())


def task_weights(
    sources: Mapping[str, Any] | Sequence[Any],
    labels: Any,
    *,
    method: Similarity | Score = "parc",
    power: float = 4.0,
    floor: float = 0.0,
) -> Weights:
    """How much each source is worth to a task: w_s = max(α_s, 0)^p / Σ_r max(α_r, 0)^p.

    Parameters
    ----------
    sources
        Features f_s(x) of the labelled rows by each source: arrays (n, d_s) in a list or by name. Or the models
        themselves; ``labels`` is then the labelled rows, a task (its train split) or a pair (X, y).
    labels
        Class ids (n,).
    method
        The similarity α of features and labels: ``parc`` (default, as in the paper), ``cka`` or ``rsa`` with the
        one-hot labels, or a function of features and class ids, for a score of your own (``rank`` has many).
    power
        p: 0 gives uniform weights, a large one all to the nearest. Default 4, not from the paper.
    floor
        Sources whose weight is not above it get none, the others share it.

    ``error`` is the jackknife standard error of α over twenty blocks of rows (nan beyond 1000 rows, where it is small):
    with few labels it is large, and the order of the sources uncertain. Where no source has a positive α the weights
    are uniform, with a warning; so is a class with fewer than two rows warned of.

    >>> y = np.repeat([0, 1, 2], 8)
    >>> noise = np.random.default_rng(0).normal(size=(24, 16))
    >>> found = task_weights({"good": np.eye(3)[y], "useless": noise}, y)
    >>> found.names[found.nearest], found.w.round(2)
    ('good', array([1., 0.]))
    """
    if not (power >= 0 and 0 <= floor < 1):
        raise InputError(f"power is {power} and floor {floor}: at least 0, and from 0 to below 1, are expected")
    if not len(sources):
        raise InputError("sources: at least one is expected")
    if isinstance(sources, Mapping):
        names, features = list(sources), list(sources.values())
    elif any(isinstance(source, SourceModel | nn.Module | str | os.PathLike) for source in sources):
        rows, models = labelled(labels), as_sources(list(sources))
        names, features = [m.name for m in models], [m.features(rows) for m in models]
        labels = rows.targets
    else:
        names, features = [str(i) for i in range(len(sources))], list(sources)
    score, classes = _score(method), class_ids(labels)
    if (fewest := np.bincount(classes).min()) < 2:
        warnings.warn(f"a class has {fewest} labelled row: similarities to a task are unreliable", stacklevel=2)
    arrays = [np.asarray(f.cpu() if isinstance(f, Tensor) else f, dtype=np.float64) for f in features]
    for name, array in zip(names, arrays, strict=True):
        if len(array) != len(classes):
            raise InputError(f"source {name!r} has features of {len(array)} rows, there are {len(classes)} labels")
    alpha = np.array([float(score(array, classes)) for array in arrays])
    if not np.isfinite(alpha).all():
        raise InputError(f"the similarity of source {names[int(np.argmin(np.isfinite(alpha)))]!r} is not a number")
    error = np.array([_jackknife(score, array, classes) for array in arrays])
    return Weights(_powered(alpha, power, floor), alpha, error, tuple(names))


class MultiSourceDistiller:
    """Train a student on few labels and on what frozen sources say: the loss is λ·CE + (1 − λ)·Σ_s w_s·D_s.

    CE is the cross-entropy of the labelled rows; D_s, over labelled and unlabelled rows alike, that of an extra linear
    head on the student's features with the source's soft labels. Extra heads are thrown away in the end.

    Parameters
    ----------
    student
        A ``Model`` with a head for the task, or a pair of modules (backbone, head). A copy is trained.
    sources
        Teachers: ``SourceModel``, ``Model``, pairs of modules, or folders and names to load.
    weights
        ``auto`` (by ``task_weights`` on the labelled rows: DistillWeighted), ``nearest`` (DistillNearest), ``uniform``,
        or one number a source, not negative.
    method, power
        As in ``task_weights``.
    lam
        λ, from 0 to 1; at 1 this is supervised training, the sources are not run. Default 0.2; choose it on held-out
        rows.
    temperature
        T of both softmaxes.
    mode
        ``labels``, or ``features`` for sources without a head: D is then one minus the cosine of features.
    augment
        Maps a batch of rows (a tensor, or rows of a task as dictionaries) to augmented ones.
    cache_teachers
        Compute soft labels once, of rows as they are (default). Otherwise at every step, from the very view that the
        student sees.
    optimizer, learning_rate, weight_decay, batch_size, ratio, seed
        See ``Recipe``: a step takes ``batch_size`` labelled and ``ratio`` times as many unlabelled rows.
    second_phase
        The share of the budget (below 1) that goes to the labelled rows alone in the end, at a tenth of the learning
        rate. Default 0: off, as we take it to be in the paper; the tenth is our choice.

    After ``fit``: ``student_`` (a ``Model`` in evaluation mode), ``weights_`` and ``history_`` (loss and its parts a
    step).

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> x, y = torch.randn(60, 4), torch.arange(60) % 2
    >>> source = SourceModel(nn.Identity(), nn.Linear(4, 3))
    >>> pair = nn.Linear(4, 5), nn.Linear(5, 2)
    >>> fitted = MultiSourceDistiller(pair, [source], weights="uniform").fit((x[:10], y[:10]), x[10:], "3 steps")
    >>> len(fitted.history_), fitted.student_.head
    (3, Linear(in_features=5, out_features=2, bias=True))
    """

    def __init__(
        self,
        student: Model | tuple[nn.Module, nn.Module],
        sources: Sequence[Any],
        *,
        weights: Literal["auto", "nearest", "uniform"] | Sequence[float] | NDArray[np.float64] = "auto",
        method: Similarity | Score = "parc",
        power: float = 4.0,
        lam: float = 0.2,
        temperature: float = 1.0,
        mode: Mode = "labels",
        augment: Callable[[Any], Any] | None = None,
        cache_teachers: bool = True,
        optimizer: Optimizer = "adam",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        batch_size: int = 16,
        ratio: int = 5,
        seed: int = 0,
        second_phase: float = 0.0,
    ) -> None:
        if not 0 <= second_phase < 1:
            raise InputError(f"second_phase is {second_phase}: a share of the budget from 0 to below 1 is expected")
        if not 0 <= lam <= 1:
            raise InputError(f"lam is {lam}: from 0 to 1 is expected")
        if not 0 < temperature < np.inf:
            raise InputError(f"temperature is {temperature}: a positive number is expected")
        if mode not in ("labels", "features"):
            raise unknown("mode", mode, ("labels", "features"))
        self.student, self.sources, self.weights = student, sources, weights
        self.method, self.power, self.lam, self.temperature, self.mode = method, power, lam, temperature, mode
        self.augment, self.cache_teachers, self.second_phase = augment, cache_teachers, second_phase
        self.recipe = Recipe(batch_size, ratio, optimizer, learning_rate, weight_decay, seed)

    def fit(
        self, labelled_rows: Any, unlabelled_rows: Any, budget: Budget | str, *, validation: Any = None
    ) -> "MultiSourceDistiller":
        """Train a copy of the student until the budget is spent.

        ``labelled_rows`` are a classification task (its train split) or a pair (X, y), ``unlabelled_rows`` a task, a
        data set, a list of rows or texts, or a tensor; ``validation`` (a task's validation split, or a pair) chooses
        the step. Examples are visits to rows, labelled or not; in FLOPs and seconds the teachers' forward passes are
        part of the budget. Charges all of it.

        Raises ``InputError`` for a source without a head (in mode ``labels``), a student whose head does not fit, rows
        that differ in form, and weights that are negative, not finite, all zero, or too few.
        """
        budget = Budget.parse(budget)
        few = labelled(labelled_rows)
        many = unlabelled(unlabelled_rows, few)
        held = None if validation is None else labelled(validation, "validation")
        student = clone(self.student if isinstance(self.student, Model) else SourceModel(*self.student).model).eval()
        with metered() as meter, torch.no_grad():
            logits = forward(student, encode(student, few.take([0]), few.view))[1]
            if logits.ndim != 2 or logits.shape[1] < few.classes:
                raise InputError(f"the student gives {tuple(logits.shape[1:])} outputs, the task has {few.classes}")
            used, w, targets, heads = self._teachers(student, few, many)
        if budget.unit in ("flops", "seconds"):
            left = budget.amount - getattr(meter.cost, budget.unit)
            if left <= 0:
                raise InputError(f"a budget of {budget} does not pay for the teachers' forward passes")
            budget = Budget(left, budget.unit)

        def loss(draw: Draw) -> tuple[dict[str, Tensor], Sequence[Batch]]:
            ids = draw.labelled + [len(few) + i for i in draw.unlabelled]
            rows = few.take(draw.labelled)
            rows = _join(rows, many.take(draw.unlabelled)) if draw.unlabelled else rows
            rows = self.augment(rows) if self.augment is not None else rows
            batch = encode(student, rows, few.view)
            features, logits = forward(student, batch)
            assert few.targets is not None
            own = F.cross_entropy(logits[: len(draw.labelled)].float(), few.targets[draw.labelled].to(logits.device))
            if not draw.unlabelled:
                return {"loss": own}, [batch]
            if targets:
                said = [target[ids].to(features.device) for target in targets]
            else:
                said = [source.target_of(rows, few.view, self.mode, self.temperature).to(features) for source in used]
            given = [head(features) for head in heads]
            other = distillation(given, said, w, mode=self.mode, temperature=self.temperature)
            parts = {"loss": self.lam * own + (1 - self.lam) * other, "labels": own, "sources": other}
            return parts, [batch]

        with ExitStack() as stack:
            for source in used if not targets else ():
                stack.enter_context(source.frozen())
            first = Budget(budget.amount * (1 - self.second_phase), budget.unit)
            self.history_ = train(
                student, heads, (few, many if used else None), loss, first, self.recipe, validation=held
            )
        if self.second_phase:
            rest = Budget(budget.amount * self.second_phase, budget.unit)
            gentle = replace(self.recipe, learning_rate=self.recipe.learning_rate / 10)
            before = copy.deepcopy(student.state_dict())
            alone = train(student, nn.ModuleList(), (few, None), loss, rest, gentle, validation=held)
            if held is not None and _lowest(alone) > _lowest(self.history_):
                student.load_state_dict(before)
            self.history_ += [row | {"step": row["step"] + len(self.history_)} for row in alone]
        self.student_ = student.eval()
        return self

    def _teachers(
        self, student: Model, few: Examples, many: Examples
    ) -> tuple[list[SourceModel], list[float], list[Tensor], nn.ModuleList]:
        """The sources that count, their weights, what they say of all rows (where it is cached), and extra heads."""
        if self.lam == 1:
            return [], [], [], nn.ModuleList()
        sources = as_sources(self.sources)
        self.weights_ = self._weigh(sources, few)
        kept = [i for i, w in enumerate(self.weights_.w) if w > 0]
        used, names = [sources[i] for i in kept], [sources[i].name for i in kept]
        settings: dict[str, Any] = {"mode": self.mode, "temperature": self.temperature}
        if self.cache_teachers:
            targets = [torch.cat([s.targets(few, **settings), s.targets(many, **settings)]) for s in used]
            examples = targets
        else:
            targets, examples = [], [s.targets(Examples(few.take([0]), few.view), **settings) for s in used]
        width = student.features(**encode(student, few.take([0]), few.view)).shape[1]
        heads = extra_heads(width, examples, names, self.recipe.seed)
        return used, [float(self.weights_.w[i]) for i in kept], targets, heads

    def _weigh(self, sources: list[SourceModel], few: Examples) -> Weights:
        names, unknown_ = tuple(s.name for s in sources), np.full(len(sources), np.nan)
        if not isinstance(self.weights, str):
            w = np.asarray(self.weights, dtype=np.float64)
            if w.shape != (len(sources),) or not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
                raise InputError(f"weights are {w.tolist()}: {len(sources)} numbers, not negative nor all 0, expected")
            return Weights(w / w.sum(), unknown_, unknown_, names)
        if self.weights == "uniform":
            return Weights(np.full(len(sources), 1 / len(sources)), unknown_, unknown_, names)
        if self.weights not in ("auto", "nearest"):
            raise unknown("weights", self.weights, ("auto", "nearest", "uniform"))
        features = {source.name: source.features(few) for source in sources}
        found = task_weights(features, few.targets, method=self.method, power=self.power, floor=0.01)
        if self.weights == "nearest":
            return Weights(np.eye(len(sources))[found.nearest], found.alpha, found.error, names)
        return found


def distill_weighted(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    sources: Sequence[Any],
    unlabelled: Any,
    method: Similarity = "parc",
    power: float = 4.0,
    lam: float = 0.2,
    temperature: float = 1.0,
    mode: Mode = "labels",
    head: HeadStart = "probe",
    optimizer: Optimizer = "adam",
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    batch_size: int = 16,
    ratio: int = 5,
    seed: int = 0,
    second_phase: float = 0.0,
    validation: bool = False,
) -> Model:
    """Train a model on the task's few labels and on what all sources say of unlabelled rows, weighted by similarity.

    Parameters
    ----------
    sources
        Models of other tasks: ``SourceModel``, ``Model``, or folders and names to load.
    unlabelled
        Rows with the task's input columns: a task (its train split; or what ``tasks.load`` reads), a data set, a list.
    head
        Where the model's head starts, as in ``full``: ``probe`` (default; at most a quarter of the budget),
        ``random`` or ``keep``.
    validation
        Return the weights with the lowest loss on the task's validation split, measured ten times.

    The rest as in ``MultiSourceDistiller``. Returns a new model; charges examples (visits to rows of either kind),
    tokens, FLOPs (those of the teachers too) and parameters.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> student, source = small("text-encoder", "nano"), small("text-encoder", "nano", seed=1).with_head(task)
    >>> others = ["aa", "zzzzz", "za", "azz"]
    >>> tuned = distill_weighted(student, task, "96 examples", sources=[source], unlabelled=others, batch_size=4)
    >>> tuned.head
    Linear(in_features=32, out_features=2, bias=True)
    """
    return _distil(
        model, task, budget, "auto", head, validation, sources, unlabelled,
        method=method, power=power, lam=lam, temperature=temperature, mode=mode, optimizer=optimizer,
        learning_rate=learning_rate, weight_decay=weight_decay, batch_size=batch_size, ratio=ratio, seed=seed,
        second_phase=second_phase,
    )  # fmt: skip


def distill_nearest(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    sources: Sequence[Any],
    unlabelled: Any,
    method: Similarity = "parc",
    lam: float = 0.2,
    temperature: float = 1.0,
    mode: Mode = "labels",
    head: HeadStart = "probe",
    optimizer: Optimizer = "adam",
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    batch_size: int = 16,
    ratio: int = 5,
    seed: int = 0,
    second_phase: float = 0.0,
    validation: bool = False,
) -> Model:
    """Train a model on the task's few labels and on what the most similar source says of unlabelled rows.

    Parameters as in ``distill_weighted``; one source is run over the unlabelled rows instead of all.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> sources = [small("text-encoder", "nano", seed=i).with_head(task) for i in (1, 2)]
    >>> tuned = distill_nearest(
    ...     small("text-encoder", "nano"), task, "96 examples", sources=sources, unlabelled=["aa", "zz"], batch_size=4
    ... )
    >>> tuned.head
    Linear(in_features=32, out_features=2, bias=True)
    """
    return _distil(
        model, task, budget, "nearest", head, validation, sources, unlabelled,
        method=method, lam=lam, temperature=temperature, mode=mode, optimizer=optimizer,
        learning_rate=learning_rate, weight_decay=weight_decay, batch_size=batch_size, ratio=ratio, seed=seed,
        second_phase=second_phase,
    )  # fmt: skip


def _distil(
    model: Model,
    task: Task,
    budget: Budget | str,
    weights: Literal["auto", "nearest"],
    head: HeadStart,
    validation: bool,
    sources: Sequence[Any],
    unlabelled: Any,
    **settings: Any,
) -> Model:
    from downriver.tasks.load import load

    rows = load(unlabelled) if isinstance(unlabelled, str | Mapping) else unlabelled
    start, left = ready(
        model, task, Budget.parse(budget), head=head, batch_size=settings["batch_size"], seed=settings["seed"]
    )
    distiller = MultiSourceDistiller(start, sources, weights=weights, **settings)
    student = distiller.fit(task, rows, left, validation=task if validation else None).student_
    return student.to(model.device).train(model.training)


def _lowest(history: list[dict[str, float]]) -> float:
    return min(row["validation loss"] for row in history if "validation loss" in row)


def _score(method: Similarity | Score) -> Score:
    if callable(method):
        return method
    if method == "parc":
        return parc
    if method not in ("cka", "rsa"):
        raise unknown("similarity", method, ("parc", "cka", "rsa"))
    compare = cka if method == "cka" else rsa
    return lambda features, classes: compare(features, np.eye(classes.max() + 1)[classes])


def _powered(alpha: NDArray[np.float64], power: float, floor: float) -> NDArray[np.float64]:
    positive = np.maximum(alpha, 0)
    if positive.max() == 0:
        warnings.warn("no source is similar to the task (every α is 0 or less): all get one weight", stacklevel=3)
        return np.full(len(alpha), 1 / len(alpha))
    raised = (positive / positive.max()) ** power
    w = raised / raised.sum()
    w = np.where(w > min(floor, w.max() - 1e-12), w, 0.0)
    return w / w.sum()


def _jackknife(score: Score, features: NDArray[np.float64], classes: NDArray[np.int64]) -> float:
    """The standard error of a score by leaving out blocks of rows, each with the classes in about their shares."""
    if len(classes) > MOST:
        return float("nan")
    order, blocks = np.argsort(classes, kind="stable"), min(BLOCKS, len(classes))
    block = np.empty(len(classes), dtype=np.int64)
    block[order] = np.arange(len(classes)) % blocks
    found = []
    for left_out in range(blocks):
        kept = block != left_out
        if kept.sum() > 2 and len(np.unique(classes[kept])) > 1:
            found.append(score(features[kept], np.unique(classes[kept], return_inverse=True)[1]))
    if len(found) < 2:
        return float("nan")
    return float(np.sqrt((len(found) - 1) * np.var(found)))


def _join(first: Rows, second: Rows) -> Rows:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    return [*first, *second]
