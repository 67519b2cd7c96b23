"""How often each of many tasks is drawn: in proportion to its examples up to a cap, within fixed shares a benchmark.

Reach for it to tune on a collection of instruction tasks of very different sizes: equal weight an example lets one
benchmark rule, equal weight a task wastes the large ones. Iyer et al. 2022, «OPT-IML», arXiv:2212.12017; p ∝ min(n, η)
is the formula of its public code (and T5's), n^α its alternative. Departure: draws are those of ``MixtureSampler``,
which keeps the shares to within one visit and shows each example of a task once before any comes again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.data.mix.sampler import MixtureSampler
from downriver.tasks.generalization import InstructionTask

OPT_IML: Mapping[str, float] = MappingProxyType(
    {
        "crossfit": 0.04,
        "exmix": 0.02,
        "flan": 0.20,
        "niv2": 0.25,
        "promptsource": 0.45,
        "t5": 0.02,
        "unifiedskg": 0.02,
    }
)
"""The paper's shares of its benchmarks."""


@dataclass(frozen=True)
class TaskMixture:
    """Tasks with a probability each; ``row(visit)`` draws from them, a function of the visit's number alone.

    Args:
        tasks: the tasks to train on; rows are numbered through all of them in this order.
        cap: η of p ∝ min(n, η); 4096 is the paper's, any smaller one did as well there. ``None``: in proportion to n.
        alpha: p ∝ n^α, instead of a cap.
        proportions: the share of each benchmark, summing to 1 (``OPT_IML`` are the paper's); within one, tasks are as
            above. Default: as above over all of them.
        extra: shares of the whole that go to benchmarks which stand beside the others (5 % pre-training text and 1 %
            reasoning in the paper); ``proportions`` divide the rest.
        seed: of the draws.

    Raises ``InputError`` for proportions that do not sum to 1, or name a benchmark that no task has or leave one out,
    and for a cap or exponent out of range.

    >>> from downriver.tasks import InstructionTask, Template
    >>> def task(name, benchmark, n):
    ...     return InstructionTask(name, "c", benchmark, [{"x": str(i)} for i in range(n)], (Template("{x}", "{x}"),))
    >>> tasks = task("a", "flan", 100), task("b", "flan", 10), task("c", "t5", 5), task("d", "text", 50)
    >>> mixture = TaskMixture(tasks, cap=30, proportions={"flan": 0.75, "t5": 0.25}, extra={"text": 0.2})
    >>> {name: round(p, 6) for name, p in mixture.probabilities.items()}
    {'a': 0.45, 'b': 0.15, 'c': 0.2, 'd': 0.2}
    """

    tasks: Sequence[InstructionTask]
    cap: float | None = 4096
    alpha: float | None = None
    proportions: Mapping[str, float] | None = None
    extra: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise InputError("a mixture of no tasks: one at least is expected")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise InputError(f"two tasks are named {next(n for n in names if names.count(n) > 1)!r}")
        if self.cap is not None and self.alpha is not None:
            raise InputError(f"cap {self.cap} and alpha {self.alpha}: one of them is expected, the other None")
        if self.cap is not None and not self.cap >= 1:
            raise InputError(f"cap is {self.cap}: at least one example is expected")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"alpha is {self.alpha}: a number of at least 0 is expected")
        present = {task.benchmark for task in self.tasks}
        for what, shares in (("proportions", self.proportions), ("extra", self.extra)):
            for name, share in (shares or {}).items():
                if name not in present:
                    raise unknown(f"benchmark in {what}", name, present)
                if not (math.isfinite(share) and share >= 0):
                    raise InputError(f"{what} of {name!r} is {share}: a share of at least 0 is expected")
        beside = sum((self.extra or {}).values())
        rest = present - set(self.extra or ())
        if beside > 1 + 1e-9 or (rest and beside >= 1) or (not rest and abs(beside - 1) > 1e-6):
            raise InputError(
                f"extra sums to {beside:g}: less than 1, as the other benchmarks need the rest, is expected"
            )
        if self.proportions is not None:
            if both := sorted(set(self.proportions) & set(self.extra or ())):
                raise InputError(f"benchmark {both[0]!r} stands in proportions and in extra")
            if missing := sorted(rest - set(self.proportions)):
                raise InputError(f"proportions say nothing of benchmark {missing[0]!r} (0 leaves it out)")
            total = sum(self.proportions.values())
            if abs(total - 1) > 1e-6:
                raise InputError(f"proportions sum to {total:g}: shares that sum to 1 are expected")

    @cached_property
    def probabilities(self) -> dict[str, float]:
        """The probability of each task, by name; they sum to 1."""
        n = np.array([len(task) for task in self.tasks], dtype=np.float64)
        if self.alpha is not None:
            weight = n**self.alpha
        else:
            weight = np.minimum(n, math.inf if self.cap is None else self.cap)  # min(n_i, η)
        of = np.array([task.benchmark for task in self.tasks])
        extra, proportions = self.extra or {}, self.proportions
        share = np.zeros(len(n))
        left = 1.0 - sum(extra.values())
        groups = [(of == name, part) for name, part in extra.items()]
        if proportions is None:
            groups.append((~np.isin(of, list(extra)), left))
        else:
            groups += [(of == name, left * part) for name, part in proportions.items()]
        for members, part in groups:
            if members.any():
                share[members] = part * weight[members] / weight[members].sum()
        return dict(zip((task.name for task in self.tasks), (share / share.sum()).tolist(), strict=True))

    @cached_property
    def sampler(self) -> MixtureSampler:
        """What draws: its ``row``, ``counts`` and ``epochs``."""
        return MixtureSampler({task.name: len(task) for task in self.tasks}, self.probabilities, seed=self.seed)

    def row(self, visit: int) -> int:
        """The row of a visit, counted through all tasks: an ``order`` for ``fine_tune``."""
        return self.sampler.row(visit)

    def example(self, visit: int) -> tuple[InstructionTask, int]:
        """The task of a visit, and the number of the example in it."""
        row = self.row(visit)
        which = int(np.searchsorted(self.sampler.offsets, row, side="right")) - 1
        return self.tasks[which], row - int(self.sampler.offsets[which])
