"""How much models are at odds with each other, told before they are merged.

Reach for it to decide whether to merge at all, which model to leave out, and how hard to trim. The measures are those
of Yadav et al., "Resolving Interference When Merging Models" (2023): how often trimmed task vectors disagree in sign;
and of Ilharco et al., "Editing models with task arithmetic" (2023): cosines between task vectors. Models are streamed
as ``merge`` streams them, so none is ever held whole.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.method import task_vector
from downriver.merge.plan import MAX_BYTES, Entry, Mismatch, Pattern, plan
from downriver.merge.stores import Source
from downriver.merge.ties import Scope, Ties


@dataclass(frozen=True, eq=False)
class TensorConflicts:
    """The task vectors of one tensor (or of all). Arrays have one row, and matrices one column too, a model."""

    name: str
    elements: int
    kept: np.ndarray
    """Share of entries that trimming keeps of each model."""
    touched: float
    """Share of entries that at least one model keeps."""
    overlap: float
    """Among those, the share that two or more models keep."""
    conflict: float
    """Among those, the share where kept values have both signs: what merging has to resolve."""
    norms: np.ndarray
    """‖τt‖ of the whole task vectors."""
    trimmed_norms: np.ndarray
    """‖τ̂t‖ after trimming."""
    cosines: np.ndarray
    """Between whole task vectors; nan where one of the two is zero."""
    trimmed_cosines: np.ndarray
    """Between trimmed ones."""
    disagreement: np.ndarray
    """Among entries that both models of a pair keep, the share with opposite signs; nan where they share none."""


@dataclass(frozen=True)
class ConflictReport:
    """What ``conflicts`` found, tensor by tensor and in total."""

    models: tuple[str, ...]
    density: float | Sequence[float]
    scope: Scope
    tensors: tuple[TensorConflicts, ...]
    total: TensorConflicts

    def table(self) -> list[dict[str, Any]]:
        """One row of plain numbers and words a tensor, the last one for all together; cosines are means over pairs."""
        return [_row(t) for t in (*self.tensors, self.total)]

    @property
    def text(self) -> str:
        """The findings in plain words."""
        t = self.total
        lines = [
            f"{_count(len(self.models), 'model')}, {_count(len(self.tensors), 'tensor')}, {t.elements:,} entries; "
            f"trimmed to density {self.density} over {'the whole model' if self.scope == 'model' else 'each tensor'}."
        ]
        for label, kept, norm, trimmed in zip(self.models, t.kept, t.norms, t.trimmed_norms, strict=True):
            share = f"the {kept:.1%} of entries kept hold {trimmed / norm:.1%} of it" if norm else "equal to the base"
            lines.append(f"{label}: distance {norm:.4g} from the base; {share}.")
        if len(self.models) > 1:
            lines.append(
                f"{t.touched:.1%} of entries are kept by some model; of these {t.overlap:.1%} by several, "
                f"and {t.conflict:.1%} with opposite signs."
            )
        for i, j in itertools.combinations(range(len(self.models)), 2):
            if not (t.norms[i] and t.norms[j]):
                continue  # a model equal to the base points nowhere
            share = t.disagreement[i, j]
            both = "no entry is kept by both" if math.isnan(share) else f"{share:.1%} of those that both keep disagree"
            lines.append(
                f"{self.models[i]} and {self.models[j]}: cosine {t.cosines[i, j]:.3f}, trimmed "
                f"{t.trimmed_cosines[i, j]:.3f}; {both}."
            )
        worst = sorted((x for x in self.tensors if x.conflict), key=lambda x: -x.conflict)[:3]
        if worst and len(self.tensors) > 1:
            lines.append("Most conflicts: " + ", ".join(f"{x.name} ({x.conflict:.1%})" for x in worst) + ".")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text


def conflicts(
    models: Sequence[Source],
    base: Source,
    *,
    density: float | Sequence[float] = 0.2,
    scope: Scope = "model",
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    max_bytes: int = MAX_BYTES,
    device: str | torch.device | None = None,
    workers: int | None = None,
) -> ConflictReport:
    """Measure how the task vectors τt = θt − θ0 of models interfere, without merging them.

    Parameters
    ----------
    models, base
        Models and the one they were fine-tuned from, as in ``merge``.
    density, scope
        The trimming after which signs are compared, as in ``ties``: by default 0.2 over the whole model, the paper's.
    include, exclude, on_mismatch, max_bytes, device, workers
        As in ``merge``.

    Raises
    ------
    InputError
        As in ``merge``: no model; names or shapes that differ; a parameter out of range; values that are not finite.

    Example
    -------
    >>> base = {"w": torch.zeros(5)}
    >>> a = {"w": torch.tensor([3.0, 0.1, 1.0, 0.0, -0.5])}
    >>> b = {"w": torch.tensor([-1.0, 0.2, 2.0, 0.0, 4.0])}
    >>> found = conflicts([a, b], base, density=0.4).total
    >>> found.kept, found.touched, found.overlap, round(found.conflict, 3)  # 3 against -1 and -0.5 against 4, of three
    (array([0.6, 0.6]), 0.6, 1.0, 0.667)
    """
    method = Ties(density=density, scope=scope)
    job = plan(
        models,
        base,
        method,
        max_bytes=max_bytes,
        include=include,
        exclude=exclude,
        on_mismatch=on_mismatch,
        device=device,
        workers=workers,
    )
    known = job.known()

    def block(entry: Entry, ground: Tensor, values: list[Tensor]) -> tuple[Entry, np.ndarray, np.ndarray]:
        taus = torch.stack([task_vector(value, ground) for value in values])
        products = [_products(taus)]
        for label, square in zip((m.label for m in job.models), products[0].diagonal(), strict=True):
            if not math.isfinite(square):
                raise InputError(f"{label}, tensor {entry.name!r}: its difference from the base is not finite")
        for tau, cut in zip(taus, known[entry.name].cuts, strict=True):
            tau.copy_(method.trimmed(tau, cut))
        products.append(_products(taus))
        signs = taus.sign_()
        both = (signs > 0).any(0) & (signs < 0).any(0)
        products.append(_products(signs))  # agreeing minus opposed entries of each pair
        present = signs.abs_().sum(0)
        products.append(_products(signs))  # entries that both keep
        return entry, np.stack(products), np.array([float(x.sum()) for x in (present > 0, present > 1, both)])

    pairs: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for entry, products, found in job.over(block):
        pairs[entry.name] = pairs.get(entry.name, 0) + products
        counts[entry.name] = counts.get(entry.name, 0) + found
        sizes[entry.name] = entry.merged
    tensors = tuple(_measures(name, size, pairs[name], counts[name]) for name, size in sizes.items())
    total = _measures(
        "total", sum(sizes.values()), np.sum([*pairs.values()], axis=0), np.sum([*counts.values()], axis=0)
    )
    return ConflictReport(tuple(m.label for m in job.models), density, scope, tensors, total)


def _products(vectors: Tensor) -> np.ndarray:
    """All inner products of a few long vectors, in float64."""
    wide = vectors.double()
    return (wide @ wide.T).cpu().numpy()


def _measures(name: str, size: int, pairs: np.ndarray, counts: np.ndarray) -> TensorConflicts:
    full, trimmed, signs, shared = pairs
    touched, overlap, conflict = counts
    norms, trimmed_norms = np.sqrt(full.diagonal()), np.sqrt(trimmed.diagonal())
    with np.errstate(invalid="ignore", divide="ignore"):
        return TensorConflicts(
            name=name,
            elements=size,
            kept=shared.diagonal() / size,
            touched=float(touched / size),
            overlap=float(overlap / max(1, touched)),
            conflict=float(conflict / max(1, touched)),
            norms=norms,
            trimmed_norms=trimmed_norms,
            cosines=np.clip(full / np.outer(norms, norms), -1, 1),
            trimmed_cosines=np.clip(trimmed / np.outer(trimmed_norms, trimmed_norms), -1, 1),
            disagreement=(shared - signs) / 2 / shared,
        )


def _row(t: TensorConflicts) -> dict[str, Any]:
    return {
        "tensor": t.name,
        "elements": t.elements,
        **{f"kept_{i}": float(x) for i, x in enumerate(t.kept)},
        **{f"norm_{i}": float(x) for i, x in enumerate(t.norms)},
        "touched": t.touched,
        "overlap": t.overlap,
        "conflict": t.conflict,
        "cosine": _mean_of_pairs(t.cosines),
        "trimmed_cosine": _mean_of_pairs(t.trimmed_cosines),
    }


def _mean_of_pairs(matrix: np.ndarray) -> float:
    values = matrix[np.triu_indices(len(matrix), 1)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
