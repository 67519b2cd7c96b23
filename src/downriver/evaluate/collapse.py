"""A guard round any surgery on weights: perplexity before and after, and the old weights back when the model broke.

Reach for ``CollapseGuard`` where a merge, an edit, a pruning or a fine-tuning could ruin a language model and
benchmarks after every step would cost too much; ``surrogate_validity`` shows how far perplexity can be trusted for your
kind of surgery. Yang et al., "The Butterfly Effect of Model Editing" (2024), whose finding the guard is built on; the
rule that the absolute limit counts only for a model that was below it is ours.
"""

import contextlib
import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsFloat, get_args

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from downriver.core.errors import DownriverError, InputError, unknown
from downriver.core.seeds import generator
from downriver.evaluate.evaluate import evaluate
from downriver.evaluate.perplexity import SurrogatePerplexity
from downriver.models.load import load as load_model
from downriver.tasks.load import load as load_task
from downriver.tasks.task import Task

OnCollapse = Literal["rollback", "raise", "warn"]
State = Literal["open", "sound", "warning", "collapsed"]
Surrogate = Callable[..., SupportsFloat]


class CollapseWarning(UserWarning):
    """A watched model's perplexity rose beyond a limit of its guard."""


class Collapsed(DownriverError):
    """Raised by a guard with ``on_collapse="raise"``; ``report`` has the figures, and ``report.rollback()``."""

    def __init__(self, message: str, report: "GuardReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass(eq=False)
class GuardReport:
    """What a guard saw. ``state`` is ``open`` until the surgery is over, then ``sound``, ``warning`` or ``collapsed``;
    ``changed`` names the tensors that differ; ``model`` is the one to go on with."""

    before: float
    model: nn.Module
    after: float = math.nan
    state: State = "open"
    changed: tuple[str, ...] = ()
    rolled_back: bool = False
    _originals: "Originals | None" = field(default=None, repr=False)

    @property
    def collapsed(self) -> bool:
        """Whether the perplexity went beyond a limit, whatever was then done about it."""
        return self.state == "collapsed"

    @property
    def ratio(self) -> float:
        """Perplexity after over perplexity before."""
        return self.after / self.before

    def rollback(self) -> None:
        """Put the watched weights back bit for bit, also after a surgery that did no harm."""
        if self._originals is not None:
            self._originals.restore()
        self.rolled_back = True


@dataclass(frozen=True)
class CollapseGuard:
    """Flags a model as collapsed when ppl / ppl₀ > ``rel``, or when ppl > ``abs`` ≥ ppl₀.

    Parameters
    ----------
    surrogate
        Called on the model (and a tokenizer where one is given), gives a perplexity: ``SurrogatePerplexity``, or any
        function whose result ``float`` takes. NaN counts as infinite.
    rel, abs
        τ_rel = 10 and τ_abs = 1000; the authors speak of collapse from about 1000 on, the factor is ours.
    on_collapse
        ``rollback`` (default): the old weights come back, with a ``CollapseWarning``, also when the surgery itself
        fails half-way. ``raise``: ``Collapsed``, weights left as they are. ``warn``: a warning only.
    warn
        Warn beyond this ratio (1.5).

    Raises ``InputError`` for ratios below 1, and for a model whose perplexity is infinite already.

    Example
    -------
    >>> from downriver.models import small
    >>> model = small("causal-lm", "nano")
    >>> guard = CollapseGuard(SurrogatePerplexity(["a river runs to the sea"]), rel=2)
    >>> with warnings.catch_warnings(), guard.watch(model) as report:
    ...     warnings.simplefilter("ignore")
    ...     _ = model.backbone.lm_head.weight.data.mul_(50)
    >>> report.state, report.rolled_back, report.changed
    ('collapsed', True, ('backbone.model.embed_tokens.weight',))
    """

    surrogate: Surrogate = field(default_factory=SurrogatePerplexity)
    rel: float = 10.0
    abs: float = 1e3
    on_collapse: OnCollapse = "rollback"
    warn: float = 1.5

    def __post_init__(self) -> None:
        for name, least in (("rel", 1), ("abs", 0), ("warn", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}: a number of at least {least} is expected")
        if self.on_collapse not in get_args(OnCollapse):
            raise unknown("on_collapse", self.on_collapse, get_args(OnCollapse))

    def measure(self, model: nn.Module, tokenizer: Any = None) -> float:
        """The surrogate's perplexity of a model."""
        found = float(self.surrogate(model) if tokenizer is None else self.surrogate(model, tokenizer))
        return math.inf if math.isnan(found) else found

    def judge(self, before: float, after: float) -> State:
        """The state that two perplexities mean: ``sound``, ``warning`` or ``collapsed``.

        >>> [CollapseGuard().judge(20.0, after) for after in (29.0, 31.0, 201.0)]
        ['sound', 'warning', 'collapsed']
        """
        if after > self.rel * before or after > self.abs >= before:
            return "collapsed"
        return "warning" if after > self.warn * before else "sound"

    @contextlib.contextmanager
    def watch(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        reference: float | None = None,
        within: Callable[[str], bool] | None = None,
    ) -> Iterator[GuardReport]:
        """Watch a block that changes ``model`` in place; the report given is filled when the block ends.

        Parameters
        ----------
        reference
            ppl₀, where it is known; by default it is measured now. Give one reference to many watches in a row
            (``guard.measure(model)`` before the first), or slow drift stays below a limit that moves with it.
        within
            Which tensors, by name, the surgery may change. All of them (default) are copied to the CPU while the block
            runs; of those left out only a checksum is kept, and a change to one of them is a ``DownriverError``.
            Afterwards the report keeps copies of the changed tensors only.

        A surgery that renames, adds or removes tensors cannot be rolled back in place: work on a copy and use
        ``check``.
        """
        before = self._reference(model, tokenizer, reference)
        originals = Originals(model, within)
        report = GuardReport(before, model, _originals=originals)
        try:
            yield report
        except BaseException:
            if self.on_collapse == "rollback":
                originals.restore()
            raise
        report.changed = originals.settle()
        report.after = self.measure(model, tokenizer)
        report.state = self.judge(before, report.after) if report.changed else "sound"
        self._act(report)

    def check(
        self, before: nn.Module, after: nn.Module, tokenizer: Any = None, *, reference: float | None = None
    ) -> GuardReport:
        """Compare two models, for surgery that gives a new one: a merge, a pruned or quantised copy.

        ``report.model`` is ``after``, or ``before`` when it collapsed and the guard rolls back. ``reference`` is ppl₀
        where it is known.

        >>> from downriver.models import small
        >>> guard = CollapseGuard(SurrogatePerplexity(["a river runs to the sea"]))
        >>> guard.check(small("causal-lm", "nano"), small("causal-lm", "nano", seed=1)).state
        'sound'
        """
        report = GuardReport(self._reference(before, tokenizer, reference), after)
        report.after = self.measure(after, tokenizer)
        report.state = self.judge(report.before, report.after)
        if report.collapsed and self.on_collapse == "rollback":
            report.model = before
        self._act(report)
        return report

    def callback(
        self,
        *,
        every: int = 100,
        tokenizer: Any = None,
        surrogate_model: Callable[[nn.Module], nn.Module] | None = None,
    ) -> "GuardCallback":
        """A ``TrainerCallback`` that checks the model every so many optimiser steps and at the end of training.

        After a collapse a guard that rolls back puts back the weights of the last check that was not one, and ends the
        training. ``surrogate_model`` gives what the surrogate reads when the model in training is not itself a language
        model (its backbone, say). Works with ``adapt.fine_tune(callbacks=[...])`` and any Hugging Face ``Trainer``.
        """
        if every < 1:
            raise InputError(f"every is {every}: at least one step is expected")
        return GuardCallback(self, every, tokenizer, surrogate_model or (lambda model: model))

    def _reference(self, model: nn.Module, tokenizer: Any, reference: float | None) -> float:
        before = self.measure(model, tokenizer) if reference is None else float(reference)
        if not (math.isfinite(before) and before > 0):
            raise InputError(f"the perplexity before the surgery is {before}: a finite one is needed to compare with")
        return before

    def _act(self, report: GuardReport) -> None:
        if report.state not in ("warning", "collapsed"):
            return
        said = f"perplexity went from {report.before:.4g} to {report.after:.4g}"
        if report.state == "warning":
            warnings.warn(said, CollapseWarning, stacklevel=4)
            return
        said += f", beyond {self.rel:g} times the old one or {self.abs:g}"
        if self.on_collapse == "raise":
            raise Collapsed(f"{said}: the model has collapsed", report)
        if self.on_collapse == "rollback":
            report.rollback()
            said += ": rolled back"
        warnings.warn(said, CollapseWarning, stacklevel=4)


class Originals:
    """The tensors of a model as they were when this was made: parameters and buffers, tied ones once."""

    def __init__(self, model: nn.Module, within: Callable[[str], bool] | None = None) -> None:
        self.model = model
        self.kept: dict[str, Tensor] = {}
        self.sums: dict[str, bytes] = {}
        for name, tensor in _tensors(model).items():
            if within is None or within(name):
                self.kept[name] = tensor.detach().to("cpu", copy=True)
            else:
                self.sums[name] = _checksum(tensor)
        if not self.kept:
            raise InputError("no tensor is watched: within refuses all of them")

    def settle(self) -> tuple[str, ...]:
        """The names of the tensors that changed; the copies of all others are let go."""
        now = _tensors(self.model)
        if others := [name for name, known in self.sums.items() if name not in now or _checksum(now[name]) != known]:
            raise DownriverError(f"{', '.join(others[:5])} changed, which within leaves out: the old values are gone")
        changed = [name for name, old in self.kept.items() if name not in now or not _same(old, now[name])]
        added = [name for name in now if name not in self.kept and name not in self.sums]
        self.kept = {name: self.kept[name] for name in changed}
        return (*changed, *added)

    def restore(self) -> None:
        """Write the copies back, bit for bit."""
        now = _tensors(self.model)
        if gone := [name for name in self.kept if name not in now]:
            raise DownriverError(
                f"{', '.join(gone[:5])} {'is' if len(gone) == 1 else 'are'} no longer in the model, so the old weights "
                "cannot be put back: change a copy and use check(before, after)"
            )
        with torch.no_grad():
            for name, old in self.kept.items():
                if now[name].shape == old.shape and now[name].dtype == old.dtype:
                    now[name].copy_(old)
                else:
                    now[name].data = old.to(now[name].device)


class GuardCallback(TrainerCallback):
    """What ``CollapseGuard.callback`` gives; ``reports`` has one report a check."""

    def __init__(
        self, guard: CollapseGuard, every: int, tokenizer: Any, surrogate_model: Callable[[nn.Module], nn.Module]
    ) -> None:
        self.guard, self.every, self.tokenizer, self.surrogate_model = guard, every, tokenizer, surrogate_model
        self.reports: list[GuardReport] = []
        self._reference, self._checked = math.nan, 0
        self._originals: Originals | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._reference = self.guard._reference(self.surrogate_model(model), self.tokenizer, None)
        self._originals, self._checked = Originals(model), state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self._check(model, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step != self._checked:
            self._check(model, state, control)

    def _check(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> None:
        assert self._originals is not None
        report = GuardReport(self._reference, model, _originals=self._originals)
        report.changed = self._originals.settle()
        report.after = self.guard.measure(self.surrogate_model(model), self.tokenizer)
        report.state = self.guard.judge(report.before, report.after)
        self.reports.append(report)
        self._checked = state.global_step
        self.guard._act(report)
        if report.rolled_back:
            control.should_training_stop = True
        else:
            report._originals = None
            self._originals = Originals(model)


@dataclass(frozen=True)
class Correlation:
    """A correlation over ``n`` models with its bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Validity:
    """How log perplexity goes with one score. ``below``: only models up to ``threshold``, the few collapsed ones left
    out, which alone can make a correlation strong. Infinite perplexities (there are ``infinite``) share the last rank
    and are left out of Pearson's."""

    task: str
    spearman: Correlation
    pearson: Correlation
    spearman_below: Correlation
    pearson_below: Correlation
    threshold: float
    infinite: int


def surrogate_validity(
    models: Iterable[nn.Module | str | os.PathLike[str]],
    surrogate: Surrogate,
    tasks: Mapping[str, Callable[[Any], float]] | Sequence[Task | str],
    *,
    threshold: float | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Validity]:
    """Measure models by the surrogate and on tasks, and correlate: is perplexity a stand-in for THIS intervention?

    Parameters
    ----------
    models
        Models, or checkpoint folders that are loaded one at a time; the first is the one before any surgery.
    tasks
        Tasks or their names (their first metric on the test split), or a dictionary from a name to a function of the
        model.
    threshold
        Where ``below`` ends; by default 1.5 times the first model's perplexity, the guard's warning.
    level, resamples, seed
        Of the percentile bootstrap over models.

    Returns one ``Validity`` a task. Raises ``InputError`` for fewer than three models.

    >>> from downriver.models import small
    >>> found = surrogate_validity(
    ...     [small("causal-lm", "nano", seed=s) for s in range(4)],
    ...     SurrogatePerplexity(["a river runs to the sea"]),
    ...     {"size of the head": lambda model: model.backbone.lm_head.weight.norm().item()},
    ... )
    >>> found[0].task, found[0].spearman.n
    ('size of the head', 4)
    """
    scored: dict[str, Callable[[Any], float]] = {}
    if isinstance(tasks, Mapping):
        scored.update(tasks)
    else:
        for task in map(load_task, tasks):
            scored[task.name] = lambda model, task=task: evaluate(model, task)[0].value  # type: ignore[misc]
    perplexities: list[float] = []
    scores: dict[str, list[float]] = {name: [] for name in scored}
    for model in models:
        if not isinstance(model, nn.Module):
            model = load_model(model)  # type: ignore[arg-type]
        perplexities.append(float(surrogate(model)))
        for name, score in scored.items():
            scores[name].append(float(score(model)))
    if not perplexities:
        raise InputError("surrogate_validity of no models: at least three are expected")
    at = 1.5 * perplexities[0] if threshold is None else threshold
    return [
        validity(perplexities, found, threshold=at, task=name, level=level, resamples=resamples, seed=seed)
        for name, found in scores.items()
    ]


def validity(
    perplexities: Sequence[float],
    scores: Sequence[float],
    *,
    threshold: float,
    task: str = "",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Validity:
    """The correlations of ``surrogate_validity`` from figures that are there already, one a model.

    >>> found = validity([10, 11, 14, 40, 900], [0.9, 0.9, 0.8, 0.3, 0.0], threshold=15)
    >>> round(found.spearman.value, 2), found.spearman_below.n
    (-0.97, 3)
    """
    x, y = np.asarray(perplexities, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 3:
        raise InputError(
            f"{len(x)} perplexities and {len(y)} scores: one of each for at least three models is expected"
        )
    x = np.where(np.isnan(x), np.inf, x)
    if not (x > 0).all() or not np.isfinite(y).all():
        raise InputError("perplexities must be positive, and scores finite")
    x = np.log(x)
    low, settings = x <= math.log(threshold), (level, resamples, seed)
    finite = np.isfinite(x)
    return Validity(
        task,
        _correlation(x, y, True, *settings),
        _correlation(x[finite], y[finite], False, *settings),
        _correlation(x[low], y[low], True, *settings),
        _correlation(x[low], y[low], False, *settings),
        threshold,
        int((~finite).sum()),
    )


def _correlation(x: np.ndarray, y: np.ndarray, ranks: bool, level: float, resamples: int, seed: int) -> Correlation:
    n = len(x)
    if n < 3:
        return Correlation(math.nan, math.nan, math.nan, n)
    chosen = np.vstack([np.arange(n), generator("validity", seed).integers(n, size=(resamples, n))])
    a, b = x[chosen], y[chosen]
    if ranks:
        a, b = rankdata(a, axis=1), rankdata(b, axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    drawn = r[1:][np.isfinite(r[1:])]  # a resample of equal values has no correlation
    if not np.isfinite(r[0]) or not len(drawn):
        return Correlation(math.nan, math.nan, math.nan, n)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(float(r[0]), float(low), float(high), n)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _same(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype and torch.equal(_bits(old), _bits(new))


def _checksum(tensor: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(_bits(tensor).numpy().data)
    return digest.digest()
