"""One seed of a study: its arms, the work they share, and what each of them cost.

Every arm and every piece of shared work has random streams of its own, derived from the names of study, arm and seed,
so a result does not depend on what ran before it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from downriver.core.cost import metered
from downriver.core.errors import InputError
from downriver.core.measurement import Cost, Direction, Measurement
from downriver.core.seeds import seeded

if TYPE_CHECKING:
    from downriver.study.study import Study

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Arm:
    """One way of doing the task: a name, and a function that does it and gives back what it measured.

    ``run`` returns ``Measurement`` objects, or a mapping from metric to number; ``directions`` says for the metrics of
    a mapping which way is better (``{"loss": "lower"}``; ``higher`` where nothing is said). ``parameters`` is anything
    the result depends on that the source of the study function does not show; it becomes part of the question.

    >>> Arm("constant", lambda: {"accuracy": 0.5}).name
    'constant'
    """

    name: str
    run: Callable[[], Iterable[Measurement] | Mapping[str, float]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    directions: Mapping[str, Direction] = field(default_factory=dict)


@dataclass
class _Frame:
    """What the arm or shared work that is running has used: shared costs by name, and wall time spent making them."""

    used: dict[Hashable, Cost] = field(default_factory=dict)
    away: float = 0.0


@dataclass(frozen=True)
class _Outcome:
    function: Callable[..., Any]
    value: Any
    error: Exception | None
    used: dict[Hashable, Cost]


_block: contextvars.ContextVar["Block | None"] = contextvars.ContextVar("block", default=None)
_frame: contextvars.ContextVar[_Frame | None] = contextvars.ContextVar("frame", default=None)


def shared(function: Callable[P, R]) -> Callable[P, R]:
    """Do a piece of work once a seed, on first use, for all arms that need it; each of them is charged its whole cost.

    Decorate a function inside the body of a study and call it from the arms. Its positional arguments, if it takes any,
    must be hashable: each choice of them is computed once. What it returns is handed to every arm as it is, so an arm
    must not change it. An error in it fails every arm that calls it. Outside a running study it is a plain call.

    >>> from downriver.study import Arm, study
    >>> @study("doubling", seeds=1)
    ... def doubling(seed, budget, scale):
    ...     @shared
    ...     def data():
    ...         return [1, 2, 3]
    ...     yield Arm("sum", lambda: {"value": sum(data())})
    ...     yield Arm("largest", lambda: {"value": max(data())})
    >>> [arm.name for arm in doubling.arms(seed=0)]
    ['sum', 'largest']
    """

    @functools.wraps(function)
    def once(*arguments: P.args, **keywords: P.kwargs) -> R:
        block = _block.get()
        return block.once(function, arguments, keywords) if block else function(*arguments, **keywords)

    return once


class Block:
    """One seed of a study while it runs; ``arms`` yields its arms and ``measure`` runs one of them."""

    def __init__(self, study: "Study", seed: int) -> None:
        self.study, self.seed = study, seed
        self.memo: dict[Hashable, _Outcome] = {}

    def arms(self) -> Generator[Arm, None, None]:
        """The arms as the study's function yields them, each handed out before the function goes on."""
        token = _block.set(self)
        try:
            with seeded(self.study.name, "body", self.seed):
                for arm in self.study.function(self.seed, self.study.budget, self.study.scale):
                    if not isinstance(arm, Arm):
                        raise InputError(f"study {self.study.name!r} yields {arm!r}: an Arm is expected")
                    yield arm
        finally:
            _block.reset(token)

    def measure(self, arm: Arm) -> list[Measurement]:
        """Run one arm and give back its measurements, completed with study, arm, seed and cost.

        A measurement that states what was spent on it (examples, tokens, FLOPs or seconds, as a point on the way
        through a training does) keeps its own cost.
        """
        with self._working() as frame, seeded(self.study.name, arm.name, self.seed), metered() as meter:
            found = arm.run()
            if isinstance(found, Mapping):
                found = [
                    Measurement(metric, value, direction=arm.directions.get(metric, "higher"))
                    for metric, value in found.items()
                ]
            rows = list(found)
        own = dataclasses.replace(meter.cost, seconds=max(0.0, meter.cost.seconds - frame.away))
        cost = sum(frame.used.values(), own)
        wrong = next((row for row in rows if not isinstance(row, Measurement)), None)
        if wrong is not None or not rows:
            raise InputError(
                f"arm {arm.name!r} gave back {'nothing' if wrong is None else repr(wrong)}:"
                " Measurements or a mapping from metric to number are expected"
            )
        return [
            dataclasses.replace(
                row,
                study=self.study.name,
                arm=arm.name,
                seed=self.seed,
                cost=row.cost if _spent(row.cost) else row.cost + cost,
            )
            for row in rows
        ]

    def once(self, function: Callable[..., R], arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> R:
        """The value of a shared function, computed now if nobody has needed it yet."""
        around = _frame.get()
        name = function.__name__
        if around is None:
            raise InputError(f"shared work {name!r} is called in the body of the study: call it from an arm's run")
        key = (name, arguments, tuple(sorted(keywords.items())))
        if key not in self.memo:
            self.memo[key] = self._compute(key, function, arguments, keywords, around)
        outcome = self.memo[key]
        if outcome.function is not function:
            raise InputError(f"two pieces of shared work are named {name!r}: give each a name of its own")
        around.used |= outcome.used
        if outcome.error:
            raise outcome.error
        return outcome.value

    def _compute(
        self,
        key: Hashable,
        function: Callable[..., R],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        around: _Frame,
    ) -> _Outcome:
        started = time.perf_counter()
        value, error = None, None
        names = (self.study.name, self.seed, "shared", function.__name__, arguments, keywords)
        with self._working() as frame, seeded(*names), metered(outer=False) as meter:
            try:
                value = function(*arguments, **keywords)
            except Exception as failure:
                error = failure
        own = dataclasses.replace(meter.cost, seconds=max(0.0, meter.cost.seconds - frame.away))
        around.away += time.perf_counter() - started
        return _Outcome(function, value, error, {key: own} | frame.used)

    @contextlib.contextmanager
    def _working(self) -> Iterator[_Frame]:
        """Make this the running block, with a fresh frame for one arm or one piece of shared work."""
        frame = _Frame()
        block_token, frame_token = _block.set(self), _frame.set(frame)
        try:
            yield frame
        finally:
            _frame.reset(frame_token)
            _block.reset(block_token)


def _spent(cost: Cost) -> bool:
    return bool(cost.examples or cost.tokens or cost.flops or cost.seconds)
