"""Retention: how much of what a model could do before it was adapted can it still do after.

Reach for it beside every adaptation: a gain on the new task is worth little if the model lost the rest.
"""

import datasets

from downriver.core.errors import InputError, unknown
from downriver.core.measurement import Cost, Direction, Measurement
from downriver.evaluate.evaluate import evaluate
from downriver.evaluate.knn import knn_accuracy
from downriver.evaluate.metrics import METRICS
from downriver.evaluate.retrieval import half_document_retrieval
from downriver.models.features import extract
from downriver.models.model import Model
from downriver.tasks.task import Task

LANGUAGE_MODELS = ("causal-lm", "masked-lm")


def retention(
    before: Model, after: Model, task: Task, split: str = "test", metric: str | None = None, *, batch_size: int = 64
) -> list[Measurement]:
    """Score both models on a reference task: four measurements, of which ``retention`` is the share that was kept.

    ``metric`` is one of

    - ``mrr`` or ``recall@1``: half-document retrieval over the task's texts, for encoders (default for texts);
    - ``loss``, ``perplexity`` or ``bits_per_byte``: as language models of the task's texts (``loss`` is the default
      for causal
      and masked language models);
    - ``knn_accuracy``: leave-one-out nearest neighbours on the task's classes (default for images and tables);
    - any metric of the task itself, when both models have a head for it.

    All but the last measure the backbone and leave the heads aside. The measurements are ``<metric>_before``,
    ``<metric>_after``, ``retention_change`` (after less before) and ``retention``: after / before where higher is
    better, before / after where lower is, so that 1 means that all was kept and more than 1 that something was
    gained.

    >>> from downriver import models, tasks
    >>> wine = tasks.load("wine")
    >>> model = models.small("mlp", "nano").with_head(wine)
    >>> found = retention(model, model, wine)
    >>> [m.metric for m in found], found[-1].value
    (['knn_accuracy_before', 'knn_accuracy_after', 'retention_change', 'retention'], 1.0)
    """
    if before.kind != after.kind:
        raise InputError(f"retention from a {before.kind} to a {after.kind}: two models of one kind are expected")
    textual = task.kind.startswith(("text", "language"))
    if metric is None:
        metric = "knn_accuracy" if not textual else "loss" if before.kind in LANGUAGE_MODELS else "mrr"
    values, unit, direction = [], "share", "higher"
    for model in (before, after):
        value, unit, direction = _score(model, task, split, metric, batch_size)
        values.append(value)
    old, new = values
    over, under = (new, old) if direction == "higher" else (old, new)
    cost = Cost(parameters=sum(p.numel() for p in after.parameters()))
    way: Direction = "higher" if direction == "higher" else "lower"
    return [
        Measurement(f"{metric}_before", old, task.name, unit, way, cost=cost),
        Measurement(f"{metric}_after", new, task.name, unit, way, cost=cost),
        Measurement("retention_change", new - old, task.name, unit, way, cost=cost),
        Measurement("retention", over / under if under else float("nan"), task.name, "share kept", "higher", cost=cost),
    ]


def _score(model: Model, task: Task, split: str, metric: str, batch_size: int) -> tuple[float, str, Direction]:
    if metric in ("mrr", "recall@1"):
        texts = task.texts(split)
        return half_document_retrieval(model, texts, batch_size=batch_size)[metric], "share", "higher"
    if metric == "knn_accuracy":
        targets = task.targets(split)
        if not task.classification:
            raise InputError(f"retention by knn_accuracy needs a task with classes, and {task.name!r} is {task.kind}")
        features = extract(model, task.rows(split), task, batch_size=batch_size)
        return knn_accuracy(features, targets, min(10, len(targets) - 1)), "share", "higher"
    if metric not in METRICS:
        raise unknown("metric of retention", metric, ["mrr", "recall@1", "knn_accuracy", *METRICS])
    if model.kind in LANGUAGE_MODELS and metric in ("loss", "perplexity", "bits_per_byte"):
        model, task = _bare(model), _as_language(task, split)
    found = evaluate(model, task, split=split, metrics=[metric], batch_size=batch_size)[0]
    return found.value, found.unit, found.direction


def _bare(model: Model) -> Model:
    """The same backbone without the task's head."""
    training = model.training
    bare = Model(
        model.backbone,
        kind=model.kind,
        processor=model.processor,
        pooling=model.pooling,
        source=model.source,
        max_length=model.max_length,
    )
    return bare.train(training)


def _as_language(task: Task, split: str) -> Task:
    if task.kind == "language-modelling":
        return task
    rows = datasets.Dataset.from_dict({"text": task.texts(split)})
    return Task(task.name, "language-modelling", {split: rows}, ("text",), None)
