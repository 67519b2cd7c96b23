"""Pretrain on scored text, by default behind tags that say what is wanted: the model then keeps to it when asked.

Reach for it when a corpus holds what a model should not say (toxic language, personal data, bad style) and something
can score it. Korbak et al. (2023), «Pretraining Language Models with Human Preferences». Departures: documents are
packed with attention kept within them (the paper concatenates: ``isolate=False``), and the defaults of learning rate
and batch are for continued pretraining of small models.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from downriver.core import Budget, InputError
from downriver.core.errors import unknown
from downriver.data.condition.annotate import Segment, SegmentScorer, Threshold, annotate
from downriver.data.condition.control_tokens import segment_rows
from downriver.data.condition.pack import Packer, Strategy, isolates
from downriver.data.score.lint import PycodestyleScorer, RegexPIIScorer
from downriver.models.model import Model
from downriver.pretrain.feedback import AWR, OBJECTIVES, Objective, Unlikelihood
from downriver.tasks.task import Task
from downriver.training import TokenRows, fine_tune
from downriver.training.engine import Precision, Schedule

SCORERS: dict[str, Callable[[], SegmentScorer]] = {"pep8": PycodestyleScorer, "pii": RegexPIIScorer}


def conditional_pretraining(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    scorer: str | SegmentScorer | Callable[[Sequence[str]], np.ndarray],
    objective: str | Objective = "conditional",
    segment: Segment = "sentence",
    threshold: Threshold = "median",
    block: int | None = None,
    strategy: Strategy = "complete",
    isolate: bool = True,
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    weight_decay: float = 0.1,
    warmup: float = 0.01,
    schedule: Schedule = "linear",
    seed: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Score the task's train texts, and train a copy of the model on them by one of six objectives.

    Parameters
    ----------
    scorer
        Something with ``score(texts)``, or a function: (n,) numbers, higher is worse. By name: ``pep8``, ``pii``.
    objective
        ``conditional`` (default: the paper's best), ``mle``, ``filtered``, ``unlikelihood``, ``rwr``, ``awr``, or one
        made from ``pretrain.feedback`` with settings of its own.
    segment, threshold
        What is scored, and from where on it is not wanted: see ``annotate``. Filtering goes by documents and takes
        its own threshold.
    block, strategy, isolate
        Of the ``Packer``; a block is by default as long as the model reads (the paper: 1024).
    learning_rate, weight_decay, warmup
        The paper's, for GPT-2 small from nothing with 64 blocks of 1024 a batch.

    The model that ``conditional`` gives has the tags in its tokenizer: ``sample_aligned(model)`` asks for the good.

    Raises ``InputError`` for a task that is no language modelling or without train split, and as ``annotate``,
    ``Packer`` and ``fine_tune`` do.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["A good day. A BAD day.", "BAD things. Good ones."]})
    >>> task = Task("days", "language-modelling", {"train": rows}, ("text",), None)
    >>> bad = lambda texts: np.array(["BAD" in text for text in texts], float)
    >>> lm = small("causal-lm", "nano")
    >>> tuned = conditional_pretraining(lm, task, "2 steps", scorer=bad, threshold=0.5, batch_size=1)
    >>> len(tuned.processor) - len(lm.processor)
    2
    """
    if task.kind != "language-modelling":
        raise InputError(f"task {task.name!r} is {task.kind}: language-modelling is expected")
    if isinstance(scorer, str):
        if scorer not in SCORERS:
            raise unknown("scorer", scorer, SCORERS)
        scorer = SCORERS[scorer]()
    annotated = annotate(task.rows("train"), scorer, segment=segment, threshold=threshold, text=task.inputs[0])
    chosen = _made(objective, model, annotated) if isinstance(objective, str) else objective
    if chosen.control:
        model = chosen.control.apply(model)
    chosen.explicit_mask = isolate and not isolates(model)
    block = min(block or model.max_length, model.max_length)
    rows = segment_rows(chosen.select(annotated), model.processor, chosen.control, seed=seed)
    return fine_tune(
        model,
        TokenRows(task.name, {"train": Packer(block, strategy, isolate).pack(rows)}, model.processor.pad_token_id or 0),
        budget,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        seed=seed,
        checkpoints=checkpoints,
        precision=precision,
        objective=chosen,
        in_place=chosen.control is not None,
    )


def _made(name: str, model: Model, annotated: Dataset) -> Objective:
    """The objective of that name with the paper's settings, fitted to model and scores where it must be."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    if name == "awr":
        return AWR.of(model)
    if name == "unlikelihood":  # from the worst segment that is still wanted
        wanted = (
            score
            for scores, bad in zip(annotated["scores"][:], annotated["misaligned"][:], strict=True)
            for score, misaligned in zip(scores, bad, strict=True)
            if not misaligned
        )
        return Unlikelihood(threshold=max(wanted, default=-math.inf))
    return OBJECTIVES[name]()
