"""How much alignment a task costs: drift against task score for several strengths of AlignGuard and of its rival.

Reach for it before choosing λ: methods are to be compared where their task scores are equal, which a single setting
does not show. The front of these runs is what there is to choose from. The rival is the plain penalty on ‖ΔW‖².
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
from tqdm import tqdm

from downriver.adapt.alignguard_lora import alignguard_lora, update_norm
from downriver.adapt.fisher import FisherSubspace
from downriver.core import Budget, InputError
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.rows import TokenRows
from downriver.training.trainer import Term


def lambda_sweep(
    model: Model,
    task: Task | TokenRows,
    budget: Budget | str,
    *,
    alignment: FisherSubspace,
    score: Callable[[Model], float],
    drift: Callable[[Model], float],
    strengths: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
    norms: Sequence[float] = (0.001, 0.01, 0.1),
    lam_a: float = 0.25,
    lam_t: float = 0.5,
    lam_nc: float = 0.1,
    progress: bool = True,
    **settings: Any,
) -> pl.DataFrame:
    """Train plain LoRA, AlignGuard at every strength, and LoRA with every weight on ‖ΔW‖², each with the same budget.

    Parameters
    ----------
    alignment
        The Fisher subspace of what is to be kept (``FisherSubspace.estimate``), the same for all runs.
    score
        Of a tuned model on the task, the more the better.
    drift
        What a tuned model lost of its alignment, the less the better, such as ``alignment_drift(...).drift``. Measure
        both on data that does not decide anything afterwards: the best of many settings is flattered.
    strengths
        Factors on λ_A, λ_T and λ_NC together.
    norms
        Weights of the rival; empty to leave it out.
    lam_a, lam_t, lam_nc, settings
        As in ``alignguard_lora``.

    Returns a row a run: ``method`` (``lora``, ``alignguard``, ``norm``), ``strength``, ``score``, ``drift``, and
    ``front``: whether no other run has as much score with less drift, or more score with as little. Charges every run.

    Raises ``InputError`` for strengths and norms that are not positive, and for measures that are not finite.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> def texts(*rows):
    ...     return Task("texts", "language-modelling", {"train": Dataset.from_dict({"text": rows})}, ("text",), None)
    >>> model = small("causal-lm", "nano")
    >>> kept = FisherSubspace.estimate(model, texts("I refuse to do that.", "That I cannot."), rank=2)
    >>> moved = lambda tuned: update_norm(tuned).item()
    >>> found = lambda_sweep(
    ...     model, texts("Rivers run to the sea."), "3 steps", alignment=kept, score=moved, drift=moved,
    ...     strengths=[10.0], norms=[0.1], batch_size=1, target_modules=["q_proj"], learning_rate=1e-2,
    ... )
    >>> found["method"].to_list(), found["front"].all()
    (['lora', 'alignguard', 'norm'], True)
    """
    for name, values in (("strengths", strengths), ("norms", norms)):
        if not all(0 < value < math.inf for value in values):
            raise InputError(f"{name} are {list(values)}: positive numbers are expected (plain LoRA is always run)")
    runs = [("lora", 0.0), *(("alignguard", x) for x in strengths), *(("norm", x) for x in norms)]
    rows = []
    for method, strength in tqdm(runs, desc="drift and task", disable=not progress, delay=2):
        factor = strength if method == "alignguard" else 0.0
        tuned = alignguard_lora(
            model,
            task,
            budget,
            alignment=alignment,
            lam_a=factor * lam_a,
            lam_t=factor * lam_t,
            lam_nc=factor * lam_nc,
            terms=[Term("norm", strength, update_norm)] if method == "norm" else [],
            **settings,
        )
        found = float(score(tuned)), float(drift(tuned))
        if not all(map(math.isfinite, found)):
            raise InputError(f"{method} at {strength:g}: score and drift are {found}, finite numbers are expected")
        rows.append((method, strength, *found))
    front = [not any(s >= mine and d <= own and (s, d) != (mine, own) for *_, s, d in rows) for *_, mine, own in rows]
    table = pl.DataFrame(rows, schema=["method", "strength", "score", "drift"], orient="row")
    return table.with_columns(front=pl.Series(front, dtype=pl.Boolean))
