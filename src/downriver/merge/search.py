"""Search λ, how far to go from the base along a merged task vector, by a score.

Reach for it whenever there are validation data: a merged task vector is usually too short, and λ makes up for it. Grids
are those of Yadav et al., "Resolving Interference When Merging Models" (2023). τm is computed once and used for every
λ; it is kept in float32, so a result may differ by its last digit from that of merging with this λ at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from downriver.core.errors import InputError, unknown
from downriver.merge.engine import empty_state, filled, resolve
from downriver.merge.method import Method
from downriver.merge.plan import Entry, Mismatch, Pattern, Plan, plan
from downriver.merge.stores import Source

T = TypeVar("T", bound=Mapping[str, Tensor] | nn.Module)
Direction = Literal["higher", "lower"]

_SHORT = tuple(i / 10 for i in range(1, 11))
GRIDS: Mapping[str, tuple[float, ...]] = {
    "ties": tuple(i / 10 for i in range(8, 26)),
    "task_arithmetic": _SHORT,
    "average": _SHORT,
    "breadcrumbs": _SHORT,
    "dare": _SHORT,
    "della": tuple(i / 10 for i in range(8, 26)),
    "sce": tuple(i / 10 for i in range(8, 26)),
}
"""λ of each method: 0.8 to 2.5 for TIES and 0.1 to 1.0 for task arithmetic (the paper's), in steps of 0.1; averaging
has no λ in the paper, and is searched from near the base to the mean itself. Those that add up task vectors take the
grid of task arithmetic, those that average what agrees that of TIES; others need a grid."""


@dataclass(frozen=True)
class LambdaSearch(Generic[T]):
    """What ``search_lambda`` found.

    ``best``: the λ with the best score, the first of equal ones; ``scores``: the score of every λ; ``merged``: the
    merged model at ``best``, of the base's type.
    """

    best: float
    scores: Mapping[float, float]
    merged: T


def search_lambda(
    models: Sequence[Source],
    base: T,
    method: str | Method,
    evaluate: Callable[[T], float],
    grid: Sequence[float] | None = None,
    *,
    direction: Direction = "higher",
    include: Pattern = None,
    exclude: Pattern = None,
    on_mismatch: Mismatch = "error",
) -> LambdaSearch[T]:
    """Evaluate θ(λ) = θ0 + λ·τm for every λ of a grid, and give the best.

    Parameters
    ----------
    models
        Models fine-tuned from ``base``, of any kind that ``merge`` reads; those on disk are streamed.
    base
        θ0, a state dict or module in memory: every candidate is one like it.
    method
        ``Ties(...)``, ``TaskArithmetic(...)``, ``Average(...)``, or a name; it gives τm, and its own ``lam`` is not
        used.
    evaluate
        The score of a candidate, which it gets as a copy of its own. Use validation data, not the test split.
    grid
        Values of λ; by default those of the method in ``GRIDS``.
    direction
        Whether a ``"higher"`` or a ``"lower"`` score is better.
    include, exclude, on_mismatch
        As in ``merge``.

    Raises
    ------
    InputError
        A base on disk; an empty grid or one that holds a value that is not finite; a score that is not finite; what
        ``merge`` refuses.

    Example
    -------
    >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
    >>> found = search_lambda([tuned], base, "task_arithmetic", lambda m: -abs(float(m["w"].sum()) - 1.5))
    >>> found.best, found.merged
    (0.5, {'w': tensor([0.5000, 1.0000])})
    """
    if not isinstance(base, Mapping | nn.Module):
        raise InputError(f"the base {base} is not in memory: load it first, a state dict or module is expected")
    if direction not in get_args(Direction):
        raise unknown("direction", direction, get_args(Direction))
    method = resolve(method)
    grid = GRIDS.get(method.name, ()) if grid is None else grid
    if len(grid) == 0:
        raise InputError(f"the grid of λ for {method.name} is empty: at least one value is expected")
    if not all(math.isfinite(lam) for lam in grid):
        raise InputError(f"the grid of λ is {list(grid)}: finite numbers are expected")
    settings: Any = {"include": include, "exclude": exclude, "on_mismatch": on_mismatch}
    job = plan(models, base, method, device="cpu", **settings)
    tau = {e.name: torch.empty(e.merged) for e in job.entries if e.merged}

    def keep(entry: Entry, start: int, values: Tensor) -> None:
        tau[entry.name][start : start + values.numel()] = values

    job.execute(keep, task_vector=True)
    scores = {}
    for lam in map(float, grid):
        scores[lam] = float(evaluate(_moved(base, job, tau, lam)))
        if not math.isfinite(scores[lam]):
            raise InputError(f"the score at λ = {lam} is {scores[lam]}: a finite number is expected")
    best = (max if direction == "higher" else min)(scores, key=lambda lam: scores[lam])
    return LambdaSearch(best, scores, _moved(base, job, tau, best))


def _moved(base: T, job: Plan, tau: Mapping[str, Tensor], lam: float) -> T:
    """θ0 + λ·τm, summed in float64; what is not merged is the base's."""
    state = empty_state(job)
    for e in job.entries:
        values, place = job.base.read(e.name, 0, e.size).cpu(), state[e.name].view(-1)
        place.copy_(values)
        if e.merged:
            place[: e.merged] = torch.add(values[: e.merged].double(), tau[e.name], alpha=lam)
    return filled(base, job, state)
