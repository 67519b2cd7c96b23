"""Choose documents by a rule and a budget, with one reason for every one that is left out.

Reach for it with a filled ``ScoreTable``. The choice depends on ids, scores and the seed, never on the order of the
documents; it writes its own audit, and its ``apply`` copies the chosen documents shard by shard.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_write
from downriver.data.documents import Layout
from downriver.data.score.table import KEYS, ScoreTable
from downriver.data.select.apply import apply as copy_chosen
from downriver.data.select.rules import Rule, keys, rule
from downriver.data.select.top import top_rows


class Reasons(Mapping[int, str]):
    """Why each dropped row was dropped, in four bytes a row: ``codes`` (n,) counts from 0 into ``texts``, -1 is kept.

    >>> dict(Reasons(np.array([-1, 0, -1]), ["below the threshold"]))
    {1: 'below the threshold'}
    """

    def __init__(self, codes: np.ndarray, texts: Sequence[str]) -> None:
        self.codes, self.texts = codes, texts

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self.codes) or self.codes[row] < 0:
            raise KeyError(row)
        return self.texts[self.codes[row]]

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self.codes >= 0).tolist())

    def __len__(self) -> int:
        return int((self.codes >= 0).sum())


@dataclass(frozen=True)
class Selection:
    """A choice of rows: ``indices`` (k,) ascending and the ``ids`` and ``weights`` (k,) of them; of all n rows the
    ``scores`` they were ranked by; ``reasons`` from the row to the one reason why it was dropped; ``threshold``, the
    lowest score that was chosen, where there is one for all; ``epochs_by_source``, the passes over each source.

    ``names`` are the ids of all n rows and ``places`` their shard and row, where these are known; ``report`` is what
    the method says of its choice.

    >>> Selection(np.array([0]), ("a",), np.array([2.0, 1.0]), np.ones(1), {1: "below 2"}).indices.tolist()
    [0]
    """

    indices: np.ndarray
    ids: Sequence[str]
    scores: np.ndarray
    weights: np.ndarray
    reasons: Mapping[int, str]
    threshold: float | None = None
    epochs_by_source: Mapping[str, float] = field(default_factory=dict)
    names: Sequence[str] | None = None
    places: pl.DataFrame | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    def audit(self, path: str | os.PathLike[str]) -> Path:
        """Write a Parquet file of all n rows: row, id (where known), kept, reason (empty for kept rows), score and
        threshold."""
        n = len(self.scores)
        kept = np.zeros(n, dtype=bool)
        kept[self.indices] = True
        if isinstance(self.reasons, Reasons):
            reason = pl.Series([*self.reasons.texts, ""], dtype=pl.String).gather(
                np.where(self.reasons.codes < 0, len(self.reasons.texts), self.reasons.codes)
            )
        else:
            reason = pl.Series([self.reasons.get(row, "") for row in range(n)], dtype=pl.String)
        ids: pl.Series = pl.Series([None] * n, dtype=pl.String)
        if self.names is not None:
            ids = pl.Series(self.names, dtype=pl.String)
        elif len(self.ids):
            ids = ids.scatter(self.indices, pl.Series(self.ids, dtype=pl.String))
        frame = pl.DataFrame({"row": np.arange(n), "id": ids, "kept": kept, "reason": reason, "score": self.scores})
        with atomic_write(path) as file:
            frame.with_columns(threshold=pl.lit(self.threshold, dtype=pl.Float64)).write_parquet(file)
        return Path(path)

    def apply(
        self,
        source: Any,
        out: str | os.PathLike[str],
        *,
        like: Layout = "jsonl",
        text: str = "text",
        id: str = "id",
    ) -> list[Path]:
        """Copy the chosen documents of the source into a folder, a file for each shard, in constant memory.

        Lines and columns stay as they are, byte by byte and field by field; files keep their names and layouts, and
        rows in memory are written as ``like``. A killed run goes on with the shards that are missing, and ends with
        the bytes of an undisturbed one.

        Raises ``InputError`` for a folder that holds something else, a source whose files changed since the first
        run, and ids that the source does not have.
        """
        return copy_chosen(self.ids, self._chosen_places(), source, Path(out), like=like, text=text, id=id)

    def _chosen_places(self) -> dict[str, np.ndarray] | None:
        if self.places is None:
            return None
        chosen = self.places[self.indices].group_by("shard", maintain_order=True).agg("row")
        return {shard: np.asarray(rows) for shard, rows in chosen.iter_rows()}


def select(
    table: Any,
    rule: str | Rule,
    *,
    k: int | None = None,
    tau: float | None = None,
    budget_tokens: float | None = None,
    quantile: float | None = None,
    quotas: Mapping[str, int] | None = None,
    per_group: str | None = None,
    tokens: str = "tokens",
    source: str | None = None,
    train_tokens: float | None = None,
    drop: Mapping[str, str] | None = None,
    missing: str = "drop",
    seed: int = 0,
) -> Selection:
    """Choose the documents that a rule ranks highest, within one budget.

    Parameters
    ----------
    table
        A ``ScoreTable``, or a polars frame with ``id`` and the columns of the rule.
    rule
        As text (``"prior - conditional"``, ``"0.3*edu + 0.7*dsir"``, ``"random"``, ``"resample(dsir)"``) or from
        ``data.select.rules``.
    k, tau, budget_tokens, quantile, quotas
        Exactly one: so many documents; ⌊n/tau⌋ of the n that can be chosen; the best ones until the next would exceed
        so many tokens (column ``tokens``); all from the q-quantile of the scores on; or by group, how many.
    per_group
        A column: the budget is for each group of it (a smaller group is taken whole, with a warning).
    source, train_tokens
        Fills ``epochs_by_source`` for the column ``source``: how often its tokens are read when the chosen documents
        are repeated until ``train_tokens`` (by default once). Documents count instead, without the column ``tokens``.
    drop
        Reasons by id, as ``dedup`` gives them: these rows cannot be chosen.
    missing
        Rows without a score are dropped for that reason, or (``"fail"``) an error.

    Equal scores are told apart by a hash of the id. Raises ``InputError`` for unknown columns, an id that stands for
    several rows, and a budget that is not within the pool.

    >>> scores = pl.DataFrame({"id": list("abcd"), "prior": [3.0, 2.0, 4.0, 1.0], "conditional": [2.5, 2.0, 2.0, 0.4]})
    >>> chosen = select(scores, "prior - conditional", tau=2)
    >>> chosen.ids, dict(chosen.reasons)
    (['c', 'd'], {0: 'below the threshold', 1: 'below the threshold'})
    """
    chosen_rule = _rule(rule)
    budgets = {"k": k, "tau": tau, "budget_tokens": budget_tokens, "quantile": quantile, "quotas": quotas}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"exactly one of {', '.join(budgets)} is expected, not {', '.join(given) or 'none'}")
    if quotas is not None and per_group is None:
        raise InputError("quotas are by group: the column of the groups, per_group=, is expected")
    needed = [
        *chosen_rule.columns,
        *([tokens] if budget_tokens is not None else []),
        *filter(None, (per_group, source)),
    ]
    frame = _frame(table, needed, tokens)
    ids = frame["id"].to_list()
    codes = np.full(len(ids), -1, dtype=np.int32)
    texts: list[str] = []

    def mark(rows: np.ndarray, reason: str) -> None:
        if len(rows):
            codes[rows] = len(texts)
            texts.append(reason)

    _mark_dropped(ids, drop or {}, mark)
    columns = _columns(frame, chosen_rule.columns, missing, codes, mark)
    able = np.flatnonzero(codes < 0)
    scores = np.full(len(ids), np.nan)
    scores[able] = chosen_rule.values(
        {name: values[able] for name, values in columns.items()}, [ids[row] for row in able], seed
    )
    weights = _tokens(frame, tokens, needed=budget_tokens is not None)
    kept: list[np.ndarray] = []
    thresholds: list[float] = []
    for group, rows in _groups(frame, per_group, able, quotas):
        best = _within(given[0], budgets[given[0]], group, scores[rows], [ids[r] for r in rows], weights[rows])
        left = np.ones(len(rows), dtype=bool)
        left[best] = False
        floor = float(scores[rows[best]].min()) if len(best) else math.inf
        where = "" if per_group is None else f" of {per_group} {group!r}"
        if chosen_rule.kind == "sum":
            mark(rows[left & (scores[rows] < floor)], f"below the threshold{where}")
            mark(rows[left & (scores[rows] >= floor)], f"as good as the threshold{where}: lost the draw")
        else:
            mark(rows[left], f"not drawn{where}")
        kept.append(rows[best])
        thresholds.append(floor)
    indices = np.sort(np.concatenate(kept)) if kept else np.arange(0)
    return Selection(
        indices=indices,
        ids=[ids[row] for row in indices],
        scores=scores,
        weights=np.ones(len(indices)),
        reasons=Reasons(codes, texts),
        threshold=thresholds[0] if len(thresholds) == 1 and len(indices) else None,
        epochs_by_source=_epochs(frame, source, indices, weights, train_tokens),
        names=ids,
        places=frame.select("shard", "row") if {"shard", "row"} <= set(frame.columns) else None,
    )


def _rule(text: str | Rule) -> Rule:
    return rule(text)


def _frame(table: Any, needed: Sequence[str], tokens: str) -> pl.DataFrame:
    if isinstance(table, ScoreTable):
        for column in needed:
            if column not in (*table.columns, *KEYS):
                raise unknown(f"column of {table.folder}", column, table.columns)
        wanted = [c for c in table.columns if c in needed or c == tokens]
        return table.frame(wanted).collect()
    if not isinstance(table, pl.DataFrame | pl.LazyFrame):
        raise InputError(f"a {type(table).__name__} is no table of scores: a ScoreTable or a polars frame is expected")
    names = table.collect_schema().names()
    for column in ("id", *needed):
        if column not in names:
            raise unknown("column of the table", column, names)
    wanted = [c for c in names if c in (*KEYS, *needed, tokens)]
    frame = table.lazy().select(wanted).collect().with_columns(pl.col("id").cast(pl.String))
    if frame["id"].null_count():
        raise InputError(f"row {int(frame['id'].is_null().arg_max() or 0)} of the table has no id")
    if frame["id"].n_unique() < frame.height:
        twice = frame["id"].filter(frame["id"].is_duplicated())[0]
        raise InputError(f"id {twice!r} stands for several rows: ids of their own are expected")
    return frame


def _mark_dropped(ids: Sequence[str], drop: Mapping[str, str], mark: Any) -> None:
    by_reason: dict[str, list[int]] = {}
    if drop:
        for row, name in enumerate(ids):
            if name in drop:
                by_reason.setdefault(drop[name], []).append(row)
    for reason, rows in by_reason.items():
        mark(np.array(rows), reason)


def _columns(
    frame: pl.DataFrame, names: Sequence[str], missing: str, codes: np.ndarray, mark: Any
) -> dict[str, np.ndarray]:
    if missing not in ("drop", "fail"):
        raise unknown("policy for missing scores", missing, ("drop", "fail"))
    columns = {}
    for name in names:
        if not frame[name].dtype.is_numeric():
            raise InputError(f"column {name!r} holds {frame[name].dtype}: numbers are expected")
        columns[name] = frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        bad = np.flatnonzero(~np.isfinite(columns[name]) & (codes < 0))
        if len(bad) and missing == "fail":
            raise InputError(
                f"column {name!r}: {len(bad)} documents have no finite score, {frame['id'][int(bad[0])]!r} the first"
            )
        mark(bad, f"no score in {name}")
    return columns


def _tokens(frame: pl.DataFrame, column: str, *, needed: bool) -> np.ndarray:
    if column not in frame.columns:
        return np.ones(frame.height)
    counts = frame[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
    bad = ~(counts >= 0)
    if needed and bad.any():
        raise InputError(f"column {column!r}: {frame['id'][int(bad.argmax())]!r} has no number of tokens")
    return np.where(bad, 0.0, counts)


def _groups(
    frame: pl.DataFrame, column: str | None, able: np.ndarray, quotas: Mapping[str, int] | None
) -> Iterator[tuple[str | None, np.ndarray]]:
    if column is None:
        yield None, able
        return
    names = frame[column].cast(pl.String).fill_null("none").to_numpy()[able]
    found, member = np.unique(names.astype(str), return_inverse=True)
    if quotas is not None and (strange := [name for name in quotas if name not in found]):
        raise unknown(f"group of {column!r} in quotas", strange[0], found)
    for number, name in enumerate(found):
        yield str(name), able[member == number]


def _within(
    budget: str, amount: Any, group: str | None, scores: np.ndarray, ids: Sequence[str], tokens: np.ndarray
) -> np.ndarray:
    """The rows of a group that the budget pays for."""
    n = len(scores)
    if budget == "quantile":
        if not 0 <= amount <= 1:
            raise InputError(f"quantile is {amount}: a share from 0 to 1 is expected")
        return np.flatnonzero(scores >= np.quantile(scores, amount, method="higher")) if n else np.arange(0)
    if budget == "budget_tokens":
        if not 0 < amount <= tokens.sum() and group is None:
            raise InputError(f"budget_tokens is {amount:g}: a positive number up to the pool's {tokens.sum():g} tokens")
        order = np.lexsort((keys(ids), -scores))
        return np.sort(order[: np.searchsorted(np.cumsum(tokens[order]), amount, side="right")])
    if budget == "tau":
        if not amount >= 1:
            raise InputError(f"tau is {amount}: at least 1 is expected (the share that is kept is 1/tau)")
        if n < amount and group is None:
            raise InputError(f"the pool has {n} documents and tau is {amount:g}: nothing would be chosen")
        return top_rows(scores, int(n // amount), ids)
    size = amount.get(group, 0) if budget == "quotas" else amount
    if size < (0 if budget == "quotas" else 1) or size != int(size):
        raise InputError(f"{budget} is {size}: a whole number of documents is expected")
    if size > n and group is None:
        raise InputError(f"k is {size} and {n} documents can be chosen: a budget within the pool is expected")
    if size > n:
        warnings.warn(f"group {group!r} has {n} documents of {size}: taken whole", RuntimeWarning, stacklevel=3)
    return top_rows(scores, int(size), ids)


def _epochs(
    frame: pl.DataFrame, source: str | None, indices: np.ndarray, tokens: np.ndarray, train_tokens: float | None
) -> dict[str, float]:
    if source is None:
        return {}
    names, member = np.unique(
        frame[source].cast(pl.String).fill_null("none").to_numpy().astype(str), return_inverse=True
    )
    there = np.bincount(member, tokens, len(names))
    chosen = np.bincount(member[indices], tokens[indices], len(names))
    passes = 1.0 if train_tokens is None else train_tokens / max(chosen.sum(), 1e-300)
    return {str(n): float(passes * c / t) if t else 0.0 for n, c, t in zip(names, chosen, there, strict=True)}
