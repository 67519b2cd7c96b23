"""Make the runs that a transfer law is fitted to: pretrain on each set by each amount, fine-tune, score; resumable.

Reach for it when you ask which pretraining text is worth scaling for your task and have no runs yet; with runs of your
own go straight to ``forecast.PretrainingAdvisor``.

Isik et al. 2024, «Scaling Laws for Downstream Task Performance of Large Language Models», arXiv:2402.04177. Departure:
the paper fine-tunes checkpoints of one long run; here every amount is a run of its own, its schedule whole, since a
checkpoint under a falling rate is no run of its length.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from downriver.adapt import full
from downriver.core import Budget, InputError, Measurement
from downriver.evaluate import evaluate
from downriver.forecast import PretrainingAdvisor, RunTable
from downriver.models import Model
from downriver.study.block import Arm, shared
from downriver.study.study import Result, Study
from downriver.tasks import Task
from downriver.training import TokenRows, fine_tune

NONE = "no pretraining"
ROWS = "finetune_rows"

Pretrain = Callable[[Model, Task | TokenRows, Budget, int], Model]
Finetune = Callable[[Model, Task, int], Model]


@dataclass(frozen=True)
class TransferRuns:
    """What a grid has measured: a run table (groups are the pretraining sets, tokens the amounts D_p, the metric
    ``finetune_rows`` the amounts D_f), and the mean score without pretraining by D_f."""

    runs: RunTable
    reference: Mapping[float, float]
    score: str
    result: Result

    def advisor(self, scale: float = 1.0) -> PretrainingAdvisor:
        """The advisor over these runs; ``scale`` is the highest score there is."""
        return PretrainingAdvisor(self.runs, score=self.score, finetune=ROWS, reference=self.reference, scale=scale)


@dataclass(frozen=True)
class TransferLawStudy:
    """A grid of pretraining sets × amounts × fine-tuning amounts × seeds, as a study.

    Args:
        pretrain_sets: name to text: a language-modelling ``Task`` or ``TokenRows``.
        d_p_grid: tokens of pretraining, increasing; four or more are what a law needs.
        finetune_set: the task, with a train and a test split. d_f_grid: how many of its training rows.
        model_factory: seed to the model before pretraining.
        score: the metric of the law, higher is better. seeds: how often everything is done anew.
        epochs: how often fine-tuning sees each row; or give ``finetune(model, task, seed)`` of your own.
        pretrain_rate, finetune_rate, batch_size: of the two trainings; or give ``pretrain(model, set, budget, seed)``.

    A seed draws the model, the batches and the rows of a smaller D_f; one seed's rows are the same for all sets, so
    that differences are paired. Raises ``InputError`` for empty or falling grids and for more rows than there are.

    >>> import tempfile
    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> text = Task("text", "language-modelling", {"train": Dataset.from_dict({"text": ["abab"] * 8})}, ("text",), None)
    >>> rows = Dataset.from_dict({"text": ["aa", "b"] * 8, "label": [0, 1] * 8})
    >>> task = Task("letters", "text-classification", {"train": rows, "test": rows}, ("text",), "label")
    >>> grid = TransferLawStudy({"abab": text}, [100, 200], task, [8], lambda seed: small("causal-lm", "nano"), seeds=1)
    >>> found = grid.run(tempfile.mkdtemp(), executor="serial", progress=False)
    >>> found.runs.tokens.tolist(), list(found.reference)
    ([100.0, 200.0], [8.0])
    """

    pretrain_sets: Mapping[str, Task | TokenRows]
    d_p_grid: Sequence[float]
    finetune_set: Task
    d_f_grid: Sequence[int]
    model_factory: Callable[[int], Model]
    seeds: int = 3
    score: str = "accuracy"
    epochs: float = 3.0
    pretrain_rate: float = 1e-3
    finetune_rate: float = 1e-3
    batch_size: int = 16
    pretrain: Pretrain | None = None
    finetune: Finetune | None = None
    name: str = "transfer-law-grid"

    def __post_init__(self) -> None:
        if not self.pretrain_sets or NONE in self.pretrain_sets:
            raise InputError(f"pretrain_sets: at least one set is expected, and none that is called {NONE!r}")
        for name in ("d_p_grid", "d_f_grid"):
            grid = list(getattr(self, name))
            if not grid or grid[0] <= 0 or any(b <= a for a, b in itertools.pairwise(grid)):
                raise InputError(f"{name} {grid}: positive, increasing amounts are expected")
        rows = len(self.finetune_set.rows("train"))
        if self.d_f_grid[-1] > rows:
            raise InputError(f"d_f_grid: {self.d_f_grid[-1]} rows are asked of a train split of {rows}")

    @cached_property
    def study(self) -> Study:
        """The study: an arm a (set, D_p, D_f), and one a D_f without pretraining; one pretraining serves all D_f."""
        asked = {
            "pretrain_sets": {name: rows.fingerprint for name, rows in self.pretrain_sets.items()},
            "finetune_set": self.finetune_set.fingerprint,
            "model": _weights(self.model_factory(0)),
            "settings": [self.score, self.epochs, self.pretrain_rate, self.finetune_rate, self.batch_size],
            "own": [getattr(f, "__qualname__", type(f).__qualname__) for f in (self.pretrain, self.finetune) if f],
        }
        return Study(self.name, self._arms, seeds=self.seeds, parameters=asked, title="Pretraining sets by amount")

    def run(self, folder: str | Path = "downriver-runs", **settings: Any) -> TransferRuns:
        """Run what is missing (``settings`` are those of ``Study.run``) and put it into a table.

        Raises ``InputError`` naming the first cell that failed.
        """
        result = self.study.run(folder, **settings)
        if result.failures:
            raise InputError(f"{len(result.failures)} runs failed, first {result.failures[0]}")
        rows = result.rows().pivot("metric", index=["arm", "seed"], values="value", maintain_order=True)
        cells = {_arm(*cell): cell for cell in self._cells()}
        rows = rows.with_columns(pl.Series("set", [cells[arm][0] for arm in rows["arm"]]))
        found = rows.filter(rows["set"] != NONE)
        at = np.array([cells[arm][1:] for arm in found["arm"]], dtype=np.float64)
        table = RunTable(
            found["parameters"].to_numpy(),
            at[:, 0],
            {"loss": found["loss"].to_numpy()},
            {self.score: found[self.score].to_numpy(), ROWS: at[:, 1]},
            groups=found["set"].to_list(),
            names=[f"{arm}, seed {seed}" for arm, seed in found.select("arm", "seed").iter_rows()],
        )
        without = rows.filter(rows["set"] == NONE)
        means = {
            float(d_f): float(without.filter(without["arm"] == _arm(NONE, 0, d_f))[self.score].mean())  # type: ignore[arg-type]
            for d_f in self.d_f_grid
        }
        return TransferRuns(table, means, self.score, result)

    def _cells(self) -> Iterator[tuple[str, float, int]]:
        for d_f in self.d_f_grid:
            yield NONE, 0, d_f
            for name in self.pretrain_sets:
                for d_p in self.d_p_grid:
                    yield name, d_p, d_f

    def _arms(self, seed: int, budget: Any, scale: str) -> Iterator[Arm]:
        @shared
        def pretrained(name: str, d_p: float) -> Model:
            model = self.model_factory(seed)
            if name == NONE:
                return model
            amount = Budget(d_p, "tokens")
            if self.pretrain is not None:
                return self.pretrain(model, self.pretrain_sets[name], amount, seed)
            return fine_tune(
                model,
                self.pretrain_sets[name],
                amount,
                learning_rate=self.pretrain_rate,
                batch_size=self.batch_size,
                seed=seed,
            )

        def measured(name: str, d_p: float, d_f: int) -> list[Measurement]:
            task = self.finetune_set.sample("train", d_f, seed=seed)
            model = pretrained(name, d_p)
            if self.finetune is not None:
                tuned = self.finetune(model, task, seed)
            else:
                tuned = full(
                    model,
                    task,
                    Budget(max(self.batch_size, round(self.epochs * d_f)), "examples"),
                    head="keep" if task.kind == "language-modelling" else "random",
                    learning_rate=self.finetune_rate,
                    batch_size=self.batch_size,
                    seed=seed,
                )
            rows = evaluate(tuned, task, metrics=list(dict.fromkeys([self.score, "loss"])))
            return [*rows, Measurement("parameters", float(sum(p.numel() for p in model.parameters())), task.name)]

        for cell in self._cells():
            yield Arm(_arm(*cell), functools.partial(measured, *cell))


def _arm(name: str, d_p: float, d_f: int) -> str:
    return f"{name}, {d_f} rows" if name == NONE else f"{name}, {d_p:g} tokens, {d_f} rows"


def _weights(model: Model) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]
