"""Frozen teachers, each with its own preprocessing, and what they say of rows: features, soft labels, computed once.

Reach for it to build a method in which a small model learns from several others; ``adapt.distill_weighted`` is one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.core import InputError, charge, count_flops, seeded, unknown
from downriver.models.features import Inputs, batches
from downriver.models.model import Model, Row
from downriver.nn.heads import linear_head
from downriver.tasks.task import Task
from downriver.training.engine import accelerator

Rows = Tensor | Sequence[Row]
Mode = Literal["labels", "features"]


@dataclass(frozen=True, eq=False)
class Examples:
    """n rows that every model encodes for itself: rows of a task (``view`` says how to read them), or one tensor
    (n, ...).

    ``targets`` are class ids (n,), ``None`` for unlabelled rows; ``classes`` how many there are.
    """

    rows: Any
    view: Inputs | None = None
    targets: Tensor | None = None
    classes: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, in this order."""
        if isinstance(self.rows, Tensor):
            return self.rows[torch.as_tensor(indices, dtype=torch.long)]
        if isinstance(self.rows, datasets.Dataset):
            columns = self.rows[list(indices)]
            return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [self.rows[i] for i in indices]


def labelled(data: Any, split: str = "train") -> Examples:
    """The labelled rows of a classification task, or of a pair (X, y): inputs (n, ...) and class ids 0 … C−1."""
    if isinstance(data, Task):
        if not data.classification:
            raise InputError(f"task {data.name!r} is {data.kind}: a classification task is expected")
        rows, view = data.rows(split).select_columns(list(data.inputs)), Inputs(data.inputs, data.kind, data.name)
        return Examples(rows, view, torch.from_numpy(data.targets(split)), len(data.labels))
    if not (isinstance(data, tuple) and len(data) == 2):
        raise InputError(f"labelled rows: a task, or inputs and labels (X, y), are expected, not {type(data).__name__}")
    inputs, targets = _tensor(data[0], "X"), torch.as_tensor(data[1])
    if targets.ndim != 1 or len(targets) != len(inputs):
        raise InputError(f"labels of shape {tuple(targets.shape)} for {len(inputs)} rows: one a row is expected")
    if targets.is_floating_point() or targets.is_complex() or targets.min() < 0:
        raise InputError("labels: class ids 0, 1, 2, ... are expected")
    present, classes = targets.unique(), int(targets.max()) + 1
    if len(present) < classes or classes < 2:
        raise InputError(f"labels hold the classes {present.tolist()}: all of 0 to C−1 are expected, two at least")
    return Examples(inputs, None, targets.long(), classes)


def unlabelled(data: Any, like: Examples) -> Examples:
    """Rows without labels, read as the labelled ones are: a task's train split, a data set, a list of rows or texts, or
    a tensor.
    """
    view = like.view
    if view is None:
        inputs = _tensor(data, "unlabelled rows")
        if inputs.shape[1:] != like.rows.shape[1:]:
            expected = tuple(like.rows.shape[1:])
            raise InputError(f"unlabelled rows have shape {tuple(inputs.shape[1:])}, the labelled ones {expected}")
        return Examples(inputs)
    rows = data.rows("train") if isinstance(data, Task) else data
    if isinstance(rows, datasets.Dataset):
        missing = [name for name in view.inputs if name not in rows.column_names]
        if missing:
            raise unknown("column of the unlabelled rows", missing[0], rows.column_names)
        rows = rows.select_columns(list(view.inputs))
    elif isinstance(rows, Sequence) and not isinstance(rows, str):
        rows = [{view.inputs[0]: row} if isinstance(row, str) else row for row in rows]
        missing = [name for name in view.inputs for row in rows if name not in row]
        if missing:
            raise InputError(f"a row of the unlabelled rows lacks the column {missing[0]!r}")
    else:
        raise InputError(f"unlabelled rows: a task, a data set or a list is expected, not {type(data).__name__}")
    if not len(rows):
        raise InputError("there are no unlabelled rows: at least one is expected")
    return Examples(rows, view)


def encode(
    model: Model, rows: Rows, view: Inputs | None, preprocess: Callable[[Any], Any] | None = None
) -> dict[str, Tensor]:
    """The batch a model reads, on its device: by ``preprocess`` where there is one, else by the model's own collate."""
    if preprocess is not None:
        made = preprocess(rows)
        batch = dict(made) if isinstance(made, Mapping) else {_key(model): made}
    elif isinstance(rows, Tensor):
        batch = {_key(model): rows}
    elif view is None:
        raise InputError("rows that are no tensor need a task that says how they are read")
    else:
        batch = model.collate(view)(rows)
    return {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}


class SourceModel:
    """A teacher: a model that stays as it is, and how rows become its input.

    Parameters
    ----------
    backbone, head
        Modules: rows' inputs to features (n, d), features to logits (n, C_s) over the source's own labels. Or a
        ``Model``, whose head is its own. A classifier in one piece is ``SourceModel(classifier, nn.Identity())``;
        without a head only features can be learnt from.
    name
        What weights and errors call it; by default where a ``Model`` came from, else the backbone's type.
    preprocess
        Maps rows as they are (a tensor (n, ...), or rows of the task as dictionaries) to the backbone's input: its own
        resolution, mean and deviation. Default: a ``Model`` reads rows by its tokenizer or image processor, a module
        takes the tensor.

    It runs in evaluation mode without gradients on the machine's accelerator, and is put back afterwards.

    >>> source = SourceModel(nn.Identity(), nn.Linear(3, 2), name="half", preprocess=lambda x: x / 2)
    >>> source.features(Examples(torch.ones(4, 3)))[0]
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        name: str = "",
        preprocess: Callable[[Any], Any] | None = None,
    ) -> None:
        if isinstance(backbone, Model) and head is not None:
            raise InputError("a Model brings its own head: give either the Model, or a backbone and a head")
        self.model = backbone if isinstance(backbone, Model) else Model(backbone, head=head)
        self.name = name or self.model.source or type(self.model.backbone).__name__
        self.preprocess = preprocess

    def features(self, examples: Examples, *, batch_size: int = 64) -> Tensor:
        """f_s(x) of all rows, (n, d) float32 on the CPU; charges the FLOPs."""
        return self._all(examples, lambda rows: self._features(rows, examples.view), batch_size)

    def targets(
        self, examples: Examples, *, mode: Mode = "labels", temperature: float = 1.0, batch_size: int = 64
    ) -> Tensor:
        """What a student is to give back for all rows, float32 on the CPU; charges the FLOPs. See ``target_of``."""
        return self._all(examples, lambda rows: self.target_of(rows, examples.view, mode, temperature), batch_size)

    def target_of(self, rows: Rows, view: Inputs | None, mode: Mode = "labels", temperature: float = 1.0) -> Tensor:
        """For one batch: σ(h_s(f_s(x)) / T), (n, C_s), or in mode ``features`` f_s(x), (n, d)."""
        features = self._features(rows, view)
        if mode == "features":
            return features
        if self.model.head is None:
            raise InputError(f"source {self.name!r} has no head: give it one, or distil by mode='features'")
        with torch.no_grad():
            logits = self.model.head(features)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise InputError(f"source {self.name!r} gives logits of shape {tuple(logits.shape)}: (n, C) is expected")
        if not torch.isfinite(logits).all():
            raise InputError(f"source {self.name!r} gives logits that are not finite")
        return torch.softmax(logits.float() / temperature, dim=1)

    def _features(self, rows: Rows, view: Inputs | None) -> Tensor:
        with torch.no_grad():
            return self.model.features(**encode(self.model, rows, view, self.preprocess))

    def _all(self, examples: Examples, of: Callable[[Rows], Tensor], batch_size: int) -> Tensor:
        found: dict[int, Tensor] = {}

        def run() -> None:
            for indices in _batches(examples, batch_size):
                for i, row in zip(indices, of(examples.take(indices)).float().cpu(), strict=True):
                    found[i] = row

        with self.frozen():
            charge(flops=count_flops(run))
        return torch.stack([found[i] for i in range(len(examples))])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """In evaluation mode on the accelerator for a while."""
        device, training = self.model.device, self.model.training
        self.model.eval().to(accelerator())
        try:
            yield
        finally:
            self.model.to(device).train(training)


def as_sources(sources: Sequence[Any]) -> list[SourceModel]:
    """Models, modules and folders or names to load as source models, each under a name of its own."""
    from downriver.models.load import load

    if isinstance(sources, str) or not sources:
        raise InputError("sources: a list of at least one model is expected")
    found = [
        s if isinstance(s, SourceModel) else SourceModel(s if isinstance(s, nn.Module) else load(s)) for s in sources
    ]
    names = [source.name for source in found]
    for i, source in enumerate(found):
        if names.count(source.name) > 1:
            found[i] = SourceModel(source.model, name=f"{source.name} ({i + 1})", preprocess=source.preprocess)
    return found


def extra_heads(width: int, targets: Sequence[Tensor], names: Sequence[str], seed: int) -> nn.ModuleList:
    """One fresh linear head g_s a source on the student's features; each depends on its source's name and the seed
    only.
    """
    heads = nn.ModuleList()
    for target, name in zip(targets, names, strict=True):
        with seeded("extra head", name, seed):
            heads.append(linear_head(width, target.shape[1]))
    return heads


def distillation(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float],
    *,
    mode: Mode = "labels",
    temperature: float = 1.0,
) -> Tensor:
    """Σ_s w_s · D_s, a mean over the rows: how far the student's extra outputs are from what the teachers say.

    D is the cross-entropy of σ(outputs / T) with the teacher's soft labels (the Kullback–Leibler divergence plus the
    teacher's entropy, which no gradient sees), or in mode ``features`` one minus the cosine.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> distillation([logits], [torch.softmax(logits, 1)], [1.0])
    tensor(0.3653)
    """
    total = outputs[0].new_zeros(())
    for output, target, weight in zip(outputs, targets, weights, strict=True):
        if mode == "features":
            each = 1 - F.cosine_similarity(output.float(), target).mean()
        else:
            each = F.cross_entropy(output.float() / temperature, target)
        total = total + weight * each
    return total


def _key(model: Model) -> str:
    if model.kind not in ("module", "vision-encoder"):
        raise InputError(f"the {model.kind} {model.source} reads texts: a task with texts is expected, not a tensor")
    return "pixel_values" if model.kind == "vision-encoder" else "inputs"


def _tensor(values: Any, name: str) -> Tensor:
    try:
        found = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: a tensor or an array of numbers is expected ({error})") from None
    found = found.float() if found.dtype == torch.float64 else found
    if found.ndim < 2 or not len(found):
        raise InputError(f"{name} has shape {tuple(found.shape)}: (n, ...) is expected, with a row at least")
    if found.is_floating_point() and not torch.isfinite(found).all():
        raise InputError(f"{name}: a value is not finite")
    return found


def _batches(examples: Examples, batch_size: int) -> Iterator[Sequence[int]]:
    if examples.view is not None:
        yield from batches(examples.rows, examples.view, batch_size)
    else:
        yield from (range(i, min(i + batch_size, len(examples))) for i in range(0, len(examples), batch_size))
