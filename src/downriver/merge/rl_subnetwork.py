"""What an update changed: how sparse it is, how full its rank, and which entries are its subnetwork.

Reach for it after reinforcement learning or any fine-tuning, to see whether a sparse patch would do, and to compare the
subnetworks of several runs. Mukherjee et al., "Reinforcement Learning Finetunes Small Subnetworks in Large Language
Models" (2025), who count an entry as unchanged up to 10⁻⁵. That number is confounded: a 16-bit checkpoint loses changes
below half a unit in the last place, so exact zeros and changes in units of the last place stand beside it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from downriver.core.errors import InputError, unknown
from downriver.merge.average import Average
from downriver.merge.plan import MAX_BYTES, Entry, Mismatch, Pattern, Plan, plan
from downriver.merge.stores import Source, Store
from downriver.nn.sparse_patch import SparseMask

Rank = Literal["exact", "stable"] | None
TOLERANCES = (1e-5, 1e-4)
LARGEST_MATRIX = 1 << 26  # elements; ranks of larger matrices are left out
OCTAVES = 8  # of changes in units of the last place, to either side of one


@dataclass(frozen=True)
class DeltaReport:
    """What changed between two checkpoints.

    ``tensors``, a row a tensor: ``tensor``, ``layer`` (−1 outside the stack), ``module`` (its last name but one),
    ``elements``, ``unchanged`` (share of entries equal in the stored type), ``within_<tolerance>``, ``below_ulp``
    (share that moved by less than a bfloat16's last unit, or not at all), ``norm`` (‖Δ‖), ``rank`` (over the smaller
    side; null where it was not asked for).

    ``ulps``, a row an octave: how many ``entries`` moved by ``at_least`` so many of a bfloat16's last units and
    ``below`` so many, and their ``share`` of all entries. The first and the last row hold what lies beyond; an entry
    that was 0 is in the last.

    ``notes`` say what to know before reading shares: types that differ, rows that only one model has, tensors left out.
    """

    before: str
    after: str
    tensors: pl.DataFrame
    ulps: pl.DataFrame
    notes: tuple[str, ...] = ()

    def share(self, column: str = "within_1e-05") -> float:
        """A share over all entries: update sparsity, as the paper reports it."""
        if column not in self.tensors.columns:
            raise unknown("column of the report", column, self.tensors.columns)
        weights = self.tensors["elements"].to_numpy()
        return float((self.tensors[column].to_numpy() * weights).sum() / weights.sum())

    @property
    def rank(self) -> float | None:
        """Mean rank of the updates over their smaller side."""
        mean = self.tensors["rank"].mean()
        return None if mean is None else float(mean)  # type: ignore[arg-type]

    def by(self, column: Literal["layer", "module"]) -> pl.DataFrame:
        """Changed entries and shares by layer or by kind of module."""
        shares = [c for c in self.tensors.columns if c == "unchanged" or c.startswith(("within_", "below_"))]
        weighted = [(pl.col(c) * pl.col("elements")).sum() / pl.col("elements").sum() for c in shares]
        return self.tensors.group_by(column, maintain_order=True).agg(pl.col("elements").sum(), *weighted).sort(column)


def delta_stats(
    before: Source,
    after: Source,
    *,
    tolerances: Sequence[float] = TOLERANCES,
    rank: Rank = None,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    max_bytes: int = MAX_BYTES,
) -> DeltaReport:
    """Measure the update from one checkpoint to another, block by block.

    Parameters
    ----------
    before, after
        Models of any kind that ``merge`` reads, adapters too. Tied tensors count once, buffers not at all.
    tolerances
        |Δ| up to which an entry counts as unchanged; 10⁻⁵ is the paper's.
    rank
        Of every matrix but norms: ``exact``, ``torch.linalg.matrix_rank`` of Δ in float32 as in the paper, or
        ``stable``, ‖Δ‖²_F / ‖Δ‖²_2; both over the smaller side. Matrices are held one at a time; those beyond 67 M
        entries are left out.
    include, exclude, on_mismatch, max_bytes
        As in ``merge``.

    Raises ``InputError`` for names and shapes that differ, values that are not finite, and a negative tolerance.

    >>> report = delta_stats({"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 1e-6, 0.5, 2.0])})
    >>> report.share("unchanged"), report.share()
    (0.25, 0.5)
    """
    if rank not in (None, "exact", "stable"):
        raise unknown("rank", rank, ("exact", "stable"))
    if any(not tolerance >= 0 for tolerance in tolerances):
        raise InputError(f"tolerances are {tuple(tolerances)}: numbers of at least 0 are expected")
    job = plan(
        [after], before, Average(), include=include, exclude=exclude, on_mismatch=on_mismatch, max_bytes=max_bytes,
        device="cpu",
    )  # fmt: skip

    def count(entry: Entry, base: Tensor, models: list[Tensor]) -> tuple[str, np.ndarray]:
        delta = (models[0] - base).abs()
        squares = float(delta.double().square().sum())
        if not math.isfinite(squares):
            raise InputError(f"tensor {entry.name!r} holds values that are not finite")
        within = [float((delta <= tolerance).sum()) for tolerance in tolerances]
        changed = delta.nonzero()[:, 0]
        moved, start = delta[changed], base[changed]
        # |Δ| is in [2^(k−1), 2^k) last units: those of a bfloat16 in [2^(e−1), 2^e) are 2^(e−8)
        k = torch.frexp(moved)[1] - torch.frexp(start)[1] + 8
        k = k.masked_fill(start == 0, OCTAVES).clamp(-OCTAVES, OCTAVES) + OCTAVES
        octaves = torch.bincount(k, minlength=2 * OCTAVES + 1).double().numpy()
        return entry.name, np.array([float(len(delta) - len(changed)), *within, squares, *octaves])

    sums: dict[str, np.ndarray] = {}
    for name, found in job.over(count):
        sums[name] = sums.get(name, 0) + found
    rows, notes, total = [], _notes(job, rank), np.zeros(2 * OCTAVES + 1)
    for entry in job.entries:
        if not entry.merged:
            continue
        unchanged, *found = sums[entry.name].tolist()
        within, squares, octaves = found[: len(tolerances)], found[len(tolerances)], found[len(tolerances) + 1 :]
        total += np.array(octaves)
        below = unchanged + sum(octaves[: OCTAVES + 1])
        layer = re.search(r"(?:^|\.)(\d+)\.", entry.name)
        row: dict[str, Any] = {
            "tensor": entry.name,
            "layer": int(layer[1]) if layer else -1,
            "module": entry.name.split(".")[-2] if "." in entry.name else entry.name,
            "elements": entry.merged,
            "unchanged": unchanged / entry.merged,
        }
        row |= {f"within_{t:g}": w / entry.merged for t, w in zip(tolerances, within, strict=True)}
        row |= {"below_ulp": below / entry.merged, "norm": math.sqrt(squares)}
        matrix = _ranked(entry) and entry.merged == entry.size <= LARGEST_MATRIX
        row["rank"] = _rank(job, entry, rank) if rank and matrix else None
        rows.append(row)
    frame = pl.DataFrame(rows, schema_overrides={"rank": pl.Float64})
    k = np.arange(-OCTAVES, OCTAVES + 1)
    at_least, below = 2.0 ** (k - 1), 2.0**k
    at_least[0], below[-1] = 0.0, np.inf
    share = total / frame["elements"].to_numpy().sum()
    ulps = pl.DataFrame({"at_least": at_least, "below": below, "entries": total.astype(np.int64), "share": share})
    return DeltaReport(job.base.label, job.models[0].label, frame, ulps, notes)


def subnetwork(before: Source, after: Source, *, tol: float = 0.0, max_bytes: int = MAX_BYTES) -> SparseMask:
    """The entries that an update changed by more than ``tol`` (0: that are not equal), over all of the model's.

    Compare those of two runs by ``overlap``, which also says what chance gives; train one alone by
    ``adapt.train_subnetwork``; ship it by ``SparsePatch.between``.

    >>> mask = subnetwork({"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 1.0, 2.0])})
    >>> mask.indices["w"].tolist(), round(mask.share, 2)
    ([1, 2], 0.67)
    """
    if not tol >= 0:
        raise InputError(f"tol is {tol}: a number of at least 0 is expected")
    job = plan([after], before, Average(), max_bytes=max_bytes, device="cpu", workers=1)
    found: dict[str, list[Tensor]] = {}
    done: dict[str, int] = {}

    def mark(entry: Entry, base: Tensor, models: list[Tensor]) -> tuple[str, Tensor, int]:
        return entry.name, ((models[0] - base).abs() > tol).nonzero()[:, 0], len(base)

    for name, places, size in job.over(mark):
        found.setdefault(name, []).append(places + done.get(name, 0))
        done[name] = done.get(name, 0) + size
    indices = {name: torch.cat(parts) for name, parts in found.items()}
    return SparseMask({n: places for n, places in indices.items() if len(places)}, sum(done.values()))


def _ranked(entry: Entry) -> bool:
    return len(entry.shape) == 2 and "norm" not in entry.name


def _notes(job: Plan, rank: Rank) -> tuple[str, ...]:
    """What makes two checkpoints not quite comparable."""
    after = job.models[0]
    there, said = set(after.names()), []
    types: dict[tuple[str, str], int] = {}
    for entry in job.entries:
        other = after.shape(entry.sources[0]) if entry.sources[0] in there else ()
        if not entry.merged:
            if other != entry.shape:
                said.append(f"{entry.name!r} is left out")
            continue
        if other != entry.shape:
            rows = entry.merged // entry.row, entry.shape[0], other[0]
            said.append(f"{entry.name!r}: the {rows[0]} rows that both have are compared, of {rows[1]} and {rows[2]}")
        if rank and _ranked(entry) and entry.size > LARGEST_MATRIX:
            said.append(f"{entry.name!r} is too large for its rank")
        pair = tuple(str(s.dtype(n)).removeprefix("torch.") for s, n in _stores(job, entry))
        types[pair[0], pair[1]] = types.get((pair[0], pair[1]), 0) + 1
    for (first, second), count in types.items():
        if first != second:
            said.append(
                f"{count} tensors are {first} before and {second} after: rounding alone makes them differ, and they "
                "are compared in the wider type"
            )
    return tuple(said)


def _stores(job: Plan, entry: Entry) -> list[tuple[Store, str]]:
    """Where to read a tensor before and after."""
    return [(job.base, entry.name), (job.models[0], entry.sources[0])]


def _rank(job: Plan, entry: Entry, kind: Rank) -> float:
    """The rank of one matrix' update over its smaller side."""
    pieces = [store.read(name, 0, entry.size) for store, name in _stores(job, entry)]
    delta = (pieces[1].float() - pieces[0].float()).view(entry.shape)
    side = min(entry.shape)
    if not delta.any():
        return 0.0
    if kind == "exact":
        return float(torch.linalg.matrix_rank(delta)) / side
    return float(delta.double().square().sum() / torch.linalg.matrix_norm(delta, 2).double() ** 2) / side
