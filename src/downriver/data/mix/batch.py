"""Mixtures that one batch can hold: every way to fill it, by number, and a sampler whose batches are exactly so.

Reach for it where the ratio has to hold in every batch, as in fine-tuning runs of a few hundred steps. Shi et al. 2025,
«DaMo: Data Mixing Optimizer in Fine-tuning Multimodal LLMs for Mobile Phone Agents», arXiv:2510.19336: m sets and a
batch of b give C(b + m - 1, m - 1) mixtures. Departures: they are counted, so that any of them can be had without
listing those before it; limits on a set leave out what breaks them instead of rejecting it; each batch is shuffled.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import derive_seed, generator
from downriver.data.mix.sampler import MixtureSampler
from downriver.data.mix.space import Array

CHUNK = 200_000


class BatchMixtureSpace:
    """All mixtures k/b of named sets with whole numbers k of rows a batch, in lexicographic order.

    Args:
        domains: names of the sets, or how many there are.
        batch_size: b.
        limits: lowest and highest share by set, for those that have any; ends count as allowed.

    Raises ``InputError`` for fewer than two sets, an unknown set, and limits that leave no mixture.

    >>> space = BatchMixtureSpace(("web", "code"), 3)
    >>> space.size, (space.unrank(range(4)) * 3).round().astype(int).tolist()
    (4, [[0, 3], [1, 2], [2, 1], [3, 0]])
    >>> BatchMixtureSpace(12, 16).size
    13037895
    >>> BatchMixtureSpace(("web", "code"), 10, {"code": (0.2, 0.45)}).size
    3
    """

    def __init__(
        self,
        domains: int | Sequence[str],
        batch_size: int,
        limits: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        names = [f"domain {i}" for i in range(domains)] if isinstance(domains, int) else domains
        self.domains = tuple(map(str, names))
        if len(self.domains) < 2 or len(set(self.domains)) < len(self.domains):
            raise InputError(f"domains {list(self.domains)}: two different names at least are expected")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: at least 1 is expected")
        self.batch_size = batch_size
        self.limits = dict(limits or {})
        low, high = [0] * len(self.domains), [batch_size] * len(self.domains)
        for name, (least, most) in self.limits.items():
            if name not in self.domains:
                raise unknown("domain in limits", name, self.domains)
            if not 0 <= least <= most <= 1:
                raise InputError(
                    f"limits of {name!r} are {least} and {most}: two shares, the lower first, are expected"
                )
            index = self.domains.index(name)
            low[index], high[index] = math.ceil(least * batch_size - 1e-9), math.floor(most * batch_size + 1e-9)
        self._low, self._high = low, high
        if self.size == 0:
            raise InputError(f"limits {self.limits}: no batch of {batch_size} keeps to them")

    @property
    def size(self) -> int:
        """How many mixtures there are."""
        return self._ways[0][-1]

    def __contains__(self, mixture: Any) -> bool:
        whole = np.asarray(mixture, dtype=np.float64) * self.batch_size
        k = np.rint(whole)
        return bool(
            k.shape == (len(self.domains),)
            and np.abs(whole - k).max() < 1e-6
            and k.sum() == self.batch_size
            and ((k >= self._low) & (k <= self._high)).all()
        )

    def unrank(self, numbers: Any) -> Array:
        """The mixtures with these numbers (from 0), (n, m); one number gives one mixture, (m,)."""
        asked = np.asarray(list(numbers) if isinstance(numbers, range) else numbers)
        rank = np.array(asked, dtype=self._kind).reshape(-1)
        if len(rank) and not (rank.min() >= 0 and rank.max() < self.size):
            raise InputError(f"number {rank.min()} to {rank.max()}: from 0 to {self.size - 1} is expected")
        left = np.full(len(rank), self.batch_size, dtype=self._kind)  # rows of the batch that are not filled yet
        counts = np.empty((len(rank), len(self.domains)), dtype=np.int64)
        for before, column in zip(self._before, counts.T, strict=True):
            place = np.searchsorted(before, left * (self.size + 1) + rank, side="right") - 1
            rank += left * (self.size + 1) - before[place]
            column[:] = place - left.astype(np.int64) * (self.batch_size + 2)
            left -= column
        return (counts / self.batch_size).reshape(*asked.shape, -1)

    def iter(self, chunk: int = CHUNK) -> Iterator[Array]:
        """All mixtures in order, (chunk, m) at a time; memory stays at one chunk."""
        for start in range(0, self.size, chunk):
            yield self.unrank(range(start, min(start + chunk, self.size)))

    def sample(self, n: int, seed: int = 0) -> Array:
        """``n`` different mixtures, each as likely as any, (n, m)."""
        if not 1 <= n <= self.size:
            raise InputError(f"{n} different mixtures are asked for: from 1 to {self.size} are expected")
        rng = generator("batch mixtures", seed)
        if self._kind is np.int64:
            return self.unrank(rng.choice(self.size, n, replace=False))
        digits = (self.size.bit_length() + 95) // 32  # so many 32-bit words that the remainder is as good as even
        found: dict[int, None] = {}
        while len(found) < n:
            words = rng.integers(2**32, size=digits, dtype=np.uint64).tolist()
            found[sum(word << (32 * i) for i, word in enumerate(words)) % self.size] = None
        return self.unrank(list(found))

    def nearest(self, weights: Mapping[str, float]) -> Array:
        """The mixture nearest to any shares: whole rows, the rest to the largest remainders within the limits."""
        exact = np.array([weights[name] for name in self.domains], dtype=np.float64)
        exact = exact / exact.sum() * self.batch_size
        low, high = np.array(self._low), np.array(self._high)
        k = np.clip(np.floor(exact + 1e-9).astype(np.int64), low, high)
        while (missing := self.batch_size - int(k.sum())) != 0:
            room = k < high if missing > 0 else k > low
            wish = np.where(room, (exact - k) * np.sign(missing), -np.inf)
            k[int(wish.argmax())] += int(np.sign(missing))
        return k / self.batch_size

    @cached_property
    def _kind(self) -> Any:
        return np.int64 if (self.batch_size + 2) * (self.size + 1) < 2**62 else object

    @cached_property
    def _ways(self) -> list[list[int]]:
        """In how many ways the sets from j on can fill r rows, [j][r]."""
        b = self.batch_size
        ways = [[1] + [0] * b]  # no set left fills nothing
        for low, high in zip(reversed(self._low), reversed(self._high), strict=True):
            after = ways[0]
            ways.insert(0, [sum(after[r - k] for k in range(low, min(high, r) + 1)) for r in range(b + 1)])
        return ways

    @cached_property
    def _before(self) -> list[NDArray[Any]]:
        """For each set: how many mixtures have fewer than k rows of it when r rows are left, plus r·(size + 1).

        One rising list over r, then k (0 to b + 1), so that one search finds k for any r.
        """
        b = self.batch_size
        tables = []
        for low, high, after in zip(self._low, self._high, self._ways[1:], strict=True):
            table = []
            for r in range(b + 1):
                table.append(r * (self.size + 1))
                for k in range(b + 1):
                    table.append(table[-1] + (after[r - k] if low <= k <= min(high, r) else 0))
            tables.append(np.array(table, dtype=self._kind))
        return tables


class BatchMixtureSampler(torch.utils.data.Sampler[list[int]]):
    """Batches with exactly ``ratio · batch_size`` rows of every set: a ``batch_sampler`` for a DataLoader.

    Args:
        datasets: the sets, or how many rows each has, by name. Rows are numbered through all sets in this order.
        ratio: the share of each set, by name.
        batch_size: rows a batch.
        batches: how many batches; ``None``: without end.
        seed: of the order. A set's rows come once each in a random order before any comes again.

    ``row(visit)`` is an ``order`` for ``training.fine_tune`` (with the same batch size); ``state_dict`` says how many
    batches were given, ``load_state_dict`` continues there. Raises ``InputError`` for a ratio that is no whole number
    of rows.

    >>> sampler = BatchMixtureSampler({"web": 6, "code": 3}, {"web": 0.75, "code": 0.25}, 4, batches=3)
    >>> [sum(row >= 6 for row in batch) for batch in sampler]
    [1, 1, 1]
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        ratio: Mapping[str, float],
        batch_size: int,
        *,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        sizes = {name: rows if isinstance(rows, int) else len(rows) for name, rows in datasets.items()}
        total = sum(ratio.values())
        for name, share in ratio.items():
            rows = share / total * batch_size if total > 0 else math.nan
            if math.isfinite(rows) and abs(rows - round(rows)) > 1e-6:
                raise InputError(
                    f"{name!r} has {rows:.4g} of {batch_size} rows a batch: a whole number is expected"
                    " (BatchMixtureSpace.nearest finds the nearest mixture)"
                )
        self._mixture = MixtureSampler(sizes, ratio, period=batch_size, seed=derive_seed("batches", seed))
        self.batch_size, self.batches, self.given = batch_size, batches, 0

    def __len__(self) -> int:
        """How many batches; a ``TypeError`` where there is no end."""
        if self.batches is None:
            raise TypeError("a sampler without end has no length")
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count(self.given) if self.batches is None else range(self.given, self.batches):
            self.given = batch + 1
            yield [self.row(batch * self.batch_size + i) for i in range(self.batch_size)]
        self.given = 0

    def row(self, visit: int) -> int:
        """The row that a visit goes to, numbered through all sets."""
        return self._mixture.row(visit)

    def epochs(self, batches: int) -> dict[str, float]:
        """How often each set is gone through by so many batches."""
        return self._mixture.epochs(batches * self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """How many batches were given since the beginning."""
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where the state was taken."""
        self.given = int(state["given"])
