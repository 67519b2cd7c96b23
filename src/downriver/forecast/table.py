"""A table of training runs: what laws are fitted to, read from wherever runs are kept.

Reach for it to bring your own runs: a tidy CSV, JSONL or Parquet file with the columns ``params``, ``tokens``, ``loss``
and, where measured, ``error`` and ``group``; a folder of lm-eval results; measurements of studies; the
``trainer_state.json`` files that the Hugging Face Trainer writes; exports of Weights & Biases; or a public ladder.

Everything is float64 from the start: 6ND overflows 64-bit integers from about 9.2e18.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_write
from downriver.core.table import read_table
from downriver.forecast.fit import Array, aligned

if TYPE_CHECKING:
    import polars as pl

Path_ = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class RunTable:
    """Runs as columns: parameters (one convention for all, embeddings included), tokens, losses and metrics.

    ``losses`` maps an evaluation set to the final loss on it (the first one is «the» loss), ``metrics`` maps a name
    such as ``error`` to a fraction, NaN where it was not measured; one of the two may be empty. ``groups`` and
    ``names`` label the runs; ``notes`` say what a reader left out or finds odd.

    Raises ``InputError`` for columns of unequal length, values that are not positive finite numbers, and a run given
    twice.

    >>> runs = RunTable([10_000_000, 6_900_000_000], [2e8, 2**62], {"loss": [4.0, 2.1]})
    >>> f"{runs.compute[1]:.3g}", runs.multiplier[0]
    ('1.91e+29', np.float64(20.0))
    """

    params: Array
    tokens: Array
    losses: Mapping[str, Array]
    metrics: Mapping[str, Array] = field(default_factory=dict)
    groups: Sequence[str] = ()
    names: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.losses and not self.metrics:
            raise InputError("a run table needs at least one loss or metric")
        numbers = aligned({"params": self.params, "tokens": self.tokens} | dict(self.losses))
        n = len(numbers[0])
        metrics = {name: _partial(name, values, n) for name, values in self.metrics.items()}
        labels = {name: np.array(list(getattr(self, name)) or [""] * n, dtype=object) for name in ("groups", "names")}
        if wrong := [name for name, values in labels.items() if len(values) != n]:
            raise InputError(f"{wrong[0]}: {n} labels are expected")
        for name, value in {
            "params": numbers[0],
            "tokens": numbers[1],
            "losses": dict(zip(self.losses, numbers[2:], strict=True)),
            "metrics": metrics,
            **labels,
        }.items():
            object.__setattr__(self, name, value)
        seen: dict[tuple[Any, ...], int] = {}
        for row in range(n):
            measured = numbers if self.losses else [*numbers, *metrics.values()]
            key = (labels["groups"][row], *(float(c[row]) for c in measured))
            if key in seen:
                raise InputError(f"rows {seen[key] + 1} and {row + 1} are the same run, twice: remove one of them")
            seen[key] = row

    def __len__(self) -> int:
        return len(self.params)

    @property
    def loss(self) -> Array:
        """The first of the losses; ``InputError`` where the table has none."""
        if not self.losses:
            raise InputError(f"these runs have no loss, only {', '.join(list(self.metrics)[:5])}")
        return next(iter(self.losses.values()))

    @property
    def compute(self) -> Array:
        """Training compute in floating-point operations, 6ND."""
        return 6.0 * self.params * self.tokens

    @property
    def multiplier(self) -> Array:
        """Tokens a parameter, D/N."""
        return self.tokens / self.params

    def select(self, rows: Any) -> "RunTable":
        """The runs of a boolean mask or of a list of row numbers."""
        rows = np.asarray(rows)
        return RunTable(
            self.params[rows],
            self.tokens[rows],
            {name: values[rows] for name, values in self.losses.items()},
            {name: values[rows] for name, values in self.metrics.items()},
            list(np.asarray(self.groups)[rows]),
            list(np.asarray(self.names)[rows]),
            self.notes,
        )

    def group(self, name: str) -> "RunTable":
        """The runs of one group."""
        if name not in self.groups:
            raise unknown("group", name, set(self.groups))
        return self.select(np.asarray(self.groups) == name)

    def frame(self) -> "pl.DataFrame":
        """The table as polars sees it: ``params``, ``tokens``, one column a loss and a metric, ``group``, ``name``."""
        import polars as pl

        columns = {"params": self.params, "tokens": self.tokens, **self.losses, **self.metrics}
        return pl.DataFrame(columns | {"group": list(self.groups), "name": list(self.names)}).with_columns(
            pl.col(pl.Float64).fill_nan(None)
        )

    def write(self, path: Path_) -> None:
        """Write the frame as CSV, or as Parquet where the name says so; whole or not at all."""
        frame = self.frame()
        with atomic_write(path) as file:
            frame.write_parquet(file) if Path(path).suffix == ".parquet" else frame.write_csv(file)

    @classmethod
    def read(cls, path: Path_, loss: str = "loss") -> "RunTable":
        """Read a tidy table: ``params``, ``tokens``, ``loss`` (or the column named), ``error``, ``group``, ``name``.

        ``error`` may be empty where it was not measured; further columns that start with ``error_`` are metrics too,
        and such as start with ``bpb_`` are losses of tasks. Sizes that mix two conventions are noted where it shows: a
        column ``params_no_embed`` that ``params`` equals in some rows only, or one run under two sizes.
        """
        columns = read_table(path).columns
        metrics = [name for name in columns if name == "error" or name.startswith("error_")]
        tasks = [name for name in columns if name.startswith("bpb_") and name != loss]
        frame = read_table(path, numeric=["params", "tokens", loss, *tasks])
        N, D = frame["params"].to_numpy(), frame["tokens"].to_numpy()
        losses = {"loss": frame[loss].to_numpy()} | {name: frame[name].to_numpy() for name in tasks}
        groups = [str(v) for v in frame["group"]] if "group" in frame.columns else [""] * len(N)
        notes = _counted_twice(groups, N, D, list(losses.values()))
        if "params_no_embed" in frame.columns:
            notes += mixed_conventions(N, _nullable(path, frame["params_no_embed"]))
        return _said(
            cls(
                N,
                D,
                losses,
                {name: _nullable(path, frame[name]) for name in metrics},
                groups,
                [str(v) for v in frame["name"]] if "name" in frame.columns else (),
                notes,
            )
        )

    @classmethod
    def from_testbed(cls, folder: Path_) -> "RunTable":
        """Read the over-training testbed (``exp_data`` of mlfoundations/scaling, MIT): 8 losses and 46 tasks a model.

        ``avg_error`` is the mean error of the 46 tasks, ``avg_subset_error`` that of the paper's 17, ``error_<task>``
        each of them; the first loss is ``c4_val``; the group is the training set.
        """
        from downriver.forecast.readers.public import testbed

        return testbed(folder)

    @classmethod
    def from_olmo_ladder(cls, folder: Path_, last: int = 5, checkpoints: bool = False) -> "RunTable":
        """Read the OLMo ladder (``ladder-runs`` of allenai/OLMo-ladder, Apache-2.0): 190M to 3B, and the 7B and 13B.

        Losses: texts by name (the first is ``c4_en``), ``bpb_<task>`` (bits per byte of the right answer) and
        ``soft_<task>`` (minus its log probability among the choices); metrics: ``error_<task>``. A task is named with
        its split, and MMLU is one (``bpb_mmlu_test``). The group is the size, the name the run; parameters leave out
        the input embedding, as the ladder counts them. A run's figures are the mean of its ``last`` checkpoints (5,
        the ladder's choice), or with ``checkpoints=True`` each checkpoint is a row. Reruns, and evaluations of the
        targets before their end, are left out.
        """
        from downriver.forecast.readers.public import olmo_ladder

        return olmo_ladder(folder, last, checkpoints)

    @classmethod
    def from_chinchilla(cls, path: Path_) -> "RunTable":
        """Read Chinchilla points: ``svg_extracted_data.csv`` of epoch-research/analyzing-chinchilla; D = FLOP/6N."""
        from downriver.forecast.readers.public import chinchilla

        return chinchilla(path)

    @classmethod
    def from_obs_scaling(cls, path: Path_) -> "RunTable":
        """Read scores of public models: ``base_llm_benchmark_eval.csv`` of ryoungj/ObsScaling (Apache-2.0).

        Metrics are ``error_<benchmark>`` (1 - score, NaN where not measured); the group is the model family. There is
        no loss. Models without a published size or number of tokens are left out, and ``notes`` says how many.
        """
        from downriver.forecast.readers.public import obs_scaling

        return _said(obs_scaling(path))

    @classmethod
    def from_lm_eval(
        cls, folder: Path_, sizes: Any = None, *, loss: str | None = None, metric: str | None = None
    ) -> "RunTable":
        """Read a folder of lm-evaluation-harness output (``--output_path``): one run a model.

        Args:
            folder: holds ``results_*.json``, in subfolders too; of two results for one task the later counts. Where
                ``samples_*.jsonl`` (``--log_samples``) lie beside them, bits per byte of the right answers of every
                multiple-choice task become the losses ``bpb_<task>``.
            sizes: a table with the columns ``model``, ``tokens``, and ``params`` and ``loss`` where you have them, or a
                mapping from model to (params, tokens[, loss]). Without params, lm-eval's own count (all of them,
                embeddings included) is taken.
            loss: ``"task/metric"`` of a perplexity task, turned into nats; by default the sizes' loss, else the bits
                per byte of the only task that has them, else the mean of the ``bpb_<task>``.
            metric: which metric is a task's accuracy; by default ``acc_norm``, else ``acc``, ``exact_match``,
                ``pass@1``, ``f1``, ``mcc``.

        Metrics are ``error_<task>`` and their mean ``error`` over the tasks that every model has; a group of tasks
        counts once. Sizes counted with embeddings for some models and without them for others are noted.
        """
        from downriver.forecast.readers.lm_eval import lm_eval

        return _said(lm_eval(folder, sizes, loss=loss, metric=metric))

    @classmethod
    def from_measurements(
        cls, rows: "pl.DataFrame | Path_", loss: str = "loss", error: str | None = None, task: str | None = None
    ) -> "RunTable":
        """Make a table of a study's rows (``Result.rows()``, or a file of them): one run an arm and seed.

        ``loss`` and ``error`` name the metrics; as an error, a metric for which higher is better becomes ``1 - value``.
        ``task`` keeps the rows of one task. Parameters and tokens are those that the measurement was charged; the group
        is the study.
        """
        from downriver.forecast.readers.tracked import measurements

        return measurements(rows, loss, error, task)

    @classmethod
    def from_trainer_states(cls, params: Mapping[Path_, float] | Path_, sizes: Any = None) -> "RunTable":
        """Read ``trainer_state.json`` files of the Hugging Face Trainer, given with each run's number of parameters.

        With a folder instead, all runs below it are read, each by its last checkpoint; parameters come from ``sizes``,
        a table or mapping by the run's folder, else from the headers of the safetensors beside the state.

        One run a file: the last ``eval_loss``, and the tokens seen (``include_num_input_tokens_seen=True`` of the
        training arguments records them; else they are total_flos / 6N). Checkpoints within a run are not runs of their
        own: under a decaying learning rate they do not lie on the law.
        """
        from downriver.forecast.readers.tracked import trainer_states

        return trainer_states(params, sizes)

    @classmethod
    def from_wandb(
        cls,
        path: Path_,
        sizes: Any = None,
        *,
        params: str | None = None,
        tokens: str | None = None,
        loss: str | None = None,
    ) -> "RunTable":
        """Read a CSV export of Weights & Biases: the table of runs, or a chart.

        Of the table of runs, ``params``, ``tokens`` and ``loss`` name the columns (by default the usual names); runs
        whose ``State`` is not ``finished`` are left out and noted. A chart has a column ``<run> - <metric>`` a run:
        the last value counts, and ``sizes`` (a table with ``run``, ``params``, ``tokens``, or a mapping) is needed.
        """
        from downriver.forecast.readers.tracked import wandb

        return _said(wandb(path, sizes, params, tokens, loss))


def _said(table: RunTable) -> RunTable:
    """Emit the table's notes as ``RuntimeWarning``, at the caller of the public reader."""
    for note in table.notes:
        warnings.warn(note, RuntimeWarning, stacklevel=3)
    return table


def mixed_conventions(params: Array, counted: Array) -> list[str]:
    """Say so where some sizes equal another count of the same models (``counted``, NaN where unknown) and some do not.

    >>> mixed_conventions(np.array([7.0e7, 1.2e8]), np.array([7.0e7, 1.6e8]))
    ['sizes mix two conventions: row 1 counts as the other column does, row 2 does not (embeddings?)']
    """
    known = np.isfinite(counted)
    same = known & (np.abs(params / np.where(known, counted, 1.0) - 1) < 0.002)
    if not same.any() or (same | ~known).all():
        return []
    first, other = int(np.flatnonzero(same)[0]) + 1, int(np.flatnonzero(known & ~same)[0]) + 1
    rows = f"row {first} counts as the other column does, row {other} does not"
    return [f"sizes mix two conventions: {rows} (embeddings?)"]


def _counted_twice(groups: Sequence[str], params: Array, tokens: Array, losses: list[Array]) -> list[str]:
    """Say so where one run seems to be there under two sizes: the same tokens and losses, another N."""
    seen: dict[tuple[Any, ...], int] = {}
    for row in range(len(params)):
        key = (groups[row], float(tokens[row]), *(float(c[row]) for c in losses))
        if losses and key in seen and params[seen[key]] != params[row]:
            return [
                f"rows {seen[key] + 1} and {row + 1} have the same tokens and loss and other params: "
                "is one run counted with embeddings and without?"
            ]
        seen[key] = row
    return []


def _nullable(path: Path_, cells: "pl.Series") -> Array:
    """A column of numbers in which empty cells are NaN and anything else is refused."""
    import polars as pl

    numbers = cells.cast(pl.Float64, strict=False)
    bad = cells.is_not_null() & ~numbers.is_finite().fill_null(False)
    if bad.any():
        row = int(bad.arg_max() or 0)
        raise InputError(
            f"{path}, column {cells.name!r}, row {row + 1}: {str(cells[row])!r} where a number or nothing is expected"
        )
    return numbers.fill_null(np.nan).to_numpy()


def _partial(name: str, values: Any, n: int) -> Array:
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: numbers are expected, not {values!r:.80}") from None
    if found.shape != (n,) or np.isinf(found).any():
        raise InputError(f"{name}: {n} finite numbers, or NaN where not measured, are expected")
    return found
