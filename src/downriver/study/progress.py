"""What a run shows while it runs: one live table of arms, or plain lines where there is no terminal."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from downriver.study.executors import State
    from downriver.study.study import Cell

FINAL = ("done", "failed")


class Progress:
    """Counts the cells of a run by what has become of them; call it with each change, as executors do."""

    def __init__(self, name: str, cells: "Sequence[Cell]", done: "Collection[Cell]", shown: bool = True) -> None:
        self.name, self.total, self.found = name, len(cells), len(done)
        self.states: dict[Cell, str] = dict.fromkeys(cells, "waiting") | dict.fromkeys(done, "done")
        self.counts = {cell.arm: Counter[str]() for cell in cells}
        for cell, state in self.states.items():
            self.counts[cell.arm][state] += 1
        self.finished = self.found
        self.shown = shown
        self.console = Console(stderr=True)
        self.live = Live(self, console=self.console) if shown and self.console.is_terminal else None
        self.started = time.monotonic()
        self.said = self.finished

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.__enter__()
        elif self.shown:
            self._say(f"{self.total} cells, {self.found} of them finished already")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.__exit__(kind, error, trace)

    def __call__(self, cell: "Cell", state: "State", error: str) -> None:
        before = self.states[cell]
        if state == before:
            return
        self.states[cell] = state
        self.counts[cell.arm].update({before: -1, state: 1})
        self.finished += (state in FINAL) - (before in FINAL)
        if not self.shown:
            return
        if state == "failed":
            self._say(f"{cell.arm}, seed {cell.seed}: {error}")
        part = (self.finished - self.said) * 100 >= self.total  # a line a hundredth of the study
        if not self.live and state in FINAL and (part or self.finished == self.total):
            self.said = self.finished
            self._say(f"{self.finished}/{self.total} cells, last {cell.arm} with seed {cell.seed}{self._left()}")

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(self.name)
        for state in ("done", "running", "failed", "waiting"):
            table.add_column(state, justify="right")
        for arm, count in self.counts.items():
            failed = f"[red]{count['failed']}[/]" if count["failed"] else "0"
            table.add_row(arm, str(count["done"]), str(count["running"]), failed, str(count["waiting"]))
        table.caption, table.caption_justify = f"{self.finished}/{self.total} cells{self._left()}", "left"
        return table

    def _say(self, line: str) -> None:
        self.console.print(f"{self.name}: {line}", markup=False, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """The time that is left, if the cells to come take as long as those of this run."""
        done = self.finished - self.found
        if done == 0 or self.finished == self.total:
            return ""
        seconds = (time.monotonic() - self.started) / done * (self.total - self.finished)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
