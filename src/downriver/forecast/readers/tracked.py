"""Runs as training leaves them: a study's measurements, the Trainer's states, exports of Weights & Biases.

Reach for them to fit a law to runs that you trained yourself.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.core.table import read_table
from downriver.forecast.fit import Array, column
from downriver.forecast.readers import read_json, read_sizes, size_of
from downriver.forecast.table import Path_, RunTable

if TYPE_CHECKING:
    import polars as pl

PARAMS = ("params", "n_params", "num_params", "num_parameters", "parameters", "model/num_parameters")
TOKENS = ("tokens", "num_input_tokens_seen", "train/num_input_tokens_seen", "total_tokens", "throughput/total_tokens")
LOSSES = ("eval/loss", "eval_loss", "val/loss", "val_loss", "validation/loss", "loss")


def measurements(
    rows: "pl.DataFrame | Path_", loss: str = "loss", error: str | None = None, task: str | None = None
) -> RunTable:
    """See ``RunTable.from_measurements``."""
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
    return RunTable(
        costs["parameters"].to_numpy(),
        costs["tokens"].to_numpy(),
        {"loss": costs[f"metric {loss}"].to_numpy()},
        {} if error is None else {"error": costs[f"metric {error}"].fill_null(np.nan).to_numpy()},
        costs["study"].to_list(),
        [f"{arm}, seed {seed}" for arm, seed in costs.select("arm", "seed").iter_rows()],
    )


def trainer_states(params: Mapping[Path_, float] | Path_, sizes: Any = None) -> RunTable:
    """See ``RunTable.from_trainer_states``."""
    N, D, losses, names = [], [], [], []
    runs = {Path(p): (str(p), n) for p, n in params.items()} if isinstance(params, Mapping) else _states(params, sizes)
    for path, (name, size) in runs.items():
        state = read_json(path)
        evaluated = [row["eval_loss"] for row in state.get("log_history", []) if "eval_loss" in row]
        if not evaluated:
            raise InputError(f"{path}: no eval_loss in its log_history")
        (size,) = column(f"params of {name}", [size])
        tokens = state.get("num_input_tokens_seen") or state.get("total_flos", 0) / (6 * size)
        if not tokens:
            raise InputError(f"{path}: neither num_input_tokens_seen nor total_flos is recorded")
        N.append(size)
        D.append(float(tokens))
        losses.append(float(evaluated[-1]))
        names.append(name)
    return RunTable(np.array(N), np.array(D), {"loss": np.array(losses)}, names=names)


def _states(folder: Path_, sizes: Any) -> dict[Path, tuple[str, float]]:
    """The last ``trainer_state.json`` of every run below a folder, with the run's name and number of parameters."""
    last: dict[Path, tuple[int, Path]] = {}
    for file in sorted(Path(folder).rglob("trainer_state.json")):
        before, _, step = file.parent.name.partition("checkpoint-")
        inside = not before and step.isdigit()
        key = file.parent.parent if inside else file.parent
        last[key] = max(last.get(key, (-1, file)), (int(step) if inside else sys.maxsize, file))
    if not last:
        raise InputError(f"{folder}: no trainer_state.json is in it or below it")
    known = None if sizes is None else read_sizes(sizes, needs="params")
    found = {}
    for run, (_, file) in last.items():
        name = run.name if run == Path(folder) else str(run.relative_to(folder))
        params = _counted(file.parent, run) if known is None else size_of([name, run.name], known)["params"]
        found[file] = (name, params)
    return found


def _counted(*folders: Path) -> float:
    """The parameters of the model that the first folder with one holds, by the headers of its safetensors."""
    from downriver.core.tensors import open_checkpoint

    for folder in folders:
        if any(folder.glob("model.safetensors*")):
            weights = open_checkpoint(folder)
            return float(sum(math.prod(weights.shape(name)) for name in weights))
    raise InputError(
        f"{folders[0]} has no model.safetensors to count parameters in: give a table of sizes (model, params)"
    )


def wandb(
    path: Path_, sizes: Any = None, params: str | None = None, tokens: str | None = None, loss: str | None = None
) -> RunTable:
    """See ``RunTable.from_wandb``."""
    frame = read_table(path)
    if any(" - " in name for name in frame.columns):
        return _chart(path, frame, sizes, loss)
    given = {} if sizes is None else read_sizes(sizes)
    name = next((n for n in ("Name", "name", "run", "ID") if n in frame.columns), None)
    notes = []
    if "State" in frame.columns:
        ended = frame["State"] == "finished"
        if unfinished := frame.height - int(ended.sum()):
            notes.append(f"{unfinished} of {frame.height} runs did not finish and are left out")
        frame = frame.filter(ended)
        if not frame.height:
            raise InputError(f"{path}: none of its runs is finished")
    names = [str(v) for v in frame[name]] if name else [""] * frame.height

    def numbers(what: str, asked: str | None, likely: tuple[str, ...]) -> Array:
        if asked is None and given and what != "loss":
            if name is None:
                raise InputError(f"{path}: a column 'Name' is expected, to look its runs up in the table of sizes")
            return np.array([size_of([run], given).get(what, np.nan) for run in names])
        found = _one(path, what, asked, likely, frame.columns)
        cells = frame[found].cast(_float(), strict=False)
        if cells.null_count():
            row = int(cells.is_null().arg_max() or 0)
            raise InputError(f"{path}, column {found!r}, run {names[row] or row + 1!r}: a number is expected")
        return cells.to_numpy()

    N, D = numbers("params", params, PARAMS), numbers("tokens", tokens, TOKENS)
    return RunTable(N, D, {"loss": numbers("loss", loss, LOSSES)}, names=names, notes=notes)


def _chart(path: Path_, frame: "pl.DataFrame", sizes: Any, loss: str | None) -> RunTable:
    """A chart's export: a column ``<run> - <metric>`` a run, with a row a step; the last value is the run's."""
    if sizes is None:
        raise InputError(
            f"{path} is the export of a chart: the sizes of its runs are needed, a table of run and tokens"
        )
    given = read_sizes(sizes)
    runs = [n.rsplit(" - ", 1) for n in frame.columns if " - " in n and not n.endswith(("__MIN", "__MAX", "__step"))]
    metrics = sorted({metric for _, metric in runs if metric != "_step"})
    asked = _one(path, "loss", loss, LOSSES, metrics)
    rows = []
    for run in (run for run, metric in runs if metric == asked):
        cells = frame[f"{run} - {asked}"].cast(_float(), strict=False).drop_nulls().drop_nans()
        if not len(cells):
            raise InputError(f"{path}, column '{run} - {asked}': no number in it")
        size = size_of([run], given)
        rows.append((size.get("params", np.nan), size["tokens"], cells[-1], run))
    N, D, reached = np.array([row[:3] for row in rows]).T
    return RunTable(N, D, {"loss": reached}, names=[row[3] for row in rows])


def _one(path: Path_, what: str, asked: str | None, likely: tuple[str, ...], columns: list[str]) -> str:
    """The column asked for, else the first likely one that is there."""
    if asked is not None:
        if asked not in columns:
            raise unknown(f"column of {path}", asked, columns)
        return asked
    found = next((name for name in likely if name in columns), None)
    if found is None:
        raise InputError(f"{path}: which column holds the {what}? Say {what}=..., one of: {', '.join(columns[:40])}")
    return found


def _float() -> Any:
    import polars as pl

    return pl.Float64
