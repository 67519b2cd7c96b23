"""The directions of each weight matrix that some data depend on most: the top of the empirical Fisher information.

Reach for ``adapt.alignguard_lora``, which keeps fine-tuning out of them. F = (1/N) Σ g_i g_iᵀ over single samples, g_i
the gradient of a sample's log-likelihood with respect to one matrix. For the diagonal over all parameters, to merge by,
there is ``merge.diagonal_fisher``.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from downriver.adapt.lora import linear_layers
from downriver.core import InputError, atomic_write, generator, unknown
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.rows import TokenRows

Approximation = Literal["exact", "kfac", "diag"]
IGNORED = -100
_FIELDS = ("eigenvalues", "dense", "left", "right", "entries")


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions u_i of one matrix with their eigenvalues λ_i (m), the largest first.

    ``dense`` (m, rows, columns); or rank-one matrices ``left`` (m, rows) ⊗ ``right`` (m, columns); or single
    ``entries`` (m) of the flattened matrix.
    """

    shape: tuple[int, int]
    eigenvalues: Tensor
    dense: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    entries: Tensor | None = None

    def coefficients(self, delta: Tensor) -> Tensor:
        """⟨u_i, ΔW⟩ (m) of a matrix."""
        if self.dense is not None:
            return self.dense.to(delta).flatten(1) @ delta.flatten()
        if self.entries is not None:
            return delta.flatten()[self.entries.to(delta.device)]
        assert self.left is not None and self.right is not None
        return ((self.left.to(delta) @ delta) * self.right.to(delta)).sum(-1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Σ c_i u_i, a matrix."""
        if self.dense is not None:
            return torch.tensordot(coefficients, self.dense.to(coefficients), 1)
        if self.entries is not None:
            flat = torch.zeros(self.shape[0] * self.shape[1], dtype=coefficients.dtype, device=coefficients.device)
            return flat.index_put((self.entries.to(coefficients.device),), coefficients).view(self.shape)
        assert self.left is not None and self.right is not None
        return (self.left.to(coefficients) * coefficients[:, None]).T @ self.right.to(coefficients)


class FisherSubspace:
    """For every weight matrix by the name of its layer, the directions that matter most to some data.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> text = Dataset.from_dict({"text": ["No, I will not.", "That I cannot do.", "I refuse to."]})
    >>> task = Task("refusals", "language-modelling", {"train": text}, ("text",), None)
    >>> found = FisherSubspace.estimate(small("causal-lm", "nano"), task, rank=2)
    >>> found["model.layers.0.self_attn.q_proj"].dense.shape
    torch.Size([2, 32, 32])
    """

    def __init__(self, matrices: Mapping[str, Directions]) -> None:
        if not matrices:
            raise InputError("a Fisher subspace without matrices: the directions of one at least are expected")
        self.matrices = dict(matrices)

    def __getitem__(self, name: str) -> Directions:
        return self.matrices[name]

    def __contains__(self, name: object) -> bool:
        return name in self.matrices

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    @classmethod
    def estimate(
        cls,
        model: Model,
        data: Task | TokenRows,
        *,
        rank: int | float = 64,
        method: Approximation = "exact",
        targets: Sequence[str] | None = None,
        samples: int = 256,
        split: str = "train",
        batch_size: int = 16,
        max_bytes: int = 1 << 30,
        seed: int = 0,
        progress: bool = True,
    ) -> "FisherSubspace":
        """Measure it at the model's present weights.

        Parameters
        ----------
        data
            What is to be kept: to keep refusals, prompts with the aligned model's own refusals; labels of -100 leave
            the prompts out (``TokenRows``). The labels are the data's own.
        rank
            m directions a matrix (64); a number below 1 is the share of F's trace that they explain.
        method
            ``exact``: eigenvectors of F from the gradients themselves, m · rows · columns numbers. ``kfac``: F taken
            as a Kronecker product of the inputs' and the output gradients' second moments; its directions have rank
            one, m · (rows + columns) numbers. ``diag``: single entries.
        targets
            Names of linear layers; all but the LM head by default.
        samples, split, seed
            So many rows at most (256), drawn without repetition.
        batch_size, max_bytes
            Rows at once. Matrices are handled in groups whose gradients (samples · rows · columns · 4 bytes) stay
            below ``max_bytes``; every group is a pass over the data.

        Gradients are taken at the layers' inputs and outputs, so weights may be quantised. Raises ``InputError`` for
        no rows, unknown layers, and a rank out of range.
        """
        if method not in get_args(Approximation):
            raise unknown("method", method, get_args(Approximation))
        if not rank > 0 or (rank >= 1 and rank != int(rank)):
            raise InputError(f"rank is {rank}: a whole number from 1, or a share below 1, is expected")
        backbone = model.backbone
        if hasattr(backbone, "merge_and_unload"):
            raise InputError("the model has adapters: merge them first (adapt.merge_adapter)")
        names = list(targets) if targets is not None else linear_layers(backbone)
        layers = dict(backbone.named_modules())
        for name in names:
            if not isinstance(layers.get(name), nn.Linear | Conv1D):
                raise InputError(f"target {name!r} is no linear layer of the model")
        rows = data.rows(split)
        order = generator("fisher_subspace", seed).permutation(len(rows))[:samples].tolist()
        if not order:
            raise InputError(f"split {split!r} of {data.name} is empty: rows to keep are expected")
        collate = data.collate(model) if isinstance(data, TokenRows) else model.collate(data)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        found: dict[str, Directions] = {}
        groups = _groups({name: _size(layers[name]) * 4 * len(order) for name in names}, max_bytes, method)
        with tqdm(total=len(groups) * len(order), desc="Fisher", disable=not progress, delay=2) as bar:
            for group in groups:
                measures = {name: _MEASURES[method](layers[name]) for name in group}
                for chosen in batches:
                    batch = collate([rows[row] for row in chosen])
                    for name, x, delta in _gradients(model, batch, {name: layers[name] for name in group}):
                        measures[name].add(x, delta)
                    bar.update(len(chosen))
                found |= {name: measure.directions(rank, len(order)) for name, measure in measures.items()}
        return cls(found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one ``.safetensors`` file."""
        tensors = {
            f"{name}:{field}": getattr(directions, field).contiguous()
            for name, directions in self.matrices.items()
            for field in _FIELDS
            if getattr(directions, field) is not None
        }
        shapes = {name: list(directions.shape) for name, directions in self.matrices.items()}
        with atomic_write(Path(path)) as file:
            file.write(save(tensors, metadata={"fisher_subspace": json.dumps(shapes)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FisherSubspace":
        """What ``save`` wrote. Raises ``InputError`` for another file."""
        if not Path(path).is_file():
            raise InputError(f"{path} is no file: a Fisher subspace is expected")
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {}).get("fisher_subspace", "{}"))
            fields: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
            for key in file.keys():  # noqa: SIM118
                name, _, field = key.rpartition(":")
                if name in fields:
                    fields[name][field] = file.get_tensor(key)
        if not shapes:
            raise InputError(f"{path} holds no Fisher subspace")
        return cls({name: Directions(shape=tuple(shape), **fields[name]) for name, shape in shapes.items()})


class _Exact:
    """Single samples' gradients, kept whole; F's eigenvectors from their N × N products."""

    def __init__(self, layer: nn.Module) -> None:
        self.turned, self.gradients = isinstance(layer, Conv1D), list[Tensor]()

    def add(self, x: Tensor, delta: Tensor) -> None:
        left, right = (x, delta) if self.turned else (delta, x)
        self.gradients.append(torch.einsum("nta,ntb->nab", left, right))

    def directions(self, rank: float, samples: int) -> Directions:
        g = torch.cat(self.gradients)
        self.gradients.clear()
        flat = g.flatten(1)
        values, vectors = torch.linalg.eigh((flat @ flat.T).double())  # ascending; eigenvalues σ² of G, F's are σ²/N
        keep = _kept(values.flip(0) / samples, rank)
        u = (vectors.flip(1)[:, : len(keep)] / values.flip(0)[: len(keep)].sqrt()).to(flat).T @ flat
        return Directions(tuple(g.shape[1:]), keep.to(flat), dense=u.view(-1, *g.shape[1:]))  # type: ignore[arg-type]


class _Kfac:
    """F ≈ t · A ⊗ B for t tokens a sample: second moments of inputs (A) and of output gradients (B)."""

    def __init__(self, layer: nn.Module) -> None:
        self.turned, self.tokens = isinstance(layer, Conv1D), 0
        self.a: Tensor | float = 0.0
        self.b: Tensor | float = 0.0

    def add(self, x: Tensor, delta: Tensor) -> None:
        used = delta.abs().sum(-1) > 0
        x, delta = x[used].double(), delta[used].double()
        self.a, self.b, self.tokens = self.a + x.T @ x, self.b + delta.T @ delta, self.tokens + len(x)

    def directions(self, rank: float, samples: int) -> Directions:
        (a, in_vectors), (b, out_vectors) = (torch.linalg.eigh(m / max(self.tokens, 1)) for m in (self.a, self.b))
        products = (b[:, None] * a).flatten() * (self.tokens / samples)
        values, places = products.sort(descending=True)
        keep = _kept(values, rank)
        outs, ins = places[: len(keep)] // len(a), places[: len(keep)] % len(a)
        left, right = out_vectors.T[outs].float(), in_vectors.T[ins].float()
        if self.turned:
            left, right = right, left
        return Directions((left.shape[1], right.shape[1]), keep.float(), left=left, right=right)


class _Diagonal:
    """F's diagonal: mean squares of single samples' gradients."""

    def __init__(self, layer: nn.Module) -> None:
        self.turned, self.squares = isinstance(layer, Conv1D), torch.zeros(())

    def add(self, x: Tensor, delta: Tensor) -> None:
        left, right = (x, delta) if self.turned else (delta, x)
        self.squares = self.squares + torch.einsum("nta,ntb->nab", left, right).square().sum(0)

    def directions(self, rank: float, samples: int) -> Directions:
        values, places = (self.squares.flatten() / samples).sort(descending=True, stable=True)
        keep = _kept(values.double(), rank).to(values)
        return Directions(tuple(self.squares.shape), keep, entries=places[: len(keep)])  # type: ignore[arg-type]


_MEASURES: dict[str, Any] = {"exact": _Exact, "kfac": _Kfac, "diag": _Diagonal}


def _kept(values: Tensor, rank: float) -> Tensor:
    """The first of these falling eigenvalues that are wanted, and not zero."""
    positive = values[values > values[0] * 1e-10] if values[0] > 0 else values[:1]
    if rank >= 1:
        return positive[: int(rank)]
    shares = positive.cumsum(0) / values.clamp(min=0).sum()
    return positive[: int((shares < rank).sum()) + 1]


def _size(layer: Any) -> int:
    """Entries of a layer's matrix; a quantised weight is stored in another shape."""
    return layer.weight.numel() if isinstance(layer, Conv1D) else layer.in_features * layer.out_features


def _groups(sizes: Mapping[str, int], limit: int, method: str) -> list[list[str]]:
    if method != "exact":
        return [list(sizes)]
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _gradients(model: Model, batch: Any, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every layer its inputs (rows, tokens, in) and, with respect to its outputs (rows, tokens, out), the gradients
    of each row's log-likelihood: their products over tokens are the gradients of single rows."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    caught: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    with _frozen(model), _inputs_and_outputs(layers, caught):
        total = _log_likelihood(model, batch)
        outputs = [y for pairs in caught.values() for _, y in pairs]
        gradients = iter(torch.autograd.grad(total, outputs, allow_unused=True))
    for name, pairs in caught.items():
        for x, y in pairs:
            delta = next(gradients)
            delta = torch.zeros_like(y) if delta is None else delta
            x, delta = (z.float().unflatten(0, (z.shape[0], 1)) if z.dim() == 2 else z.float() for z in (x, delta))
            yield name, x, delta


def _log_likelihood(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """Of all rows together: sums over tokens, no means, so that every token of a row counts alike."""
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"})["logits"].float()
    if labels.is_floating_point():
        return -0.5 * (logits.squeeze(-1) - labels).square().sum()  # of a normal distribution of variance 1
    if model.kind == "causal-lm" and labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return -loss


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Meanwhile no weight asks for a gradient, and nothing is dropped out."""
    before, training = [p.requires_grad for p in model.parameters()], model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter, learns in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(learns)


@contextmanager
def _inputs_and_outputs(layers: Mapping[str, nn.Module], caught: dict[str, list[tuple[Tensor, Tensor]]]) -> Any:
    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            first = not output.requires_grad  # of all layers that are watched: gradients end here
            output = output.detach().requires_grad_() if first else output
            caught[name].append((arguments[0].detach(), output))
            return output.clone() if first else output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
