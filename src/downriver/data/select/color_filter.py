"""CoLoR-Filter: choose the documents whose loss falls most when a small model is tuned on the target.

Reach for it with a large pool and a small sample of what the model is to be good at. Brandfonbrener et al. 2024,
«CoLoR-Filter: Conditional Loss Reduction Filtering for Targeted Language Model Pre-training»: score
s(x) = ℓ(x; θ_prior) − ℓ(x; θ_conditional), mean over tokens, and the top ⌊N/τ⌋ of the whole pool. Departures: the
cosine of ``fit_conditional`` ends at 0 (paper: 10 %), AdamW's ε is 1e-8 (1e-15), no z-loss, and the warm-up is at most
a tenth of the run, so that small target samples still train.
"""

import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import polars as pl

from downriver.core.budget import Budget
from downriver.core.errors import InputError, unknown
from downriver.core.minhash import word_runs
from downriver.data.documents import shards
from downriver.data.score.loss import LossScorer
from downriver.data.score.table import ScoreTable
from downriver.data.select.rules import Rule, difference, random, resample, top
from downriver.data.select.select import Selection, select
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training import TokenRows, fine_tune

RULES: dict[str, Rule] = {
    "color": difference("prior", "conditional"),
    "rho": difference("current", "conditional"),
    "cond": top("conditional", lowest=True),
    "ppl": top("prior", lowest=True),
    "dsir": resample("dsir"),
    "random": random(),
}
"""``color``: the paper's; ``rho``: RHO-Loss with the ``current`` losses of the model in training; ``cond`` and ``ppl``:
the lowest conditional or prior loss; ``dsir``: importance resampling; ``random``."""
Name = Literal["color", "rho", "cond", "ppl", "dsir", "random"]


@dataclass(frozen=True)
class ColorFilter:
    """Score a pool by two models and keep the top ⌊N/τ⌋.

    Parameters
    ----------
    prior, conditional
        Causal language models, or ``LossScorer`` objects of them. With ``prior=None`` the conditional carries a peft
        adapter, and the prior is the model without it (one loading gives both losses).
    tau
        One document of so many is kept; 16 by default (paper: 7 to 64).
    context
        Tokens read at once (512 in the paper).
    target
        Texts of the target sample, to warn where the pool repeats their runs of 13 words.
    prior_saw
        Ids of the pool that the prior was trained on: their prior loss is too low. They are counted in the report,
        and with ``exclude_seen`` dropped for that reason.

    Raises ``InputError`` when the two losses cannot be compared (tokenizer, context, reduction), when prior and
    conditional are one model, for a document without a loss, and for a pool smaller than tau.

    >>> from downriver.models import small
    >>> prior, conditional = small("causal-lm", "nano", seed=0), small("causal-lm", "nano", seed=1)
    >>> pool = ["a river", "the sea", "a lake", "the shore"]
    >>> chosen = ColorFilter(prior, conditional, tau=2).select(pool)
    >>> len(chosen.indices), chosen.report["tau"]
    (2, 2)
    """

    prior: Model | LossScorer | None
    conditional: Model | LossScorer
    tau: float = 16
    context: int = 512
    target: Sequence[str] | None = None
    prior_saw: Collection[str] = ()
    exclude_seen: bool = False

    def select(self, pool: Any, *, table: ScoreTable | str | Path | None = None) -> Selection:
        """Choose from a pool: a source of documents (see ``documents.shards``) or a list of texts.

        ``table`` keeps the losses (``prior``, ``conditional``), so that a killed run goes on and another ``tau`` costs
        nothing; without it they are made anew.
        """
        prior, conditional = self._scorers()
        pool = as_documents(pool)
        if self.target is not None:
            _warn_of_overlap(self.target, pool)
        with tempfile.TemporaryDirectory() as scratch:
            kept = table if isinstance(table, ScoreTable) else ScoreTable(table or Path(scratch) / "losses")
            scored = _losses(kept, prior, conditional, pool)
        seen = set(self.prior_saw)
        drop = dict.fromkeys(seen, "the prior was trained on it") if self.exclude_seen else {}
        chosen = select(scored, RULES["color"], tau=self.tau, drop=drop, missing="fail")
        report = {
            "tau": self.tau,
            "pool": scored.height,
            "chosen": len(chosen.indices),
            "seen by the prior": int(scored["id"].is_in(list(seen)).sum()),
            "chosen of these": len(seen & set(chosen.ids)),
        }
        return replace(chosen, report=report)

    def _scorers(self) -> tuple[LossScorer | None, LossScorer]:
        conditional = self._scorer(self.conditional)
        if self.prior is None:
            if not conditional.both:
                raise InputError("without a prior the conditional model must carry a peft adapter")
            return None, conditional
        prior = self._scorer(self.prior)
        if prior.both or conditional.both:
            raise InputError("a model with an adapter is prior and conditional in one: give it alone, with prior=None")
        if prior.reads != conditional.reads:
            raise InputError(
                "prior and conditional differ in tokenizer, context or reduction: their losses cannot be compared"
            )
        if prior.fingerprint == conditional.fingerprint:
            raise InputError("prior and conditional are the same model: every score would be 0")
        return prior, conditional

    def _scorer(self, model: Model | LossScorer) -> LossScorer:
        return model if isinstance(model, LossScorer) else LossScorer(model, context=self.context)


def fit_conditional(
    prior: Model,
    target: Task | TokenRows | Iterable[str],
    *,
    epochs: float = 1,
    learning_rate: float = 1e-3,
    warmup_steps: int = 100,
    batch_size: int = 16,
    seed: int = 0,
) -> Model:
    """Continue from the prior on the target sample, with a fresh optimiser: the conditional model.

    One epoch by default: more overfits a small sample, and the score then finds its phrases. AdamW with β (0.9, 0.95)
    and no weight decay, cosine schedule; learning rate 1e-3 and 100 warm-up steps (20 for the paper's Books; a tenth
    of the run at most). The paper's batch is 256. A prior with a trainable peft adapter has only that trained, and
    serves as both models: ``ColorFilter(None, fit_conditional(prior, ...))``.

    >>> from downriver.models import small
    >>> tuned = fit_conditional(small("causal-lm", "nano"), ["a river runs"] * 4, batch_size=2)
    >>> tuned.kind
    'causal-lm'
    """
    if not epochs > 0:
        raise InputError(f"epochs is {epochs}: a positive number is expected")
    if isinstance(target, Task | TokenRows):
        rows: Task | TokenRows = target
    else:
        texts = list(target)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("the target sample has no texts: a list of strings, a Task or TokenRows is expected")
        rows = Task(
            "target", "language-modelling", {"train": datasets.Dataset.from_dict({"text": texts})}, ("text",), None
        )
    examples = max(1.0, epochs * len(rows.rows("train")))
    steps = max(1, round(examples / batch_size))
    return fine_tune(
        prior,
        rows,
        Budget(steps, "steps"),
        learning_rate=learning_rate,
        batch_size=batch_size,
        warmup=min(warmup_steps / steps, 0.1),
        schedule="cosine",
        betas=(0.9, 0.95),
        seed=seed,
    )


def select_by(
    scores: Mapping[str, np.ndarray],
    rule: Name = "color",
    *,
    tau: float | None = None,
    k: int | None = None,
    budget_tokens: float | None = None,
    tokens: np.ndarray | None = None,
    ids: Sequence[str] | None = None,
    seed: int = 0,
) -> Selection:
    """Choose by losses that are at hand: arrays (n,) named ``prior``, ``conditional``, ``current`` or ``dsir``.

    ``ids`` default to the places in the arrays; ``budget_tokens`` needs ``tokens`` (n,).

    >>> losses = {"prior": np.array([3.0, 2.0, 4.0]), "conditional": np.array([2.9, 1.0, 3.5])}
    >>> select_by(losses, "color", k=1).indices.tolist(), select_by(losses, "ppl", k=1).indices.tolist()
    ([1], [1])
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    lengths = {name: len(values) for name, values in scores.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"scores have lengths {lengths}: one score a document is expected")
    n = next(iter(lengths.values()))
    names = [str(i) for i in range(n)] if ids is None else list(ids)
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    if tokens is not None:
        columns["tokens"] = np.asarray(tokens)
    if len(names) != n or (tokens is not None and len(tokens) != n):
        raise InputError(f"{n} scores with {len(names)} ids and tokens: one of each a document is expected")
    frame = pl.DataFrame({"id": names, **columns})
    return select(frame, RULES[rule], tau=tau, k=k, budget_tokens=budget_tokens, missing="fail", seed=seed)


def as_documents(pool: Any) -> Any:
    """A list of strings, which are texts, as documents whose ids are their places; any other source as it is."""
    if isinstance(pool, Sequence) and not isinstance(pool, str) and pool and isinstance(pool[0], str):
        return [{"id": f"{i:09d}", "text": text} for i, text in enumerate(pool)]
    return pool


def _losses(table: ScoreTable, prior: LossScorer | None, conditional: LossScorer, pool: Any) -> pl.DataFrame:
    if prior is None:
        table.add("both", conditional, pool, progress=False)
        renamed = {"both_prior": "prior", "both_conditional": "conditional"}
        return table.frame(list(renamed)).rename(renamed).collect()
    table.add("prior", prior, pool, progress=False)
    table.add("conditional", conditional, pool, progress=False)
    table.comparable("prior", "conditional")
    return table.frame(["prior", "conditional"]).collect()


def _warn_of_overlap(target: Sequence[str], pool: Any) -> None:
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *(word_runs(t, 13, short=False) for t in target)]))
    documents = repeated = 0
    for shard in shards(pool):
        for _, document in shard.documents(lambda problem: None):
            documents += 1
            repeated += bool(np.isin(word_runs(document["text"], 13, short=False), known).any())
    if repeated:
        warnings.warn(
            f"{repeated} of {documents} documents of the pool share 13 words in a row with the target sample: the"
            " choice may find copies of it",
            RuntimeWarning,
            stacklevel=3,
        )
