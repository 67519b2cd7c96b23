"""A merge thought through before anything is written: what happens to every tensor, in blocks that fit a memory bound.

Reach for ``plan`` to look at models side by side without merging them (``inspect`` and ``search`` do). All models are
read in blocks that lie within a tensor, so the largest tensor does not matter: with N models a block of b elements
takes about ``2 · b · ((N + 1) · (bytes read + 8) + 16 · N + 64)`` bytes a thread, and ``max_bytes`` decides b.
"""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from downriver.core import compiled
from downriver.core.errors import InputError, unknown
from downriver.merge.method import Known, Method, Tally, square, task_vector
from downriver.merge.report import total as total_of
from downriver.merge.stores import Source, Store, equal, open_store
from downriver.nn.select import THREE_PASSES, TWO_PASSES, RadixSelect, hold_pages

MAX_BYTES = 2**30
"""Working memory of a merge when none is declared: 1 GiB."""

Mismatch = Literal["error", "skip", "slice-embed"]
Vocabulary = Literal["base", "union"]
Overrides = Mapping[str, Mapping[str, Any]] | Callable[[str, float], Mapping[str, Any]]
Pattern = str | Sequence[str] | None
T = TypeVar("T")

LARGEST, LARGEST_ON_GPU, SMALLEST = 1 << 18, 1 << 22, 1 << 10  # elements of a block: 1 MiB of float32 fits the cache
VOCABULARY = re.compile(r"(embed|wte|shared|lm_head|predictions|output_projection)")
_NO_TOKENS = re.compile(r"(position|token_type|wpe\b|patch)")


@dataclass(frozen=True)
class Entry:
    """One tensor of the result. Its first ``merged`` elements are merged, the others are the base's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the result
    merged: int
    method: Method  # with this tensor's own parameters
    sources: tuple[str, ...]  # its name in each model
    aliases: tuple[str, ...] = ()  # names tied to it

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of a row: those that share the first index; a vector is one row."""
        return max(1, math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape))


@dataclass
class Plan:
    """A merge that is thought through but not begun: everything that can be wrong with its inputs has been said."""

    base: Store
    models: Sequence[Store]
    method: Method
    entries: Sequence[Entry]
    dtype: torch.dtype | None
    device: torch.device
    block: int
    workers: int
    digits: Sequence[int]
    max_bytes: int
    bytes_read: int = field(default=0, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    def known(self) -> dict[str, Known]:
        """Cuts, and norms and sums where the method needs them, of every tensor to be merged."""
        merged = [e for e in self.entries if e.merged]
        cuts = self._cuts(merged)
        known = {e.name: Known(cuts[e.name], tensor=e.name, row=e.row) for e in merged}
        if self.method.needs_norms:
            squares = np.zeros(len(self.models))
            for part in self.over(lambda e, base, models: _squares(e, base, models, known[e.name]), merged):
                squares += part
            known = {n: dataclasses.replace(k, norms=tuple(np.sqrt(squares).tolist())) for n, k in known.items()}
        if self.method.needs_sums:

            def measure(entry: Entry, start: int, stop: int) -> tuple[str, np.ndarray]:
                base, models = self._read(entry, start, stop)
                here = dataclasses.replace(known[entry.name], start=start)
                return entry.name, entry.method.measure(base, models, here)

            sums: dict[str, np.ndarray] = {}
            for name, found in self._threads(measure, self._blocks(merged)):
                sums[name] = sums[name] + found if name in sums else found
            known = {name: dataclasses.replace(k, sums=sums[name]) for name, k in known.items()}
        return known

    def execute(self, write: Callable[[Entry, int, Tensor], None], task_vector: bool = False) -> dict[str, Tally]:
        """Merge block by block and give each block to ``write(entry, start, values)``, from several threads, in any
        order.

        ``task_vector`` gives τm in float32 instead of the merged values, and no tensors that are only copied.
        """
        known = self.known()
        tallies = self._merge(self.entries, known, write, task_vector)
        total = total_of(tallies.values(), len(self.models))
        if majority := self.method.majority(total):  # only now known: entries whose votes cancel are merged once more
            again = [e for e in self.entries if e.name in tallies and tallies[e.name].cancelled]
            known = {e.name: dataclasses.replace(known[e.name], majority=majority) for e in again}
            tallies |= self._merge(again, known, write, task_vector)
        if not task_vector:
            copies = [(e, a, b) for e in self.entries for a, b in self._pieces(e.merged, e.size)]
            collections.deque(
                self._threads(lambda e, a, b: write(e, a, self._raw(self.base, e.name, a, b)), copies), maxlen=0
            )
        return tallies

    def _merge(
        self,
        entries: Sequence[Entry],
        known: Mapping[str, Known],
        write: Callable[[Entry, int, Tensor], None],
        task_vector: bool,
    ) -> dict[str, Tally]:
        def block(entry: Entry, start: int, stop: int) -> tuple[str, Tally]:
            base, models = self._read(entry, start, stop)
            here = dataclasses.replace(known[entry.name], start=start)
            delta, tally = entry.method.delta(base, models, here)
            if not np.isfinite(tally.squares).all():
                self._refuse_non_finite(entry, base, models)
            if entry.method.lam != 1 and not task_vector:
                delta = delta.mul_(entry.method.lam)
            tally.merged = square(delta)
            write(entry, start, delta.float() if task_vector else delta.add_(base))
            return entry.name, tally

        tallies: dict[str, Tally] = {}
        for name, tally in self._threads(block, self._blocks(entries)):
            tallies[name] = tallies[name] + tally if name in tallies else tally
        return tallies

    def over(
        self, fn: Callable[[Entry, Tensor, list[Tensor]], T], entries: Iterable[Entry] | None = None
    ) -> Iterator[T]:
        """``fn(entry, base block, model blocks)`` over the merged part of the entries, in order, in threads."""
        blocks = self._blocks(self.entries if entries is None else entries)
        return self._threads(lambda e, start, stop: fn(e, *self._read(e, start, stop)), blocks)

    def _cuts(self, entries: Sequence[Entry]) -> dict[str, tuple[float, ...]]:
        """For each tensor the magnitude that each model's entries must reach."""
        groups: dict[Hashable, list[Entry]] = {}
        for e in entries:
            groups.setdefault(e.method.group(e.name), []).append(e)
        cuts: dict[str, tuple[float, ...]] = {}
        for group in groups.values():
            size = sum(e.merged for e in group)
            ranks = group[0].method.ranks(len(self.models), size)
            selects = {
                i: RadixSelect(k, self.digits)
                for i, k in enumerate(ranks)
                if callable(k) or (k is not None and k <= size)
            }
            for _ in self.digits if selects else ():
                self._narrow(group, selects)
            found = [0.0 if k is None else selects[i].value if i in selects else math.inf for i, k in enumerate(ranks)]
            cuts |= {e.name: tuple(found) for e in group}
        return cuts

    def _narrow(self, group: Sequence[Entry], selects: dict[int, RadixSelect]) -> None:
        """One pass of every selection over a group; those whose rank is none of the values' are taken out."""

        def count(entry: Entry, base: Tensor, models: list[Tensor]) -> dict[int, Tensor]:
            vectors = entry.method.ranked(base, models)
            return {i: s.counts(vectors[i].float()) for i, s in selects.items()}

        totals: dict[int, Tensor] = {}
        for counts in self.over(count, group):
            for i, c in counts.items():
                totals[i] = totals[i].add_(c) if i in totals else c
        for i, select in list(selects.items()):
            if select.fits(int(totals[i].sum())):
                select.narrow(totals[i])
            else:
                del selects[i]

    def _pieces(self, start: int, stop: int, row: int = 1) -> Iterator[tuple[int, int]]:
        block = max(1, self.block // row) * row
        return ((a, min(stop, a + block)) for a in range(start, stop, block))

    def _blocks(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, int, int]]:
        return ((e, a, b) for e in entries for a, b in self._pieces(0, e.merged, e.row if e.method.whole_rows else 1))

    def _threads(self, fn: Callable[..., T], items: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Results in order; at most one item more than there are threads is under way."""
        hold_pages()
        if self.workers == 1:
            yield from itertools.starmap(fn, items)
            return
        threads = torch.get_num_threads()
        try:  # one block a thread: torch's own threads would only get in the way
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                under_way: collections.deque[Any] = collections.deque()
                for item in items:
                    under_way.append(pool.submit(fn, *item))
                    if len(under_way) > self.workers:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
        finally:
            torch.set_num_threads(threads)

    def _raw(self, store: Store, name: str, start: int, stop: int) -> Tensor:
        values = store.read(name, start, stop)
        with self._lock:
            self.bytes_read += values.numel() * values.element_size()
        return values

    def _read(self, entry: Entry, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        """The base's and the models' elements, on the device, in the type that the method calculates in."""
        stores = [(self.base, entry.name), *zip(self.models, entry.sources, strict=True)]
        read = [self._raw(store, name, start, stop).to(self.device, self.dtype) for store, name in stores]
        if entry.method.own_dtype:
            common = functools.reduce(torch.promote_types, (x.dtype for x in read))
            read = [x.to(common) for x in read]
        else:
            read = [x if x.dtype == torch.float64 else x.float() for x in read]
        return read[0], read[1:]

    def _refuse_non_finite(self, entry: Entry, base: Tensor, models: Sequence[Tensor]) -> None:
        for store, name, x in zip(
            [self.base, *self.models], [entry.name, *entry.sources], [base, *models], strict=True
        ):
            if not torch.isfinite(x).all():
                raise InputError(
                    f"{store.label}, tensor {name!r} holds values that are not finite: it cannot be merged"
                )


def plan(
    models: Sequence[Source],
    base: Source,
    method: Method,
    *,
    max_bytes: int = MAX_BYTES,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    include: Pattern = None,
    exclude: Pattern = None,
    params: Overrides | None = None,
    on_mismatch: Mismatch = "error",
    device: str | torch.device | None = None,
    workers: int | None = None,
) -> Plan:
    """Open everything, compare names, shapes and types, and decide what happens to every tensor; see ``merge``."""
    if isinstance(models, str | os.PathLike | Mapping | nn.Module):
        raise InputError("models is a single model: a list of models is expected")
    if len(models) == 0:
        raise InputError("no models to merge: at least one is expected")
    if on_mismatch not in get_args(Mismatch):
        raise unknown("on_mismatch", on_mismatch, get_args(Mismatch))
    method.check(len(models))
    opened = [open_store(m) for m in models]
    ground = next((o for o, m in zip(opened, models, strict=True) if m is base), None) or open_store(base)
    entries = _entries(ground, opened, method, include, exclude, params, on_mismatch, out_dtype or dtype)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    block, threads, digits = _fit(max_bytes, ground, opened, entries, where, workers)
    return Plan(ground, opened, method, entries, dtype, where, block, threads, digits, max_bytes)


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep in its stack of layers each tensor lies, 0 for the first layer (and outside any) to 1 for the last.

    >>> depths(["emb", "h.0.w", "h.1.w", "h.2.w"])
    {'emb': 0.0, 'h.0.w': 0.0, 'h.1.w': 0.5, 'h.2.w': 1.0}
    """
    found = {name: re.match(r"(.*?)(?:^|\.)(\d+)\.", name) for name in names}
    last: dict[str, int] = {}
    for m in found.values():
        if m:
            last[m[1]] = max(last.get(m[1], 0), int(m[2]))
    return {name: (int(m[2]) / last[m[1]] if last[m[1]] else 1.0) if m else 0.0 for name, m in found.items()}


def spread(anchors: Sequence[Any], depth: float) -> Any:
    """The value at a depth from 0 to 1 of numbers (or lists of numbers) spread evenly over it.

    >>> spread([0.0, 1.0, 3.0], 0.75)
    2.0
    """
    at = depth * (len(anchors) - 1)
    low = min(int(at), len(anchors) - 1)
    high = min(low + 1, len(anchors) - 1)
    mixed = (1 - (at - low)) * np.asarray(anchors[low], float) + (at - low) * np.asarray(anchors[high], float)
    return mixed.tolist()


def rows_of_tokens(store: Store) -> int:
    """Rows of the embedding of tokens, those beyond the tokenizer's tokens too."""
    shapes = [store.shape(name) for name in store.names() if of_tokens(name)]
    found = [shape[0] for shape in shapes if len(shape) == 2]
    if not found:
        raise InputError(f"{store.label} has no embedding of tokens")
    return max(found)


def of_tokens(name: str) -> bool:
    """Whether a tensor's name is that of an embedding of tokens or of an output layer."""
    return bool(VOCABULARY.search(name)) and not _NO_TOKENS.search(name)


def _entries(
    base: Store,
    models: Sequence[Store],
    method: Method,
    include: Pattern,
    exclude: Pattern,
    params: Overrides | None,
    on_mismatch: Mismatch,
    out_dtype: torch.dtype | None,
) -> list[Entry]:
    names = base.names()
    wanted = matching(include, exclude)
    tied = _tied_everywhere(base, models)
    theirs = [set(m.names()) for m in models]
    parameters = _parameters(method, params, [n for n in names if n not in tied], len(models))
    problems: list[list[str]] = [[] for _ in models]
    entries = []
    for name in names:
        if name in tied:
            continue
        aliases = tuple(alias for alias, chief in tied.items() if chief == name)
        shape, dtype = base.shape(name), base.dtype(name)
        merged, sources = 0, [name] * len(models)
        if dtype.is_floating_point and name not in base.buffers and wanted(name):
            merged = math.prod(shape)
            for i, model in enumerate(models):
                source = next((n for n in (name, *aliases) if n in theirs[i]), None)
                common, problem = _compare(name, shape, model, source, on_mismatch)
                merged = min(merged, common)
                sources[i] = source or name
                if problem:
                    problems[i].append(problem)
        result = out_dtype if out_dtype and dtype.is_floating_point else dtype
        entries.append(Entry(name, shape, result, merged, parameters(name), tuple(sources), aliases))
    for i, model in enumerate(models):
        extra = [n for n in model.names() if n not in names and model.tied.get(n) not in names and wanted(n)]
        extra = [n for n in extra if model.dtype(n).is_floating_point and n not in model.buffers]
        problems[i] += [f"has {n!r}, which the base lacks" for n in extra]
    if any(problems) and on_mismatch != "skip":
        each = enumerate(zip(models, problems, strict=True))
        lists = [f"model {i} ({m.label}): {'; '.join(found)}" for i, (m, found) in each if found]
        raise InputError(f"models differ from the base {base.label}: " + ". ".join(lists))
    if not any(e.merged for e in entries):
        raise InputError("no tensor is left to merge: include and exclude (or skipped mismatches) leave none")
    return entries


def _compare(
    name: str, shape: tuple[int, ...], model: Store, source: str | None, on_mismatch: Mismatch
) -> tuple[int, str | None]:
    """How many leading elements of a tensor can be merged, and what is wrong where that is not as it should be."""
    if source is None:
        return 0, f"lacks {name!r}"
    other = model.shape(source)
    if not model.dtype(source).is_floating_point:
        return 0, f"{name!r} is {str(model.dtype(source)).removeprefix('torch.')}, not floating point"
    if other == shape:
        return math.prod(shape), None
    rows_only = len(other) == len(shape) > 0 and other[1:] == shape[1:]
    if on_mismatch == "slice-embed" and rows_only and VOCABULARY.search(name):
        return min(other[0], shape[0]) * math.prod(shape[1:]), None
    return 0, f"{name!r} has shape {other} instead of {shape}"


def _tied_everywhere(base: Store, models: Sequence[Store]) -> dict[str, str]:
    """The base's tied names, but those that a model has with values of their own."""
    tied = dict(base.tied)
    for model in models:
        has = set(model.names())
        for alias, chief in base.tied.items():
            one = model.tied.get(alias, alias) == model.tied.get(chief, chief)
            if {alias, chief} <= has and not one and not equal(model.tensors, alias, model.tensors, chief):
                tied.pop(alias, None)
    return tied


def matching(include: Pattern, exclude: Pattern) -> Callable[[str], bool]:
    """Whether a tensor's name is included and not excluded."""

    def compiled(pattern: Pattern) -> list[re.Pattern[str]]:
        return [_regex(p) for p in ([pattern] if isinstance(pattern, str) else pattern or ())]

    yes, no = compiled(include), compiled(exclude)
    return lambda name: (not yes or any(p.search(name) for p in yes)) and not any(p.search(name) for p in no)


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}") from None


def _parameters(method: Method, params: Overrides | None, names: Sequence[str], models: int) -> Callable[[str], Method]:
    """The method with the parameters of one tensor."""
    if params is None:
        return lambda name: method
    deep = depths(names)
    if callable(params):
        given = params
    else:
        rules = [(_regex(pattern), values) for pattern, values in params.items()]
        for pattern, values in rules:
            if not any(pattern.search(name) for name in names):
                raise InputError(f"params: {pattern.pattern!r} matches no tensor")
            for key in values:
                if key not in method.per_tensor:
                    raise unknown(f"parameter of {method.name} by tensor", key, method.per_tensor)

        def given(name: str, depth: float) -> Mapping[str, Any]:
            values = {k: v for pattern, own in rules if pattern.search(name) for k, v in own.items()}
            return {
                k: spread(v, depth) if isinstance(v, Sequence) and not isinstance(v, str) else v
                for k, v in values.items()
            }

    @functools.cache
    def with_values(values: tuple[tuple[str, Any], ...]) -> Method:
        changed = dataclasses.replace(method, **dict(values))
        changed.check(models)
        return changed

    def at(name: str) -> Method:
        values = given(name, deep[name])
        return with_values(tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(values.items())))

    return at


def _fit(
    max_bytes: int,
    base: Store,
    models: Sequence[Store],
    entries: Sequence[Entry],
    device: torch.device,
    workers: int | None,
) -> tuple[int, int, Sequence[int]]:
    """Elements of a block, threads, and the digits of a selection that fit into so many bytes."""
    n = len(models)
    merged = [e for e in entries if e.merged]
    widest = max(
        s.dtype(name).itemsize for e in merged for s, name in zip((base, *models), (e.name, *e.sources), strict=True)
    )
    per_element = 2 * ((n + 1) * (widest + 8) + 16 * n + 64)  # twice what is alive: the heap is never packed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    least = max([SMALLEST, *(e.row for e in merged if e.method.whole_rows)])
    rooms = [(max_bytes, LARGEST if device.type == "cpu" else LARGEST_ON_GPU)]
    if device.type == "cpu" and importlib.util.find_spec("numba"):  # else blocks too small for compiled loops
        rooms = [(max_bytes - compiled.MEMORY, LARGEST)] if max_bytes >= 2 * compiled.MEMORY else []
        rooms.append((max_bytes, compiled.WORTHWHILE - 1))
    selections = len(merged[0].method.ranks(n, 1))
    smallest = 0
    for room, most in rooms:
        largest = max(least, most)
        for threads in range(min(cores, 4) if workers is None else max(1, workers), 0, -1):
            for digits in (TWO_PASSES, THREE_PASSES):
                counters = (threads + 2) * selections * 8 * (1 << max(digits))
                smallest = counters + threads * least * per_element
                block = (room - counters) // (threads * per_element)
                if block >= max(least, largest // 8 if threads > 1 or digits is TWO_PASSES else 0):
                    block = min(block, largest)
                    return block, min(threads, -(-sum(e.merged for e in merged) // block)), digits
    raise InputError(f"max_bytes of {max_bytes} is too small for {n} models: at least {smallest} bytes are needed")


def _squares(entry: Entry, base: Tensor, models: Sequence[Tensor], known: Known) -> np.ndarray:
    taus = (entry.method.trimmed(task_vector(m, base), cut) for m, cut in zip(models, known.cuts, strict=True))
    return np.array([square(t, torch.float64) for t in taus])
