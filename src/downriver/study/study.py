"""Studies: declare arms and claims once, run them over seeds, come back any time for the cells that are missing."""

import ast
import functools
import inspect
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

import polars as pl
import pyarrow as pa

from downriver.core.budget import Budget
from downriver.core.errors import InputError
from downriver.core.io import fingerprint
from downriver.study import claims as judge
from downriver.study.block import Arm, Block
from downriver.study.claims import Claim, Verdict
from downriver.study.ledger import SCHEMA, Failure, Ledger

Body = Callable[[int, Any, str], Iterable[Arm]]  # seed, budget (None without one), scale


@dataclass(frozen=True)
class Cell:
    """One arm under one seed, and the key of its file: the fingerprint of everything that was asked."""

    arm: str
    seed: int
    key: str


@dataclass(frozen=True)
class Study:
    """A function of ``(seed, budget, scale)`` that yields arms, and the claims that its measurements must bear out.

    Made by the decorator ``study``. ``budget`` is the same for every arm (None where the arms need none), ``scale`` a
    word that the function may use to choose sizes. ``parameters`` is anything else the answer depends on, such as the
    fingerprint of the data. ``version`` is raised by hand when code that the function calls has changed its meaning; a
    change in the function's own source is noticed by itself.
    """

    name: str
    function: Body
    claims: tuple[Claim, ...] = ()
    seeds: int = 5
    budget: Budget | None = None
    scale: str = "small"
    title: str = ""
    version: str = "1"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise InputError(f"study name {self.name!r}: letters, digits, '_', '-', '+' and '.' are expected")
        _positive("seeds", self.seeds)

    @cached_property
    def code(self) -> str:
        """The fingerprint of the function's source (decorators aside) and the declared version."""
        return fingerprint(_source(self.function), self.version)

    def arms(self, seed: int = 0) -> list[Arm]:
        """The arms of one seed; nothing is run."""
        return list(Block(self, seed).arms())

    def key(self, arm: Arm, seed: int) -> str:
        """The fingerprint of everything that one cell's answer depends on."""
        budget = str(self.budget) if self.budget is None else [self.budget.amount, self.budget.unit]
        try:
            return fingerprint(
                self.name, self.code, arm.name, seed, arm.parameters, self.parameters, budget, self.scale
            )
        except TypeError as error:
            raise InputError(f"study {self.name!r}, arm {arm.name!r}: {error}") from error

    def cells(self, seeds: int | None = None) -> list[Cell]:
        """Every cell of the study, seed by seed in the order of its arms; nothing is run."""
        found = []
        for seed in range(_positive("seeds", self.seeds if seeds is None else seeds)):
            names = set()
            for arm in self.arms(seed):
                if arm.name in names:
                    raise InputError(f"study {self.name!r} yields two arms named {arm.name!r}")
                names.add(arm.name)
                found.append(Cell(arm.name, seed, self.key(arm, seed)))
        return found

    def run(
        self,
        folder: str | Path = "downriver-runs",
        executor: str = "processes",
        workers: int | None = None,
        fresh: bool = False,
        seeds: int | None = None,
        progress: bool = True,
    ) -> "Result":
        """Run the cells that the ledger in ``folder`` lacks and give back what all of them measured.

        Args:
            folder: a local folder or an fsspec URL; it may hold many studies, and several processes may share it.
            executor: ``serial`` (this process), ``processes`` (a pool on this machine) or ``ray`` (a Ray cluster).
            workers: how many seeds run at a time; by default as many as there are cores, or as the cluster has.
            fresh: forget the finished cells of this study and run them again.
            seeds: fewer or more seeds than the study declares.
            progress: show a live table, or plain lines where there is no terminal, on standard error.

        A cell that fails is recorded with its traceback and stops no other; it is tried again by the next run.
        Raises ``InputError`` for a claim on an arm that does not exist, before anything is run.
        """
        from downriver.study import executors
        from downriver.study.progress import Progress

        ledger = Ledger(folder)
        run_on = executors.choose(executor, ledger, workers)
        started = time.time()
        result = self._result(ledger, seeds)
        if fresh:
            ledger.forget(self.name, (cell.key for cell in result.cells))
        there = ledger.finished(self.name)
        done = {c for c in result.cells if c.key in there and ledger.read(self.name, c.key) is not None}
        missing = [c for c in result.cells if c not in done]
        with Progress(self.name, result.cells, done, shown=progress) as shown:
            if missing:
                run_on(executors.Job(self, ledger, started, missing), workers, shown)
        return result

    def result(self, folder: str | Path = "downriver-runs", seeds: int | None = None) -> "Result":
        """What the ledger in ``folder`` holds of this study; nothing is run."""
        return self._result(Ledger(folder), seeds)

    def _result(self, ledger: Ledger, seeds: int | None) -> "Result":
        result = Result(self, ledger, tuple(self.cells(seeds)))
        judge.check(self.claims, result.arms)
        return result


@dataclass(frozen=True)
class Result:
    """What a study has measured: tidy rows, verdicts on its claims, and the cells that failed."""

    study: Study
    ledger: Ledger
    cells: tuple[Cell, ...]

    @property
    def arms(self) -> list[str]:
        """The names of the arms, in the order in which the study yields them."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return sorted({cell.seed for cell in self.cells})

    def rows(self) -> pl.DataFrame:
        """One row a measurement of this study's cells (and of no older version of them), in the order of the cells."""
        return self._rows

    def verdicts(self) -> list[Verdict]:
        """The verdicts on the study's claims, in their order."""
        return judge.verdicts(self.study.claims, self.rows(), self.arms, self.seeds)

    @cached_property
    def failures(self) -> list[Failure]:
        """The cells that failed when they were last tried."""
        recorded = self.ledger.failures(self.study.name)
        return [recorded[cell.key] for cell in self.cells if cell.key in recorded]

    @cached_property
    def _rows(self) -> pl.DataFrame:
        found = [rows for cell in self.cells if (rows := self.ledger.read(self.study.name, cell.key)) is not None]
        empty = pa.table({name: pa.array([], kind) for name, kind in SCHEMA.items()})
        return pl.DataFrame(pa.concat_tables([empty, *found], promote_options="default"))


def study(
    name: str,
    *,
    claims: Sequence[Claim] = (),
    seeds: int = 5,
    budget: str | Budget | None = None,
    scale: str = "small",
    title: str = "",
    version: str = "1",
    parameters: Mapping[str, Any] | None = None,
) -> Callable[[Body], Study]:
    """Declare a study: decorate a function of ``(seed, budget, scale)`` that yields ``Arm`` objects.

    The function's body runs often and must be cheap: what costs time goes into the arms, or into ``shared`` work that
    several arms need.

    >>> import tempfile
    >>> from downriver.study import Arm, better, study
    >>> @study("coin", claims=[better("fair", than="zero", on="heads")], seeds=4)
    ... def coin(seed, budget, scale):
    ...     yield Arm("zero", lambda: {"heads": 0.0})
    ...     yield Arm("fair", lambda: {"heads": 0.5 + seed / 100})
    >>> result = coin.run(tempfile.mkdtemp(), executor="serial", progress=False)
    >>> result.rows().height, result.verdicts()[0].verdict
    (8, 'holds')
    """

    def declare(function: Body) -> Study:
        return Study(
            name=name,
            function=function,
            claims=tuple(claims),
            seeds=seeds,
            budget=None if budget is None else Budget.parse(budget),
            scale=scale,
            title=title or name,
            version=version,
            parameters=dict(parameters or {}),
        )

    return declare


def _positive(name: str, value: object) -> int:
    if not (isinstance(value, int) and value >= 1):
        raise InputError(f"{name} is {value!r}: a whole number of at least 1 is expected")
    return value


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    """The function's source without its decorators; its bytecode where there is no source (an interactive shell)."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        node = ast.parse(text).body[0]
    except (OSError, SyntaxError, IndexError):
        return _bytecode(function.__code__)
    return "\n".join(text.splitlines()[node.lineno - 1 :])


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return fingerprint(code.co_code.hex(), code.co_names, constants)
