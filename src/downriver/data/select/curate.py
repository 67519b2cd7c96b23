"""Curate an annotated instruction set: a rule for quality, a repaired task mix, no duplicates, a reason for every drop.

Reach for it with the table of an ``Annotator``. «Fixing It in Post» (TuluTalk, June 2025): the quality core distorts
the task mix and hurts instruction following, so the best of the next quality come back for tasks that lost. The paper's
thresholds are not published; those of ``TULUTALK`` are read off its released columns. Departures: near-duplicates are
found exactly within the distance, not among 500 neighbours, and the one with the smallest id stays.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from downriver.core.errors import InputError, unknown
from downriver.data.annotate.magpie import ORDERED, AnnotationTable
from downriver.data.select.select import Selection

TULUTALK = "quality>=excellent & (mt_reward==5 | st_reward>=q(.5, by='source'))"
Table = pl.DataFrame | AnnotationTable
REWARDS = ("st_reward",)


class Rule:
    """A condition on the columns of a table, written as text and never evaluated as code.

    Comparisons (``== != < <= > >=``) of a column with a number, a word (``excellent``; quoted where it has spaces:
    ``'very poor'``) or ``q(p, by='column')``, the p-quantile of the same column within each group (without ``by``: of
    all rows; always a value that occurs, so that a monotone change of scale within a group changes nothing). Joined by
    ``&``, ``|``, ``~`` and parentheses; ``&`` binds closer than ``|``. ``quality`` and ``difficulty`` are compared by
    their rank. An empty cell fulfils no comparison.

    Raises ``InputError`` with the place for a text that is no rule; ``expression(table)`` raises it for a column or
    word that the table or the scale does not have.

    >>> table = pl.DataFrame({"quality": ["good", "excellent"], "turns": [1, 3]})
    >>> table.filter(Rule("quality>=good & turns>1").expression(table)).height
    1
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._tokens = _tokens(text)
        self._at = 0
        self.tree = self._either()
        if self._at < len(self._tokens):
            self._wrong("the end or an operator")

    def __repr__(self) -> str:
        return f"Rule({self.text!r})"

    @property
    def columns(self) -> set[str]:
        """The columns that the rule reads."""
        found: set[str] = set()
        for part in _leaves(self.tree):
            found |= {part.column} | ({part.by} if part.by else set())
        return found

    def expression(self, table: pl.DataFrame) -> pl.Expr:
        """A boolean expression without nulls for this table."""
        for part in _leaves(self.tree):
            for column in (part.column, part.by):
                if column is not None and column not in table.columns:
                    raise unknown(f"column in the rule «{self.text}»", column, table.columns)
        return _expression(self.tree, table, self.text)

    def conjuncts(self) -> "list[tuple[str, Any]]":
        """The parts that must all hold, each with its text."""
        parts = self.tree[1:] if self.tree[0] == "&" else [self.tree]
        return [(_written(part), part) for part in parts]

    def _either(self) -> Any:
        parts = [self._both()]
        while self._next("|"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else ("|", *parts)

    def _both(self) -> Any:
        parts = [self._one()]
        while self._next("&"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else ("&", *parts)

    def _one(self) -> Any:
        if self._next("~"):
            return ("~", self._one())
        if self._next("("):
            inner = self._either()
            self._take(")")
            return inner
        column = self._take("a column", kind="word")
        operator = self._take("a comparison", kind="compare")
        return ("compare", self._value(column, operator))

    def _value(self, column: str, operator: str) -> "_Comparison":
        if self._next("q"):
            self._take("(")
            p = float(self._take("a share from 0 to 1", kind="number"))
            if not 0 <= p <= 1:
                raise InputError(f"rule «{self.text}»: q({p:g}): a share from 0 to 1 is expected")
            by = None
            if self._next(","):
                if self._take("by", kind="word") != "by" or self._take("=") != "=":
                    raise InputError(f"rule «{self.text}»: by='column' is expected in q(...)")
                by = self._take("a column", kind=("word", "text"))
            self._take(")")
            return _Comparison(column, operator, quantile=p, by=by)
        value = self._take("a number, a word or q(...)", kind=("number", "word", "text"))
        number = self._tokens[self._at - 1][0] == "number"
        return _Comparison(column, operator, value=float(value) if number else value)

    def _next(self, text: str) -> bool:
        """Step over this token if it comes next; ``q`` counts only before a parenthesis."""
        if self._at >= len(self._tokens) or self._tokens[self._at][:2] == ("text", text):
            return False
        if self._tokens[self._at][1] != text:
            return False
        if text == "q" and (self._at + 1 >= len(self._tokens) or self._tokens[self._at + 1][1] != "("):
            return False
        self._at += 1
        return True

    def _take(self, expected: str, kind: str | tuple[str, ...] = "sign") -> str:
        kinds = (kind,) if isinstance(kind, str) else kind
        if self._at >= len(self._tokens):
            self._wrong(expected)
        found, text, _ = self._tokens[self._at]
        if found not in kinds or (kind == "sign" and text != expected):
            self._wrong(expected)
        self._at += 1
        return text

    def _wrong(self, expected: str) -> None:
        place = self._tokens[self._at][2] if self._at < len(self._tokens) else len(self.text)
        rest = self.text[place : place + 20]
        raise InputError(f"rule «{self.text}», at {rest!r} (character {place + 1}): {expected} is expected")


@dataclass(frozen=True)
class _Comparison:
    column: str
    operator: str
    value: float | str | None = None
    quantile: float | None = None
    by: str | None = None


@dataclass(frozen=True)
class TaskBalance:
    """Repair of the task mix: bring back the best rows of categories that the rule starved.

    ``reference`` is the mix wanted: ``"source"``, that of the table before curation, or shares by category.
    Candidates are dropped rows of at least ``min_quality``, best quality first, then the higher rank of the reward
    within its source. Rows come back until every category's share is within ``tolerance`` of its reference, or its
    candidates are used up, which is a warning.
    """

    reference: Literal["source"] | Mapping[str, float] = "source"
    min_quality: str = "good"
    tolerance: float = 0.02
    column: str = "task"

    def __post_init__(self) -> None:
        if self.min_quality not in ORDERED["quality"]:
            raise unknown("min_quality", self.min_quality, ORDERED["quality"])
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}: a share above 0 and below 1 is expected")
        if isinstance(self.reference, str):
            if self.reference != "source":
                raise unknown("reference", self.reference, ("source",))
        elif abs(sum(self.reference.values()) - 1) > 1e-6 or min(self.reference.values()) < 0:
            raise InputError(f"reference shares sum to {sum(self.reference.values()):g}: 1, none negative, is expected")


@dataclass(frozen=True)
class Curator:
    """Curate a table of annotations; without parameters it keeps every row.

    Rows go, in this order and with the first reason that applies: ``annotation failed`` and ``unsafe`` (as far as
    named in ``drop``; removing unsafe rows removes refusals, too: a choice), ``duplicate of <id>`` (embeddings nearer
    than ``dedup`` in L2 distance; the smallest id of a cluster stays), ``rule: <part>`` (the first part of ``keep``
    that does not hold, unless the repair brings the row back), ``target size`` (beyond the best ``target_size`` rows).

    ``Curator(keep=TULUTALK, repair=TaskBalance(), dedup=0.05, drop=("failed",))`` is the paper's recipe.

    Raises ``InputError`` for a rule that names a missing column, a ``target_size`` above what is admitted, and a
    reward compared across several reward scales by anything but a quantile by source.

    >>> table = pl.DataFrame({"id": ["a", "b", "c"], "quality": ["good", "excellent", "poor"]})
    >>> chosen = Curator(keep="quality>=good").fit(table)
    >>> chosen.indices.tolist(), chosen.reasons
    ([0, 1], {2: 'rule: quality>=good'})
    """

    keep: Rule | str | None = None
    repair: TaskBalance | None = None
    dedup: float | None = None
    drop: Sequence[Literal["failed", "unsafe"]] = ()
    target_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            object.__setattr__(self, "keep", Rule(self.keep))
        for name in self.drop:
            if name not in ("failed", "unsafe"):
                raise unknown("kind of row to drop", name, ("failed", "unsafe"))
        if self.dedup is not None and not self.dedup > 0:
            raise InputError(f"dedup is {self.dedup}: a distance above 0, or None, is expected")
        if self.target_size is not None and self.target_size < 1:
            raise InputError(f"target_size is {self.target_size}: at least 1, or None, is expected")

    def fit(self, table: Table, embeddings: np.ndarray | None = None) -> Selection:
        """Choose rows; ``embeddings`` (n, d), one of each row's instruction, are needed for ``dedup``."""
        frame = _frame(table)
        self._check(frame, embeddings)
        why: list[str | None] = [None] * frame.height
        rule = self.keep if isinstance(self.keep, Rule) else None
        if "failed" in self.drop:
            wanted = [c for c in ("task", "quality", "difficulty", "safety") if c in frame.columns]
            _mark(why, frame.select(pl.any_horizontal(pl.col(c).is_null() for c in wanted))[:, 0], "annotation failed")
        if "unsafe" in self.drop:
            _mark(why, (frame["safety"] == "unsafe").fill_null(False), "unsafe")
        if self.dedup is not None and embeddings is not None:
            for row, first in _duplicates(frame["id"].to_list(), embeddings, self.dedup, why).items():
                why[row] = f"duplicate of {first}"
        eligible = [i for i, reason in enumerate(why) if reason is None]
        if rule is not None:
            for text, part in rule.conjuncts():
                _mark(why, ~frame.select(_expression(part, frame, rule.text))[:, 0], f"rule: {text}")
        merit = _merit(frame, self.seed)
        if self.repair is not None:
            for row in self._repaired(frame, why, eligible, merit, self.repair):
                why[row] = None
        if self.target_size is not None:
            kept = [i for i, reason in enumerate(why) if reason is None]
            if self.target_size > len(kept):
                raise InputError(f"target_size {self.target_size} is above the {len(kept)} rows that the rules admit")
            for row in self._beyond(frame, kept, merit, self.target_size):
                why[row] = "target size"
        return _selection(frame, why, merit)

    def _check(self, frame: pl.DataFrame, embeddings: np.ndarray | None) -> None:
        for name in ("id", "safety") if "unsafe" in self.drop else ("id",):
            if name not in frame.columns:
                raise unknown("column that curation needs", name, frame.columns)
        if frame["id"].n_unique() < frame.height:
            twice = frame["id"].filter(frame["id"].is_duplicated())[0]
            raise InputError(f"id {twice!r} stands for several rows: ids of their own are expected")
        if self.repair is not None:
            for name in (self.repair.column, "quality"):
                if name not in frame.columns:
                    raise unknown("column that the repair needs", name, frame.columns)
        if self.dedup is not None and (embeddings is None or len(embeddings) != frame.height):
            given = "none" if embeddings is None else f"{len(embeddings)}"
            raise InputError(f"dedup needs an embedding of each of the {frame.height} rows: {given} given")
        if isinstance(self.keep, Rule):
            self.keep.expression(frame)
            _check_scales(frame, self.keep)

    def _repaired(
        self, frame: pl.DataFrame, why: list[str | None], eligible: list[int], merit: np.ndarray, balance: TaskBalance
    ) -> list[int]:
        """The dropped rows that come back."""
        categories = [_word(c) for c in frame[balance.column]]
        reference = _shares([categories[i] for i in eligible]) if balance.reference == "source" else balance.reference
        floor = ORDERED["quality"].index(balance.min_quality)
        ranks = _ranks(frame, "quality")
        kept = [i for i in eligible if why[i] is None]
        spare: dict[str, list[int]] = {category: [] for category in reference}
        for i in sorted((i for i in eligible if why[i] is not None and ranks[i] >= floor), key=lambda i: -merit[i]):
            spare.setdefault(categories[i], []).append(i)
        have = {c: sum(categories[i] == c for i in kept) for c in {*reference, *categories}}
        total = float(len(kept))
        most = max([total, *(have[c] / share for c, share in reference.items() if share)])  # where the mix is exact
        while True:  # the fewest rows that bring every share within the tolerance
            more = {c: min(max(0, round(s * total) - have[c]), len(spare[c])) for c, s in reference.items()}
            everything = max(1, sum(have.values()) + sum(more.values()))
            off = {c: (have[c] + more[c]) / everything - share for c, share in reference.items()}
            if not (far := [c for c, gap in off.items() if abs(gap) > balance.tolerance]) or total >= most:
                break
            total = min(most, total * 1.002 + 1)
        if far:
            said = ", ".join(f"{c} {off[c]:+.3f}" for c in far)
            warnings.warn(f"too few rows to bring back: shares off their reference: {said}", stacklevel=3)
        return [i for c, n in more.items() for i in spare[c][:n]]

    def _beyond(self, frame: pl.DataFrame, kept: list[int], merit: np.ndarray, size: int) -> list[int]:
        """The rows to leave out: the worst ones, within each category where the mix is to be kept."""
        best = sorted(kept, key=lambda i: -merit[i])
        if self.repair is None:
            return best[size:]
        categories = [_word(c) for c in frame[self.repair.column]]
        counts = _shares([categories[i] for i in kept])
        quota = _apportion(counts, size)
        chosen: set[int] = set()
        for category, n in quota.items():
            chosen |= set([i for i in best if categories[i] == category][:n])
        return [i for i in kept if i not in chosen]


@dataclass(frozen=True)
class DatasetProfile:
    """Shares of every category column, quantiles of every numeric one, and the number of rows."""

    name: str
    rows: int
    shares: Mapping[str, Mapping[str, float]]
    quantiles: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two profiles and the Jensen–Shannon divergence, in bits from 0 to 1, of each column they share."""

    first: DatasetProfile
    second: DatasetProfile
    divergences: Mapping[str, float]

    def plot(self, path: str | Path) -> Path:
        """One panel of paired bars a column, written as an image."""
        from matplotlib.figure import Figure

        columns = list(self.divergences)
        figure = Figure(figsize=(9, 1 + 2.4 * len(columns)), layout="constrained")
        for place, column in enumerate(columns):
            axes = figure.add_subplot(len(columns), 1, place + 1)
            mine, other = self.first.shares[column], self.second.shares[column]
            words = sorted({*mine, *other}, key=lambda word: -mine.get(word, 0) - other.get(word, 0))
            at = np.arange(len(words))
            for shift, profile in ((-0.2, self.first), (0.2, self.second)):
                heights = [profile.shares[column].get(word, 0) for word in words]
                axes.bar(at + shift, heights, 0.4, label=f"{profile.name} ({profile.rows:,})")
            axes.set_xticks(at, words, rotation=30, ha="right", fontsize=8)
            axes.set_title(f"{column}: divergence {self.divergences[column]:.3f} bit", fontsize=10)
            axes.set_ylabel("share")
        figure.axes[0].legend(fontsize=8)
        figure.savefig(Path(path))
        return Path(path)


def profile(table: Table, by: Sequence[str] = ("source", "turns", "task"), name: str = "data") -> DatasetProfile:
    """What a set is made of: shares of the values of the columns ``by``, quantiles (0, .25, .5, .75, 1) of numbers.

    >>> profile(pl.DataFrame({"task": ["math", "math", "editing", None]}), by=["task"]).shares["task"]
    {'editing': 0.25, 'math': 0.5, 'none': 0.25}
    """
    frame = _frame(table)
    for column in by:
        if column not in frame.columns:
            raise unknown("column to profile", column, frame.columns)
    if frame.height == 0:
        raise InputError("the table is empty: at least one row is expected")
    shares = {column: {_word(k): v for k, v in _shares(frame[column].to_list()).items()} for column in by}
    numbers = [c for c in frame.columns if frame[c].dtype.is_numeric() and c != "row" and frame[c].drop_nulls().len()]
    quantiles = {
        c: tuple(float(np.quantile(frame[c].drop_nulls(), q)) for q in (0, 0.25, 0.5, 0.75, 1)) for c in numbers
    }
    return DatasetProfile(name, frame.height, {c: dict(sorted(s.items())) for c, s in shares.items()}, quantiles)


def compare(first: DatasetProfile, second: DatasetProfile) -> Comparison:
    """How differently two sets are made, column by column.

    >>> a = profile(pl.DataFrame({"task": ["math", "editing"]}), by=["task"])
    >>> b = profile(pl.DataFrame({"task": ["math", "math"]}), by=["task"])
    >>> round(compare(a, b).divergences["task"], 3), compare(a, a).divergences["task"]
    (0.311, 0.0)
    """
    from scipy.spatial.distance import jensenshannon

    columns = [column for column in first.shares if column in second.shares]
    if not columns:
        raise InputError("the profiles have no column in common: profile both by the same columns")
    found = {}
    for column in columns:
        words = sorted({*first.shares[column], *second.shares[column]})
        p, q = ([shares[column].get(word, 0.0) for word in words] for shares in (first.shares, second.shares))
        found[column] = float(jensenshannon(p, q, base=2) ** 2)
    return Comparison(first, second, found)


def _selection(frame: pl.DataFrame, why: list[str | None], merit: np.ndarray) -> Selection:
    kept = np.array([i for i, reason in enumerate(why) if reason is None], dtype=np.int64)
    ids = frame["id"].to_list()
    return Selection(
        indices=kept,
        ids=tuple(ids[i] for i in kept),
        scores=merit,
        weights=np.ones(len(kept)),
        reasons={i: reason for i, reason in enumerate(why) if reason is not None},
        names=ids,
    )


def _frame(table: Table) -> pl.DataFrame:
    return table.frame if isinstance(table, AnnotationTable) else table


def _mark(why: list[str | None], which: pl.Series, reason: str) -> None:
    """Give the reason to the rows that have none yet."""
    for i in np.flatnonzero(which.to_numpy()):
        if why[i] is None:
            why[i] = reason


def _check_scales(frame: pl.DataFrame, rule: Rule) -> None:
    """A reward on several scales may only be compared within its source."""
    if "reward_scale" not in frame.columns or frame["reward_scale"].drop_nulls().n_unique() < 2:
        return
    scales = ", ".join(sorted(frame["reward_scale"].drop_nulls().unique()))
    for part in _leaves(rule.tree):
        if part.column in REWARDS and part.by is None:
            raise InputError(
                f"rule «{rule.text}» compares {part.column} over several scales ({scales}): a quantile by source,"
                f" {part.column}>=q(.5, by='source'), is expected"
            )


def _duplicates(ids: list[str], embeddings: np.ndarray, distance: float, why: list[str | None]) -> dict[int, str]:
    """Row → the id that stays, for every row that is not the smallest id of its cluster."""
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import NearestNeighbors

    rows = np.array([i for i, reason in enumerate(why) if reason is None])
    if len(rows) < 2:
        return {}
    points = np.asarray(embeddings, dtype=np.float64)[rows]
    graph = NearestNeighbors(radius=np.nextafter(distance, 0)).fit(points).radius_neighbors_graph(mode="connectivity")
    _, cluster = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    for row, c in zip(rows, cluster, strict=True):
        first[c] = min(first.get(c, ids[row]), ids[row])
    return {int(row): first[c] for row, c in zip(rows, cluster, strict=True) if ids[row] != first[c]}


def _merit(frame: pl.DataFrame, seed: int) -> np.ndarray:
    """One number a row to rank by: quality, then the rank of the reward within its source, then a hash of the id."""
    quality = _ranks(frame, "quality") if "quality" in frame.columns else np.zeros(frame.height)
    reward = np.zeros(frame.height)
    groups = ["source"] if "source" in frame.columns else []
    for column in ("st_reward", "mt_reward"):
        if column in frame.columns:
            rank = pl.col(column).rank("average") / pl.col(column).count()
            share = frame.select((rank.over(groups) if groups else rank).fill_null(0.0))[:, 0].to_numpy()
            reward = np.maximum(reward, share)
    noise = [int.from_bytes(hashlib.sha256(f"{seed} {i}".encode()).digest()[:6], "big") / 2**48 for i in frame["id"]]
    return quality + 0.99 * reward + 0.0099 * np.array(noise) / max(1, frame.height)


def _ranks(frame: pl.DataFrame, column: str) -> np.ndarray:
    """The place of each word on its scale, -1 for an empty cell."""
    scale = ORDERED[column]
    return np.array([scale.index(word) if word in scale else -1 for word in frame[column].to_list()])


def _shares(values: Sequence[Any]) -> dict[Any, float]:
    words, counts = np.unique([_word(v) for v in values], return_counts=True)
    return dict(zip(words.tolist(), (counts / counts.sum()).tolist(), strict=True))


def _apportion(shares: Mapping[Any, float], size: int) -> dict[Any, int]:
    """Whole numbers in proportion, by largest remainders."""
    exact = {key: share * size for key, share in shares.items()}
    found = {key: math.floor(value + 1e-9) for key, value in exact.items()}
    for key in sorted(exact, key=lambda k: (found[k] - exact[k], str(k)))[: size - sum(found.values())]:
        found[key] += 1
    return found


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _leaves(tree: Any) -> list[_Comparison]:
    return [tree[1]] if tree[0] == "compare" else [leaf for part in tree[1:] for leaf in _leaves(part)]


def _written(tree: Any) -> str:
    """A part of a rule as text."""
    if tree[0] == "compare":
        part = tree[1]
        by = f", by='{part.by}'" if part.by else ""
        value = f"q({part.quantile:g}{by})" if part.quantile is not None else part.value
        return (
            f"{part.column}{part.operator}{value:g}"
            if isinstance(value, float)
            else f"{part.column}{part.operator}{value}"
        )
    if tree[0] == "~":
        return f"~({_written(tree[1])})"
    return f" {tree[0]} ".join(f"({_written(p)})" if p[0] in "&|" else _written(p) for p in tree[1:])


_COMPARE: dict[str, Callable[[pl.Expr, Any], pl.Expr]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _expression(tree: Any, table: pl.DataFrame, text: str) -> pl.Expr:
    if tree[0] == "~":
        return ~_expression(tree[1], table, text)
    if tree[0] in "&|":
        parts = [_expression(part, table, text) for part in tree[1:]]
        return pl.all_horizontal(parts) if tree[0] == "&" else pl.any_horizontal(parts)
    part: _Comparison = tree[1]
    column, value = pl.col(part.column), part.value
    numeric = table[part.column].dtype.is_numeric()
    if part.quantile is not None:
        if not numeric:
            raise InputError(f"rule «{text}»: column {part.column!r} holds no numbers to take a quantile of")
        found = column.quantile(part.quantile, interpolation="higher")
        return _COMPARE[part.operator](column, found.over(part.by) if part.by else found).fill_null(False)
    if part.column in ORDERED and not numeric:
        scale = ORDERED[part.column]
        if value not in scale:
            raise unknown(f"{part.column} in the rule «{text}»", value, scale)
        ranks = column.replace_strict({word: i for i, word in enumerate(scale)}, default=None, return_dtype=pl.Int64)
        return _COMPARE[part.operator](ranks, scale.index(str(value))).fill_null(False)
    if numeric != isinstance(value, float):
        kind = "numbers" if numeric else "words"
        raise InputError(f"rule «{text}»: column {part.column!r} holds {kind} and is compared with {value!r}")
    return _COMPARE[part.operator](column, pl.lit(value)).fill_null(False)


_TOKEN = re.compile(
    r"\s*(?:(?P<compare>[=!<>]=|[<>])|(?P<sign>[()&|~,=])|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<word>[A-Za-z_]\w*)|'(?P<text>[^']*)'|\"(?P<text2>[^\"]*)\")"
)


def _tokens(text: str) -> list[tuple[str, str, int]]:
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise InputError(
                f"rule «{text}», at {text[at : at + 20]!r} (character {at + 1}): this is no part of a rule"
            )
        kind = str(match.lastgroup)
        found.append((kind.rstrip("2"), match[kind], match.start(kind)))
        at = match.end()
    if not found:
        raise InputError("the rule is empty: a comparison such as quality>=good is expected")
    return found
