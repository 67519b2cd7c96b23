"""One view of every kind of model that can be merged: named tensors, read piece by piece.

Reach for ``open_store`` to look at a state dict, a module, a checkpoint folder or file, a hub id, or a base with a LoRA
adapter as if each were a folder of plain tensors. Nothing is read before it is asked for; an adapter's ΔW = s·B·A is
made row by row, never as a whole.
"""

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.core.tensors import Checkpoint, open_checkpoint

HEAD_FILE = "downriver_head.safetensors"
HEAD_PREFIX = "downriver_head."

_EMBEDDING = re.compile(r"(embed|wte|shared|lm_head|predictions\.decoder|output_projection|score)[\w.]*weight$")
_OUTPUT = re.compile(r"(lm_head|embed_out|predictions|output_projection)")
_BUFFER = re.compile(r"(^|\.)(running_mean|running_var|inv_freq|original_inv_freq|masked_bias|relative_coords_table)$")
_COMPARE = 1 << 16


class Tensors(Protocol):
    """What the engine reads; ``core.tensors.Checkpoint`` is one."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read_flat(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Store:
    """A model as the engine sees it.

    ``tied`` maps a name that shares its values with another one to that one; ``buffers`` are float tensors that are
    state or constants rather than weights; ``folder`` is where configuration and tokenizer lie, when there is such a
    place; ``layers`` says of a stacked model which layer of its source each of its layers is.
    """

    label: str
    tensors: Tensors
    folder: Path | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    layers: tuple[int, ...] | None = None

    def names(self) -> list[str]:
        """Every tensor's name, tied ones too."""
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.tensors.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        """The element type of a tensor."""
        return self.tensors.dtype(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor."""
        return self.tensors.read_flat(name, start, stop)

    def fingerprint(self) -> str:
        """20 digits of the sha256 of names, types, shapes and the first and last 64 values of every tensor."""
        digest = hashlib.sha256()
        for name in sorted(self.names()):
            shape, size = self.shape(name), math.prod(self.shape(name))
            digest.update(f"{name} {self.dtype(name)} {shape}".encode())
            for start in {0, max(0, size - 64)}:
                values = self.read(name, start, min(size, start + 64))
                digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes() if size else b"")
        return digest.hexdigest()[:20]


Source = Store | Mapping[str, Tensor] | nn.Module | str | os.PathLike[str] | tuple[Any, str | os.PathLike[str]]
"""A state dict, a module, a folder, file, hub id or built-in name, (base, folder of a LoRA adapter), or what
``open_store`` and ``stack`` give."""


def open_store(source: Source) -> Store:
    """Open any kind of model as a ``Store``.

    Parameters
    ----------
    source
        A state dict; an ``nn.Module`` (adapters of peft inside it are merged in a copy); a folder or file that
        ``core.tensors.open_checkpoint`` reads, with the head that ``Model.save`` wrote beside it under
        ``downriver_head.``; a built-in name or hub id; a folder of a LoRA adapter, whose base is the one that it names;
        or a pair (base, adapter folder).

    Raises
    ------
    InputError
        Not one of these; no weights; an adapter that is not plain LoRA or that fits no tensor of its base.

    Example
    -------
    >>> store = open_store({"w": torch.ones(2, 3), "n": torch.tensor(4)})
    >>> store.names(), store.shape("w")
    (['w', 'n'], (2, 3))
    """
    if isinstance(source, Store):
        return source
    if isinstance(source, tuple):
        if len(source) != 2:
            raise InputError(f"a tuple of {len(source)} is no model: (base, adapter folder) is expected")
        return _with_adapter(open_store(source[0]), Path(source[1]))
    if isinstance(source, nn.Module):
        return _of_module(source)
    if isinstance(source, Mapping):
        return _of_state(source, f"state dict of {len(source)} tensors")
    if isinstance(source, str | os.PathLike):
        return _of_path(source)
    raise InputError(
        f"a {type(source).__name__} is no model: a state dict, module, folder, hub id or (base, adapter) is expected"
    )


def without_adapters(module: nn.Module) -> nn.Module:
    """The module itself, or, where it holds peft adapters, a copy with all of them merged into plain weights."""
    if not any(hasattr(m, "merge_and_unload") for m in module.modules()):
        return module
    whole: Any = copy.deepcopy(module)
    if hasattr(whole, "merge_and_unload"):
        return whole.merge_and_unload()
    merged: list[str] = []
    for name, child in list(whole.named_modules()):  # peft's wrapper comes before the tuner inside it
        if hasattr(child, "merge_and_unload") and not any(name.startswith(f"{done}.") for done in merged):
            parent, _, last = name.rpartition(".")
            setattr(whole.get_submodule(parent), last, child.merge_and_unload())
            merged.append(name)
    return whole


class _InMemory:
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: value.detach() for name, value in state.items()}

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name].reshape(-1)[start:stop]

    def tied(self) -> dict[str, str]:
        """Names whose tensors are the same memory seen in the same way."""
        seen: dict[tuple[object, ...], list[str]] = {}
        for name, value in self._state.items():
            if value.numel():
                seen.setdefault((value.data_ptr(), value.dtype, tuple(value.shape), value.stride()), []).append(name)
        return _aliases(seen.values())


class _Joined:
    """Two sets of tensors, the second under a prefix."""

    def __init__(self, first: Tensors, second: Tensors, prefix: str) -> None:
        self._first, self._second, self._prefix = first, second, prefix

    def names(self) -> list[str]:
        return [*self._first.names(), *(self._prefix + name for name in self._second.names())]

    def _at(self, name: str) -> tuple[Tensors, str]:
        if name.startswith(self._prefix):
            return self._second, name.removeprefix(self._prefix)
        return self._first, name

    def shape(self, name: str) -> tuple[int, ...]:
        tensors, name = self._at(name)
        return tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        tensors, name = self._at(name)
        return tensors.dtype(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        tensors, name = self._at(name)
        return tensors.read_flat(name, start, stop)


@dataclass(frozen=True)
class _Factors:
    """One LoRA pair, ``W + scale · left @ right`` (transposed where the layer keeps its weight as (in, out))."""

    left: str
    right: str
    scale: float
    transposed: bool


class _Adapted:
    """A base whose adapted tensors are W + s·B·A; tensors that the adapter stores whole replace the base's."""

    def __init__(
        self, base: Tensors, adapter: Checkpoint, factors: Mapping[str, _Factors], whole: Mapping[str, str]
    ) -> None:
        self._base, self._adapter, self._factors, self._whole = base, adapter, factors, whole

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._adapter.shape(self._whole[name]) if name in self._whole else self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._whole:
            return self._adapter.dtype(self._whole[name])
        dtype = self._base.dtype(name)  # a small ΔW would be lost in a 16-bit sum: adapted tensors are float32 at least
        return torch.promote_types(dtype, torch.float32) if name in self._factors else dtype

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._whole:
            return self._adapter.read_flat(self._whole[name], start, stop)
        values = self._base.read_flat(name, start, stop)
        if name not in self._factors:
            return values
        lora = self._factors[name]
        width = math.prod(self._base.shape(name)[1:])
        first, last = start // width, -(-stop // width)  # the rows that hold the elements asked for
        left, right = (self._adapter.read(n).flatten(1).double() for n in (lora.left, lora.right))
        rows = right[:, first:last].T @ left.T if lora.transposed else left[first:last] @ right
        delta = rows.reshape(-1)[start - first * width : stop - first * width]
        return (values.double() + lora.scale * delta).to(self.dtype(name))


def _of_state(state: Mapping[str, Tensor], label: str, buffers: Iterable[str] = ()) -> Store:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{label}, entry {name!r} is a {type(value).__name__}: a tensor is expected")
    tensors = _InMemory(state)
    return Store(label, tensors, None, tensors.tied(), _buffers(state, buffers))


def _of_module(module: nn.Module) -> Store:
    plain = without_adapters(module)
    label = str(getattr(module, "source", "") or getattr(module, "name_or_path", "") or type(module).__name__)
    return _of_state(module_state(plain), label, module_state(plain, dict(plain.named_buffers())))


def module_state(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A module's state; that of a ``Model`` under the names that its backbone and head have on disk."""
    state = module.state_dict() if state is None else state
    if not hasattr(module, "with_head"):
        return dict(state)
    return {
        n.removeprefix("backbone.") if n.startswith("backbone.") else n.replace("head.", HEAD_PREFIX, 1): t
        for n, t in state.items()
    }


def _of_path(source: str | os.PathLike[str]) -> Store:
    path = Path(source)
    if not path.exists():
        from downriver.models.load import locate  # built-in names and hub ids; transformers is loaded only for these

        path = locate(str(source))[0]
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return _with_adapter(open_store(_base_of(path)), path)
    tensors: Tensors = open_checkpoint(path)
    if path.is_dir() and (path / HEAD_FILE).is_file():
        tensors = _Joined(tensors, open_checkpoint(path / HEAD_FILE), HEAD_PREFIX)
    folder = path if path.is_dir() else None
    return Store(str(source), tensors, folder, _equal_embeddings(tensors), _buffers(tensors.names()))


def _buffers(names: Iterable[str], known: Iterable[str] = ()) -> frozenset[str]:
    return frozenset(known) | {name for name in names if _BUFFER.search(name)}


def _aliases(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """In each group the first name that is no output layer stands for all."""
    aliases: dict[str, str] = {}
    for group in groups:
        chief = next((name for name in group if not _OUTPUT.search(name)), group[0])
        aliases |= {name: chief for name in group if name != chief}
    return aliases


def _equal_embeddings(tensors: Tensors) -> dict[str, str]:
    """Files keep no sharing: embeddings and output layers of one shape that hold the same values are taken as tied."""
    groups: list[list[str]] = []
    for name in tensors.names():
        if len(tensors.shape(name)) == 2 and _EMBEDDING.search(name):
            same = next((group for group in groups if equal(tensors, group[0], tensors, name)), None)
            groups.append([name]) if same is None else same.append(name)
    return _aliases(groups)


def equal(left: Tensors, name: str, right: Tensors, other: str) -> bool:
    """Whether two stored tensors have one type, shape and content; reading stops at the first difference."""
    if (left.dtype(name), tuple(left.shape(name))) != (right.dtype(other), tuple(right.shape(other))):
        return False
    size = math.prod(left.shape(name))
    pieces = ((start, min(size, start + _COMPARE)) for start in range(0, size, _COMPARE))
    return all(torch.equal(left.read_flat(name, *piece), right.read_flat(other, *piece)) for piece in pieces)


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no adapter folder: adapter_config.json cannot be read ({error})") from None


def _base_of(folder: Path) -> str:
    base = _adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder}/adapter_config.json names no base: give the pair (base, adapter)")
    return str(base)


def _with_adapter(base: Store, folder: Path) -> Store:
    """Find where every tensor of a LoRA adapter belongs in its base."""
    config = _adapter_config(folder)
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else kind
        raise InputError(
            f"{folder} is a {kind} adapter: plain LoRA is read; merge it with peft's merge_and_unload and save it"
        )
    adapter = open_checkpoint(folder)
    names = set(base.names())
    factors: dict[str, _Factors] = {}
    whole: dict[str, str] = {}
    for stored in adapter.names():
        module, part = _lora_part(stored)
        if part in ("lora_B", "lora_embedding_B"):
            target = _place(f"{module}.weight", names, folder)
            right = stored.replace("_B", "_A")
            rank = adapter.shape(right)[0]
            embedding = part == "lora_embedding_B"
            scale = _scale(config, module, rank)
            factors[target] = _Factors(stored, right, scale, embedding or bool(config.get("fan_in_fan_out")))
            expected = (
                math.prod(adapter.shape(stored)[1:]),
                rank,
                adapter.shape(stored)[0],
                math.prod(adapter.shape(right)[1:]),
            )
            shape = base.shape(target)
            sides = (shape[0], math.prod(shape[1:]))
            if expected[0] != rank or tuple(sorted(sides)) != tuple(sorted(expected[2:])):
                raise InputError(f"{folder}, tensor {stored!r} does not fit {target!r} of shape {shape}")
        elif part == "":
            whole[_place(module, names, folder)] = stored
        elif part not in ("lora_A", "lora_embedding_A"):
            raise InputError(
                f"{folder}, tensor {stored!r}: {part} is not read; merge it with peft's merge_and_unload and save it"
            )
    tensors = _Adapted(base.tensors, adapter, factors, whole)
    changed = factors.keys() | whole.keys()
    tied = {alias: name for alias, name in base.tied.items() if not {alias, name} & changed}
    return Store(f"{base.label} + {folder}", tensors, base.folder, tied, base.buffers)


def _lora_part(stored: str) -> tuple[str, str]:
    """The module of an adapter's tensor and which part of LoRA it is: '' for a tensor that is stored whole."""
    name = stored.removeprefix("base_model.model.").replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    found = re.fullmatch(r"(.+)\.(lora_[A-Za-z_]+?)(\.weight)?", name)
    return (found[1], found[2]) if found else (name, "")


def _place(name: str, names: set[str], folder: Path) -> str:
    """The base's name for it: the same, or the only one that differs by a prefix."""
    if name in names:
        return name
    near = [n for n in names if n.endswith(f".{name}") or name.endswith(f".{n}")]
    if len(near) != 1:
        raise InputError(f"{folder} adapts {name!r}, which the base {'has several times' if near else 'lacks'}")
    return near[0]


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α/r, or α/√r when rank-stabilised; per-module values win over the general one."""
    patterns = config.get("alpha_pattern") or {}
    key = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    alpha = patterns[key] if key else config.get("lora_alpha", 8)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
