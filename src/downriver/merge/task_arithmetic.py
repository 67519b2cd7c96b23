"""Task arithmetic: add up task vectors and go a part of the way along their sum.

Reach for it as the classic rival of TIES when tasks differ; λ should be searched (``search_lambda``). Ilharco et al.,
"Editing models with task arithmetic" (2023).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from downriver.merge.engine import combine
from downriver.merge.method import Known, Method, Tally, square, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.stores import Source

T = TypeVar("T")


def task_arithmetic(
    models: Sequence[Source],
    base: T,
    *,
    lam: float = 0.4,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = θ0 + λ·Σ wt·(θt − θ0).

    Parameters
    ----------
    models, base
        Models and the one they were fine-tuned from, as in ``ties``.
    lam
        λ, 0.4 by default, which the TIES paper takes for it where no validation set is at hand; otherwise 0.1 to 1.0 is
        searched.
    weights
        wt, one number a model; 1 by default. A negative weight removes a task.
    normalize
        Divide the sum by Σ wt (mergekit's option of that name; off by default there and here).
    include, exclude, on_mismatch, out
        As in ``ties``.

    Returns
    -------
    What ``base`` is: a state dict, a module (a copy), or the path ``out``. Sums are made in float64.

    Raises
    ------
    InputError
        No model; other tensors or shapes than the base's; weights that do not fit the models.

    Example
    -------
    >>> base, a, b = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 2.0])}
    >>> task_arithmetic([a, b], base, lam=0.5)
    {'w': tensor([1., 1.])}
    """
    method = TaskArithmetic(lam=lam, weights=weights, normalize=normalize)
    return combine(models, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    """Task arithmetic for ``merge``; parameters as in ``task_arithmetic``."""

    lam: float = 0.4
    normalize: bool = False

    name: ClassVar[str] = "task_arithmetic"

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        weights = [self.weight(i) for i in range(len(models))]
        total = torch.zeros_like(base, dtype=torch.float64)
        for model, weight in zip(models, weights, strict=True):
            total.add_(model, alpha=weight)
        total.sub_(base, alpha=sum(weights))  # Σ wt·θt − (Σ wt)·θ0 = Σ wt·τt
        if self.normalize and abs(sum(weights)) >= 1e-8:
            total.div_(sum(weights))
        squares = [square(task_vector(model, base)) for model in models]
        return total, Tally.plain(squares)
