"""What documents are ranked by: a column of scores, a sum or difference of columns, chance, or importance resampling.

Reach for ``rule("prior - conditional")`` or the functions here; ``select`` takes either. Resampling adds Gumbel noise
to log weights and takes the top, which draws without replacement in proportion to the weights (Xie et al. 2023, DSIR).
Chance comes from a hash of seed and id: the order of the documents has no part in it.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from downriver.core.errors import InputError, unknown

Normalize = Literal["rank", "zscore"]
_TERM = re.compile(r"(?:([0-9.eE+-]*[0-9.])\s*\*\s*)?([A-Za-z0-9_][\w.+-]*)")
_RESAMPLE = re.compile(r"resample\((.+)\)")


@dataclass(frozen=True)
class Rule:
    """Higher values are chosen first. ``weights`` by column; ``kind`` says what is done with their sum."""

    kind: Literal["sum", "random", "resample"]
    weights: Mapping[str, float]
    normalize: Normalize | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return list(self.weights)

    def values(self, columns: Mapping[str, np.ndarray], ids: Sequence[str], seed: int) -> np.ndarray:
        """What to rank by, (n,) float64, from finite columns (n,) of the documents with these ids."""
        if self.kind == "random":
            return uniform(ids, seed)
        found = np.zeros(len(ids))
        for column, weight in self.weights.items():
            found += weight * normalized(columns[column], self.normalize)
        if self.kind == "resample":
            found += -np.log(-np.log(uniform(ids, seed)))  # Gumbel(0, 1)
        return found


def top(column: str, *, lowest: bool = False) -> Rule:
    """The highest (or lowest) values of one column.

    >>> top("loss", lowest=True).weights
    {'loss': -1.0}
    """
    return Rule("sum", {column: -1.0 if lowest else 1.0})


def difference(first: str, second: str) -> Rule:
    """The highest values of ``first - second``: CoLoR is ``difference("prior", "conditional")``."""
    return Rule("sum", {first: 1.0, second: -1.0})


def weighted(weights: Mapping[str, float], normalize: Normalize | None = None) -> Rule:
    """The highest weighted sums of columns, of their ranks or of their z-scores.

    >>> weighted({"edu": 0.5, "dsir": 0.5}, "rank").columns
    ['edu', 'dsir']
    """
    if not weights or not all(np.isfinite(list(weights.values()))):
        raise InputError(f"weights {dict(weights)}: a finite number for at least one column is expected")
    return Rule("sum", dict(weights), normalize)


def random() -> Rule:
    """Documents drawn evenly."""
    return Rule("random", {})


def resample(column: str) -> Rule:
    """Documents drawn without replacement, in proportion to the exponential of a column of log importances."""
    return Rule("resample", {column: 1.0})


def rule(text: "str | Rule") -> Rule:
    """A rule as text: ``quality``, ``prior - conditional``, ``0.3*edu + 0.7*dsir``, ``random``, ``resample(dsir)``.

    Signs between columns stand between spaces, because names may hold them.

    >>> rule("0.3*edu - ad-share").weights
    {'edu': 0.3, 'ad-share': -1.0}
    """
    if isinstance(text, Rule):
        return text
    text = text.strip()
    if text == "random":
        return random()
    if found := _RESAMPLE.fullmatch(text):
        return resample(found[1].strip())
    weights: dict[str, float] = {}
    parts = re.split(r"\s+([+-])\s+", text)
    for sign, part in zip(["+", *parts[1::2]], parts[::2], strict=True):
        negative = part.startswith("-") and not part[1:2].isdigit()
        term = _TERM.fullmatch(part[1:].strip() if negative else part)
        if term is None:
            raise InputError(f"rule {text!r}: {part!r} is no column, or number*column, joined by ' + ' and ' - '")
        try:
            weight = float(term[1] or 1)
        except ValueError:
            raise InputError(f"rule {text!r}: {term[1]!r} is no number") from None
        weights[term[2]] = weights.get(term[2], 0.0) + weight * (-1 if sign == "-" else 1) * (-1 if negative else 1)
    return weighted(weights)


def normalized(values: np.ndarray, how: Normalize | None) -> np.ndarray:
    """Values as they are, as ranks in (0, 1] (equal values share the mean rank), or with mean 0 and deviation 1.

    >>> normalized(np.array([10.0, 0.1, 10.0, 7.0]), "rank").tolist()
    [0.875, 0.25, 0.875, 0.5]
    """
    values = np.asarray(values, dtype=np.float64)
    if how is None:
        return values
    if how == "rank":
        return pl.Series(values).rank("average").to_numpy() / max(len(values), 1)
    if how == "zscore":
        return (values - values.mean()) / (values.std() or 1.0)
    raise unknown("normalisation", how, ("rank", "zscore"))


def uniform(ids: Sequence[str], seed: int) -> np.ndarray:
    """A number in (0, 1) for every id and seed, (n,)."""
    return (keys(ids, f"draw {seed}") >> np.uint64(11)) * 2.0**-53 + 2.0**-54


def keys(ids: Sequence[str], salt: str = "tie") -> np.ndarray:
    """A 64-bit hash of every id, (n,): equal scores are told apart by it."""
    key = salt.encode()
    digests = (hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for i in ids)
    return np.frombuffer(b"".join(digests), dtype="<u8")
