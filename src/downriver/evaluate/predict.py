"""What a model says to every row of a split, in the order of the rows."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from downriver.core.errors import InputError
from downriver.models.features import batches, inference
from downriver.models.model import Model
from downriver.tasks.task import Task, values

MOST_LOGITS = 2**26
"""Values of a language model's logits held at once: 256 MB in float32."""


@dataclass(frozen=True)
class Predictions:
    """Scores and targets of n rows.

    Classification: ``scores`` (n, K) are logits and ``targets`` (n,) class ids. Regression and similarity: (n, 1) and
    (n,) values. Language modelling: ``scores`` (n, 1) are the summed negative log-likelihoods in nats of each
    document's predicted tokens, ``tokens`` and ``bytes`` how many tokens were predicted and how many bytes of text
    they stand for, ``groups`` the domains, and ``targets`` is empty.
    """

    scores: np.ndarray
    targets: np.ndarray
    tokens: np.ndarray | None = None
    bytes: np.ndarray | None = None
    groups: np.ndarray | None = None


def predict(model: Model, task: Task, split: str = "test", *, batch_size: int = 64) -> Predictions:
    """Run a model over a split: rows of like length together, without gradients, on the model's device.

    A masked language model predicts the tokens that ``Model.collate`` hides, the same ones at every evaluation. Texts
    longer than the model's ``max_length`` are cut, and bytes are counted for what is left.

    Raises ``InputError`` when the model has no head for the task, or one with another number of outputs.

    >>> from downriver import models, tasks
    >>> task = tasks.load("wine")
    >>> predict(models.small("mlp", "nano").with_head(task), task).scores.shape
    (36, 3)
    """
    rows = task.rows(split)
    if task.kind == "language-modelling":
        return _language(model, task, split, batch_size)
    outputs = len(task.labels) if task.classification else 1
    collate = model.collate(task)
    scores = np.empty((len(rows), outputs), dtype=np.float32)
    with inference(model):
        for indices in batches(rows, task, batch_size):
            batch = {k: v.to(model.device) for k, v in collate([rows[i] for i in indices]).items() if k != "labels"}
            logits = model(**batch)["logits"]
            if logits.ndim != 2 or logits.shape[1] != outputs:
                raise InputError(
                    f"task {task.name!r} needs {outputs} output(s), and the model {model.source or model.kind} gives "
                    f"{tuple(logits.shape[1:])}: give it a head with with_head(task) and train it"
                )
            scores[indices] = logits.float().cpu().numpy()
    if not np.isfinite(scores).all():
        row = int(np.argwhere(~np.isfinite(scores))[0][0])
        raise InputError(f"task {task.name!r}, split {split!r}, row {row + 1}: the model's score is not finite")
    return Predictions(scores, task.targets(split))


def _language(model: Model, task: Task, split: str, batch_size: int) -> Predictions:
    rows = task.rows(split)
    collate = model.collate(task)
    shift = 1 if model.kind == "causal-lm" else 0  # a causal model's output at t is about token t + 1
    nats, tokens, size = (np.zeros(len(rows)) for _ in range(3))
    with inference(model):
        for indices in batches(rows, task, batch_size):
            batch = collate([rows[i] for i in indices])
            step = max(1, MOST_LOGITS // (batch["labels"].shape[1] * len(model.processor)))
            for start in range(0, len(indices), step):
                part = {k: v[start : start + step].to(model.device) for k, v in batch.items()}
                labels = part.pop("labels")
                logits = model(**part)["logits"]
                logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
                losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
                at = indices[start : start + step]
                nats[at] = losses.sum(dim=1, dtype=torch.float64).cpu().numpy()
                tokens[at] = (labels != -100).sum(dim=1).cpu().numpy()
                size[at] = [_bytes(model, row[row != -100]) for row in labels.cpu()]
    if not np.isfinite(nats).all():
        row = int(np.flatnonzero(~np.isfinite(nats))[0])
        raise InputError(f"task {task.name!r}, split {split!r}, row {row + 1}: the model's loss is not finite")
    if not tokens.any():
        raise InputError(f"task {task.name!r}, split {split!r}: no text has a token to predict")
    groups = values(rows, task.group).astype(str) if task.group else None
    return Predictions(nats[:, None].astype(np.float32), np.empty(0), tokens, size, groups)


def _bytes(model: Model, ids: torch.Tensor) -> int:
    text = model.processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", "replace"))
