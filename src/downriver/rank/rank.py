"""Rank pretrained models for a task by a score of their features, with intervals, and hold a ranking against truth.

Reach for ``rank_models`` before fine-tuning anything: it reads some rows once with every model, which costs a small
part of what fine-tuning them all would (``fine_tuning_seconds`` measures that on a real step).
"""

import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.stats import weightedtau
from torch import nn

from downriver import tasks
from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator, seeded
from downriver.models.model import Model
from downriver.rank.bank import FeatureBank, General, open_model
from downriver.rank.ped import NO_GENERAL, PED
from downriver.rank.scores import OF_PROBABILITIES, SCORES, classes_of
from downriver.rank.scores import score as score_of
from downriver.tasks.task import Task

Source = FeatureBank | Model | nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Agreement:
    """How well scores order models by what they reached.

    ``weighted_tau`` is Kendall's τ in which the best models count most (``scipy.stats.weightedtau``), ``tau_low`` and
    ``tau_high`` its range over the resampled scores (``None`` without), ``pearson`` the correlation, ``regret`` what
    is lost by taking the first (the best truth less the first's), ``top`` the best truth among the first k as a share
    of the best of all, by k, ``size_tau`` the weighted τ of simply taking the larger model (``None`` where all are of
    one size): a score below it is not worth its while.
    """

    weighted_tau: float
    pearson: float
    regret: float
    top: Mapping[int, float]
    tau_low: float | None = None
    tau_high: float | None = None
    size_tau: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Models from the best score to the worst.

    ``table`` has a row a model: ``rank``, ``model``, ``score``, ``low`` and ``high`` (``null`` without intervals),
    ``first`` (the share of resamples in which the model came first), ``seconds`` (features and score), ``parameters``,
    ``features``, and ``fine_tuning_seconds`` where it was asked for. ``resampled`` (models, resamples) are the scores
    of the random halves, in the table's order.
    """

    score: str
    task: str
    rows: int
    table: pl.DataFrame
    resampled: np.ndarray
    level: float
    notes: tuple[str, ...] = field(default=())

    @property
    def models(self) -> list[str]:
        """Names, the best first."""
        return self.table["model"].to_list()

    def agreement(self, truth: Mapping[str, float], top: Sequence[int] = (1, 3)) -> Agreement:
        """Hold the ranking against what the models reached: accuracies (larger is better) by the models' names."""
        missing = [name for name in self.models if name not in truth]
        if missing:
            raise unknown("model in truth", missing[0], truth)
        reached = np.array([truth[name] for name in self.models], dtype=np.float64)
        sizes = self.table["parameters"].to_numpy()
        found = agreement(self.table["score"].to_numpy(), reached, top)
        low = high = None
        if self.resampled.size:
            taus = [_tau(column, reached) for column in self.resampled.T]
            low, high = (float(q) for q in np.quantile(taus, [(1 - self.level) / 2, (1 + self.level) / 2]))
        size_tau = _tau(sizes, reached) if np.ptp(sizes) > 0 else None
        return replace(found, tau_low=low, tau_high=high, size_tau=size_tau)


def rank_models(
    models: Sequence[Source] | Mapping[str, Source],
    task: Task | str | Mapping[str, Any] | None = None,
    score: str = "logme",
    pre: PED | None = None,
    *,
    split: str = "train",
    rows: int | None = 2000,
    general: Task | General | None = None,
    resamples: int = 40,
    level: float = 0.9,
    epochs: float | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    cache: bool = True,
    **parameters: Any,
) -> Ranking:
    """Rank models for a task by a transferability score, the best first.

    Parameters
    ----------
    models
        Whatever ``models.load`` takes, or banks that were made before; with a mapping under names of your own.
    task, split, rows, general, max_length, batch_size, cache
        As in ``FeatureBank.extract``; not needed for banks.
    score, pre, parameters
        As in ``rank.score``; ``pre=PED()`` takes the general statistics of the banks.
    resamples, level
        Intervals of that level come from so many random halves of the rows (the classes in their shares, the same
        rows for every model): scores of halves scatter about their mean as scores of whole samples do. A bootstrap
        proper would show rows twice, which nearest neighbours and LogME take for information. 0: no intervals; none
        either where a class has fewer than four rows.
    epochs
        Also measure one real step of fine-tuning each model and say how long so many epochs of the split would take.

    Raises ``InputError`` naming the model whose features, labels or probabilities do not do, for banks of different
    rows and for models of one name.

    Example
    -------
    >>> from datasets import Dataset
    >>> texts = ["aaaa", "zzzz", "aab", "zzy", "aba", "zyz", "baa", "yzz"]
    >>> rows = Dataset.from_dict({"text": texts, "label": [0, 1] * 4})
    >>> task = tasks.Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> found = rank_models(["small:text-encoder:nano:0", "small:text-encoder:tiny:0"], task, cache=False)
    >>> found.table.columns[:5], found.rows
    (['rank', 'model', 'score', 'low', 'high'], 8)
    """
    named = _named(models)
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    if resamples < 0 or not 0 < level < 1:
        raise InputError(
            f"resamples {resamples} and level {level}: 0 or more, and a number between 0 and 1, are expected"
        )
    needs_task = epochs is not None or any(not isinstance(source, FeatureBank) for source in named.values())
    if needs_task and task is None:
        raise InputError("a task is expected: models that are no banks have to read its rows")
    task = tasks.load(task) if task is not None and needs_task else None

    found: list[dict[str, Any]] = []
    halves: list[list[float]] = []
    notes: tuple[str, ...] = ()
    chosen: list[np.ndarray] = []
    first: FeatureBank | None = None
    for name, source in named.items():
        loaded = source if isinstance(source, FeatureBank) else open_model(source, max_length)
        if isinstance(loaded, FeatureBank):
            bank = loaded
        else:
            assert task is not None
            bank = FeatureBank.extract(
                loaded,
                task,
                split=split,
                rows=rows,
                general=general,
                probabilities=score in OF_PROBABILITIES,
                batch_size=batch_size,
                seed=seed,
                cache=cache,
            )
        if first is None:
            first = bank
            chosen, notes = _halves(bank.y, resamples, seed)
        elif not np.array_equal(bank.y, first.y):
            raise InputError(f"the banks of {first.model} and {name} hold different rows: the same ones are expected")
        try:
            started = time.perf_counter()
            if pre is not None and pre.rescale and bank.general is None:
                own = bank.X.astype(np.float64)
                bank = replace(bank, general=(own.mean(axis=0), own.std(axis=0)))
                notes = tuple(dict.fromkeys([*notes, NO_GENERAL]))
            value = _score(bank, slice(None), score, pre, parameters)
            seconds = time.perf_counter() - started
            halves.append([_score(bank, half, score, pre, parameters) for half in chosen])
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        row = {"model": name, "score": value, "seconds": bank.seconds + seconds, "parameters": bank.parameters}
        row["features"] = bank.X.shape[1]
        if epochs is not None and task is not None and isinstance(loaded, Model):
            row["fine_tuning_seconds"] = fine_tuning_seconds(loaded, task, split=split, epochs=epochs, seed=seed)
        found.append(row)
        del loaded  # before the next one is read
    if NO_GENERAL in notes:
        warnings.warn(NO_GENERAL, UserWarning, stacklevel=2)
    assert first is not None
    return _ranking(found, np.array(halves), score, first, level, notes)


def agreement(scores: Any, truth: Any, top: Sequence[int] = (1, 3)) -> Agreement:
    """How well ``scores`` (m,) order m models by ``truth`` (m,), what they reached; larger is better in both.

    >>> found = agreement([0.1, 0.2, 0.3], [70.0, 90.0, 80.0])
    >>> round(found.weighted_tau, 3), found.regret, round(found.top[1], 3)
    (0.182, 10.0, 0.889)
    """
    given, reached = (np.asarray(values, dtype=np.float64) for values in (scores, truth))
    if given.shape != reached.shape or given.ndim != 1 or len(given) < 2:
        raise InputError(f"scores {given.shape} and truth {reached.shape}: as many of both, two at least, are expected")
    for name, values in (("scores", given), ("truth", reached)):
        if not np.isfinite(values).all():
            raise InputError(
                f"{name}, model {int(np.flatnonzero(~np.isfinite(values))[0]) + 1}: the value is not finite"
            )
    if any(k < 1 for k in top):
        raise InputError(f"top is {tuple(top)}: numbers of models are expected")
    order = np.argsort(-given, kind="stable")
    pearson = float(np.corrcoef(given, reached)[0, 1]) if np.ptp(given) > 0 and np.ptp(reached) > 0 else 0.0
    best = float(reached.max())
    return Agreement(
        weighted_tau=_tau(given, reached),
        pearson=pearson,
        regret=best - float(reached[order[0]]),
        top={k: float(reached[order[:k]].max() / best) if best else 1.0 for k in top},
    )


def with_plasticity(scores: Any, layers: Any) -> np.ndarray:
    """Scores (m,) of m models, standardised over the models, plus a fiftieth for each of a model's ``layers`` (m,).

    Deeper models gain more from fine-tuning than their frozen features tell: Bolya et al. 2021, «Scalable Diverse Model
    Selection for Accessible Transfer Learning», who add this to any score. Layers are counted as models are named, 50
    of a ResNet-50. Hold it against the depth alone with ``agreement``: on public tables that is a strong rival.
    Raises ``InputError`` for other lengths than one, fewer than two models, and values that are not finite.

    >>> with_plasticity([0.1, 0.2, 0.3], [50, 18, 18]).round(3).tolist()
    [-0.225, 0.36, 1.585]
    """
    given, depth = (np.asarray(values, dtype=np.float64) for values in (scores, layers))
    if given.shape != depth.shape or given.ndim != 1 or len(given) < 2:
        raise InputError(f"scores {given.shape} and layers {depth.shape}: as many of both, two at least, are expected")
    if not np.isfinite([given, depth]).all() or (depth <= 0).any():
        raise InputError("scores and layers: finite numbers, and positive layers, are expected")
    spread = given.std()
    return (given - given.mean()) / (spread if spread > 0 else 1.0) + depth / 50


def fine_tuning_seconds(
    model: Model,
    task: Task,
    *,
    split: str = "train",
    epochs: float = 3.0,
    batch_size: int = 16,
    seed: int = 0,
) -> float:
    """The seconds that fine-tuning would take here: those of one real step times the steps of so many epochs.

    The step is AdamW's on all weights and a fresh head, of ``batch_size`` random rows, after one to warm up; the
    model given stays as it is. Evaluation, saving and the search for a learning rate come on top.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = tasks.Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> fine_tuning_seconds(open_model("small:text-encoder:nano:0"), task) > 0
    True
    """
    if not 0 < epochs < math.inf or batch_size < 1:
        raise InputError(f"epochs {epochs} and batch_size {batch_size}: positive numbers are expected")
    total = len(task.rows(split))
    draw = generator("fine_tuning_seconds", seed).choice(total, min(batch_size, total), replace=False)
    with seeded("fine_tuning_seconds", seed):
        tuned = model.with_head(task).train()
        for parameter in tuned.parameters():
            parameter.requires_grad_(True)
        batch = tuned.collate(task)([task.rows(split)[int(i)] for i in draw])
        batch = {name: tensor.to(tuned.device) for name, tensor in batch.items()}
        optimiser = torch.optim.AdamW(tuned.parameters())
        taken = 0.0
        for _ in range(2):
            started = time.perf_counter()
            tuned(**batch)["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()
            if tuned.device.type == "cuda":
                torch.cuda.synchronize(tuned.device)
            taken = time.perf_counter() - started
    return taken * math.ceil(epochs * total / batch_size)


def _named(models: Sequence[Source] | Mapping[str, Source]) -> dict[str, Source]:
    if isinstance(models, Mapping):
        pairs: Iterable[tuple[str, Source]] = models.items()
    elif isinstance(models, str | os.PathLike):
        raise InputError(f"models is {models!r}: a list of models is expected")
    else:
        pairs = [(_called(source), source) for source in models]
    named: dict[str, Source] = {}
    for name, source in pairs:
        if name in named:
            raise InputError(f"two models are called {name!r}: give a mapping from names of your own")
        named[name] = source
    if not named:
        raise InputError("no models: at least one is expected")
    return named


def _called(source: Source) -> str:
    if isinstance(source, FeatureBank):
        return source.model
    if isinstance(source, Model):
        return source.source or type(source.backbone).__name__
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


def _score(bank: FeatureBank, rows: Any, score: str, pre: PED | None, parameters: Mapping[str, Any]) -> float:
    probs = None if bank.probs is None else bank.probs[rows]
    return score_of(bank.X[rows], bank.y[rows], score, probs=probs, pre=pre, general=bank.general, **parameters)


def _halves(y: np.ndarray, resamples: int, seed: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Row numbers of random halves with the classes in their shares; none, and a note, where a class is too small."""
    strata = np.zeros(len(y), dtype=np.int64)
    if y.dtype.kind != "f":
        strata, counts = classes_of(y, len(y))
        if counts.min() < 4:
            return [], (f"no intervals: a class has {counts.min()} rows, four at least are needed",)
    rng = generator("rank", seed)
    halves = []
    for _ in range(resamples):
        order = rng.permutation(len(y))
        order = order[np.argsort(strata[order], kind="stable")]  # class by class, every second row of each
        halves.append(np.sort(order[int(rng.integers(2)) :: 2]))
    return halves, ()


def _ranking(
    found: list[dict[str, Any]],
    halves: np.ndarray,
    score: str,
    bank: FeatureBank,
    level: float,
    notes: tuple[str, ...],
) -> Ranking:
    order = np.argsort([-row["score"] for row in found], kind="stable")
    resampled = halves[order]
    names = ["rank", "model", "score", "low", "high", "first", "seconds", "parameters", "features"]
    if any("fine_tuning_seconds" in row for row in found):
        names.append("fine_tuning_seconds")
    z = NormalDist().inv_cdf((1 + level) / 2)
    leaders = resampled.argmax(axis=0) if resampled.size else np.empty(0)
    rows = []
    for place, i in enumerate(order):
        row = dict.fromkeys(names) | found[i] | {"rank": place + 1}
        if resampled.shape[1] > 1:
            half_width = z * float(resampled[place].std(ddof=1))
            row |= {"low": row["score"] - half_width, "high": row["score"] + half_width}
            row["first"] = float((leaders == place).mean())
        rows.append(row)
    floats = dict.fromkeys(("score", "low", "high", "first", "seconds", "fine_tuning_seconds"), pl.Float64)
    table = pl.DataFrame(rows, schema_overrides={n: t for n, t in floats.items() if n in names}).select(names)
    return Ranking(score, bank.task, len(bank.y), table, resampled, level, notes)


def _tau(scores: np.ndarray, truth: np.ndarray) -> float:
    return float(weightedtau(scores, truth).statistic)
