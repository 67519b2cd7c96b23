"""Forecast a benchmark's score for a large model from the items on which small models make steady progress.

Reach for it when you have item-level pass rates of four or more models of one recipe and the benchmark mixes items that
small models already solve, items that they begin to solve, and items that they only guess: its mean then follows no
simple law, but groups of items of like difficulty do.

Xu et al. 2025, «Unveiling Downstream Performance Scaling of LLMs: A Clustering-Based Perspective», arXiv:2502.17262.
Items are clustered by their pass rates over the models, a law is fitted to each cluster, clusters that have not emerged
or cannot be extrapolated are dropped, and the score on the rest is mapped to the whole benchmark. Departures, where the
paper's text leaves it open: the unit of compute is the smallest model's, clusters are not merged at the end, falls of
up to 0.02 between models count as noise, and the mapping is a non-decreasing spline by construction, whose smoothing
is given up (instead of knots added) until its RMSE is below 0.005.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from downriver.core.errors import InputError, unknown
from downriver.forecast.curve import Curve
from downriver.forecast.fit import Array, LawFit, aligned, column, fit_law, fit_laws
from downriver.forecast.forms import Form, PassRate, PowerLaw, Sigmoid, SmoothlyBroken
from downriver.forecast.law import Law, caution, shaped

MAPPINGS = ("spline", "quartic", "linear")
FORMS = ("exp", "passrate", "bnsl")
FALL = 0.02  # between two models, of a cluster's mean pass rate: noise
EMERGED = 0.05  # rise above chance from which a cluster has emerged
CLOSE = 0.005  # RMSE that the mapping must reach; the paper's


class NoPredictableSubset(InputError):
    """No cluster of items can be extrapolated; the message says why, cluster by cluster."""


@dataclass(frozen=True)
class ClusterFit:
    """One cluster: items in it, its mean pass rate at each model, its law, and why it was dropped (None if kept)."""

    size: int
    rates: Array
    law: LawFit
    reason: Literal["non-emergent", "non-extrapolatable"] | None

    @property
    def kept(self) -> bool:
        return self.reason is None

    @property
    def params(self) -> dict[str, float]:
        """g, a, b, c of ``g + (1 - g) exp(-a C^-b - c)``, C in the predictor's unit."""
        return self.law.params


@dataclass(frozen=True)
class CODForecast:
    """The score of the whole benchmark, that of the subset it was mapped from, and the subset's share of the items."""

    score: float
    subset_score: float
    subset_fraction: float
    clusters: tuple[ClusterFit, ...]
    warnings: tuple[str, ...]


class CODPredictor(BaseEstimator):
    """Clustering on difficulty: score of a benchmark at a compute far beyond the models that were measured.

    Args:
        radius: largest distance of an item from its cluster's centre, in pass rates over the models.
        min_cluster: fewest items of a cluster; the others are outliers.
        thresholds: a cluster is kept where a > the first, b > the second and c < the third.
        mapping: from subset to whole: ``"spline"`` (cubic, smoothing), ``"quartic"``, or ``"linear"``,
            which is none at all. Each is non-decreasing, 0 at 0 and 1 at 1.
        chance: pass rate of guessing, one number an item or for all; None takes the smallest model's.
        compute_unit: ``"min"``, the smallest model's compute, or a number; a's threshold depends on it.
        smooth: share of each item's features taken from their non-decreasing regression, 0 to 1.

    Attributes: ``labels_`` (a cluster's number an item, -1 for outliers), ``clusters_``, ``unit_``, ``kept_`` (a mask
    over the items), ``pairs_`` (subset and whole score of every model and anchor), ``mapping_``.

    >>> rng, C = np.random.default_rng(0), 3.0 ** np.arange(6)
    >>> a = np.repeat([1.5, 4.0], 40)[:, None] * np.exp(0.05 * rng.standard_normal((80, 1)))
    >>> cod = CODPredictor().fit(np.exp(-a * C**-0.4), C)
    >>> forecast = cod.predict(3.0**9)
    >>> truth = np.exp(-a * 3.0 ** (9 * -0.4)).mean()
    >>> len(forecast.clusters), forecast.subset_fraction, bool(abs(forecast.score - truth) < 0.005)
    (2, 1.0, True)
    """

    def __init__(
        self,
        radius: float = 0.25,
        min_cluster: int = 10,
        thresholds: tuple[float, float, float] = (1.0, 0.1, 1.0),
        mapping: Literal["spline", "quartic", "linear"] = "spline",
        chance: Any = None,
        compute_unit: Literal["min"] | float = "min",
        smooth: float = 0.0,
    ) -> None:
        self.radius = radius
        self.min_cluster = min_cluster
        self.thresholds = thresholds
        self.mapping = mapping
        self.chance = chance
        self.compute_unit = compute_unit
        self.smooth = smooth

    def fit(self, pass_rates: Any, compute: Any, anchors: Sequence[Any] = ()) -> "CODPredictor":
        """Fit to pass rates (items, models) in 0..1 of models whose ``compute`` rises from column to column.

        ``anchors`` are pass rates (items,) of other, stronger models: with the small models they show how the subset's
        score goes with the whole. Raises ``InputError`` for fewer than four models, ``NoPredictableSubset`` where no
        cluster is kept.
        """
        rates, compute, anchors = self._checked(pass_rates, compute, anchors)
        self.unit_ = float(compute[0] if self.compute_unit == "min" else self.compute_unit)
        self.compute_ = compute
        self.labels_ = cluster_items(smoothed(rates, self.smooth), self.radius, self.min_cluster)
        members = [self.labels_ == k for k in range(self.labels_.max() + 1)]
        if not members:
            raise NoPredictableSubset(
                f"no {self.min_cluster} of {len(rates)} items lie within {self.radius} of a common centre"
            )
        means = np.stack([rates[m].mean(axis=0) for m in members])
        laws = fit_laws(PassRate(), [compute / self.unit_], means)
        guess = rates[:, 0] if self.chance is None else np.broadcast_to(self.chance, len(rates))
        self.clusters_ = tuple(
            ClusterFit(int(m.sum()), mean, law, self._reason(mean, law, float(guess[m].mean())))
            for m, mean, law in zip(members, means, laws, strict=True)
        )
        self._kept = [k for k, cluster in enumerate(self.clusters_) if cluster.kept]
        if not self._kept:
            each = "; ".join(f"{c.size} items {c.reason} ({_figures(c)})" for c in self.clusters_)
            raise NoPredictableSubset(f"no cluster can be extrapolated: {each}")
        self.kept_ = np.isin(self.labels_, self._kept)
        every = np.column_stack([rates, *anchors])
        self.pairs_ = np.stack([every[self.kept_].mean(axis=0), every.mean(axis=0)])
        self.top_anchor_ = float(max((a[self.kept_].mean() for a in anchors), default=-np.inf))
        self.mapping_ = ScoreMapping.fit(self.pairs_[0], self.pairs_[1], self.mapping)
        self._data = rates, anchors
        return self

    def predict(self, compute: float) -> CODForecast:
        """The benchmark's score at a compute, and what it was made of.

        Warns (``RuntimeWarning``) of a target inside the range of the models, and of a subset score beyond that of
        every anchor: there the mapping is a guess.
        """
        C = self._target(compute)
        subset = float(self._subset(lambda law: law.predict(C)))
        said = []
        if compute <= self.compute_[-1]:
            said.append("the target lies inside the range of the fitted models: an interpolation, not a forecast")
        if self.top_anchor_ < subset and not (self.kept_.all() or self.mapping == "linear"):
            said.append(f"no anchor reaches the subset score {subset:.3f}: how it maps to the whole is a guess")
        caution(said)
        return CODForecast(float(self.mapping_(subset)), subset, float(self.kept_.mean()), self.clusters_, tuple(said))

    def interval(self, compute: float, level: float = 0.9) -> tuple[float, float]:
        """The range of the score by the scatter of each kept cluster; the mapping is taken as known."""
        C = self._target(compute)
        if not 0 < level < 1:
            raise InputError(f"level {level}: a number between 0 and 1 is expected")
        if any(self.clusters_[k].law.spare <= 0 for k in self._kept):
            return np.nan, np.nan
        seeds = iter(range(len(self._kept)))  # clusters scatter independently of each other
        drawn = self._subset(lambda law: np.clip(law.sample([C], n=500, seed=next(seeds))[0], 0, 1))
        low, high = np.quantile(self.mapping_(drawn), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def ci(self, level: float = 0.95) -> list[dict[str, tuple[float, float]]]:
        """Intervals of g, a, b and c of every kept cluster."""
        check_is_fitted(self, "clusters_")
        return [self.clusters_[k].law.ci(level) for k in self._kept]

    def audit(self) -> float:
        """Forecast minus truth for the largest model, from the smaller ones (at least four) and the anchors."""
        check_is_fitted(self, "clusters_")
        rates, anchors = self._data
        if len(self.compute_) < 5:
            raise InputError("audit: at least five models are needed, to hide one")
        unit = self.unit_ if self.compute_unit == "min" else self.compute_unit
        smaller = clone(self).set_params(compute_unit=unit).fit(rates[:, :-1], self.compute_[:-1], anchors)
        return float(smaller.mapping_(smaller._subset(lambda law: law.predict(self.compute_[-1] / unit)))) - float(
            rates[:, -1].mean()
        )

    def report(self) -> str:
        """Every cluster with its law and fate, and how far the mapping is off on what it was fitted to."""
        check_is_fitted(self, "clusters_")
        outliers = int((self.labels_ < 0).sum())
        lines = [f"{len(self.clusters_)} clusters, {outliers} outliers, {self.kept_.mean():.0%} of the items kept"]
        for cluster in self.clusters_:
            rates = " ".join(f"{v:.2f}" for v in cluster.rates)
            lines.append(f"  {cluster.size:5} items {rates}: {_figures(cluster)}, {cluster.reason or 'kept'}")
        off = self.mapping_(self.pairs_[0]) - self.pairs_[1]
        return "\n".join([*lines, f"  mapping {self.mapping}: off by {np.sqrt((off**2).mean()):.4f} (RMSE)"])

    def _subset(self, ask: Any) -> Any:
        weights = np.array([self.clusters_[k].size for k in self._kept], dtype=np.float64)
        values = np.stack([ask(self.clusters_[k].law) for k in self._kept])
        return np.tensordot(weights / weights.sum(), values, axes=1)

    def _target(self, compute: float) -> float:
        check_is_fitted(self, "clusters_")
        return float(column("compute", [compute])[0]) / self.unit_

    def _reason(self, mean: Array, law: LawFit, chance: float) -> Literal["non-emergent", "non-extrapolatable"] | None:
        if mean.max() - chance < EMERGED:
            return "non-emergent"
        p, (a, b, c) = law.params, self.thresholds
        rises = bool((np.diff(mean) >= -FALL).all()) and mean[-1] > mean[0]
        return None if rises and p["a"] > a and p["b"] > b and p["c"] < c else "non-extrapolatable"

    def _checked(self, pass_rates: Any, compute: Any, anchors: Sequence[Any]) -> tuple[Array, Array, list[Array]]:
        if self.mapping not in MAPPINGS:
            raise unknown("mapping", self.mapping, MAPPINGS)
        if not (self.radius > 0 and self.min_cluster >= 1 and 0 <= self.smooth <= 1):
            raise InputError(
                f"radius {self.radius}, min_cluster {self.min_cluster}, smooth {self.smooth}: a positive number, a "
                "whole number of at least 1 and a number from 0 to 1 are expected"
            )
        rates = _rates("pass_rates", pass_rates, 2)
        compute = column("compute", compute)
        if rates.shape[1] != len(compute):
            raise InputError(f"pass_rates: {rates.shape[1]} models, compute: {len(compute)}")
        if len(compute) < 4:
            raise InputError(f"{len(compute)} models: at least 4 are needed")
        if (np.diff(compute) <= 0).any():
            raise InputError("compute: a larger number for each next model is expected (one model a compute)")
        found = [_rates(f"anchor {i}", anchor, 1) for i, anchor in enumerate(anchors)]
        if wrong := [i for i, anchor in enumerate(found) if len(anchor) != len(rates)]:
            raise InputError(f"anchor {wrong[0]}: pass rates of all {len(rates)} items are expected")
        return rates, compute, found


def cluster_items(features: Array, radius: float, min_cluster: int = 10) -> Array:
    """Group items (n, d) by mean shift, so that no item lies farther than ``radius`` from its cluster's centre.

    Mean shift is run on what is left until no new cluster of ``min_cluster`` items appears; the rest has label -1.
    Neither the order of the items nor a feature given twice changes the groups.

    >>> rates = np.array([[0.1, 0.2]] * 12 + [[0.8, 0.9]] * 15 + [[0.1, 0.9]] * 3)
    >>> np.bincount(cluster_items(rates, 0.2) + 1).tolist()
    [3, 15, 12]
    """
    from sklearn.cluster import MeanShift

    features = np.unique(np.asarray(features, dtype=np.float64), axis=1)
    order = np.lexsort(features.T)
    X = features[order]
    labels, rest, count = np.full(len(X), -1), np.arange(len(X)), 0
    while len(rest) >= min_cluster:
        seeds = np.unique(np.round(X[rest] / radius), axis=0) * radius
        try:
            found = MeanShift(bandwidth=radius, seeds=seeds).fit(X[rest])
        except ValueError:  # no item within the radius of any seed
            found = MeanShift(bandwidth=radius).fit(X[rest])
        accepted = np.zeros(len(rest), dtype=bool)
        for k, centre in enumerate(found.cluster_centers_):
            near = (found.labels_ == k) & (np.linalg.norm(X[rest] - centre, axis=1) <= radius)
            if near.sum() >= min_cluster:
                labels[rest[near]] = count
                count += 1
                accepted |= near
        if not accepted.any():
            break
        rest = rest[~accepted]
    back = np.empty_like(labels)
    back[order] = labels
    return back


def smoothed(rates: Array, share: float) -> Array:
    """Features with a share of their non-decreasing regression over the models mixed in."""
    if share == 0:
        return rates
    from sklearn.isotonic import isotonic_regression

    return (1 - share) * rates + share * np.stack([isotonic_regression(row) for row in rates])


@dataclass(frozen=True)
class ScoreMapping:
    """A non-decreasing spline on [0, 1] from 0 to 1: ``knots`` inside, coefficients that never fall."""

    degree: int
    knots: Array
    coefficients: Array

    @classmethod
    def fit(cls, subset: Array, whole: Array, kind: str) -> "ScoreMapping":
        """Least squares through pairs; ``"spline"`` has a knot at every pair and bends no more than the RMSE needs."""
        if kind != "spline":
            return cls._with({"quartic": 4, "linear": 1}[kind], np.empty(0), 0.0, subset, whole)
        knots = np.unique(subset[(subset > 0.01) & (subset < 0.99)].round(2))
        for smoothing in 10.0 ** np.arange(0, -9, -0.5):
            found = cls._with(3, knots, smoothing, subset, whole)
            if np.sqrt(((found(subset) - whole) ** 2).mean()) < CLOSE:
                break
        return found

    @classmethod
    def _with(cls, degree: int, knots: Array, smoothing: float, subset: Array, whole: Array) -> "ScoreMapping":
        from scipy.optimize import nnls

        blank = cls(degree, knots, np.empty(0))
        B = blank._basis(subset)
        # f = B c with c rising from 0 to 1: its steps are at least 0 and sum to 1
        steps = np.tril(np.ones((B.shape[1], B.shape[1] - 1)), -1)
        rows, targets = [B @ steps / np.sqrt(len(subset))], [whole / np.sqrt(len(subset))]
        if smoothing:
            # beyond the pairs it may bend as it must: there only its ends are known
            grid = np.linspace(subset.min(), subset.max(), 200)
            rows.append(np.sqrt(smoothing / len(grid)) * blank._basis(grid, 2) @ steps)  # the mean of f''^2
            targets.append(np.zeros(len(grid)))
        firm = 1e4
        found, _ = nnls(np.vstack([*rows, np.full(steps.shape[1], firm)]), np.concatenate([*targets, [firm]]))
        return cls(degree, knots, steps @ (found / found.sum()))

    def __call__(self, subset: Any) -> Any:
        points = np.clip(np.asarray(subset, dtype=np.float64), 0, 1)
        return shaped((self._basis(points.ravel()) @ self.coefficients).reshape(points.shape), subset)

    def _basis(self, points: Array, derivative: int = 0) -> Array:
        from scipy.interpolate import BSpline

        ends = self.degree + 1
        t = np.concatenate([np.zeros(ends), self.knots, np.ones(ends)])
        spline = BSpline(t, np.eye(len(t) - ends), self.degree)
        return spline.derivative(derivative)(points) if derivative else spline(points)


class EndToEndLaw(Curve):
    """A benchmark's mean score straight from compute: what clustering is to be compared with.

    Args:
        form: ``"exp"``, ``g + (1-g) exp(-a C^-b - c)``, the law of a cluster on all items; ``"passrate"``, a power law
            with floor of minus the logarithm of the score; ``"bnsl"``, a smoothly broken power law of ``1 - score``.
        n_starts: starting points of the fit.

    Attributes: ``params_``, ``fit_``, ``range_``.

    >>> C = 3.0 ** np.arange(7)
    >>> round(EndToEndLaw().fit(C, 0.2 + 0.8 * np.exp(-4 * C**-0.4 - 0.05)).predict(3.0**8), 4)
    0.8757
    """

    input = "compute"
    output = "score"
    far = 1000.0

    def __init__(self, form: Literal["exp", "passrate", "bnsl"] = "exp", n_starts: int = 108) -> None:
        self.form = form
        self.n_starts = n_starts

    def fit(self, compute: Any, score: Any, sample_weight: Any = None) -> "EndToEndLaw":
        """Fit to compute and mean scores in 0..1 (above 0 for ``"passrate"``), 1-D, of one length."""
        self._check()
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        score = _rates("score", score, 1)
        if self.form == "passrate" and (score <= 0).any():
            raise InputError("score: a positive score at every model is expected, for its logarithm is fitted")
        forms: dict[str, Form] = {"exp": PassRate(), "passrate": PowerLaw(), "bnsl": SmoothlyBroken()}
        return self._fit_curve(forms[self.form], compute, self._turned(score), sample_weight, "lsq", self.n_starts)

    def interval(self, x: Any, level: float = 0.95) -> tuple[Array, Array]:
        ends = super().interval(x, level)
        if self.form == "exp":
            return ends
        low, high = (self._back(end) for end in ends[::-1])
        return low, high

    def _value(self, points: Array) -> Array:
        return self._back(super()._value(points))

    def _turned(self, score: Array) -> Array:
        return {"exp": lambda s: s, "passrate": lambda s: -np.log(s), "bnsl": lambda s: 1 - s}[self.form](score)

    def _back(self, fitted: Array) -> Array:
        return {"exp": lambda v: v, "passrate": lambda v: np.exp(-v), "bnsl": lambda v: 1 - v}[self.form](fitted)


class LossIntermediate(Law):
    """Compute to loss by ``E + A C^-alpha``, loss to score by a sigmoid: the other usual way to a score.

    Attributes: ``fit_`` (the sigmoid), ``loss_fit_``, ``params_`` of both.

    >>> C = 3.0 ** np.arange(7)
    >>> loss = 1.5 + 2 * C**-0.3
    >>> law = LossIntermediate().fit(C, loss, 0.9 - 0.7 / (1 + np.exp(-3 * (loss - 2.3))))
    >>> round(law.predict(3.0**9), 4)
    0.823
    """

    def __init__(self, n_starts: int = 108) -> None:
        self.n_starts = n_starts

    def fit(self, compute: Any, loss: Any, score: Any) -> "LossIntermediate":
        """Fit to compute, loss and scores in 0..1 of the same models, 1-D, of one length; at least four models."""
        self._check()
        compute, loss = aligned({"compute": compute, "loss": loss})
        score = _rates("score", score, 1)
        self.loss_fit_ = fit_law(PowerLaw(), [compute], loss, n_starts=self.n_starts)
        self.fit_ = fit_law(Sigmoid(), [loss], score, n_starts=self.n_starts)
        self.params_ = self.loss_fit_.params | self.fit_.params
        caution(self.cautions())
        return self

    def predict(self, compute: Any) -> Any:
        """The score at a compute: a float for a number, else an array."""
        points = self._points(compute)
        return shaped(self.fit_.predict(self.loss_fit_.predict(points)), compute)

    def interval(self, compute: Any, level: float = 0.9) -> tuple[Array, Array]:
        """The range of a new model's score, the loss's scatter carried through; NaN where no model is spare."""
        points = np.atleast_1d(self._points(compute))
        if min(self.fit_.spare, self.loss_fit_.spare) <= 0:
            return np.full(len(points), np.nan), np.full(len(points), np.nan)
        drawn = self.fit_.sample(self.loss_fit_.sample(points), seed=1)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=1)
        return low, high

    def _points(self, compute: Any) -> Array:
        self._fitted()
        return column("compute", np.ravel(compute)).reshape(np.shape(compute))


def _rates(name: str, values: Any, dimensions: int) -> Array:
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: numbers are expected, not {values!r:.80}") from None
    if found.ndim != dimensions or not found.size:
        raise InputError(f"{name}: {dimensions} dimensions and at least one entry are expected, not {found.shape}")
    bad = ~((found >= 0) & (found <= 1))
    if bad.any():
        where = np.argwhere(bad)[0].tolist()
        raise InputError(f"{name}: entry {where} is {found[tuple(where)]}, a number from 0 to 1 is expected")
    return found


def _figures(cluster: ClusterFit) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in cluster.params.items())
