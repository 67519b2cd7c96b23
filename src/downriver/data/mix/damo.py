"""Which ratio of fine-tuning sets gives the best scores on many tasks, from a few dozen runs and their checkpoints.

Reach for it to mix instruction sets: every checkpoint is a row, as the amount of each set it has seen. Shi et al. 2025,
«DaMo: Data Mixing Optimizer in Fine-tuning Multimodal LLMs for Mobile Phone Agents», arXiv:2510.19336. Departures:

- The released script splits rows, so that every run it tests on is in training too. Here the checkpoints of a run, and
  all rows of one mixture, stay together.
- Trees are the default: on the released runs they predict runs left out, and the released network (``"mlp"``) hardly.
- A proposal is the best by the mean less the spread of an ensemble, not by one predictor's best guess.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.data.mix.batch import BatchMixtureSpace
from downriver.data.mix.propose import Mixture, in_hull
from downriver.data.mix.regress import Function, Kind, MixtureRegressor, targets
from downriver.data.mix.space import Array, shares

ROUNDED = 0.25  # how far from 1 a row may sum: the released ones, with one decimal, sum to 0.8 at least
SLOW, FAST = 10**6, 10**8  # mixtures that are searched one and all: trees and Gaussian processes, the others
SHORTLIST = 2000  # mixtures that the whole ensemble looks at


@dataclass(frozen=True)
class Report:
    """How well runs left out are predicted: R² and Spearman's ρ by task, and of the mean of all tasks."""

    tasks: tuple[str, ...]
    r2: Array
    rho: Array
    mean_r2: float
    mean_rho: float
    folds: int
    groups: int


class DaMo:
    """Scores on many tasks as a function of the ratio and of how far the training is.

    Args:
        regressor: a kind of ``MixtureRegressor``; ``"mlp"`` is the paper's.
        progress: use the checkpoints: features are p · (t + 1) / T, the amount of each set seen. Without, only the
            rows of the last checkpoint are used.
        members: how many more regressors are fitted for ``propose``, each to runs drawn with replacement.
        seed: of the regressor and of the draws.

    Attributes: ``domains_``, ``tasks_``, ``max_t_`` (T - 1), ``groups_``.

    >>> rng = np.random.default_rng(0)
    >>> P = rng.multinomial(16, [1 / 3] * 3, size=30) / 16
    >>> runs, P, T = np.repeat(np.arange(30), 2), np.repeat(P, 2, axis=0), np.tile([0, 1], 30)
    >>> seen = P * (T[:, None] + 1) / 2
    >>> damo = DaMo("linear").fit(P, T, {"sums": 40 + 20 * seen[:, 0], "plans": 30 + 30 * seen[:, 2]}, groups=runs)
    >>> damo.cv_report().mean_r2 > 0.999
    True
    >>> best = damo.propose(BatchMixtureSpace(damo.domains_, 16, {"domain 2": (0, 0.5)}), {"plans": 1.0}, top=1)[0]
    >>> best.weights["domain 2"]
    0.5
    """

    def __init__(self, regressor: Kind = "lightgbm", progress: bool = True, *, members: int = 8, seed: int = 1) -> None:
        if members < 0:
            raise InputError(f"members is {members}: a number of at least 0 is expected")
        self.regressor, self.progress, self.members, self.seed = regressor, progress, members, seed

    def fit(self, P: Any, T: Any, scores: Any, groups: Any = None, max_t: int | None = None) -> "DaMo":
        """Fit scores (n, k) to ratios ``P`` (n, m) at checkpoints ``T`` (n,), 0 to ``max_t`` (by default the last).

        ``groups`` is a label a row: of the run that it is a checkpoint of. Data frames are read by their columns'
        names. Warns where ratios had to be scaled to sum to 1, and for fewer than 2 (m + 1) runs.

        Raises ``InputError`` for ratios that sum to less than 0.75 or more than 1.25, scores that are missing, and for
        several rows of one mixture without groups.
        """
        ratios, self.domains_ = shares(P, name="ratios", off=ROUNDED)
        values, self.tasks_ = targets(scores, len(ratios))
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise InputError(f"scores, row {row + 1}, {self.tasks_[column]!r} is missing: a number is expected")
        steps = _checkpoints(T, len(ratios))
        self.max_t_ = int(steps.max()) if max_t is None else max_t
        if steps.max() > self.max_t_:
            raise InputError(f"T has a checkpoint {steps.max()}: 0 to {self.max_t_} are expected")
        member = _runs(ratios, groups)
        keep = np.ones(len(ratios), dtype=bool) if self.progress else steps == self.max_t_
        if not keep.any():
            raise InputError(f"no row is at the last checkpoint, {self.max_t_}")
        self.ratios_, self.steps_, self.scores_, self.groups_ = ratios[keep], steps[keep], values[keep], member[keep]
        runs, fewest = len(np.unique(self.groups_)), 2 * (len(self.domains_) + 1)
        if runs < fewest:
            warnings.warn(
                f"{runs} runs of {len(self.domains_)} sets: {fewest} at least are advised", RuntimeWarning, stacklevel=2
            )
        features = self._features(self.ratios_, self.steps_)
        self._functions = self._fitted(features, self.scores_)
        self._ensemble = []
        labels = np.unique(self.groups_)
        for number in range(self.members):
            drawn = generator("damo ensemble", self.seed, number).choice(labels, len(labels))
            rows = np.concatenate([np.flatnonzero(self.groups_ == label) for label in drawn])
            self._ensemble.append(self._fitted(features[rows], self.scores_[rows]))
        self._scale, self._shift = np.ones(len(self.tasks_)), np.zeros(len(self.tasks_))
        return self

    def predict(self, P: Any, t: Any = None) -> Array:
        """Scores (n, k) of ratios (n, m) at checkpoint ``t`` (one, or one a row; by default the last)."""
        self._check()
        ratios, _ = shares(P, self.domains_, "ratios", ROUNDED)
        steps = np.full(len(ratios), self.max_t_) if t is None else _checkpoints(t, len(ratios))
        return self._aligned(_apply(self._functions, self._features(ratios, steps)))

    def cv_report(self, groups: Any = None, folds: int = 10) -> Report:
        """Fit to all folds of runs but one, predict that one, for each.

        ``groups`` are by default those given to ``fit``. Whatever they say, rows of one mixture are never on both
        sides.
        """
        self._check()
        member = self.groups_ if groups is None else _runs(self.ratios_, groups)
        labels, member = np.unique(member, return_inverse=True)
        if not 2 <= folds <= len(labels):
            raise InputError(f"folds is {folds}: from 2 to the {len(labels)} groups of rows are expected")
        fold = (generator("damo folds", self.seed).permutation(len(labels)) % folds)[member]
        features, predicted = self._features(self.ratios_, self.steps_), np.empty_like(self.scores_)
        for k in range(folds):
            left = fold == k
            predicted[left] = _apply(self._fitted(features[~left], self.scores_[~left]), features[left])
        pairs = list(zip(self.scores_.T, predicted.T, strict=True))
        mean = self.scores_.mean(axis=1), predicted.mean(axis=1)
        return Report(
            self.tasks_,
            np.array([_r2(truth, guess) for truth, guess in pairs]),
            np.array([spearmanr(truth, guess).statistic for truth, guess in pairs]),
            _r2(*mean),
            float(spearmanr(*mean).statistic),
            folds,
            len(labels),
        )

    def propose(
        self,
        space: BatchMixtureSpace,
        weights: Mapping[str, float] | None = None,
        constraints: Mapping[str, tuple[float, float]] | None = None,
        *,
        top: int = 50,
        t: int | None = None,
        threshold: float | None = None,
        caution: float = 1.0,
        exhaustive: int | None = None,
        seed: int = 0,
    ) -> list[Mixture]:
        """The mixtures of one batch with the highest predicted weighted mean of the tasks, best first.

        Parameters
        ----------
        weights
            Of tasks; those not named have none. By default all alike.
        constraints
            Lowest and highest share by set, beside the limits of the space.
        top
            How many. The paper keeps 50, and trains on the first.
        t
            The checkpoint to be best at; by default the last.
        threshold
            Leave out mixtures that are predicted to be below it (65 in the released code).
        caution
            Mixtures are ranked by the ensemble's mean less so many of its standard deviations (``spread``). 0 and
            ``members=0`` is the paper's search.
        exhaustive
            Up to so many mixtures all are tried: 1e8, or 1e6 for trees and Gaussian processes, which take a thousand
            times as long. Beyond, a sample of 20 000 and a search from its best: one row of the batch moved at a time.
        seed
            Of that sample.

        The fitted regressor makes a shortlist of 2000 (or ``top``), which the ensemble ranks. Warns where the first
        lies outside the ratios that were fitted.
        """
        self._check()
        if set(space.domains) != set(self.domains_):
            raise InputError(
                f"domain {min(set(space.domains) ^ set(self.domains_))!r} is known to only one of space and regressor"
            )
        if top < 1 or caution < 0 or not 0 <= (self.max_t_ if t is None else t) <= self.max_t_:
            raise InputError(f"top {top}, caution {caution}, t {t}: numbers from 1, 0, and 0 to {self.max_t_}")
        share = self._weights(weights)
        if constraints:
            space = BatchMixtureSpace(space.domains, space.batch_size, _meet(space.limits, constraints))
        columns = [space.domains.index(name) for name in self.domains_]
        step = self.max_t_ if t is None else t
        single = self._objective(share)

        def features(W: Array) -> Array:
            return self._features(W[:, columns], np.full(len(W), step))

        def objective(W: Array) -> Array:
            return single(features(W))

        if exhaustive is None:
            exhaustive = SLOW if self.regressor in ("lightgbm", "exp+lightgbm", "gp") else FAST
        if space.size <= exhaustive:
            found = _best(space.iter(), objective, max(top, SHORTLIST))
        else:
            found = _climb(space, objective, max(top, SHORTLIST), seed)
        every = [self._functions, *self._ensemble]
        votes = np.stack([self._aligned(_apply(f, features(found))) @ share for f in every])
        mean, spread = votes.mean(axis=0), votes.std(axis=0)
        order = np.argsort(-(mean - caution * spread), kind="stable")[:top]
        order = order if threshold is None else order[mean[order] >= threshold]
        obvious = self._obvious(share, step)
        inside = [in_hull(found[i][columns], self.ratios_) for i in order]
        if inside and not inside[0]:
            warnings.warn(
                "the best mixture lies outside the runs that were fitted: run more of that region, or set constraints",
                RuntimeWarning,
                stacklevel=2,
            )
        return [
            Mixture(
                dict(zip(space.domains, found[i].tolist(), strict=True)),
                float(mean[i]),
                float(spread[i]),
                None,
                obvious,
                within,
            )
            for i, within in zip(order, inside, strict=True)
        ]

    def align(self, P: Any, scores: Any, T: Any = None) -> "DaMo":
        """The same predictor for another model: a straight line a task, from what is predicted to a few runs of it.

        ``scores`` (n, k) of ratios ``P`` (n, m), columns by the names of the tasks, at checkpoints ``T`` (by default
        the last). The paper names the step, not its form: a least-squares line is our reading. Where the predictions of
        a task do not differ, only a constant is added. Warns where a line falls: the new model's order is the reverse.

        Raises ``InputError`` for fewer than two rows, unknown or missing tasks.
        """
        self._check()
        predicted = self.predict(P, T)
        given, names = targets(scores, len(predicted))
        if hasattr(scores, "columns") or isinstance(scores, dict):
            if missing := [name for name in self.tasks_ if name not in names]:
                raise InputError(f"scores say nothing of task {missing[0]!r}")
            given = given[:, [names.index(name) for name in self.tasks_]]
        if given.shape != predicted.shape or len(given) < 2 or not np.isfinite(given).all():
            raise InputError(
                f"scores of shape {given.shape}: two rows at least, of {len(self.tasks_)} numbers, are expected"
            )
        centred, spread = predicted - predicted.mean(axis=0), predicted.var(axis=0)
        flat = spread <= 1e-12 * (1 + predicted.mean(axis=0) ** 2)
        slope = np.where(flat, 1.0, (centred * given).mean(axis=0) / np.where(flat, 1.0, spread))
        if (slope < 0).any():
            warnings.warn(
                f"task {self.tasks_[int(slope.argmin())]!r}: the new scores fall where the old predictor rises",
                RuntimeWarning,
                stacklevel=2,
            )
        new = copy.copy(self)
        new._scale = self._scale * slope
        new._shift = self._shift * slope + given.mean(axis=0) - slope * predicted.mean(axis=0)
        return new

    def _check(self) -> None:
        if not hasattr(self, "_functions"):
            raise InputError("DaMo is not fitted: call fit first")

    def _features(self, ratios: Array, steps: NDArray[np.int64]) -> Array:
        x = ratios * ((steps + 1) / (self.max_t_ + 1))[:, None]  # p (t + 1) / T
        if self.regressor in ("exp", "exp+lightgbm"):  # the law's k needs features that sum to 1
            return np.column_stack([x, 1 - x.sum(axis=1)]) if self.progress else x
        return x

    def _fitted(self, features: Array, values: Array) -> list[Function]:
        return MixtureRegressor(self.regressor, seed=self.seed).functions(features, values)

    def _objective(self, share: Array) -> Function:
        """The weighted mean of the tasks by one function: trees are fitted to the mean itself, the others averaged."""
        if self.regressor != "lightgbm":
            return lambda X: self._aligned(_apply(self._functions, X)) @ share
        blend = (self.scores_ * self._scale + self._shift) @ share
        return self._fitted(self._features(self.ratios_, self.steps_), blend[:, None])[0]

    def _aligned(self, values: Array) -> Array:
        return values * self._scale + self._shift

    def _weights(self, weights: Mapping[str, float] | None) -> Array:
        given = dict.fromkeys(self.tasks_, 1.0) if weights is None else weights
        for name, weight in given.items():
            if name not in self.tasks_:
                raise unknown("task in weights", name, self.tasks_)
            if not (np.isfinite(weight) and weight >= 0):
                raise InputError(f"weight of task {name!r} is {weight}: a number of at least 0 is expected")
        share = np.array([given.get(name, 0.0) for name in self.tasks_])
        if share.sum() <= 0:
            raise InputError("weights: at least one above 0 is expected")
        return share / share.sum()

    def _obvious(self, share: Array, step: int) -> dict[str, float]:
        """What is predicted of equal shares and of the best single set, and what the best run had at that point."""
        m = len(self.domains_)
        some = np.vstack([np.full(m, 1 / m), np.eye(m)])
        values = self._aligned(_apply(self._functions, self._features(some, np.full(m + 1, step)))) @ share
        best = int(values[1:].argmax())
        found = {"equal shares": float(values[0]), f"only {self.domains_[best]}": float(values[1 + best])}
        there = self.steps_ == step
        if there.any():
            found["best run"] = float((self._aligned(self.scores_[there]) @ share).max())
        return found


def _apply(functions: list[Function], X: Array) -> Array:
    return np.column_stack([function(X) for function in functions])


def _r2(truth: Array, guess: Array) -> float:
    return float(1 - ((truth - guess) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def _checkpoints(T: Any, n: int) -> NDArray[np.int64]:
    given = np.asarray(T)
    steps = np.broadcast_to(given, (n,)) if given.ndim == 0 else given
    if steps.shape != (n,) or not (np.equal(np.mod(steps, 1), 0) & (steps >= 0)).all():
        raise InputError(
            f"T has shape {given.shape}: the number of a checkpoint, from 0, for each of {n} rows is expected"
        )
    return steps.astype(np.int64)


def _runs(ratios: Array, groups: Any) -> NDArray[np.int64]:
    """A number a row; rows of one group, or of one mixture, have the same."""
    mixture = np.unique(np.round(ratios, 9), axis=0, return_inverse=True)[1].ravel()
    if groups is None:
        first: dict[int, int] = {}
        for row, label in enumerate(mixture.tolist()):
            if label in first:
                raise InputError(
                    f"rows {first[label] + 1} and {row + 1} have the same mixture: say with groups which rows are"
                    " checkpoints of one run (a random split would test on runs that are in training)"
                )
            first[label] = row
        return mixture
    labels = np.asarray(groups)
    if labels.shape != (len(ratios),):
        raise InputError(f"groups: a label for each of {len(ratios)} rows is expected, not {labels.shape}")
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group = np.unique(labels, return_inverse=True)[1].ravel()
    size = int(group.max() + mixture.max()) + 2
    links = coo_array((np.ones(len(group)), (group, group.max() + 1 + mixture)), shape=(size, size))
    return connected_components(links, directed=False)[1][group].astype(np.int64)


def _meet(
    limits: Mapping[str, tuple[float, float]], constraints: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Both kinds of limits together."""
    found = dict(limits)
    for name, (low, high) in constraints.items():
        least, most = found.get(name, (0.0, 1.0))
        found[name] = max(low, least), min(high, most)
    return found


def _best(chunks: Iterator[Array], objective: Function, top: int) -> Array:
    """The rows of all chunks with the highest objective, best first; memory stays at one chunk."""
    kept: Array | None = None
    values = np.empty(0)
    for chunk in chunks:
        rows = chunk if kept is None else np.concatenate([kept, chunk])
        values = np.concatenate([values, objective(chunk)])
        order = np.argsort(-values, kind="stable")[:top]
        kept, values = rows[order], values[order]
    assert kept is not None
    return kept


def _climb(space: BatchMixtureSpace, objective: Function, top: int, seed: int, starts: int = 20) -> Array:
    """The best of a sample and of what lies uphill from its best, one row of the batch moved at a time."""
    b, m = space.batch_size, len(space.domains)
    sample = space.sample(min(20_000, space.size), seed)
    seen = {row.tobytes(): value for row, value in zip(_counts(sample, b), objective(sample), strict=True)}
    front = sorted(seen, key=lambda row: -seen[row])[:starts]
    moves = np.array([np.eye(m, dtype=np.int64)[i] - np.eye(m, dtype=np.int64)[j] for i in range(m) for j in range(m)])
    moves = moves[np.abs(moves).sum(axis=1) > 0]
    while front:
        near = [(row, np.frombuffer(row, dtype=np.int64) + moves) for row in front]
        fresh = {k.tobytes() for _, steps in near for k in steps if k.tobytes() not in seen and k / b in space}
        if fresh:
            rows = np.array([np.frombuffer(row, dtype=np.int64) for row in sorted(fresh)])
            seen |= {row.tobytes(): value for row, value in zip(rows, objective(rows / b), strict=True)}
        uphill = []
        for row, steps in near:
            best = max((k.tobytes() for k in steps if k.tobytes() in seen), key=seen.__getitem__, default=row)
            if seen[best] > seen[row]:
                uphill.append(best)
        front = list(dict.fromkeys(uphill))
    order = sorted(seen, key=lambda row: -seen[row])[:top]
    return np.array([np.frombuffer(row, dtype=np.int64) for row in order]) / b


def _counts(W: Array, batch_size: int) -> NDArray[np.int64]:
    return np.rint(W * batch_size).astype(np.int64)
