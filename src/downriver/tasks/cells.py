"""A grid of task-language cells, some trained on and some only tested, and a sampler that treats trained cells alike.

Reach for it when a model learns a task in some languages and should do it in others: the grid keeps what is unseen out
of the training data, and the sampler keeps common cells from drowning rare ones.

Spravil et al. 2025, «Florenz: Scaling Laws for Systematic Generalization in Vision-Language Models», arXiv:2503.09443:
captions in some languages, translations into all, every cell equally often.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from downriver.core.errors import InputError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

Cell = tuple[str, str]


@dataclass(frozen=True)
class CellSplit:
    """Rows to train on, all of seen cells, and test rows by cell: of seen cells and of held ones."""

    train: "Dataset"
    seen: Mapping[Cell, "Dataset"]
    unseen: Mapping[Cell, "Dataset"]


class CellGrid:
    """Which (task, language) cells are trained on (``seen``) and which are tested as unseen (``held``).

    ``held`` is by default every cell that is not seen. Raises ``InputError`` for a cell outside the grid, no seen cell,
    and a held cell that is also seen.

    >>> trained = {("caption", "de"), ("translate", "de"), ("translate", "es")}
    >>> grid = CellGrid(["caption", "translate"], ["de", "es"], trained)
    >>> sorted(grid.held)
    [('caption', 'es')]
    """

    def __init__(
        self, tasks: Sequence[str], languages: Sequence[str], seen: Iterable[Cell], held: Iterable[Cell] | None = None
    ) -> None:
        self.tasks = tuple(tasks)
        self.languages = tuple(languages)
        self.seen = frozenset(self.check(cell) for cell in seen)
        if not self.seen:
            raise InputError("a grid needs at least one seen cell")
        every = {(task, language) for task in self.tasks for language in self.languages}
        self.held = frozenset(every - self.seen if held is None else (self.check(cell) for cell in held))
        if both := self.held & self.seen:
            raise InputError(f"cell {sorted(both)[0]} is to be tested as unseen, but it is trained on")

    def check(self, cell: Cell) -> Cell:
        """The cell itself; ``InputError`` where its task or its language is not in the grid."""
        task, language = cell
        if task not in self.tasks:
            raise unknown("task of the grid", task, self.tasks)
        if language not in self.languages:
            raise unknown("language of the grid", language, self.languages)
        return task, language

    def split(self, data: "Dataset", test: float = 0.1, seed: int = 0, group: str | None = None) -> CellSplit:
        """Part rows with columns ``task`` and ``language`` into training rows and test rows by cell.

        A share ``test`` of each seen cell's rows is kept for its test; of held cells all rows are tested, of cells that
        are neither none is used. With ``group`` (a column such as the image's id) a share of the groups is tested, in
        every cell, and no row of them is trained on: what is tested was then not met under another cell either.
        Raises ``InputError`` where nothing is left to train on.
        """
        if not 0 < test < 1:
            raise InputError(f"test {test}: a share between 0 and 1 is expected")
        cells = cells_of(data, self)
        rng = np.random.default_rng(seed)
        if group is None:
            tested = np.zeros(len(cells), dtype=bool)
            for cell in sorted(self.seen):
                rows = rng.permutation([i for i, c in enumerate(cells) if c == cell])
                tested[rows[: max(1, round(test * len(rows)))].astype(int)] = True
        else:
            if group not in data.column_names:
                raise unknown("column", group, data.column_names)
            names, which = np.unique(np.asarray(data[group]).astype(str), return_inverse=True)
            tested = np.isin(which, rng.permutation(len(names))[: max(1, round(test * len(names)))])
        train = [i for i, c in enumerate(cells) if c in self.seen and not tested[i]]
        if not train:
            raise InputError(f"no row of the {len(cells)} is left to train on")

        def rows_of(cell: Cell, every: bool) -> "Dataset":
            return data.select([i for i, c in enumerate(cells) if c == cell and (every or tested[i])])

        return CellSplit(
            data.select(train),
            {cell: rows_of(cell, False) for cell in sorted(self.seen)},
            {cell: rows_of(cell, group is None) for cell in sorted(self.held)},
        )


class CellBalancedSampler:
    """Row numbers in which every seen cell is equally likely, or likely by its weight; never a row of another cell.

    A sampler for ``torch.utils.data.DataLoader``. Within a cell, rows come in random order, all of them before any
    comes again. Every pass over the sampler goes on with the random stream of ``seed``; ``n`` is how many rows a pass
    has, by default as many as the seen cells hold.

    >>> grid = CellGrid(["caption"], ["de", "es"], {("caption", "de")})
    >>> rows = {"task": ["caption"] * 4, "language": ["de", "es", "de", "es"]}
    >>> sorted(set(CellBalancedSampler(rows, grid, n=8)))
    [0, 2]
    """

    def __init__(
        self,
        data: "Dataset | Mapping[str, Sequence[str]]",
        grid: CellGrid,
        weights: Mapping[Cell, float] | None = None,
        n: int | None = None,
        seed: int = 0,
    ) -> None:
        cells = cells_of(data, grid)
        self.rows = {cell: np.array([i for i, c in enumerate(cells) if c == cell]) for cell in sorted(grid.seen)}
        if empty := [cell for cell, rows in self.rows.items() if not len(rows)]:
            raise InputError(f"the seen cell {empty[0]} has no row")
        for cell in weights or ():
            if cell not in self.rows:
                raise unknown("seen cell", cell, self.rows)
        share = np.array([(weights or {}).get(cell, 1.0 if weights is None else 0.0) for cell in self.rows])
        if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
            raise InputError(f"weights {dict(weights or {})}: non-negative numbers, not all 0, are expected")
        self.share = share / share.sum()
        self.n = sum(map(len, self.rows.values())) if n is None else n
        self._rng = np.random.default_rng(seed)
        self._left: dict[Cell, list[int]] = {cell: [] for cell in self.rows}

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        names = list(self.rows)
        for choice in self._rng.choice(len(names), size=self.n, p=self.share):
            left = self._left[names[choice]]
            if not left:
                left.extend(self._rng.permutation(self.rows[names[choice]]).tolist())
            yield left.pop()


def cells_of(data: "Dataset | Mapping[str, Sequence[str]]", grid: CellGrid) -> list[Cell]:
    """The cell of each row, from its columns ``task`` and ``language``; ``InputError`` names a row outside the grid."""
    columns = getattr(data, "column_names", None) or list(data)
    for name in ("task", "language"):
        if name not in columns:
            raise unknown("column", name, columns)
    return [grid.check((task, language)) for task, language in zip(data["task"], data["language"], strict=True)]
