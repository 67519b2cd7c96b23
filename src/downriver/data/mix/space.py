"""The mixtures that may be trained on: shares of named domains, each below a cap, and random designs over them.

Reach for ``sample_mixtures`` to lay out a sweep of small runs. Liu et al. 2024, «RegMix: Data Mixture as Regression for
Language Model Pre-training», arXiv:2407.01492; defaults are those of its public code. Departure: shares are rounded so
that they still sum to 1 exactly, and a cap counts after rounding.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator

Array = NDArray[np.float64]

MOST_DRAWS = 5_000_000
OFF = 1e-2  # how far from 1 the shares of a row may sum: published tables are off by up to 3e-3


@dataclass(frozen=True)
class MixtureSpace:
    """Named domains, their natural shares, and how much of each a mixture may hold.

    Args:
        domains: names; everything is matched by them, never by position.
        prior: natural share of each domain, by name or in the order of ``domains``; by default its share of
            ``available_tokens``, else equal shares. Scaled to sum to 1.
        max_repeat: how often a domain may be repeated. With ``token_budget`` and ``available_tokens`` a domain's cap
            is ``max_repeat * available / budget``; without, the paper's ``max_repeat`` times its natural share.
            15 is the paper's; with real token counts 4 is usual.
        token_budget: tokens of the run that the mixture is for.
        available_tokens: tokens that each domain has.

    Raises ``InputError`` for fewer than two domains, a name given twice or unknown, shares that are not positive, and
    caps that leave no mixture.

    >>> space = MixtureSpace(("web", "code", "wiki"), {"wiki": 1, "web": 8, "code": 1}, max_repeat=4)
    >>> space.prior.tolist(), space.caps.tolist()
    ([0.8, 0.1, 0.1], [1.0, 0.4, 0.4])
    """

    domains: tuple[str, ...]
    prior: Any = None
    max_repeat: float = 15.0
    token_budget: float | None = None
    available_tokens: Any = None

    def __post_init__(self) -> None:
        names = tuple(map(str, self.domains))
        object.__setattr__(self, "domains", names)
        if len(names) < 2 or len(set(names)) != len(names):
            raise InputError(f"domains {list(names)}: two different names at least are expected")
        if not self.max_repeat > 0:
            raise InputError(f"max_repeat is {self.max_repeat}: a positive number is expected")
        available = None if self.available_tokens is None else self._by_name("available_tokens", self.available_tokens)
        object.__setattr__(self, "available_tokens", available)
        given = self.prior if self.prior is not None else np.ones(len(names)) if available is None else available
        prior = self._by_name("prior", given)
        object.__setattr__(self, "prior", prior / prior.sum())
        if self.token_budget is not None and (available is None or not self.token_budget > 0):
            raise InputError(f"token_budget {self.token_budget}: a positive number beside available_tokens is expected")
        if self.caps.sum() < 1 - 1e-9:
            raise InputError(
                f"the caps {self.named(self.caps)} sum to {self.caps.sum():.3g}: no mixture keeps to them;"
                " raise max_repeat or lower token_budget"
            )

    @property
    def caps(self) -> Array:
        """The largest share of every domain, (d,)."""
        if self.token_budget is not None:
            return np.minimum(1.0, self.max_repeat * self.available_tokens / self.token_budget)
        return np.minimum(1.0, self.max_repeat * self.prior)

    def epochs(self, weights: Array) -> dict[str, float] | None:
        """How often a run with these shares reads each domain; ``None`` without token counts."""
        if self.token_budget is None:
            return None
        return self.named(weights * self.token_budget / self.available_tokens)

    def named(self, values: Array) -> dict[str, float]:
        """Values by domain."""
        return {name: float(value) for name, value in zip(self.domains, values, strict=True)}

    def _by_name(self, what: str, values: Any) -> Array:
        if isinstance(values, Mapping):
            if strange := [name for name in values if name not in self.domains]:
                raise unknown(f"domain in {what}", strange[0], self.domains)
            if missing := [name for name in self.domains if name not in values]:
                raise InputError(f"{what} says nothing of domain {missing[0]!r}")
            values = [values[name] for name in self.domains]
        found = np.asarray(values, dtype=np.float64)
        if found.shape != (len(self.domains),) or not (np.isfinite(found) & (found > 0)).all():
            raise InputError(f"{what}: a positive number for each of {len(self.domains)} domains is expected")
        return found


def sample_mixtures(
    space: MixtureSpace,
    n: int = 512,
    *,
    temperature: float = 0.5,
    strengths: tuple[float, float] = (0.1, 5.0),
    minimum: float = 2e-4,
    oversample: int = 100,
    seed: int = 0,
) -> Array:
    """Draw ``n`` different mixtures, (n, d), each below its caps and in whole multiples of ``minimum``.

    The prior is tempered, q ∝ q^temperature; for each candidate a strength s is drawn from 15 logarithmic steps of
    ``strengths`` and the mixture from Dirichlet(s·q): small strengths give corners, large ones the middle. Shares below
    ``minimum`` become 0. ``oversample`` times as many are drawn, and the sample taken from those that differ.

    Raises ``InputError`` when the caps leave fewer than ``n`` different mixtures within reach.

    >>> space = MixtureSpace(("web", "code", "wiki"), (0.8, 0.1, 0.1), max_repeat=4)
    >>> W = sample_mixtures(space, 64, seed=1)
    >>> W.shape, bool((W <= space.caps + 1e-12).all()), bool(np.allclose(W.sum(axis=1), 1, atol=1e-12))
    ((64, 3), True, True)
    """
    steps = round(1 / minimum)
    if not (0 < minimum < 1 and abs(steps * minimum - 1) < 1e-9):
        raise InputError(f"minimum is {minimum}: a whole fraction of 1, such as 2e-4, is expected")
    if n < 1 or oversample < 1 or not 0 < strengths[0] <= strengths[1]:
        raise InputError(f"n {n}, oversample {oversample}, strengths {strengths}: positive numbers are expected")
    rng = generator("sample_mixtures", seed)
    q = space.prior**temperature
    q /= q.sum()
    levels = np.geomspace(*strengths, 15)
    kept: list[NDArray[np.int64]] = []
    for _ in range(20):  # the caps may refuse most candidates
        counts = rng.multinomial(n * oversample, np.full(len(levels), 1 / len(levels)))
        drawn = np.concatenate([rng.dirichlet(s * q, size=k) for s, k in zip(levels, counts, strict=True)])
        drawn = drawn[(drawn <= space.caps).all(axis=1)]
        drawn[drawn < minimum] = 0.0
        whole = _apportion(drawn / drawn.sum(axis=1, keepdims=True), steps)
        kept.append(whole[(whole <= space.caps * steps + 1e-6).all(axis=1)])
        different = np.unique(np.concatenate(kept), axis=0)
        if len(different) >= n:
            return rng.choice(different, n, replace=False) / steps
    raise InputError(f"only {len(different)} different mixtures keep to the caps: {n} were asked for; raise max_repeat")


def dirichlet(space: MixtureSpace, n: int, strength: float, rng: np.random.Generator) -> Array:
    """``n`` mixtures below the caps, (n, d), from Dirichlet(strength · prior); fewer if five million draws lack them.

    >>> dirichlet(MixtureSpace(("a", "b")), 5, 1.0, np.random.default_rng(0)).shape
    (5, 2)
    """
    found: list[Array] = []
    drawn, kept = 0, 0
    while kept < n and drawn < MOST_DRAWS:
        size = min(MOST_DRAWS - drawn, max(n, 1000))
        some = rng.dirichlet(strength * space.prior, size=size)
        found.append(some[(some <= space.caps + 1e-12).all(axis=1)])
        drawn, kept = drawn + size, kept + len(found[-1])
    return np.concatenate(found)[:n]


def shares(
    W: Any, domains: Sequence[str] | None = None, name: str = "mixtures", off: float = OFF
) -> tuple[Array, tuple[str, ...]]:
    """Mixtures as an array (n, d) whose rows sum to 1, and the names of the domains.

    ``W`` is an array, or a data frame (polars, or a mapping of columns) whose columns are taken by name: with
    ``domains`` exactly these are expected, in any order. Rows that sum to 1 within ``off`` are scaled, with a warning
    where they are off by more than rounding. Raises ``InputError`` naming the row or the column.

    >>> W, names = shares({"code": [0.25, 1.0], "web": [0.75, 0.0]}, ("web", "code"))
    >>> W.tolist(), names
    ([[0.75, 0.25], [0.0, 1.0]], ('web', 'code'))
    """
    columns = getattr(W, "columns", None) if not isinstance(W, Mapping) else list(W)
    if columns is not None:
        names = tuple(map(str, columns)) if domains is None else tuple(domains)
        if missing := [c for c in names if c not in columns]:
            raise InputError(f"{name}: domain {missing[0]!r} is missing (there are: {', '.join(map(str, columns))})")
        if strange := [c for c in columns if c not in names]:
            raise unknown(f"domain in {name}", strange[0], names)
        rows = np.column_stack([np.asarray(W[c], dtype=np.float64) for c in names])
    else:
        rows = np.array(W, dtype=np.float64)
        names = tuple(domains) if domains is not None else tuple(f"domain {i}" for i in range(rows.shape[-1]))
    if rows.ndim != 2 or rows.shape[1] != len(names) or len(rows) == 0:
        raise InputError(f"{name} has shape {rows.shape}: rows of {len(names)} shares are expected")
    bad = ~np.isfinite(rows) | (rows < 0)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise InputError(
            f"{name}, row {row + 1}, domain {names[column]!r}: {rows[row, column]} where a share is expected"
        )
    total = rows.sum(axis=1)
    far = np.abs(total - 1)
    if far.max() > off:
        row = int(far.argmax())
        raise InputError(f"{name}, row {row + 1} sums to {total[row]:.4g}: shares that sum to 1 are expected")
    if far.max() > 1e-6:
        warnings.warn(
            f"{name}: {int((far > 1e-6).sum())} rows do not sum to 1 (off by {far.max():.1e} at most): scaled",
            RuntimeWarning,
            stacklevel=2,
        )
    return rows / total[:, None], names


def _apportion(W: Array, steps: int) -> NDArray[np.int64]:
    """Rows in whole steps that sum to ``steps``: rounded down, the rest to the largest remainders."""
    exact = W * steps
    whole = np.floor(exact + 1e-9).astype(np.int64)
    rank = np.argsort(np.argsort(-(exact - whole), axis=1, kind="stable"), axis=1)
    return whole + (rank < (steps - whole.sum(axis=1))[:, None])
