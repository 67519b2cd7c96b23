"""Meta-rater: learn how to weigh many quality scores together, from cheap trainings on what random weights select.

Reach for it when documents have several scores and none is clearly the right one. Zhuang et al. 2025, «Meta-rater: A
Multi-dimensional Data Selection Method for Pre-training Language Models»: N = 256 proxies, each trained on the top
documents by a random weighted sum; LightGBM from weights to validation loss; the best of many simulated weights,
averaged. The paper does not publish this part's code: ranks as normalisation, weights from Dirichlet(1), and 100 000
simulated weights of which the best 128 are averaged (as RegMix has it) are assumed. ``train_rater`` keeps the epoch
with the lowest validation loss, where the paper's raters are kept by macro-F1.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as field_
from typing import Any, Literal

import numpy as np
import polars as pl

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.data.mix.regress import CrossValidation, Kind, MixtureRegressor
from downriver.data.score.classifier import ClassifierScorer
from downriver.data.score.table import KEYS, ScoreTable
from downriver.data.select.rules import Normalize, keys, normalized, top
from downriver.data.select.select import Selection, select

Proxy = Callable[[np.ndarray], float]
"""Rows of the table (ascending) → the validation loss of a small model trained on these documents."""


@dataclass
class MetaRater:
    """Learn weights of score columns, and select by their weighted sum.

    Parameters
    ----------
    proxy
        ``proxy(indices)`` trains a small model on these rows of the table and gives its validation loss.
    scores
        Columns to weigh; by default all numeric ones. Those where low is good are named in ``lower`` and turned round.
    normalize
        ``rank`` (default; no monotone change of a score matters) or ``zscore``.
    n_proxies, alpha
        So many weight vectors are drawn from Dirichlet(alpha) (256 as in the paper; 1.0).
    regressor
        A kind of ``MixtureRegressor``.
    k, budget_tokens
        What each proxy is trained on: the best k documents, or the best within so many tokens (column ``tokens``).
    simulated, averaged
        Weight vectors that the regressor is asked about, and how many of the best are averaged.
    missing
        Documents without a score: ``fail``, ``median`` (of the column) or ``exclude`` (never chosen).

    After ``fit``: ``weights_`` by column, ``losses_`` (N,) and ``drawn_`` (N, m).

    Raises ``InputError`` for fewer than five proxies, a budget beyond the table, a proxy that returns NaN, missing
    scores, and a budget at which all weights choose the same documents. A constant column is left out with a warning.

    >>> rng = np.random.default_rng(0)
    >>> good, noise = rng.random(200), rng.random(200)
    >>> table = pl.DataFrame({"id": [f"{i}" for i in range(200)], "good": good, "noise": noise})
    >>> rater = MetaRater(lambda rows: 1 - good[rows].mean(), k=40, n_proxies=60, simulated=2000, averaged=20)
    >>> rater.fit(table).weights_["good"] > 0.8
    True
    """

    proxy: Proxy
    scores: Sequence[str] | None = None
    k: int | None = None
    budget_tokens: float | None = None
    normalize: Normalize = "rank"
    lower: Sequence[str] = ()
    n_proxies: int = 256
    alpha: float = 1.0
    regressor: Kind = "lightgbm"
    simulated: int = 100_000
    averaged: int = 128
    missing: Literal["fail", "median", "exclude"] = "fail"
    tokens: str = "tokens"
    seed: int = 0

    weights_: dict[str, float] = field_(init=False, repr=False)
    losses_: np.ndarray = field_(init=False, repr=False)
    drawn_: np.ndarray = field_(init=False, repr=False)
    regressor_: MixtureRegressor = field_(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.n_proxies < 5:
            raise InputError(f"n_proxies is {self.n_proxies}: at least 5 are needed to learn from")
        if not self.alpha > 0 or not 1 <= self.averaged <= self.simulated:
            raise InputError(
                f"alpha {self.alpha}, averaged {self.averaged} of {self.simulated}: a positive alpha and"
                " 1 <= averaged <= simulated are expected"
            )
        if self.missing not in ("fail", "median", "exclude"):
            raise unknown("policy for missing scores", self.missing, ("fail", "median", "exclude"))
        if (self.k is None) == (self.budget_tokens is None):
            raise InputError("exactly one of k and budget_tokens is expected: what each proxy is trained on")

    def fit(self, table: Any) -> "MetaRater":
        """Run the proxies and learn the weights; returns itself."""
        frame = self._frame(table)
        names = self._columns(frame)
        matrix, able = self._matrix(frame, names)
        choose = self._chooser(frame, able)
        rng = generator("meta_rater", self.seed)
        drawn = rng.dirichlet(np.full(len(names), self.alpha), size=self.n_proxies)
        chosen = [choose(matrix @ weights) for weights in drawn]
        if all(np.array_equal(chosen[0], other) for other in chosen[1:]):
            raise InputError(
                f"all {self.n_proxies} weight vectors choose the same {len(chosen[0])} documents: there is nothing to"
                " learn; change the budget or the scores"
            )
        losses = np.array([self._loss(rows, run) for run, rows in enumerate(chosen)])
        named = {name: drawn[:, j] for j, name in enumerate(names)}
        self.drawn_, self.losses_ = drawn, losses
        self.regressor_ = MixtureRegressor(self.regressor).fit(named, losses)
        many = rng.dirichlet(np.full(len(names), self.alpha), size=self.simulated)
        predicted = self.regressor_.predict({name: many[:, j] for j, name in enumerate(names)})
        best = many[np.argsort(predicted, kind="stable")[: self.averaged]].mean(axis=0)
        self.weights_ = {name: float(w) for name, w in zip(names, best, strict=True)}
        return self

    def cv_report(self, folds: int = 5) -> CrossValidation:
        """How well the losses of proxies left out are predicted; by rank, a ρ near 0 means that nothing was learned."""
        names = list(self._fitted())
        named = {name: self.drawn_[:, j] for j, name in enumerate(names)}
        return self.regressor_.cross_validate(named, self.losses_, folds)

    def select(
        self,
        table: Any,
        *,
        k: int | None = None,
        budget_tokens: float | None = None,
        tau: float | None = None,
        weights: Mapping[str, float] | None = None,
        per_group: str | None = None,
        drop: Mapping[str, str] | None = None,
    ) -> Selection:
        """The best documents by the learned weights (or by others); the budget is by default that of the proxies."""
        weights = dict(self._fitted() if weights is None else weights)
        if k is None and budget_tokens is None and tau is None:
            k, budget_tokens = self.k, self.budget_tokens
        frame = self._frame(table)
        for name in weights:
            if name not in frame.columns:
                raise unknown("score column", name, frame.columns)
        matrix, able = self._matrix(frame, list(weights))
        values = np.full(frame.height, np.nan)
        values[able] = (matrix @ np.array(list(weights.values())))[able]
        ranked = frame.with_columns(pl.Series("weighted sum", values))
        return select(
            ranked,
            top("weighted sum"),
            k=k,
            budget_tokens=budget_tokens,
            tau=tau,
            tokens=self.tokens,
            per_group=per_group,
            drop=drop,
        )

    def ablate(self, table: Any) -> dict[str, float]:
        """By column, how much the proxy's loss rises when the selection is made without it (its weight goes to the
        others in proportion): one more proxy a column, and one with all."""
        weights = self._fitted()
        whole = self._loss(self.select(table).indices, "all scores")
        found = {}
        for name in weights:
            rest = {other: w for other, w in weights.items() if other != name}
            found[name] = self._loss(self.select(table, weights=rest).indices, f"without {name}") - whole
        return found

    def _fitted(self) -> dict[str, float]:
        if not hasattr(self, "weights_"):
            raise InputError("the rater has no weights yet: call fit first")
        return self.weights_

    def _frame(self, table: Any) -> pl.DataFrame:
        if isinstance(table, ScoreTable):
            return table.frame().collect()
        if not isinstance(table, pl.DataFrame | pl.LazyFrame):
            raise InputError(
                f"a {type(table).__name__} is no table of scores: a ScoreTable or polars frame is expected"
            )
        frame = table.lazy().collect()
        if "id" not in frame.columns:
            raise unknown("column of the table", "id", frame.columns)
        return frame

    def _columns(self, frame: pl.DataFrame) -> list[str]:
        if self.scores is None:
            names = [c for c in frame.columns if frame[c].dtype.is_numeric() and c not in (*KEYS, self.tokens)]
        else:
            names = list(self.scores)
        for name in (*names, *self.lower):
            if name not in frame.columns:
                raise unknown("score column", name, frame.columns)
        constant = [name for name in names if frame[name].drop_nulls().n_unique() < 2]
        if constant:
            warnings.warn(f"constant scores are left out: {', '.join(constant)}", RuntimeWarning, stacklevel=3)
        names = [name for name in names if name not in constant]
        if len(names) < 2:
            raise InputError(f"{len(names)} score columns vary: at least two are needed to weigh")
        return names

    def _matrix(self, frame: pl.DataFrame, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Normalised scores (n, m), and the rows that can be chosen."""
        raw = np.column_stack([frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in names])
        bad = ~np.isfinite(raw)
        if bad.any() and self.missing == "fail":
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"column {names[column]!r}: {frame['id'][int(row)]!r} has no finite score"
                " (missing='median' or 'exclude' go on)"
            )
        if self.missing == "median":
            raw = np.where(bad, np.nanmedian(np.where(bad, np.nan, raw), axis=0), raw)
            bad = np.zeros_like(bad)
        able = np.flatnonzero(~bad.any(axis=1))
        matrix = np.zeros_like(raw)
        for column, name in enumerate(names):
            sign = -1.0 if name in self.lower else 1.0
            matrix[able, column] = normalized(sign * raw[able, column], self.normalize)
        return matrix, able

    def _chooser(self, frame: pl.DataFrame, able: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Weighted sums (n,) → the rows that the budget pays for, ascending; the order of ``select``."""
        ties = keys(frame["id"].cast(pl.String).to_list())
        if self.k is not None:
            if not 1 <= self.k <= len(able):
                raise InputError(
                    f"k is {self.k} and {len(able)} documents can be chosen: a budget within them is needed"
                )
            tokens, budget = np.ones(frame.height), float(self.k)
        else:
            if self.tokens not in frame.columns:
                raise unknown("column of tokens", self.tokens, frame.columns)
            tokens, budget = frame[self.tokens].cast(pl.Float64).to_numpy(), float(self.budget_tokens or 0)
            if not 0 < budget <= tokens[able].sum():
                raise InputError(f"budget_tokens is {budget:g} and the corpus has {tokens[able].sum():g}")

        def choose(sums: np.ndarray) -> np.ndarray:
            order = able[np.lexsort((ties[able], -sums[able]))]
            return np.sort(order[: np.searchsorted(np.cumsum(tokens[order]), budget, side="right")])

        return choose

    def _loss(self, rows: np.ndarray, run: object) -> float:
        loss = float(self.proxy(rows))
        if not np.isfinite(loss):
            raise InputError(f"proxy {run} returned {loss} for {len(rows)} documents: a finite loss is expected")
        return loss


def train_rater(
    texts: Sequence[str],
    labels: Sequence[int],
    base: Any = "answerdotai/ModernBERT-base",
    *,
    num_labels: int = 6,
    epochs: float = 10,
    learning_rate: float = 5e-5,
    batch_size: int = 64,
    held: float = 0.1,
    seed: int = 0,
) -> ClassifierScorer:
    """Tune a text encoder to give the labels (0 to ``num_labels`` - 1) that a judge gave; a scorer of Σ i·P(i).

    ``base`` is a hub id, a folder or a ``Model``. Defaults are the paper's: cosine schedule from 5e-5, weight decay
    0.01, at most ten epochs of batches of 64 (16 × 4). ``held`` of the texts is kept for validation, once an epoch.

    >>> from downriver.models import small
    >>> scorer = train_rater(["good", "bad"] * 8, [1, 0] * 8, small("text-encoder", "nano"), num_labels=2, epochs=1,
    ...                      batch_size=4)
    >>> scorer.score(["good"]).shape
    (1,)
    """
    import datasets

    from downriver.core.budget import Budget
    from downriver.models.load import load
    from downriver.models.model import Model
    from downriver.tasks.task import Task
    from downriver.training import fine_tune

    if len(texts) != len(labels) or len(texts) < 10:
        raise InputError(f"{len(texts)} texts and {len(labels)} labels: one a text, and ten at least, are expected")
    if not all(0 <= int(label) < num_labels for label in labels):
        raise InputError(f"labels run from {min(labels)} to {max(labels)}: 0 to {num_labels - 1} are expected")
    names = tuple(str(i) for i in range(num_labels))
    order = generator("rater", seed).permutation(len(texts))
    cut = max(1, round(held * len(texts)))
    parts = {"validation": order[:cut], "train": order[cut:]}
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    splits = {
        split: datasets.Dataset.from_dict(
            {"text": [texts[i] for i in rows], "label": [int(labels[i]) for i in rows]}, features=features
        )
        for split, rows in parts.items()
    }
    task = Task("rating", "text-classification", splits, ("text",), "label", names)
    model = base if isinstance(base, Model) else load(base)
    steps = max(1, round(epochs * len(parts["train"]) / batch_size))
    tuned = fine_tune(
        model.with_head(task),
        task,
        Budget(steps, "steps"),
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=0.01,
        schedule="cosine",
        validation=max(1, min(steps, round(epochs))),
        seed=seed,
        in_place=True,
    )
    return ClassifierScorer(tuned)
