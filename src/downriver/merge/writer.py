"""Write a sharded safetensors checkpoint piece by piece, in any order, from several threads.

Reach for it when tensors are made in blocks and must not be held: every shard gets its header and its full size at once
(a disk that is too small says so before any work is done), then each block goes to its place by a positioned write.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from downriver.core.tensors import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD_SIZE = 5 * 10**9
"""Bytes of a shard, as transformers writes them by default."""


@dataclass(frozen=True)
class Slot:
    """One tensor to be written; ``file`` and ``stored`` put it into a file apart, under another name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str = ""
    stored: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Files ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with their index, in an existing folder.

    A shard takes tensors in the order given until the next one would exceed ``shard_size`` bytes. Use it as a context
    manager.

    >>> import tempfile
    >>> from downriver.core.tensors import open_checkpoint
    >>> folder = Path(tempfile.mkdtemp())
    >>> with ShardWriter(folder, [Slot("w", (2, 2), torch.float32)]) as writer:
    ...     writer.write("w", 2, torch.tensor([3.0, 4.0]))
    ...     writer.write("w", 0, torch.tensor([1.0, 2.0]))
    >>> open_checkpoint(folder).read("w")
    tensor([[1., 2.],
            [3., 4.]])
    """

    def __init__(self, folder: Path, slots: Sequence[Slot], shard_size: int = SHARD_SIZE) -> None:
        shards = _shards([slot for slot in slots if not slot.file], shard_size)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        layout = dict(zip(names if len(shards) > 1 else ["model.safetensors"], shards, strict=True))
        apart: dict[str, list[Slot]] = {}
        for slot in slots:
            if slot.file:
                apart.setdefault(slot.file, []).append(slot)
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}  # file descriptor, offset in the file, type
        self._open: list[int] = []
        try:
            for file, inside in (layout | apart).items():
                self._create(folder / file, inside)
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(slot.size for inside in shards for slot in inside)},
                "weight_map": {slot.name: file for file, inside in layout.items() for slot in inside},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _create(self, path: Path, slots: Sequence[Slot]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for slot in slots:
            offsets = [end, end + slot.size]
            header[slot.stored or slot.name] = {
                "dtype": CODES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": offsets,
            }
            end += slot.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight bytes
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._open.append(descriptor)
        _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
        start, size = 8 + len(text), 8 + len(text) + end
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
        for slot in slots:
            self._places[slot.name] = (descriptor, start, slot.dtype)
            start += slot.size

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put values at elements ``start`` and on of the flattened tensor, converted to its type."""
        descriptor, offset, dtype = self._places[name]
        raw = values.detach().reshape(-1).to("cpu", dtype).contiguous().view(torch.uint8).numpy()
        _write_all(descriptor, raw.data, offset + start * dtype.itemsize)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.pop())


def _shards(slots: Sequence[Slot], limit: int) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shards[-1] and filled + slot.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.size
    return shards


def _write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    data = memoryview(data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
