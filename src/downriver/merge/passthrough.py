"""Passthrough: one model as it is, tensors scaled where asked for; with layer slices, a model stacked from others.

Reach for it to duplicate, drop or interleave layers («frankenmerging», no paper of its own) and to silence single
projections; ``stack`` makes the model that ``merge`` then writes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.method import Known, Method, Tally
from downriver.merge.stores import Source, Store, Tensors, open_store

Slice = tuple[Source, tuple[int, int]]
LAYER = re.compile(r"^(.*?(?:^|\.))(\d+)\.")
LAST = re.compile(r"(lm_head|embed_out|score|classifier|(^|\.)(norm|final_layer_norm|ln_f|final_norm)\.)")


@dataclass(frozen=True, kw_only=True)
class Passthrough(Method):
    """The only model, times ``scale``."""

    scale: float = 1.0

    name: ClassVar[str] = "passthrough"
    per_tensor: ClassVar[tuple[str, ...]] = ("scale",)

    def check(self, models: int) -> None:
        super().check(models)
        if models != 1:
            raise InputError(f"passthrough: {models} models, one is expected")
        if self.weights is not None or self.lam != 1:
            raise InputError("passthrough takes neither weights nor lam, only scale")
        if not math.isfinite(self.scale):
            raise InputError(f"passthrough: scale is {self.scale}, a finite number is expected")

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        moved = models[0].double().mul_(self.scale).sub_(base)
        return moved, Tally.plain([float(torch.linalg.vector_norm(moved)) ** 2])


def stack(slices: Sequence[Slice]) -> Store:
    """A model whose layers are those of others, one slice after another.

    Parameters
    ----------
    slices
        Pairs of a model (of any kind that ``merge`` reads) and its layers from ``start`` up to, not including,
        ``stop``. What lies outside the layers is the first slice's, but the last norm and the output layer are the last
        slice's.

    Returns
    -------
    Store
        For ``merge(models, base, ...)``; the folder written has the configuration of the first slice's model with the
        new number of layers.

    Raises
    ------
    InputError
        A model without layers or with several stacks of them; a range outside it; layers that differ in their tensors.

    Example
    -------
    >>> a = {"e.weight": torch.zeros(2, 2), "h.0.w": torch.ones(1), "h.1.w": torch.full((1,), 2.0)}
    >>> store = stack([(a, (0, 2)), (a, (1, 2))])
    >>> store.names(), store.read("h.2.w", 0, 1)
    (['e.weight', 'h.0.w', 'h.1.w', 'h.2.w'], tensor([2.]))
    """
    if not slices:
        raise InputError("slices is empty: at least one pair of a model and its layers is expected")
    opened: dict[int, Store] = {id(source): open_store(source) for source, _ in slices}
    parts = [(opened[id(source)], span) for source, span in slices]
    first, last = parts[0][0], parts[-1][0]
    prefix, _ = _layers(first)
    places: dict[str, tuple[Tensors, str]] = {}
    for store in (first, last):
        for name in store.names():
            if not name.startswith(prefix) and (name not in places or LAST.search(name)):
                places[name] = store.tensors, name
    origin: list[int] = []
    expected: frozenset[str] | None = None
    for store, (start, stop) in parts:
        own, layers = _layers(store)
        if own != prefix:
            raise InputError(f"{store.label}: its layers are {own}* and those of {first.label} {prefix}*")
        if not 0 <= start < stop <= len(layers):
            raise InputError(f"{store.label}: layer_range {[start, stop]}, part of 0 to {len(layers)} is expected")
        for layer in range(start, stop):
            if expected is not None and layers[layer] != expected:
                odd = sorted(layers[layer] ^ expected)[0]
                raise InputError(f"{store.label}, layer {layer}: tensor {odd!r} is not in all layers of the slices")
            expected = layers[layer]
            for rest in sorted(expected):
                places[f"{prefix}{len(origin)}.{rest}"] = store.tensors, f"{own}{layer}.{rest}"
            origin.append(layer)
    label = " + ".join(f"{store.label}[{a}:{b}]" for store, (a, b) in parts)
    names = [n for n in places if not n.startswith(prefix)]
    order = [*(n for n in names if not LAST.search(n)), *(n for n in places if n.startswith(prefix))]
    tensors = _Renamed({n: places[n] for n in [*order, *(n for n in names if LAST.search(n))]})
    here = set(tensors.names())
    tied = {n: chief for n, chief in first.tied.items() if {n, chief} <= here and first is last}
    return Store(label, tensors, first.folder, tied, first.buffers & here, tuple(origin))


class _Renamed:
    """Tensors of several models under new names."""

    def __init__(self, places: Mapping[str, tuple[Tensors, str]]) -> None:
        self._places = dict(places)

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        tensors, stored = self._places[name]
        return tuple(tensors.shape(stored))

    def dtype(self, name: str) -> torch.dtype:
        tensors, stored = self._places[name]
        return tensors.dtype(stored)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        tensors, stored = self._places[name]
        return tensors.read_flat(stored, start, stop)


def _layers(store: Store) -> tuple[str, list[frozenset[str]]]:
    """The prefix of a model's layers, and of every layer the names of its tensors behind its number."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in store.names():
        if match := LAYER.match(name):
            found.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(name[match.end() :])
    stacks = {prefix: layers for prefix, layers in found.items() if sorted(layers) == list(range(len(layers)))}
    if len(stacks) != 1:
        raise InputError(f"{store.label} has {len(stacks)} stacks of layers ({', '.join(stacks)}): one is expected")
    ((prefix, layers),) = stacks.items()
    return prefix, [frozenset(layers[number]) for number in range(len(layers))]
