"""Reading checkpoints tensor by tensor, or piece by piece, without loading the rest and without ever running a
pickle's code.

Reach for ``open_checkpoint`` when weights are to be looked at, compared, merged or checked: a safetensors file, a
folder with one or many shards, or a PyTorch state dict (``.bin``, ``.pth``, ``.pt``; read with
``weights_only=True``).
"""

import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from downriver.core.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The element types of the safetensors format."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files a checkpoint folder may keep its weights in, in the order they are looked for."""

_PICKLES = (".bin", ".pth", ".pt")
_HEADER_LIMIT = 100_000_000
_CHUNK = 1 << 30  # one positioned read gives at most 2 GiB on Linux


@dataclass(frozen=True)
class _Stored:
    """Where one tensor is: in bytes of a file, or as a tensor that a state dict maps."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    tensor: Tensor | None = None


class Checkpoint:
    """The tensors of a checkpoint by name; nothing is read before it is asked for, and what is read is the caller's
    own copy.

    Safe to use from several threads, and from several processes after a fork.
    """

    def __init__(self, path: Path, tensors: Mapping[str, _Stored]) -> None:
        self.path = path
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """The names of the tensors, in the order in which they lie in the files."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The element type of a tensor."""
        return self._find(name).dtype

    def numel(self, name: str) -> int:
        """The number of elements of a tensor."""
        return math.prod(self._find(name).shape)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._find(name).file

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.read_flat(name, 0, self.numel(name)).reshape(self.shape(name))

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """A range of rows, ``tensor[start:stop]``, without the others; the slice's step must be one."""
        shape = self.shape(name)
        if not shape or rows.step not in (None, 1):
            raise InputError(f"{self.path}, tensor {name!r} of shape {shape}: rows {rows} cannot be taken")
        start, stop, _ = rows.indices(shape[0])
        stride = math.prod(shape[1:])
        return self.read_flat(name, start * stride, max(start, stop) * stride).reshape(-1 if stride else 0, *shape[1:])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor, one-dimensional, without the others."""
        stored = self._find(name)
        total = math.prod(stored.shape)
        if not 0 <= start <= stop <= total:
            raise InputError(f"{self.path}, tensor {name!r} has {total} elements: {start} to {stop} are not among them")
        if stored.tensor is not None:
            return stored.tensor.reshape(-1)[start:stop].clone()
        out = torch.empty(stop - start, dtype=stored.dtype)
        size = stored.dtype.itemsize
        _read_into(stored.file, stored.offset + start * size, out.view(torch.uint8).numpy().data, name)
        return out

    def _find(self, name: str) -> _Stored:
        if name not in self._tensors:
            raise InputError(f"{self.path} has no tensor {name!r}")
        return self._tensors[name]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint, reading only its headers.

    Parameters
    ----------
    path
        A ``.safetensors`` file; a folder with ``model.safetensors``, with shards and their ``*.index.json``, or with
        a single other ``.safetensors`` file (an adapter); or a state dict in ``.bin``, ``.pth`` or ``.pt`` form,
        which is mapped into memory by ``torch.load(weights_only=True)``.

    Raises
    ------
    InputError
        Nothing there; a folder without weights; a corrupt or truncated file; an index that names a shard or tensor
        which is not there; a pickle that would need code to run. The message names the file and the tensor.

    Example
    -------
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file({"w": torch.arange(6.0).reshape(3, 2)}, folder / "model.safetensors")
    >>> weights = open_checkpoint(folder)
    >>> weights.names(), weights.shape("w"), weights.read_flat("w", 1, 3)
    (['w'], (3, 2), tensor([1., 2.]))
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: a checkpoint file or folder is expected")
    file = weights_file(path) if path.is_dir() else path
    return Checkpoint(path, _read_index(file) if file.name.endswith(".index.json") else _read_file(file))


def weights_file(folder: str | os.PathLike[str]) -> Path:
    """The file of a checkpoint folder that holds the weights or the index of its shards."""
    folder = Path(folder)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = [p for p in sorted(folder.glob("*.safetensors")) if p.name != "downriver_head.safetensors"]
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(p.name for p in others)
        raise InputError(
            f"{folder} holds several weight files ({names}) but no model.safetensors.index.json that orders them"
        )
    raise InputError(f"{folder} holds no weights: one of {', '.join(WEIGHTS)} is expected")


def _read_file(file: Path) -> dict[str, _Stored]:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in _PICKLES:
        return _read_state_dict(file)
    raise InputError(f"{file} is no checkpoint: .safetensors, {', '.join(_PICKLES)} or a folder is expected")


def _read_index(index: Path) -> dict[str, _Stored]:
    """A sharded checkpoint: every tensor of ``weight_map`` from the shard that the index names."""
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = list(dict.fromkeys(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is no index of shards: a JSON object with a weight_map is expected ({error})"
        ) from None
    tensors: dict[str, _Stored] = {}
    for shard in shards:
        file = index.parent / shard
        if not file.is_file():
            missing = next(name for name, s in where.items() if s == shard)
            raise InputError(f"{index} names the shard {shard} (tensor {missing!r}), which is not there")
        tensors |= {name: stored for name, stored in _read_file(file).items() if where.get(name) == shard}
    for name, shard in where.items():
        if name not in tensors:
            raise InputError(f"{index.parent / shard} has no tensor {name!r}, which {index.name} says it holds")
    return tensors


def _read_safetensors(file: Path) -> dict[str, _Stored]:
    """The header of a safetensors file: eight bytes of length, JSON, then the data, every byte of it owned by one
    tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise InputError(f"{file} is corrupt or truncated: its header would be {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            spans = sorted((tuple(entry["data_offsets"]), name) for name, entry in header.items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is corrupt: its header is no safetensors header ({error})") from None
    tensors, end = {}, 0
    for (start, stop), name in spans:
        entry = header[name]
        dtype, shape = DTYPES.get(entry.get("dtype")), tuple(entry.get("shape", ()))
        if dtype is None:
            raise InputError(f"{file}, tensor {name!r}: element type {entry.get('dtype')!r} is not known")
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{file} is corrupt: tensor {name!r} of shape {shape} lies at bytes {start} to {stop}")
        tensors[name] = _Stored(file, dtype, shape, offset=8 + length + start)
        end = stop
        if 8 + length + end > size:
            raise InputError(
                f"{file} is truncated: tensor {name!r} ends at byte {8 + length + end}, the file at {size}"
            )
    if 8 + length + end != size:
        raise InputError(f"{file} is corrupt: {size - 8 - length - end} bytes after the last tensor belong to none")
    return tensors


def _read_state_dict(file: Path) -> dict[str, _Stored]:
    try:
        state = _torch_load(file)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} is a pickle that needs code to run, not plain tensors; it is not read ({_brief(error)})"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, AttributeError, IndexError, KeyError) as error:
        raise InputError(f"{file} is corrupt or no PyTorch state dict ({_brief(error)})") from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{file} holds a {type(state).__name__}: a state dict (names to tensors) is expected")
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{file}, entry {name!r} is a {type(value).__name__}: a tensor is expected")
        tensors[str(name)] = _Stored(file, value.dtype, tuple(value.shape), tensor=value.detach())
    return tensors


def _torch_load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(file, map_location="cpu", weights_only=True)  # files written before PyTorch 1.6


def _read_into(file: Path, offset: int, buffer: memoryview, name: str) -> None:
    """Fill the buffer from the file by positioned reads, which keep nothing else of it in the process's memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            got = os.preadv(descriptor, [buffer[done : done + _CHUNK]], offset + done)
            if got == 0:
                raise InputError(f"{file} ends inside tensor {name!r}: it was cut while it was read")
            done += got
    finally:
        os.close(descriptor)


def _brief(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
