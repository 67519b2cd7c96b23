"""What a score needs of one checkpoint on one task: features, labels, source probabilities, general statistics.

Reach for ``FeatureBank.extract`` when several scores are to be tried on the same models; ``rank_models`` makes and
keeps banks by itself. A bank is one safetensors file, found again by the content of the weights and of the rows.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from scipy.special import softmax
from torch import nn

from downriver import models, tasks
from downriver.core.assets import cache_folder
from downriver.core.errors import InputError
from downriver.core.io import atomic_write, fingerprint
from downriver.models.features import extract as features_of
from downriver.models.features import weights_fingerprint
from downriver.models.model import Model
from downriver.nn.similarity import as_rows
from downriver.tasks.task import Task

General = tuple[np.ndarray, np.ndarray]
_VERSION = 1  # raised when what is stored changes its meaning


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureBank:
    """Features of n rows of a task by one model.

    ``X`` (n, d) float32 pooled features; ``y`` (n,) class ids, or float64 targets; ``probs`` (n, source classes)
    float32, what the model's own classifier says of the rows, ``None`` where it has none; ``general`` mean and
    standard deviation (d,) of the features of a general set, ``None`` where none was given; ``parameters`` of the
    backbone; ``seconds`` that extraction took when it was done.

    >>> from downriver.models import small
    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = tasks.Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> bank = FeatureBank.extract(small("text-encoder", "nano"), task, cache=False)
    >>> bank.X.shape, bank.y.tolist(), bank.probs is None, bank.parameters
    ((4, 32), [0, 1, 0, 1], True, 37952)
    """

    model: str
    task: str
    X: np.ndarray
    y: np.ndarray
    probs: np.ndarray | None = None
    general: General | None = None
    parameters: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        as_rows(self.X, f"features of {self.model}")
        for name, n in (("labels", len(self.y)), ("probabilities", len(self.y if self.probs is None else self.probs))):
            if n != len(self.X):
                raise InputError(f"bank of {self.model}: {n} {name} for {len(self.X)} rows of features")

    @classmethod
    def extract(
        cls,
        model: "Model | nn.Module | str | os.PathLike[str]",
        task: Task | str | Mapping[str, Any],
        *,
        split: str = "train",
        rows: int | None = 2000,
        general: Task | General | None = None,
        probabilities: bool = True,
        max_length: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        cache: bool = True,
    ) -> "FeatureBank":
        """Read a split once with a model, or find the bank that was made before.

        Parameters
        ----------
        model
            Anything that ``models.load`` takes; what is loaded by name runs on the machine's accelerator.
        task
            Classification or regression, by name or as a ``Task``.
        rows
            How many rows at most, drawn by ``seed`` with the classes in their shares; ``None`` for all.
        general
            A task whose rows (at most 2000 of its ``train`` split, or of its first) stand for text or images in
            general, or the two statistics. For ``PED``.
        probabilities
            Whether to read the rows a second time for source probabilities where the checkpoint is a transformers
            classifier (``...ForSequenceClassification``, ``...ForImageClassification``). Those of a linear head that
            the model carries (``Model.head``) cost nothing and are always there.
        max_length
            Cut texts at so many tokens.
        cache
            Keep the bank in downriver's cache under the hash of weights, head, settings and rows.

        Raises ``InputError`` for tasks without labels or numbers to score, and as ``models.load``, ``tasks.load`` and
        ``Model.collate`` do.
        """
        task = tasks.load(task)
        if task.target is None or task.kind == "text-similarity":
            raise InputError(f"task {task.name!r} is {task.kind}: classification or regression is expected")
        task = _only(task, split, rows, seed)
        model = open_model(model, max_length)
        classifier = _classifier(model, probabilities)
        if isinstance(general, Task):
            general = _only(general, "train" if "train" in general.splits else next(iter(general.splits)), 2000, seed)
        file = None
        if cache:
            asked = (_VERSION, weights_fingerprint(model), _hash(classifier), task.fingerprint, _hash(general))
            file = cache_folder() / "banks" / f"{fingerprint(*asked)}.safetensors"
            if file.is_file():
                return dataclasses.replace(cls.load(file), model=_name(model), task=task.name)

        started = time.perf_counter()
        X = features_of(model, task.rows(split), task, batch_size=batch_size)
        bank = cls(
            model=_name(model),
            task=task.name,
            X=X,
            y=task.targets(split),
            probs=_probabilities(classifier, X, task, split, batch_size),
            general=_statistics(model, general, batch_size) if isinstance(general, Task) else general,
            parameters=sum(p.numel() for p in model.backbone.parameters()),
            seconds=time.perf_counter() - started,
        )
        if file is not None:
            bank.save(file)
        return bank

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the bank as one safetensors file, whole or not at all."""
        found = {"X": self.X, "y": self.y, "probs": self.probs}
        if self.general is not None:
            found |= {"general_mean": self.general[0], "general_std": self.general[1]}
        named = {"model": self.model, "task": self.task, "parameters": self.parameters, "seconds": self.seconds}
        tensors = {name: np.ascontiguousarray(value) for name, value in found.items() if value is not None}
        with atomic_write(file) as out:
            out.write(to_bytes(tensors, {"downriver": json.dumps(named)}))
        return Path(file)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "FeatureBank":
        """Read a bank that ``save`` wrote; anything else is an ``InputError`` that names the file."""
        if not Path(file).is_file():
            raise InputError(f"{file} is not there: the file of a bank is expected")
        try:
            with safe_open(file, framework="numpy") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dictionary)
                named = json.loads((stored.metadata() or {})["downriver"])
            mean, std = tensors.pop("general_mean", None), tensors.pop("general_std", None)
            return cls(**named, **tensors, general=None if mean is None or std is None else (mean, std))
        except InputError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{file} is no bank of features: {' '.join(str(error).split())[:200]}") from None


def open_model(model: "Model | nn.Module | str | os.PathLike[str]", max_length: int | None = None) -> Model:
    """The model itself, or what ``models.load`` makes of a name, on the accelerator where there is one."""
    if isinstance(model, Model):
        if max_length is not None:
            raise InputError("max_length is for models that are loaded by name: set the model's own")
        return model
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    source: Any = model
    return models.load(source, max_length=max_length, device=None if isinstance(model, nn.Module) else device)


def _name(model: Model) -> str:
    return model.source or type(model.backbone).__name__


def _only(task: Task, split: str, rows: int | None, seed: int) -> Task:
    """The task with this split alone, at most so many rows of it."""
    task = dataclasses.replace(task, splits={split: task.rows(split)})
    total = len(task.rows(split))
    return task if rows is None or rows >= total else task.sample(split, rows, seed=seed)


def _classifier(model: Model, whole_too: bool) -> nn.Linear | Model | None:
    """What tells source classes: the model's linear head, or the whole transformers classifier it was loaded from."""
    if model.head is not None:
        return model.head if isinstance(model.head, nn.Linear) and model.head.out_features > 1 else None
    if not whole_too:
        return None
    config: Any = getattr(model.backbone, "config", None)
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    if not architecture.endswith(("ForSequenceClassification", "ForImageClassification")) or model.kind == "module":
        return None
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        return None
    try:
        whole = models.load(model.source, kind="module", device=model.device, max_length=model.max_length)
    except InputError:  # the source of a model made in memory is a name only
        return None
    trunk: Any = whole.backbone
    theirs = trunk.base_model.state_dict()
    mine = model.backbone.state_dict()
    same = all(name in theirs and torch.equal(value, theirs[name]) for name, value in mine.items())
    return whole if same else None  # trained further since: its classifier belongs to other features


def _probabilities(
    classifier: nn.Linear | Model | None, X: np.ndarray, task: Task, split: str, batch_size: int
) -> np.ndarray | None:
    if classifier is None:
        return None
    if isinstance(classifier, nn.Linear):
        weight, bias = (p.detach().float().cpu().numpy() for p in (classifier.weight, classifier.bias))
        return softmax(X @ weight.T + bias, axis=1)
    return softmax(features_of(classifier, task.rows(split), task, batch_size=batch_size), axis=1)


def _statistics(model: Model, general: Task, batch_size: int) -> General:
    (rows,) = general.splits.values()
    found = features_of(model, rows, general, batch_size=batch_size).astype(np.float64)
    return found.mean(axis=0), found.std(axis=0)


def _hash(part: nn.Linear | Model | Task | General | None) -> Any:
    if isinstance(part, Model):
        return weights_fingerprint(part)
    if isinstance(part, nn.Linear):
        weights = b"".join(p.detach().float().cpu().numpy().tobytes() for p in part.parameters())
        return hashlib.blake2b(weights, digest_size=16).hexdigest()
    return part.fingerprint if isinstance(part, Task) else part
