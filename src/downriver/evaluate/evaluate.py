"""Score a model on a task: one measurement a metric."""

from collections.abc import Sequence

import numpy as np

from downriver.core.errors import InputError
from downriver.core.measurement import Cost, Measurement
from downriver.evaluate.metrics import lookup
from downriver.evaluate.predict import Predictions, predict
from downriver.models.model import Model
from downriver.tasks.task import Task


def evaluate(
    model: Model, task: Task, *, split: str = "test", metrics: Sequence[str] | None = None, batch_size: int = 64
) -> list[Measurement]:
    """Predict every row of ``split`` and score it by ``metrics`` (the task's own when none are named).

    Language modelling gives each metric over all texts and, where the task has domains, once a domain as
    ``metric/domain``. A measurement's cost holds the model's parameters only: evaluation is not charged as training.

    Raises ``InputError`` for a metric that is unknown or not for this kind of task, before anything is computed.

    >>> from downriver import models, tasks
    >>> task = tasks.load("wine")
    >>> [m.metric for m in evaluate(models.small("mlp", "nano").with_head(task), task, metrics=["accuracy", "ece"])]
    ['accuracy', 'ece']
    """
    of = "tokens" if task.kind == "language-modelling" else "classes" if task.classification else "numbers"
    names = task.metrics if metrics is None else tuple(metrics)
    if not names or isinstance(metrics, str):
        raise InputError(f"metrics {metrics!r}: a list of metric names is expected")
    found = {name: lookup(name, of) for name in names}
    predictions = predict(model, task, split, batch_size=batch_size)
    cost = Cost(parameters=sum(p.numel() for p in model.parameters()))
    measurements = []
    for name, metric in found.items():
        for part, chosen in _parts(predictions):
            value = metric.function(*(array[chosen] for array in _arrays(predictions)))
            label = f"{name}/{part}" if part else name
            measurements.append(Measurement(label, value, task.name, metric.unit, metric.direction, cost=cost))
    return measurements


def _parts(predictions: Predictions) -> list[tuple[str, np.ndarray]]:
    everything = np.ones(len(predictions.scores), dtype=bool)
    if predictions.groups is None:
        return [("", everything)]
    return [("", everything), *((str(g), predictions.groups == g) for g in np.unique(predictions.groups))]


def _arrays(predictions: Predictions) -> tuple[np.ndarray, ...]:
    if predictions.tokens is None or predictions.bytes is None:
        return predictions.scores, predictions.targets
    return predictions.scores[:, 0].astype(np.float64), predictions.tokens, predictions.bytes
