"""Which parameter-efficient method to take: the runs that no other run beats, out of measured ones, with reasons.

Reach for ``read_comparison`` and ``read_ledger`` to bring runs into one table, and for ``advise`` to choose among them
by what matters to you. There are no rules of thumb here: what was not measured is not advised, and runs of different
models or data are never held against one another. It is the executable part of «Parameter-Efficient Fine-Tuning for
Foundation Models» (2025); the files of peft's public comparison (``method_comparison/*/results/*.json`` in its
repository: 63 finished runs of Llama 3.2 3B on MetaMathQA, 31 of an image generator) are read as they are. Every one of
these has a single seed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from downriver.core.errors import InputError, unknown

OBJECTIVES = {
    "score": "higher",
    "forgetting": "lower",
    "parameters": "lower",
    "memory": "lower",
    "seconds": "lower",
    "disk": "lower",
}
"""What a run can be good at: its score on the task; loss on text of before that it added; trained parameters; peak
memory in bytes; seconds of the whole run; bytes of what is kept a task."""
SCHEMA = {
    "run": pl.String,
    "method": pl.String,
    "benchmark": pl.String,
    "metric": pl.String,
    **dict.fromkeys(OBJECTIVES, pl.Float64),
    "learning_rate": pl.Float64,
    "seeds": pl.Int64,
    "source": pl.String,
}


@dataclass(frozen=True)
class Advice:
    """``chosen``: the runs that no other beats, best score first, each with a ``reason``; ``left_out``: all others,
    each with the constraint that it breaks or a run that beats it."""

    chosen: pl.DataFrame
    left_out: pl.DataFrame
    objectives: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for (benchmark,), rows in self.chosen.group_by(["benchmark"], maintain_order=True):
            lines.append(f"{benchmark}: {rows.height} runs that no other beats on {' and '.join(self.objectives)}")
            lines += [
                f"  {row['run']} ({row['method'] or 'no method known'}): {row['reason']}" for row in rows.to_dicts()
            ]
        return "\n".join(lines or ["no run meets the constraints"])


def read_comparison(folder: str | Path) -> pl.DataFrame:
    """The finished runs of peft's public comparison: those of the JSON files in a folder and below it.

    One row a run: ``run`` (the file's name), ``method`` (as in ``catalogue()``; ``full`` without an adapter),
    ``benchmark`` (folder and model), ``metric``, ``score`` (on the test split), ``forgetting`` (or drift),
    ``parameters``, ``memory`` (the peak), ``seconds``, ``disk``, ``learning_rate``, ``seeds`` (1), ``source``. What a
    file does not say is missing. Runs that failed are left out.

    Raises ``InputError`` for a folder without such files, and naming the file that is damaged or of another form.

    >>> read_comparison("nowhere")
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: nowhere holds no JSON files: a folder of peft's method_comparison is expected
    """
    folder = Path(folder)
    files = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder} holds no JSON files: a folder of peft's method_comparison is expected")
    rows = [row for file in files if (row := _run(file)) is not None]
    if not rows:
        raise InputError(f"{folder}: none of {len(files)} runs has finished")
    return pl.DataFrame(rows, schema=SCHEMA)


def read_ledger(rows: pl.DataFrame, metric: str, **columns: str) -> pl.DataFrame:
    """Runs of your own studies (``Ledger(...).rows()``), in the form of ``read_comparison``; means over the seeds.

    ``metric`` is the score. The other columns are metrics of their names, as ``study.compare_peft`` measures them,
    or those that ``columns`` says (``forgetting="retention_change"``); where there are none, trained parameters, peak
    memory and seconds are those of the arm's cost. ``benchmark`` is study and task, ``run`` the arm, ``method`` its
    first word where that is a method's name. A score for which lower is better is negated.

    Raises ``InputError`` for a metric that no row has, and for a column that is none of ``OBJECTIVES``.
    """
    needed = ("study", "arm", "seed", "task", "metric", "value", "direction")
    for name in (*needed, "trained_parameters", "peak_memory", "seconds"):
        if name not in rows.columns:
            raise unknown("column of the ledger", name, rows.columns)
    for column in columns:
        if column not in OBJECTIVES or column == "score":
            raise unknown("column", column, [name for name in OBJECTIVES if name != "score"])
    for asked in (metric, *columns.values()):
        if asked not in rows["metric"]:
            raise unknown("metric", asked, rows["metric"].unique())
    keys = ["study", "arm"]
    lower = pl.col("direction") == "lower"
    scored = (
        rows.filter(pl.col("metric") == metric)
        .with_columns(pl.when(lower).then(-pl.col("value")).otherwise(pl.col("value")).alias("score"))
        .group_by([*keys, "task"], maintain_order=True)
        .agg(
            pl.col("score", "seconds").mean(),
            pl.col("trained_parameters").max().cast(pl.Float64).alias("parameters"),
            pl.col("peak_memory").max().cast(pl.Float64).alias("memory"),
            pl.col("seed").n_unique().alias("seeds"),
            pl.lit(None, pl.Float64).alias("forgetting"),
            pl.lit(None, pl.Float64).alias("disk"),
        )
    )
    for column in OBJECTIVES:
        if column != "score":
            own = rows.filter(pl.col("metric") == columns.get(column, column)).group_by(keys)
            scored = scored.join(own.agg(pl.col("value").mean().alias("own")), on=keys, how="left")
            scored = scored.with_columns(pl.coalesce("own", column).alias(column)).drop("own")
    from downriver.adapt.peft_entries import known

    names = {*known(), "full"}
    return scored.select(
        pl.col("arm").alias("run"),
        pl.col("arm")
        .map_elements(lambda arm: next((w for w in arm.split()[:1] if w in names), None), return_dtype=pl.String)
        .alias("method"),
        (pl.col("study") + ", " + pl.col("task")).alias("benchmark"),
        pl.lit(metric).alias("metric"),
        *(pl.col(name).cast(pl.Float64) for name in OBJECTIVES),
        pl.lit(None, pl.Float64).alias("learning_rate"),
        pl.col("seeds").cast(pl.Int64),
        pl.lit("ledger").alias("source"),
    )


def advise(
    runs: pl.DataFrame,
    *,
    objectives: Sequence[str] = ("score", "memory"),
    most: Mapping[str, float] | None = None,
    least_score: float | None = None,
    tasks: int = 1,
    merge: bool = False,
    quantised: bool = False,
    benchmark: str | None = None,
) -> Advice:
    """The Pareto set of measured runs: those that no run with the same benchmark beats.

    A run beats another that is no better on any objective and worse on one.

    Parameters
    ----------
    runs
        Of ``read_comparison`` or ``read_ledger``, or both under one another.
    objectives
        What matters: some of ``OBJECTIVES``. Add ``forgetting`` where retention has priority.
    most
        Upper bounds by objective: ``{"memory": 24e9, "disk": 1e9}``. What is kept on disk counts ``tasks`` times.
    least_score
        A lower bound of the score.
    tasks
        How many tasks are to be kept beside one another.
    merge, quantised
        Only methods that merge into plain weights, or that work on a quantised base, as ``catalogue()`` says (full
        fine-tuning does the first). A run of an unknown method is left out then.

    benchmark
        Only benchmarks whose names contain this: the model and the data, and so the sizes of both, are part of them.

    Raises ``InputError`` for an unknown objective, none at all, fewer than one task, or no such benchmark.

    >>> table = pl.DataFrame(
    ...     {"run": ["a", "b", "c"], "score": [0.5, 0.4, 0.4], "memory": [9e9, 5e9, 7e9]}
    ... ).with_columns(benchmark=pl.lit("demo"), method=pl.lit("lora"))
    >>> advice = advise(table)
    >>> advice.chosen["run"].to_list(), advice.left_out["reason"].to_list()
    (['a', 'b'], ['b has no less score (0.4 and 0.4) and no more memory (5e+09 and 7e+09)'])
    """
    if not objectives:
        raise InputError("objectives is empty: at least one is expected")
    for name in (*objectives, *(most or {})):
        if name not in OBJECTIVES:
            raise unknown("objective", name, OBJECTIVES)
        if name not in runs.columns:
            raise unknown("column of the runs", name, runs.columns)
    if tasks < 1:
        raise InputError(f"tasks is {tasks}: at least 1 is expected")
    if benchmark is not None:
        every, runs = runs, runs.filter(pl.col("benchmark").str.contains(benchmark, literal=True))
        if runs.is_empty():
            raise unknown("benchmark", benchmark, every["benchmark"].unique())
    names = tuple(dict.fromkeys(objectives))
    chosen, left = [], []
    for (_,), group in runs.group_by(["benchmark"], maintain_order=True):
        candidates = []
        for row in group.to_dicts():
            why = _refused(row, names, most or {}, least_score, tasks, merge, quantised)
            if why:
                left.append({**row, "reason": why})
            else:
                candidates.append(row)
        front = []
        for row in candidates:
            better = [other for other in candidates if _beats(other, row, names)]
            if better:
                left.append({**row, "reason": _beaten(better[0], row, names)})
            else:
                front.append(row)
        front.sort(key=lambda row: [_signed(row, name) for name in dict.fromkeys(("score", *names)) if name in row])
        chosen += [{**row, "reason": _reason(row, front, names)} for row in front]
    schema: Any = {**runs.schema, "reason": pl.String}
    return Advice(pl.DataFrame(chosen, schema=schema), pl.DataFrame(left, schema=schema), names)


def _signed(row: Mapping[str, Any], name: str) -> float:
    """Lower is better."""
    return -row[name] if OBJECTIVES[name] == "higher" else row[name]


def _beats(one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]) -> bool:
    pairs = [(_signed(one, name), _signed(other, name)) for name in names]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _beaten(better: Mapping[str, Any], row: Mapping[str, Any], names: Sequence[str]) -> str:
    words = {"higher": "no less", "lower": "no more"}
    parts = [f"{words[OBJECTIVES[n]]} {n} ({_number(better[n])} and {_number(row[n])})" for n in names]
    return f"{better['run']} has {' and '.join(parts)}"


def _reason(row: Mapping[str, Any], front: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """What a run is best at, and what the one with the best first objective has over it."""
    words = {"higher": "the highest", "lower": "the lowest"}
    leads = [n for n in names if _signed(row, n) == min(_signed(other, n) for other in front)]
    parts = [f"{words[OBJECTIVES[n]]} {n} ({_number(row[n])})" for n in leads]
    first = min(front, key=lambda other: _signed(other, names[0]))
    if first is not row:
        against = [f"{n} {_number(row[n])} against {_number(first[n])}" for n in names if row[n] != first[n]]
        if against:
            parts.append(f"beside {first['run']}: {', '.join(against)}")
    return "; ".join(parts)


def _refused(
    row: Mapping[str, Any],
    names: Sequence[str],
    most: Mapping[str, float],
    least_score: float | None,
    tasks: int,
    merge: bool,
    quantised: bool,
) -> str | None:
    for name in (*names, *most, *(["score"] if least_score is not None else [])):
        if row[name] is None or not math.isfinite(row[name]):
            return f"{name} was not measured"
    for name, bound in most.items():
        value = row[name] * (tasks if name == "disk" else 1)
        if value > bound:
            return f"{name} {_number(value)} is above {_number(bound)}"
    if least_score is not None and row["score"] < least_score:
        return f"score {_number(row['score'])} is below {_number(least_score)}"
    if merge or quantised:
        from downriver.adapt.peft_entries import known

        entry = known().get(row.get("method") or "")
        name = row.get("method") or "an unknown method"
        if merge and name != "full" and not (entry and entry.mergeable):
            return f"{name} does not merge into plain weights"
        if quantised and not (entry and entry.quantised):
            return f"{name} does not work on a quantised base"
    return None


def _number(value: float) -> str:
    return f"{value:.4g}"


def _run(file: Path) -> dict[str, Any] | None:
    """A run of the public comparison; none where it failed."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
    try:
        info, train = content["run_info"], content["train_info"]
        if train["status"] != "success":
            return None
        settings, last = info["train_config"], train["metrics"][-1]
        metric = next((name for name in last if name.startswith("test ")), None)
        if metric is None:
            raise KeyError("test ... in the last of train_info.metrics")
        return {
            "run": file.stem,
            "method": method_of(info["peft_config"]),
            "benchmark": f"{file.parent.name}, {settings['model_id']}",
            "metric": metric.removeprefix("test "),
            "score": float(last[metric]),
            "forgetting": next((float(last[n]) for n in ("forgetting", "drift") if last.get(n) is not None), None),
            "parameters": float(train["num_trainable_params"]),
            "memory": float(train["accelerator_memory_max"]),
            "seconds": float(info["total_time"]),
            "disk": float(train["file_size"]),
            "learning_rate": settings.get("optimizer_kwargs", {}).get("lr"),
            "seeds": 1,
            "source": str(file),
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{file} is no run of peft's comparison: {error} is missing or of another form") from None


def method_of(config: Mapping[str, Any] | None) -> str:
    """The catalogue's name of a peft configuration, given as JSON has it; ``full`` for none.

    >>> method_of({"peft_type": "LORA", "use_dora": True}), method_of({"peft_type": "IA3"}), method_of(None)
    ('dora', 'ia3', 'full')
    """
    if config is None:
        return "full"
    kind = str(config["peft_type"])
    if kind != "LORA":
        return kind.lower()
    flags = {
        "dora": "use_dora",
        "rslora": "use_rslora",
        "bdlora": "use_bdlora",
        "kasa": "kasa_config",
        "monteclora": "monteclora_config",
        "velora": "velora_config",
        "alora": "alora_invocation_tokens",
    }
    for name, flag in flags.items():
        if config.get(flag):
            return name
    start = config.get("init_lora_weights")
    starts = {"pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal_lora", "mica": "mica", "eva": "eva"}
    starts |= {"corda": "corda", "lora_ga": "lora_ga"}
    return next((name for begin, name in starts.items() if str(start).startswith(begin)), "lora")
