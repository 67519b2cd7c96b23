"""Sparse masks over a model's parameters, and revertible patches: which entries change, from what, and to what.

Reach for it when a method changes a few weights of a large model: the patch is a small safetensors file that is applied
to, and taken back from, the model it was made for, bit by bit. Nothing else of the model is kept or touched.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from downriver.core.errors import InputError
from downriver.core.io import atomic_write
from downriver.nn.select import kth_magnitude

INDICES, BITS, VALUES, BEFORE = "indices", "bits", "values", "before"
FORMAT, MASK_FORMAT = "downriver-patch-1", "downriver-mask-1"


@dataclass(frozen=True)
class Overlap:
    """``of_first``: share of the first mask's entries that the second has; ``of_second`` the other way round; both with
    what independent masks of these sizes would give."""

    of_first: float
    of_second: float
    chance_of_first: float
    chance_of_second: float


@dataclass(frozen=True)
class SparseMask:
    """A set of entries: of each tensor the ascending flat indices (int64); ``total`` entries of the whole model.

    >>> mask = SparseMask.top({"w": torch.tensor([[0.1, -3.0], [2.0, 0.0]])}, 2)
    >>> mask.indices["w"].tolist(), mask.count, mask.share
    ([1, 2], 2, 0.5)
    """

    indices: Mapping[str, Tensor]
    total: int

    @classmethod
    def of(cls, dense: Mapping[str, Tensor], total: int | None = None) -> "SparseMask":
        """The entries that are true in tensors of truth values. ``total`` counts these tensors' entries by default."""
        found = {name: mask.reshape(-1).nonzero()[:, 0].cpu() for name, mask in dense.items()}
        size = sum(mask.numel() for mask in dense.values()) if total is None else total
        return cls({name: places for name, places in found.items() if len(places)}, size)

    @classmethod
    def top(cls, values: Mapping[str, Tensor], k: int, total: int | None = None) -> "SparseMask":
        """The ``k`` entries of largest magnitude, ranked over all tensors together.

        Of entries equal to the smallest that is chosen the first ones are taken. Raises ``InputError`` for ``k`` below
        1 or above the number of entries.
        """
        size = sum(value.numel() for value in values.values())
        if not 1 <= k <= size:
            raise InputError(f"k is {k} of {size} entries: at least one and at most all are expected")
        flat = {name: value.detach().reshape(-1).float().abs() for name, value in values.items()}
        cut = kth_magnitude(list(flat.values()), size - k + 1)
        above = sum(int((value > cut).sum()) for value in flat.values())
        ties = k - above
        chosen: dict[str, Tensor] = {}
        for name, value in flat.items():
            equal = (value == cut).nonzero()[:, 0][:ties]
            ties -= len(equal)
            chosen[name] = torch.cat([(value > cut).nonzero()[:, 0], equal]).sort().values.cpu()
        return cls({n: places for n, places in chosen.items() if len(places)}, size if total is None else total)

    @property
    def count(self) -> int:
        """Entries in the mask."""
        return sum(len(places) for places in self.indices.values())

    @property
    def share(self) -> float:
        """Entries in the mask over all of the model's."""
        return self.count / self.total

    def dense(self, name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The truth values of one tensor."""
        mask = torch.zeros(shape, dtype=torch.bool)
        if name in self.indices:
            mask.view(-1)[self.indices[name]] = True
        return mask

    def union(self, other: "SparseMask") -> "SparseMask":
        """Entries of either mask."""
        return self._combined(other, lambda a, b: torch.cat([a, b]).unique())

    def intersection(self, other: "SparseMask") -> "SparseMask":
        """Entries of both masks."""
        return self._combined(other, lambda a, b: a[torch.isin(a, b, assume_unique=True)])

    def overlap(self, other: "SparseMask") -> Overlap:
        """How much of one mask lies in the other; 0 for an empty one."""
        both = self.intersection(other).count
        first, second = (both / mask.count if mask.count else 0.0 for mask in (self, other))
        return Overlap(first, second, other.share, self.share)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: of each tensor a bit an entry, or where that is less the indices themselves."""
        tensors: dict[str, Tensor] = {}
        for name, places in self.indices.items():
            if len(places) * 64 < int(places[-1]):
                tensors[f"{name}|{INDICES}"] = places.contiguous()
            else:
                bits = torch.zeros(int(places[-1]) + 1, dtype=torch.bool)
                bits[places] = True
                tensors[f"{name}|{BITS}"] = torch.from_numpy(np.packbits(bits.numpy()))
        path = Path(path)
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={"format": MASK_FORMAT, "total": str(self.total)}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SparseMask":
        """Read what ``save`` wrote. Raises ``InputError`` naming the file for anything else, or a damaged one."""
        indices: dict[str, Tensor] = {}
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != MASK_FORMAT:
                    raise InputError(f"{path} is no mask: a file written by SparseMask.save is expected")
                for key in sorted(file.keys()):
                    name, _, kind = key.rpartition("|")
                    stored = file.get_tensor(key)
                    packed = kind == BITS
                    indices[name] = (
                        torch.from_numpy(np.flatnonzero(np.unpackbits(stored.numpy()))) if packed else stored
                    )
            return cls(indices, int(about["total"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a mask: {error}") from None

    def _combined(self, other: "SparseMask", rule: Callable[[Tensor, Tensor], Tensor]) -> "SparseMask":
        if other.total != self.total:
            raise InputError(f"masks of models with {self.total} and {other.total} entries cannot be combined")
        none = torch.zeros(0, dtype=torch.int64)
        names = [*self.indices, *(name for name in other.indices if name not in self.indices)]
        found = {name: rule(self.indices.get(name, none), other.indices.get(name, none)) for name in names}
        return SparseMask({name: places for name, places in found.items() if len(places)}, self.total)


@dataclass(frozen=True)
class SparsePatch:
    """Changes of single entries: ``values`` take the place of ``before`` at the entries of ``mask``.

    ``shapes`` of the tensors concerned, and what the maker says of itself (``about``: method, figures; JSON).

    >>> old, new = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 5.0, 7.0])}
    >>> patch = SparsePatch.between(old, new, SparseMask({"w": torch.tensor([1])}, 3))
    >>> patch.apply(old)["w"], patch.revert(patch.apply(old))["w"]
    (tensor([0., 5., 0.]), tensor([0., 0., 0.]))
    """

    mask: SparseMask
    values: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        mask: SparseMask,
        about: Mapping[str, Any] | None = None,
    ) -> "SparsePatch":
        """The patch that gives ``old`` the values of ``new`` at the entries of the mask."""
        taken: list[dict[str, Tensor]] = [{}, {}]
        for name, places in mask.indices.items():
            for state, part in zip((old, new), taken, strict=True):
                if name not in state or state[name].shape != old[name].shape:
                    raise InputError(f"tensor {name!r} is missing or has another shape in one of the models")
                part[name] = state[name].detach().reshape(-1)[places.to(state[name].device)].cpu().clone()
            taken[1][name] = taken[1][name].to(taken[0][name].dtype)
        return cls(mask, taken[1], taken[0], {n: tuple(old[n].shape) for n in mask.indices}, dict(about or {}))

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the state with the patch's values; tensors that it does not concern are shared with the given one.

        Raises ``InputError`` naming the tensor when an entry has not the value that the patch was made for.
        """
        return self._moved(state, self.before, self.values, "before the patch")

    def revert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state as it was before ``apply``, bit by bit; refuses a state that has not the patch's values."""
        return self._moved(state, self.values, self.before, "after the patch")

    def rows(self, name: str, start: int, stop: int, revert: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """For the flat entries ``start`` to ``stop`` of a tensor: places in this block, what is expected there, and
        what it becomes. Empty for a tensor that the patch does not concern."""
        if name not in self.mask.indices:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0)
        places = self.mask.indices[name]
        low, high = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
        expected, wanted = (self.values, self.before) if revert else (self.before, self.values)
        return places[low:high] - start, expected[name][low:high], wanted[name][low:high]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file; indices are int32 where they fit."""
        tensors: dict[str, Tensor] = {}
        for name, places in self.mask.indices.items():
            small = int(places[-1]) < 2**31
            tensors[f"{name}|{INDICES}"] = places.int() if small else places
            tensors[f"{name}|{VALUES}"] = self.values[name].contiguous()
            tensors[f"{name}|{BEFORE}"] = self.before[name].contiguous()
        about = {
            "format": FORMAT,
            "total": str(self.mask.total),
            "shapes": json.dumps({name: list(shape) for name, shape in self.shapes.items()}),
            "about": json.dumps(self.about),
        }
        path = Path(path)
        with atomic_write(path) as file:
            file.write(save(tensors, metadata=about))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SparsePatch":
        """Read what ``save`` wrote. Raises ``InputError`` naming the file for anything else, or a damaged one."""
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise InputError(f"{path} is no patch: a file written by SparsePatch.save is expected")
                shapes = {name: tuple(shape) for name, shape in json.loads(about["shapes"]).items()}
                parts = {
                    kind: {name: file.get_tensor(f"{name}|{kind}") for name in shapes}
                    for kind in (INDICES, VALUES, BEFORE)
                }
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a patch: {error}") from None
        places = {name: indices.long() for name, indices in parts[INDICES].items()}
        for name, indices in places.items():
            size = torch.Size(shapes[name]).numel()
            whole = len(indices) == len(parts[VALUES][name]) == len(parts[BEFORE][name])
            if not whole or int(indices[0]) < 0 or int(indices[-1]) >= size or not (indices.diff() > 0).all():
                raise InputError(f"{path}, tensor {name!r}: its entries do not fit together")
        mask = SparseMask(places, int(about["total"]))
        return cls(mask, parts[VALUES], parts[BEFORE], shapes, json.loads(about["about"]))

    def check(self, name: str, found: Tensor, expected: Tensor, when: str) -> None:
        """Raise ``InputError`` unless the values are bit for bit those that the patch expects."""
        if found.dtype != expected.dtype or not torch.equal(found.cpu(), expected):
            raise InputError(f"tensor {name!r} has not the values that it had {when}: the patch is for another model")

    def _moved(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], wanted: Mapping[str, Tensor], when: str
    ) -> dict[str, Tensor]:
        moved = dict(state)
        for name, places in self.mask.indices.items():
            if name not in state or tuple(state[name].shape) != self.shapes[name]:
                there = tuple(state[name].shape) if name in state else "missing"
                raise InputError(f"tensor {name!r} is {there}: shape {self.shapes[name]} is expected by the patch")
            value = state[name].detach().clone()
            at = places.to(value.device)
            self.check(name, value.view(-1)[at], expected[name], when)
            value.view(-1)[at] = wanted[name].to(value.device)
            moved[name] = value
        return moved
