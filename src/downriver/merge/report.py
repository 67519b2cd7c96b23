"""What a merge did, tensor by tensor and in total."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from downriver.merge.method import Tally

if TYPE_CHECKING:
    from downriver.merge.plan import Plan


@dataclass(frozen=True)
class TensorReport:
    """What merging did to one tensor. Rates are shares of entries; ``None`` where the method elects no sign."""

    name: str
    elements: int
    kept: tuple[float, ...] | None
    """Share of entries that each model keeps after trimming."""
    conflict: float | None
    """Among entries that some model keeps, the share where a kept value is against the elected sign."""
    agreement: float | None
    """Among kept values, the share that has the elected sign."""
    norms: tuple[float, ...]
    """‖θt − θ0‖ of each model."""
    merged_norm: float
    """‖λ·τm‖: how far the result is from the base."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, tensor by tensor and in total."""

    out: Path
    method: str
    parameters: Mapping[str, Any]
    tensors: tuple[TensorReport, ...]
    total: TensorReport
    copied: tuple[str, ...]
    """Tensors taken from the base as they are, and those of which only a part is merged."""
    bytes_read: int
    bytes_written: int
    seconds: float
    max_bytes: int
    inputs: tuple[Mapping[str, str], ...]
    """Label and fingerprint of the base and of every model."""

    def rows(self) -> list[dict[str, Any]]:
        """One flat dictionary a tensor, for a table."""
        return [dataclasses.asdict(t) for t in self.tensors]

    def __str__(self) -> str:
        t = self.total
        parts = [f"{self.method}: {len(self.tensors)} tensors merged, {len(self.copied)} taken from the base"]
        if t.kept is not None and t.conflict is not None:
            kept = ", ".join(f"{k:.1%}" for k in t.kept)
            parts.append(f"kept {kept}; sign conflicts {t.conflict:.1%} of kept entries")
        parts.append(f"{self.bytes_written / 1e6:,.0f} MB in {self.seconds:.1f} s")
        return "; ".join(parts)


def report_of(job: "Plan", tallies: Mapping[str, Tally], out: Path, written: int, seconds: float) -> MergeReport:
    """The report of a merge whose blocks are counted."""
    entries = {e.name: e for e in job.entries}
    tensors = tuple(_tensor_report(name, entries[name].merged, tally) for name, tally in tallies.items())
    whole = _tensor_report("total", sum(t.elements for t in tensors), total(tallies.values(), len(job.models)))
    parameters = {f.name: getattr(job.method, f.name) for f in dataclasses.fields(job.method)}
    copied = tuple(e.name for e in job.entries if e.merged < e.size)
    inputs = tuple({"model": s.label, "fingerprint": s.fingerprint()} for s in (job.base, *job.models))
    return MergeReport(
        out,
        job.method.name,
        parameters,
        tensors,
        whole,
        copied,
        job.bytes_read,
        written,
        seconds,
        job.max_bytes,
        inputs,
    )


def total(tallies: Iterable[Tally], models: int) -> Tally:
    """The counts of all tensors together."""
    return sum(tallies, start=Tally(np.zeros(models), np.zeros(models)))


def _tensor_report(name: str, elements: int, tally: Tally) -> TensorReport:
    elects = tally.touched > 0 or tally.kept.any()
    kept = tuple((tally.kept / max(1, elements)).tolist()) if elects else None
    conflict = float(tally.conflicts / tally.touched) if tally.touched else None
    agreement = float(tally.agreeing / tally.kept.sum()) if tally.touched else None
    norms = tuple(np.sqrt(tally.squares).tolist())
    return TensorReport(name, elements, kept, conflict, agreement, norms, math.sqrt(tally.merged))
