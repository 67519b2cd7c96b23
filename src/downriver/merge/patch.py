"""Apply a sparse patch to a checkpoint on disk, or take it back: a new folder in blocks, the old one untouched.

Reach for it to ship a repair or a skill of a large model as a small file (``SparsePatch``, which methods such as
``localize_skill`` and ``recover_alignment`` give).
"""

import math
import os
from pathlib import Path

from downriver.core.errors import InputError
from downriver.core.io import atomic_folder
from downriver.merge import card
from downriver.merge.engine import slot_of
from downriver.merge.plan import LARGEST
from downriver.merge.stores import Source, Store, open_store
from downriver.merge.writer import SHARD_SIZE, ShardWriter
from downriver.nn.sparse_patch import SparsePatch


def patch_checkpoint(
    model: Source,
    patch: SparsePatch | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revert: bool = False,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Write the model with the patch applied, or taken back, as a folder that ``from_pretrained`` loads.

    Parameters
    ----------
    model
        A folder, file, hub id or state dict, as for ``merge``; with ``revert`` one that has the patch.
    patch
        A ``SparsePatch`` or the file that one was saved in.
    out
        The folder to be written; it appears whole or not at all.
    revert
        Take the patch back: the result is bit for bit what it was applied to.
    shard_size, overwrite
        As for ``merge``.

    Raises ``InputError`` when the folder exists, when the model lacks a tensor of the patch or has it in another shape,
    and when its entries are not those that the patch was made for.

    >>> import tempfile, torch
    >>> from downriver.nn.sparse_patch import SparseMask
    >>> old, new = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 5.0, 7.0])}
    >>> patch = SparsePatch.between(old, new, SparseMask({"w": torch.tensor([1])}, 3))
    >>> folder = patch_checkpoint(old, patch, Path(tempfile.mkdtemp()) / "patched")
    >>> open_store(folder).read("w", 0, 3)
    tensor([0., 5., 0.])
    """
    patch = patch if isinstance(patch, SparsePatch) else SparsePatch.load(patch)
    store, out = open_store(model), Path(out)
    places = {store.tied.get(name, name): name for name in patch.mask.indices}
    _check(store, patch, places)
    with atomic_folder(out, overwrite) as part:
        once = card.copy_files(model, store, part, None)
        names = [name for name in store.names() if not (once and name in store.tied)]
        slots = [slot_of(name, store.shape(name), store.dtype(name)) for name in names]
        with ShardWriter(part, slots, shard_size) as writer:
            for name in names:
                stored = places.get(store.tied.get(name, name), "")
                size = math.prod(store.shape(name))
                for start in range(0, size, LARGEST):
                    stop = min(size, start + LARGEST)
                    values = store.read(name, start, stop).clone()
                    at, expected, wanted = patch.rows(stored, start, stop, revert)
                    if len(at):
                        patch.check(stored, values[at], expected, "after the patch" if revert else "before the patch")
                        values[at] = wanted
                    writer.write(name, start, values)
    return out


def _check(store: Store, patch: SparsePatch, places: dict[str, str]) -> None:
    here = set(store.names())
    for name, stored in places.items():
        if name not in here:
            raise InputError(f"{store.label} lacks {stored!r}, which the patch changes")
        if store.shape(name) != patch.shapes[stored]:
            found, expected = store.shape(name), patch.shapes[stored]
            raise InputError(f"{store.label}, tensor {stored!r} has shape {found}: the patch expects {expected}")
