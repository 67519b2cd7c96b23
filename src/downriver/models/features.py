"""Pooled features of many rows: batched, sorted by length, without gradients, optionally kept on disk.

Reach for it wherever a frozen backbone is all that is needed: linear probes, retrieval, nearest neighbours, ranking.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downriver.core.assets import cache_folder
from downriver.core.errors import InputError
from downriver.core.io import atomic_write, fingerprint
from downriver.models.model import Model, TaskLike


@dataclass(frozen=True)
class Inputs:
    """What ``Model.collate`` asks of a task when only the inputs count: no target, nothing masked."""

    inputs: tuple[str, ...] = ("text",)
    kind: str = "text-classification"
    name: str = "features"
    target: str | None = None
    labels: tuple[str, ...] = ()
    splits: dict[str, Any] = field(default_factory=dict)


def extract(
    model: Model, rows: Sequence[Any], task: TaskLike | None = None, *, batch_size: int = 64, cache: bool = False
) -> np.ndarray:
    """The features of rows by a model's backbone, (n, d) float32, in the order of the rows.

    ``rows`` is a ``datasets.Dataset`` or a list of dictionaries with the input columns of ``task``, or, without a
    task, a list of texts. The head is not used; of a pair of texts for similarity only the first is read. Batches
    hold rows of like length, so little is padded. With ``cache`` the array is kept as a ``.npy`` file in downriver's
    cache, under the hash of the weights, the settings and the rows.

    >>> from downriver.models import small
    >>> extract(small("text-encoder", "nano"), ["a river", "the sea is wide", "rain"]).shape
    (3, 32)
    """
    if len(rows) == 0:
        raise InputError("features of no rows: at least one is expected")
    if task is None:
        rows, task = [{"text": text} for text in rows], Inputs()
    view = Inputs(task.inputs, "text-classification" if task.kind == "language-modelling" else task.kind, task.name)
    file = _cache_file(model, rows, view) if cache else None
    if file is not None and file.is_file():
        return np.load(file, allow_pickle=False)
    collate = model.collate(view)
    found: np.ndarray | None = None
    with inference(model):
        for indices in batches(rows, view, batch_size):
            batch = {k: v.to(model.device) for k, v in collate([rows[i] for i in indices]).items()}
            features = model.features(**batch).float().cpu().numpy()
            found = np.empty((len(rows), features.shape[1]), dtype=np.float32) if found is None else found
            found[indices] = features
    assert found is not None
    if file is not None:
        with atomic_write(file) as out:
            np.save(out, found, allow_pickle=False)
    return found


def batches(rows: Sequence[Any], task: TaskLike, batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, the longest first (so that memory runs out at once or never)."""
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: at least 1 is expected")
    order = list(range(len(rows)))
    if task.kind.startswith(("text", "language")):
        lengths = np.zeros(len(rows), dtype=np.int64)
        for name in task.inputs:
            cells = (row[name] for row in rows)
            lengths += np.fromiter((len(cell) for cell in cells), dtype=np.int64, count=len(rows))
        order = np.argsort(-lengths, kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def inference(model: Model) -> Iterator[None]:
    """Evaluation mode without gradients; the mode the model was in comes back."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def weights_fingerprint(model: Model) -> str:
    """A hash of every weight of the backbone and of the settings that decide its features."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return fingerprint(digest.hexdigest(), type(model.backbone).__name__, model.kind, model.pooling, model.max_length)


def _cache_file(model: Model, rows: Sequence[Any], task: TaskLike) -> Path:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for name in task.inputs:
            value = row[name]
            digest.update(
                value.tobytes() if hasattr(value, "tobytes") else repr(value).encode("utf-8", "surrogatepass")
            )
            digest.update(b"\0")
    return cache_folder() / "features" / f"{fingerprint(weights_fingerprint(model), task.kind, digest.hexdigest())}.npy"
