"""Forecast what more pretraining data buys after fine-tuning, and say whether that pretraining data is aligned at all.

Reach for it when you can fine-tune a few early checkpoints: a score that follows the log-law may be extrapolated; a
score that falls while the loss falls too means that the pretraining set is not aligned with the task, and that the loss
must not be trusted.

Isik et al. 2024, «Scaling Laws for Downstream Task Performance of Large Language Models», arXiv:2402.04177: the score
law ``(log(A D^alpha))^beta`` (BLEU, COMET, ROUGE, chrF), the loss law ``E + A D^-alpha``, one fit for each pretraining
set, fine-tuning size and metric. Departures: Huber's loss of width 1e-3 is taken of the logarithm of the score, so that
the score's unit drops out; beta, alpha and the logarithm at every fitted point are positive by construction; the
thresholds of the verdict are ours, for the paper gives none.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.forecast.curve import Curve
from downriver.forecast.fit import Array, aligned, column
from downriver.forecast.forms import LogLaw, PowerLaw
from downriver.forecast.table import RunTable

FEWEST = 4  # sizes of pretraining data that a law needs
MISFIT = 0.05  # largest residual of an aligned series, relative to its mean score; our choice


class LawDomainError(InputError):
    """The score law was asked where its logarithm is not positive: there it has no value."""


class ScoreLogLaw(Curve):
    """``f(D_p) = (log(A D_p^alpha))^beta``: a score after fine-tuning against the amount D_p of pretraining data.

    Args:
        scale: the highest score there is (100 for BLEU or chrF, 1 for fractions); scores beyond it are refused.
        loss: ``"huber_log"``, Huber's loss on the logarithm (the default), or ``"lsq"`` on the score.
        delta: width of Huber's loss.
        n_starts: starting points of the fit; the best end is kept.

    Attributes: ``params_`` (log_A, alpha, beta; natural logarithm), ``residual_`` (root mean square, in units of the
    score), ``fit_``, ``range_`` (smallest and largest fitted D_p).

    >>> D = np.array([1e8, 3e8, 1e9, 3e9, 1e10])
    >>> law = ScoreLogLaw().fit(D, (-5 + 0.5 * np.log(D)) ** 2.0)
    >>> round(law.predict(3e10), 3), f"{law.tokens_for(50.0):.4g}"
    (49.875, '3.053e+10')
    """

    input = "d_p"
    output = "score"

    def __init__(
        self,
        scale: float = 100.0,
        loss: Literal["huber_log", "lsq"] = "huber_log",
        delta: float = 1e-3,
        n_starts: int = 108,
    ) -> None:
        self.scale = scale
        self.loss = loss
        self.delta = delta
        self.n_starts = n_starts

    def fit(self, d_p: Any, score: Any, sample_weight: Any = None) -> "ScoreLogLaw":
        """Fit to amounts of pretraining data and scores, 1-D, positive, of one length; an amount may be there twice.

        Raises ``InputError`` for fewer than four different amounts, for an amount of 0 (the run without pretraining is
        a reference, not a point of the law), and for scores that are not above 0 and at most ``scale``.
        """
        self._check()
        d_p, score = _points(d_p, "score", score)
        if (score > self.scale).any():
            raise InputError(f"score: {score.max():g} is above scale {self.scale:g}; are two metrics mixed?")
        self._fit_curve(LogLaw(), d_p, score, sample_weight, self.loss, self.n_starts, self.delta)
        self.residual_ = float(np.sqrt(np.mean((score - self.fit_.predict(d_p)) ** 2)))
        return self

    def tokens_for(self, score: Any) -> Any:
        """The amount of pretraining data that reaches a score, the inverse of ``predict``."""
        if (np.asarray(score) > self.scale).any():
            raise InputError(f"score {score!r} is above scale {self.scale:g}")
        return self._input_for(score)

    def _value(self, points: Array) -> Array:
        found = super()._value(points)
        if np.isnan(found).any():
            raise LawDomainError(
                f"d_p {points[np.isnan(found)].max():g}: log_A + alpha log d_p is not positive there, the law has no "
                f"value so far below the fitted {self.range_[0]:g}"
            )
        return found


class PowerLossLaw(Curve):
    """``L(D_p) = E + A D_p^-alpha``: downstream cross-entropy against the amount of pretraining data.

    Args:
        loss: ``"lsq"`` on the cross-entropy, or ``"huber_log"``.
        n_starts: starting points of the fit.

    Attributes: ``params_`` (E, A, alpha), ``fit_``, ``range_``.

    >>> D = np.array([1e8, 3e8, 1e9, 3e9, 1e10])
    >>> law = PowerLossLaw().fit(D, 1.5 + 60 * D**-0.2)
    >>> round(law.predict(3e10), 4), f"{law.tokens_for(2.0):.4g}"
    (1.9816, '2.488e+10')
    """

    input = "d_p"
    output = "loss"

    def __init__(self, loss: Literal["lsq", "huber_log"] = "lsq", n_starts: int = 108) -> None:
        self.loss = loss
        self.n_starts = n_starts

    def fit(self, d_p: Any, loss: Any, sample_weight: Any = None) -> "PowerLossLaw":
        """Fit to amounts of pretraining data and losses, 1-D, positive, of one length; four different amounts."""
        self._check()
        d_p, loss = _points(d_p, "loss", loss)
        return self._fit_curve(PowerLaw(), d_p, loss, sample_weight, self.loss, self.n_starts)

    def tokens_for(self, loss: Any) -> Any:
        """The amount of pretraining data that reaches a loss; ``InputError`` for one at or below the floor E."""
        return self._input_for(loss)


@dataclass(frozen=True)
class Verdict:
    """Whether a pretraining set is aligned with the task, and what to do about it.

    ``paradox``: the loss falls while the score does not rise, so that the loss is no measure of the score here.
    ``law_residual`` is the score law's largest residual relative to the mean score (NaN where no law was fitted).
    """

    aligned: bool
    monotone_score: bool
    monotone_loss: bool
    paradox: bool
    law_residual: float
    reason: str
    advice: str


def alignment_verdict(
    d_p: Any,
    score: Any,
    loss: Any = None,
    reference_score: float | None = None,
    noise: float | None = None,
    *,
    loss_noise: float = 0.0,
    misfit: float = MISFIT,
) -> Verdict:
    """Judge a series of fine-tuned checkpoints of one pretraining set.

    Aligned means: the score rises with every larger amount of pretraining data, it follows the log-law, and it ends
    above the score without pretraining.

    Args:
        d_p: amounts of pretraining data; 0 is the run without pretraining, and repeated amounts are seeds (averaged).
        score: higher is better. loss: downstream cross-entropy of the same runs, if measured.
        reference_score: the score without pretraining, where ``d_p`` has no 0.
        noise, loss_noise: standard deviation of one mean score and loss from seed to seed. A fall by less than two
            standard deviations of a difference is no fall. ``noise=None`` takes it from repeated amounts, or 0.
        misfit: residual relative to the mean score beyond which the law does not describe the series.

    >>> D = np.array([1e8, 3e8, 1e9, 3e9, 1e10])
    >>> alignment_verdict(D, (-5 + 0.5 * np.log(D)) ** 2.0, 1.5 + 60 * D**-0.2).aligned
    True
    >>> found = alignment_verdict(D, [30, 29, 27, 26, 24], [3.0, 2.8, 2.7, 2.6, 2.5])
    >>> found.aligned, found.paradox
    (False, True)
    """
    sizes, scores = _columns(d_p, score)
    losses = None if loss is None else column("loss", loss)
    if losses is not None and len(losses) != len(sizes):
        raise InputError(f"columns of one length are expected: d_p {len(sizes)}, loss {len(losses)}")
    D, mean, spread = _by_size(sizes, scores)
    step = 2 * np.sqrt(2) * (spread if noise is None else noise)
    mean_loss = None if losses is None else _by_size(sizes, losses)[1]
    if D[0] == 0:
        reference_score = float(mean[0])
        D, mean, mean_loss = D[1:], mean[1:], None if mean_loss is None else mean_loss[1:]
    if len(D) < FEWEST:
        raise InputError(f"d_p: {len(D)} different amounts above 0; at least {FEWEST} are needed")
    # a fall is measured from the best so far, so that small ones add up
    rises = bool((mean >= np.maximum.accumulate(mean) - step).all() and mean[-1] - mean[0] > step)
    falls = mean_loss is not None and bool(
        (mean_loss <= np.minimum.accumulate(mean_loss) + 2 * np.sqrt(2) * loss_noise).all()
        and mean_loss[0] - mean_loss[-1] > 2 * np.sqrt(2) * loss_noise
    )
    residual = float("nan")
    if rises:
        law = _quietly(ScoreLogLaw(scale=np.inf, loss="lsq"), D, mean)
        residual = float(np.abs(mean - law.fit_.predict(D)).max() / mean.mean())
    gain = None if reference_score is None else float(mean[-1] - reference_score)

    def said(aligned: bool, reason: str, advice: str) -> Verdict:
        return Verdict(aligned, rises, falls, falls and not rises, residual, reason, advice)

    if not rises:
        also = " while the loss falls: the loss is no proxy for the score here" if falls else ""
        return said(False, f"the score does not rise with pretraining data{also}", "do not scale this pretraining set")
    if residual > misfit:
        return said(
            False,
            f"the score rises, but its log-law is off by up to {residual:.1%} of the mean score",
            "do not extrapolate: measure at larger amounts first",
        )
    if gain is not None and gain <= step:
        return said(
            False,
            f"the largest amount is no better than no pretraining ({gain:+.3g})",
            "fine-tuning data alone saturates the score, or the set is not aligned: do not scale it",
        )
    return said(True, f"the score rises and follows its log-law to {residual:.1%}", "extrapolate the score law")


@dataclass(frozen=True)
class Recommendation:
    """One pretraining set at the target: forecast score with its interval, and the gain over no pretraining.

    ``score`` and its interval are NaN where the set is not aligned: there is no law to forecast by.
    """

    pretraining: str
    score: float
    low: float
    high: float
    gain: float
    verdict: Verdict
    advice: str


class PretrainingAdvisor:
    """Rank pretraining sets by the score that each will give at the amount of data that you can afford.

    Args:
        runs: one row a fine-tuned checkpoint: the group is the pretraining set, ``tokens`` the amount of pretraining
            data D_p, the first loss (where there is one) the downstream cross-entropy, and two metrics the score and
            the amount of fine-tuning data. Rows with the same group and tokens are seeds.
        score, finetune: the names of these two metrics.
        reference: the score without pretraining, by amount of fine-tuning data.
        noise: standard deviation of the score from seed to seed; by default from repeated rows.
        scale: the highest score there is.

    >>> D = np.array([1e8, 3e8, 1e9, 3e9, 1e10])
    >>> good, bad = (-5 + 0.5 * np.log(D)) ** 2.0, [30, 29, 27, 26, 24]
    >>> runs = RunTable(
    ...     np.full(10, 3e9), np.tile(D, 2), {}, {"score": np.append(good, bad), "finetune_tokens": np.full(10, 6e6)},
    ...     ["German"] * 5 + ["French"] * 5,
    ... )
    >>> first, last = PretrainingAdvisor(runs, reference={6e6: 15.0}).recommend(3e10, 6e6)
    >>> first.pretraining, round(first.score, 1), round(first.gain, 1), last.pretraining, last.verdict.aligned
    ('German', 49.9, 34.9, 'French', False)
    """

    def __init__(
        self,
        runs: RunTable,
        *,
        score: str = "score",
        finetune: str = "finetune_tokens",
        reference: Mapping[float, float] | None = None,
        noise: float | None = None,
        scale: float = 100.0,
    ) -> None:
        for name in (score, finetune):
            if name not in runs.metrics:
                raise unknown("metric of the runs", name, runs.metrics)
        self.runs = runs
        self.score = score
        self.finetune = finetune
        self.reference = dict(reference or {})
        self.noise = noise
        self.scale = scale

    def recommend(self, target_tokens: float, finetune_tokens: float, level: float = 0.9) -> list[Recommendation]:
        """The sets with runs at ``finetune_tokens``, aligned ones first, by the score forecast at ``target_tokens``.

        Sets are compared at the target, not at the amounts measured. Raises ``InputError`` where no run has that amount
        of fine-tuning data, and for a set with fewer than four amounts of pretraining data.
        """
        (target,) = column("target_tokens", [target_tokens])
        amounts = self.runs.metrics[self.finetune]
        mine = amounts == finetune_tokens
        if not mine.any():
            raise unknown("amount of fine-tuning data", finetune_tokens, sorted(set(amounts.tolist())))
        reference = self.reference.get(finetune_tokens)
        found = [
            self._one(self.runs.select(mine & (np.asarray(self.runs.groups) == name)), name, target, reference, level)
            for name in sorted(set(np.asarray(self.runs.groups)[mine]))
        ]
        return sorted(found, key=lambda r: (not r.verdict.aligned, -r.score if r.verdict.aligned else 0.0))

    def _one(self, runs: RunTable, name: str, target: float, reference: float | None, level: float) -> Recommendation:
        scores = runs.metrics[self.score]
        loss = runs.loss if runs.losses else None
        verdict = alignment_verdict(runs.tokens, scores, loss, reference, self.noise)
        if not verdict.aligned:
            return Recommendation(name, np.nan, np.nan, np.nan, np.nan, verdict, verdict.advice)
        law = _quietly(ScoreLogLaw(self.scale), runs.tokens, scores)
        score = min(float(law.fit_.predict(target)), self.scale)
        low, high = (min(float(v[0]), self.scale) for v in law.interval([target], level))
        reached = float(_by_size(runs.tokens, scores)[1].max())
        spread = _by_size(runs.tokens, scores)[2] if self.noise is None else self.noise
        advice = verdict.advice
        if score - reached <= 2 * spread:
            advice = f"stop: the target promises {score - reached:+.3g} over the best measured, within the noise"
        gain = np.nan if reference is None else score - reference
        return Recommendation(name, score, low, high, gain, verdict, advice)


def _quietly(law: ScoreLogLaw, d_p: Array, score: Array) -> ScoreLogLaw:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the verdict speaks, not the cautions of the fit
        return law.fit(d_p, score)


def _points(d_p: Any, name: str, values: Any) -> tuple[Array, Array]:
    if np.any(np.asarray(d_p) == 0):
        raise InputError("d_p: 0 is the run without pretraining, a reference and no point of the law: leave it out")
    sizes, found = aligned({"d_p": d_p, name: values})
    if (different := len(np.unique(sizes))) < FEWEST:
        raise InputError(f"d_p: {different} different amounts; at least {FEWEST} are needed")
    return sizes, found


def _columns(d_p: Any, score: Any) -> tuple[Array, Array]:
    sizes, scores = aligned({"d_p": d_p, "score": score}, positive=False)
    if (sizes < 0).any():
        raise InputError(f"d_p: {sizes.min():g} where an amount of data, 0 or more, is expected")
    if (scores <= 0).any():
        raise InputError(f"score: {scores.min():g} where a positive number is expected")
    return sizes, scores


def _by_size(sizes: Array, values: Array) -> tuple[Array, Array, float]:
    """Amounts in order, the mean value at each, and the standard deviation of such a mean (0 without repeats)."""
    D, which, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    mean = np.bincount(which, values) / counts
    spare = len(values) - len(D)
    deviation = np.sqrt(((values - mean[which]) ** 2).sum() / spare) if spare else 0.0
    return D, mean, float(deviation / np.sqrt(counts.min()))
