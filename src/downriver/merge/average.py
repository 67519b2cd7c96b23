"""Plain and weighted averaging of models: the first thing to try, and the line that every other merge has to beat.

Reach for it when models were fine-tuned from one base on the same or close tasks. Wortsman et al., "Model soups:
averaging weights of multiple fine-tuned models improves accuracy without increasing inference time" (2022).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.engine import combine
from downriver.merge.method import Known, Method, Tally, square, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.stores import Source

T = TypeVar("T")


def average(
    models: Sequence[Source],
    base: T,
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θm = Σ wt·θt / Σ wt.

    Parameters
    ----------
    models
        State dicts, modules, ``Model`` objects, checkpoint folders or hub ids with the same tensors; at least one.
    base
        Gives what is not averaged (integers, buffers, excluded tensors) and the form of the result. It takes no part in
        the mean unless it is also among the models.
    weights
        One number a model; equal by default.
    normalize
        Divide by the sum of weights (the default); otherwise Σ wt·θt.
    include, exclude, on_mismatch
        As in ``merge``.
    out
        The folder to be written when ``base`` is a folder or hub id.

    Returns
    -------
    What ``base`` is: a state dict, a module (a copy), or the path ``out``. Sums are made in float64.

    Raises
    ------
    InputError
        No model; other tensors or shapes than the base's; weights that do not fit the models or sum to zero.

    Example
    -------
    >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
    >>> average([a, b], a)
    {'w': tensor([2., 4.])}
    >>> average([a, b], a, weights=[3, 1])
    {'w': tensor([1.5000, 3.0000])}
    """
    method = Average(weights=weights, normalize=normalize)
    return combine(models, base, method, include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)


@dataclass(frozen=True, kw_only=True)
class Average(Method):
    """Averaging for ``merge``; parameters as in ``average``, and ``lam`` to go only a part of the way from the base."""

    normalize: bool = True

    name: ClassVar[str] = "average"

    def check(self, models: int) -> None:
        super().check(models)
        if self.normalize and sum(self.weight(i) for i in range(models)) == 0:
            raise InputError(f"{self.name}: weights {self.weights} sum to zero")

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        total = torch.zeros_like(base, dtype=torch.float64)
        for i, model in enumerate(models):
            total.add_(model, alpha=self.weight(i))
        if self.normalize:
            total.div_(sum(self.weight(i) for i in range(len(models))))
        squares = [square(task_vector(model, base)) for model in models]
        return total.sub_(base), Tally.plain(squares)
