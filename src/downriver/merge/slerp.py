"""Slerp: go from one model to another along the arc between them instead of the straight line.

Reach for it to mix exactly two models; the norm of the weights is kept on the way. Shoemake, "Animating rotation with
quaternion curves" (1985), for each tensor as one long vector. Tensors that are (nearly) parallel are mixed along the
line. Angles are measured in float64 over the whole tensor.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge.engine import combine
from downriver.merge.method import Known, Method, Tally, square, task_vector
from downriver.merge.plan import Mismatch, Pattern
from downriver.merge.stores import Source

T = TypeVar("T")
PARALLEL, SHORT = 0.9995, 1e-8  # cosine from which two tensors count as parallel; a norm that counts as 0


def slerp(
    models: Sequence[Source],
    base: T,
    *,
    t: float = 0.5,
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
    out: str | os.PathLike[str] | None = None,
) -> T:
    """θ = sin((1−t)Ω)/sin Ω · θ1 + sin(tΩ)/sin Ω · θ2, with Ω the angle between the two, tensor by tensor.

    Parameters
    ----------
    models
        Two models: ``t = 0`` is the first, ``t = 1`` the second. With one, the other end is ``base``.
    base
        Gives what is not merged, and the form of the result.
    t
        How far to go, 0 to 1; half-way by default.
    include, exclude, on_mismatch, out
        As in ``merge``.

    Raises
    ------
    InputError
        Other than two models; ``t`` that is not finite.

    Example
    -------
    >>> import torch
    >>> a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    >>> slerp([a, b], a)  # still of length 1
    {'w': tensor([0.7071, 0.7071])}
    """
    pair = [base, *models] if len(models) == 1 else models
    return combine(pair, base, Slerp(t=t), include=include, exclude=exclude, on_mismatch=on_mismatch, out=out)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Slerp(Method):
    """Slerp for ``merge``, of two models; ``t`` as in ``slerp``."""

    t: float = 0.5

    name: ClassVar[str] = "slerp"
    per_tensor: ClassVar[tuple[str, ...]] = ("t",)

    @property
    def needs_sums(self) -> bool:
        return True

    def check(self, models: int) -> None:
        super().check(models)
        if models != 2:
            raise InputError(f"slerp: {models} models, two are expected")
        if self.weights is not None or self.lam != 1:
            raise InputError("slerp takes neither weights nor lam: t says how far to go")
        if not math.isfinite(self.t):
            raise InputError(f"slerp: t is {self.t}, a finite number is expected")

    def measure(self, base: Tensor, models: Sequence[Tensor], known: Known) -> np.ndarray:
        """θ1·θ1, θ2·θ2, θ1·θ2."""
        a, b = (model.double().view(-1) for model in models)
        return np.array([float(a @ a), float(b @ b), float(a @ b)])

    def delta(self, base: Tensor, models: Sequence[Tensor], known: Known) -> tuple[Tensor, Tally]:
        first, second = self._coefficients(known)
        mixed = models[0].double().mul_(first).add_(models[1], alpha=second)
        squares = [square(task_vector(model, base)) for model in models]
        return mixed.sub_(base), Tally.plain(squares)

    def _coefficients(self, known: Known) -> tuple[float, float]:
        assert known.sums is not None
        norms = [norm if norm > SHORT else 1.0 for norm in np.sqrt(known.sums[:2])]
        cosine = float(np.clip(known.sums[2] / (norms[0] * norms[1]), -1, 1))
        if abs(cosine) > PARALLEL:
            return 1 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)
