"""A table of training runs: what laws are fitted to, read from wherever runs are kept.

Reach for it to bring your own runs: a tidy CSV, JSONL or Parquet file with the columns ``params``, ``tokens``, ``loss``
and, where measured, ``error`` and ``group``; measurements of studies; the ``trainer_state.json`` files that the Hugging
Face Trainer writes; or one of the public testbeds.

Everything is float64 from the start: 6ND overflows 64-bit integers from about 9.2e18.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_write
from downriver.core.table import read_table
from downriver.forecast.fit import Array, aligned, column

if TYPE_CHECKING:
    import polars as pl

Path_ = str | os.PathLike[str]

# The 17 tasks that the over-training paper averages (scaling/constants.py of mlfoundations/scaling).
SEVENTEEN = (
    "bigbench_operators",
    "pubmed_qa_labeled",
    "hellaswag_zeroshot",
    "boolq",
    "arc_easy",
    "coqa",
    "bigbench_dyck_languages",
    "lambada_openai",
    "bigbench_novel_concepts",
    "winograd",
    "bigbench_cs_algorithms",
    "commonsense_qa",
    "bigbench_qa_wikidata",
    "hellaswag",
    "copa",
    "squad",
    "piqa",
)


@dataclass(frozen=True, eq=False)
class RunTable:
    """Runs as columns: parameters (one convention for all, embeddings included), tokens, losses and metrics.

    ``losses`` maps an evaluation set to the final loss on it (the first one is «the» loss), ``metrics`` maps a name
    such as ``error`` to a fraction, NaN where it was not measured. ``groups`` and ``names`` label the runs.

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

    def __post_init__(self) -> None:
        if not self.losses:
            raise InputError("a run table needs at least one loss")
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
            key = (labels["groups"][row], *(float(c[row]) for c in numbers))
            if key in seen:
                raise InputError(f"rows {seen[key] + 1} and {row + 1} are the same run, twice: remove one of them")
            seen[key] = row

    def __len__(self) -> int:
        return len(self.params)

    @property
    def loss(self) -> Array:
        """The first of the losses."""
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

        ``error`` may be empty where it was not measured; further columns that start with ``error_`` are metrics too.
        """
        frame = read_table(path, numeric=["params", "tokens", loss])
        metrics = [name for name in frame.columns if name == "error" or name.startswith("error_")]
        return cls(
            frame["params"].to_numpy(),
            frame["tokens"].to_numpy(),
            {"loss": frame[loss].to_numpy()},
            {name: _nullable(path, frame[name]) for name in metrics},
            [str(v) for v in frame["group"]] if "group" in frame.columns else (),
            [str(v) for v in frame["name"]] if "name" in frame.columns else (),
        )

    @classmethod
    def from_testbed(cls, folder: Path_) -> "RunTable":
        """Read the over-training testbed (``exp_data`` of mlfoundations/scaling, MIT): 8 losses and 46 tasks a model.

        ``avg_error`` is the mean error of the 46 tasks, ``avg_subset_error`` that of the paper's 17, ``error_<task>``
        each of them; the first loss is ``c4_val``; the group is the training set.
        """
        folder = Path(folder)
        files = sorted((folder / "models").glob("*.json"))
        if not files:
            raise InputError(f"{folder} holds no models/*.json: the testbed's exp_data folder is expected")
        rows = []
        for file in files:
            model = _json(file)
            scores = _json(folder / "evals" / f"evaluation_{file.stem}_heavy.json")
            try:
                settings, accuracy = model["hyperparameters"], scores["eval_metrics"]["icl"]
                losses = {_evaluation(r["val_data"][0]): float(r["loss"]) for r in model["results"]}
                rows.append(
                    (settings["params"], settings["tokens"], losses, accuracy, model["dataset_name"], file.stem)
                )
            except (KeyError, TypeError, IndexError) as error:
                raise InputError(f"{file} is not a model file of the testbed: {error!r}") from error
        sets = sorted(rows[0][2], key=lambda name: (name != "c4_val", name))
        tasks = {f"error_{task}": np.array([1 - r[3][task] for r in rows]) for task in rows[0][3]}
        averages = {
            "avg_error": np.mean(list(tasks.values()), axis=0),
            "avg_subset_error": np.mean([tasks[f"error_{task}"] for task in SEVENTEEN], axis=0),
        }
        return cls(
            np.array([r[0] for r in rows], dtype=np.float64),
            np.array([r[1] for r in rows], dtype=np.float64),
            {name: np.array([r[2][name] for r in rows]) for name in sets},
            averages | tasks,
            [r[4] for r in rows],
            [r[5] for r in rows],
        )

    @classmethod
    def from_chinchilla(cls, path: Path_) -> "RunTable":
        """Read Chinchilla points: ``svg_extracted_data.csv`` of epoch-research/analyzing-chinchilla; D = FLOP/6N."""
        frame = read_table(path, numeric=["Model Size", "Training FLOP", "loss"])
        N = frame["Model Size"].to_numpy()
        return cls(N, frame["Training FLOP"].to_numpy() / (6 * N), {"loss": frame["loss"].to_numpy()})

    @classmethod
    def from_measurements(
        cls, rows: "pl.DataFrame | Path_", loss: str = "loss", error: str | None = None, task: str | None = None
    ) -> "RunTable":
        """Make a table of a study's rows (``Result.rows()``, or a file of them): one run an arm and seed.

        ``loss`` and ``error`` name the metrics; as an error, a metric for which higher is better becomes ``1 - value``.
        ``task`` keeps the rows of one task. Parameters and tokens are those that the measurement was charged; the group
        is the study.
        """
        import polars as pl

        frame = rows if isinstance(rows, pl.DataFrame) else read_table(rows)
        needed = ("study", "arm", "seed", "task", "metric", "value", "direction", "parameters", "tokens")
        if missing := [name for name in needed if name not in frame.columns]:
            raise InputError(f"these are not measurements: column {missing[0]!r} is missing")
        frame = frame.filter(pl.col("task") == task) if task is not None else frame
        wanted = [loss] if error is None else [loss, error]
        if absent := [name for name in wanted if name not in frame["metric"]]:
            raise unknown("metric", absent[0], frame["metric"].unique())
        if error is not None:
            turned = (pl.col("direction") == "higher") & (pl.col("metric") == error)
            frame = frame.with_columns(value=pl.when(turned).then(1 - pl.col("value")).otherwise("value"))
        keys = ["study", "arm", "seed"]
        costs = frame.group_by(keys, maintain_order=True).agg(pl.col("parameters", "tokens").max())
        for name in wanted:
            mean = pl.col("value").filter(pl.col("metric") == name).mean().alias(f"metric {name}")
            costs = costs.join(frame.group_by(keys).agg(mean), on=keys, how="left", maintain_order="left")
        costs = costs.drop_nulls(f"metric {loss}")
        return cls(
            costs["parameters"].to_numpy(),
            costs["tokens"].to_numpy(),
            {"loss": costs[f"metric {loss}"].to_numpy()},
            {} if error is None else {"error": costs[f"metric {error}"].fill_null(np.nan).to_numpy()},
            costs["study"].to_list(),
            [f"{arm}, seed {seed}" for arm, seed in costs.select("arm", "seed").iter_rows()],
        )

    @classmethod
    def from_trainer_states(cls, params: Mapping[Path_, float]) -> "RunTable":
        """Read ``trainer_state.json`` files of the Hugging Face Trainer, given with each run's number of parameters.

        One run a file: the last ``eval_loss``, and the tokens seen (``include_num_input_tokens_seen=True`` of the
        training arguments records them; else they are total_flos / 6N). Checkpoints within a run are not runs of their
        own: under a decaying learning rate they do not lie on the law.
        """
        N, D, losses = [], [], []
        for path, size in params.items():
            state = _json(Path(path))
            evaluated = [row["eval_loss"] for row in state.get("log_history", []) if "eval_loss" in row]
            if not evaluated:
                raise InputError(f"{path}: no eval_loss in its log_history")
            (size,) = column(f"params of {path}", [size])
            tokens = state.get("num_input_tokens_seen") or state.get("total_flos", 0) / (6 * size)
            if not tokens:
                raise InputError(f"{path}: neither num_input_tokens_seen nor total_flos is recorded")
            N.append(size)
            D.append(float(tokens))
            losses.append(float(evaluated[-1]))
        return cls(np.array(N), np.array(D), {"loss": np.array(losses)}, names=[str(path) for path in params])


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is not there") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error


def _evaluation(path: str) -> str:
    """The testbed names an evaluation by its folder, and the German one by its file."""
    place = Path(path)
    return place.stem if place.parent.name == "de-en" else place.parent.name


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
