"""Merge checkpoints of any size in a declared amount of memory.

Reach for ``merge`` to fuse fine-tuned checkpoints of one base on disk; the functions ``average``, ``task_arithmetic``
and ``ties`` do the same to models in memory, by the same rules on the same blocks (``merge/plan.py``).
"""

import copy
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_folder
from downriver.merge import card
from downriver.merge.method import Method, Tally
from downriver.merge.plan import MAX_BYTES, Entry, Mismatch, Overrides, Pattern, Plan, Vocabulary, plan
from downriver.merge.report import MergeReport, report_of
from downriver.merge.stores import HEAD_FILE, HEAD_PREFIX, Source, module_state, without_adapters
from downriver.merge.writer import SHARD_SIZE, ShardWriter, Slot

T = TypeVar("T")


def merge(
    models: Sequence[Source],
    base: Source,
    method: str | Method,
    out: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_BYTES,
    dtype: torch.dtype | str | None = None,
    out_dtype: torch.dtype | str | None = None,
    include: Pattern = None,
    exclude: Pattern = None,
    params: Overrides | None = None,
    on_mismatch: Mismatch = "error",
    vocabulary: Vocabulary | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    workers: int | None = None,
) -> MergeReport:
    """Merge models into a checkpoint folder that ``from_pretrained`` loads, within a declared amount of memory.

    The folder appears whole or not at all. It has sharded safetensors with their index, the base's configuration,
    tokenizer and generation files, and a model card that says what was merged and how. Tensors that are not floating
    point, and float buffers (running statistics, rotary frequencies), are the base's. Tied tensors are counted and
    written once.

    Parameters
    ----------
    models, base
        Fine-tuned models and the one they come from: folders, files, hub ids, built-in names, state dicts, modules, or
        (base, LoRA adapter folder).
    method
        ``Ties(...)``, ``TaskArithmetic(...)``, ``Average(...)``, or the name of one with its defaults.
    out
        The folder to be written.
    max_bytes
        Bound of the working memory in bytes, 1 GiB by default: blocks of all models, counters and results.
    dtype
        Round what is read to this type first; it is then also the type of the result. By default nothing is rounded.
    out_dtype
        Type of the result's floating tensors; by default ``dtype``, or each tensor's type in the base.
    include, exclude
        Regular expressions (one or several) searched in tensor names. What is not included, or is excluded, is the
        base's.
    params
        Parameters of single tensors, ``{regex: {parameter: value}}``; where several match, the last one wins. A list of
        values is spread over the layers from first to last and interpolated linearly; an item may be a list with one
        value a model.
    on_mismatch
        What to do where names or shapes differ: ``error`` lists all differences; ``skip`` takes such tensors from the
        base; ``slice-embed`` merges the rows that all vocabularies have and takes the base's further rows.
    vocabulary
        Align models of different tokenizers row by row first, to the base's tokens (``base``) or to all that there are
        (``union``; the result then has such a tokenizer): see ``align_vocabularies``. By default rows are taken as they
        are.
    shard_size
        Bytes of a shard, 5 GB by default.
    overwrite
        Replace an existing folder.
    device
        Where to calculate; a GPU when there is one.
    workers
        Threads that read, calculate and write; by default the CPU's cores, at most 4.

    Returns
    -------
    MergeReport
        Per tensor and in total: shares kept, sign conflicts, agreement, norms; bytes and seconds.

    Raises
    ------
    InputError
        The folder exists; no model; names or shapes differ; an unknown parameter; values that are not finite;
        ``max_bytes`` too small (it says what would do). Nothing is left behind.

    Example
    -------
    >>> import tempfile
    >>> from downriver.merge import Ties, open_store
    >>> base, a, b = {"w": torch.zeros(3)}, {"w": torch.tensor([2.0, 1.0, 0.1])}, {"w": torch.tensor([-1.0, 3, 0])}
    >>> report = merge([a, b], base, Ties(density=0.4), Path(tempfile.mkdtemp()) / "merged")
    >>> open_store(report.out).read("w", 0, 3)
    tensor([2., 2., 0.])
    """
    started = time.perf_counter()
    out, method, dtype, out_dtype = Path(out), resolve(method), as_dtype(dtype), as_dtype(out_dtype)
    ground, tokenizer = base, None
    if vocabulary is not None:
        from downriver.merge.vocabulary import align_vocabularies  # transformers is loaded only for it

        aligned = align_vocabularies(models, base, vocabulary)
        models, tokenizer = aligned.models, aligned.tokenizer
        if tokenizer is not None:
            ground = aligned.base
            if isinstance(base, Mapping | nn.Module):
                raise InputError("a union of vocabularies needs a base on disk: save it first")
    job = plan(
        models,
        ground,
        method,
        max_bytes=max_bytes,
        dtype=dtype,
        out_dtype=out_dtype,
        include=include,
        exclude=exclude,
        params=params,
        on_mismatch=on_mismatch,
        device=device,
        workers=workers,
    )
    with atomic_folder(out, overwrite) as part:
        if hasattr(base, "with_head"):  # a Model in memory saves itself, head and settings too
            state = empty_state(job)
            tallies = job.execute(lambda entry, start, values: put(state, entry.name, start, values))
            model: Any = filled(base, job, state)
            model.to(dtype=out_dtype or dtype).save(part, overwrite=True)
            written = sum(t.numel() * t.element_size() for t in state.values())
        else:
            ties_itself = card.copy_files(base, job.base, part, out_dtype or dtype, tokenizer)
            tallies, written = _stream(job, part, shard_size, once=ties_itself)
        report = report_of(job, tallies, out, written, time.perf_counter() - started)
        (part / "README.md").write_text(card.text(report, job.base), encoding="utf-8")
    return report


def _stream(job: Plan, folder: Path, shard_size: int, once: bool) -> tuple[dict[str, Tally], int]:
    """Merge into shards; tied names are written ``once`` where the loader ties them itself."""
    names = {e.name: (e.name,) if once else (e.name, *e.aliases) for e in job.entries}
    slots = [slot_of(name, e.shape, e.dtype) for e in job.entries for name in names[e.name]]
    with ShardWriter(folder, slots, shard_size) as writer:

        def write(entry: Entry, start: int, values: Tensor) -> None:
            for name in names[entry.name]:
                writer.write(name, start, values)

        return job.execute(write), sum(slot.size for slot in slots)


def slot_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
    """Where a tensor of a store goes: the head that ``Model.save`` keeps beside the weights has a file of its own."""
    if name.startswith(HEAD_PREFIX):
        return Slot(name, shape, dtype, HEAD_FILE, name.removeprefix(HEAD_PREFIX))
    return Slot(name, shape, dtype)


def combine(
    models: Sequence[Source],
    base: T,
    method: Method,
    *,
    include: Pattern = None,
    exclude: Pattern = None,
    params: Overrides | None = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """Merge in memory and give back what ``base`` is: a module (a copy with the merged weights), or a state dict.

    A base on disk is merged into the folder ``out`` instead, whose path is given back.
    """
    if isinstance(base, str | os.PathLike | tuple):
        if out is None:
            raise InputError(
                f"the base {base} is on disk: name the folder to be written with out=, or load the models first"
            )
        settings: Any = {"include": include, "exclude": exclude, "params": params, "on_mismatch": on_mismatch}
        merge(models, base, method, out, **settings)
        return str(out) if isinstance(base, str) else Path(out)  # type: ignore[return-value]
    if out is not None:
        raise InputError("out= is for a base on disk: save what is given back instead")
    given: Any = base
    job = plan(
        models, given, method, include=include, exclude=exclude, params=params, on_mismatch=on_mismatch, device="cpu"
    )
    state = empty_state(job)
    job.execute(lambda entry, start, values: put(state, entry.name, start, values))
    return filled(base, job, state)


def empty_state(job: Plan, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Memory for the result, tied names sharing it."""
    state: dict[str, Tensor] = {}
    for e in job.entries:
        state[e.name] = torch.empty(e.shape, dtype=dtype or e.dtype)
        state |= dict.fromkeys(e.aliases, state[e.name])
    return {name: state[name] for name in job.base.names()}


def put(state: Mapping[str, Tensor], name: str, start: int, values: Tensor) -> None:
    """Write one block of a result."""
    state[name].view(-1)[start : start + values.numel()] = values.to(state[name].dtype)


def filled(base: T, job: Plan, state: Mapping[str, Tensor]) -> T:
    """The merged state in the shape of the base: a copy of a module, or a state dict on the base's devices."""
    if isinstance(base, Mapping):
        return {name: state[name].to(base[name].device) for name in base}  # type: ignore[return-value]
    assert isinstance(base, nn.Module)
    module = without_adapters(base)
    if module is base:
        processor = getattr(base, "processor", None)  # a tokenizer is shared rather than copied
        module = copy.deepcopy(base, {id(processor): processor} if processor is not None else {})
    with torch.no_grad():
        for name, value in module_state(module).items():
            value.copy_(state[name])
    return module  # type: ignore[return-value]


def resolve(method: str | Method) -> Method:
    """A method by its name, with its defaults."""
    from downriver import merge as room

    known: dict[str, type[Method]] = {kind.name: kind for kind in (getattr(room, name) for name in room.CLASSES)}
    if isinstance(method, Method):
        return method
    if method not in known:
        raise unknown("merge method", method, known)
    return known[method]()


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating type by its name in torch."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise unknown("dtype", dtype, ("float32", "bfloat16", "float16", "float64"))
        return found
    return dtype
