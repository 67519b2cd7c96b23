"""A mixture of sources as an order of rows: shares that are kept, epochs that are counted, phases, exact resumption.

Reach for it wherever several sources are trained on at once: its ``row`` is an ``order`` for ``training.fine_tune``,
and ``MixtureStream`` is a dataset for any other loop. Which row a visit goes to follows from the visit's number alone,
so a run that continues at visit n sees what it would have seen.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import derive_seed, generator

PERIOD, LONGEST = 1024, 2**20
KEPT = 64  # permutations and periods in memory


class MixtureSampler:
    """Sends visit 0, 1, 2, ... to rows of several sources, in given shares.

    Visits come in periods. At the end of every period each source has had its share of all visits so far to within
    one; inside it the visits of a source are spread evenly, at random distances. A source's rows are visited once
    each in a random order before any comes again, in another order.

    Parameters
    ----------
    sizes
        Rows of each source, by name. Rows are numbered through all sources in this order.
    weights
        The share of each source, by name, scaled to sum to 1; 0 leaves one out.
    lengths
        Mean tokens a row of each source: the weights are then shares of tokens, not of rows.
    phases
        Further weights, each from a visit on: ``[(9000, {"plain": 1})]`` is a cooldown. Sources that go on continue
        with the rows they have not shown yet.
    period
        Visits a period. By default 1024, or as many as the smallest share needs to come up once. With the batch size
        every batch holds the shares exactly, where they are whole numbers of rows.
    seed
        Of the order.

    Raises ``InputError`` naming the source: unknown or missing in the weights, empty though it has a share, a share
    below one in a million or one that ``period`` has no room for; phases out of order.

    >>> sampler = MixtureSampler({"web": 100, "code": 10}, {"web": 3, "code": 1}, period=4)
    >>> rows = [sampler.row(visit) for visit in range(40)]
    >>> sum(row >= 100 for row in rows), sampler.epochs(40)
    (10, {'web': 0.3, 'code': 1.0})
    >>> sorted(row for row in rows if row >= 100) == list(range(100, 110))
    True
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        lengths: Mapping[str, float] | None = None,
        phases: Sequence[tuple[int, Mapping[str, float]]] = (),
        period: int | None = None,
        seed: int = 0,
    ) -> None:
        if not sizes:
            raise InputError("a mixture of no sources: one at least is expected")
        self.names = tuple(sizes)
        self.sizes = np.array([sizes[name] for name in self.names], dtype=np.int64)
        if (self.sizes < 0).any():
            raise InputError(f"source {self.names[int(self.sizes.argmin())]!r} has a negative number of rows")
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.seed = seed
        starts = [0, *(start for start, _ in phases)]
        if any(a >= b for a, b in pairwise(starts)):
            raise InputError(f"phases start at {starts[1:]}: rising numbers above 0 are expected")
        self._phases: list[_Phase] = []
        before = np.zeros(len(self.names), dtype=np.int64)
        for number, given in enumerate([weights, *(w for _, w in phases)]):
            shares = self._shares(given, lengths)
            phase = _Phase(starts[number], shares, self._period(shares, period), before, (seed, number))
            self._phases.append(phase)
            if number + 1 < len(starts):
                before = phase.counts(starts[number + 1])
        self._orders: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """Rows of all sources together."""
        return int(self.sizes.sum())

    def row(self, visit: int) -> int:
        """The row that a visit goes to, numbered through all sources."""
        source, place = self.source(visit)
        return int(self.offsets[source]) + self._order(source, place)

    def source(self, visit: int) -> tuple[int, int]:
        """The number of the source of a visit, and how often the source was visited before."""
        if visit < 0:
            raise InputError(f"visit {visit}: a number from 0 is expected")
        return self._at(visit).source(visit)

    def counts(self, visits: int) -> dict[str, int]:
        """How often each source is visited by the first ``visits`` visits."""
        found = self._at(max(visits - 1, 0)).counts(visits)
        return dict(zip(self.names, found.tolist(), strict=True))

    def epochs(self, visits: int) -> dict[str, float]:
        """How often each source is gone through by the first ``visits`` visits (0 for an empty source)."""
        counts = self.counts(visits)
        return {n: counts[n] / int(size) if size else 0.0 for n, size in zip(self.names, self.sizes, strict=True)}

    def _at(self, visit: int) -> "_Phase":
        return next(phase for phase in reversed(self._phases) if visit >= phase.start)

    def _order(self, source: int, place: int) -> int:
        epoch, inside = divmod(place, int(self.sizes[source]))
        key = source, epoch
        if key not in self._orders:
            rng = generator("mixture order", self.seed, self.names[source], epoch)
            self._orders[key] = rng.permutation(int(self.sizes[source]))
            if len(self._orders) > max(KEPT, 2 * len(self.names)):
                self._orders.popitem(last=False)
        return int(self._orders[key][inside])

    def _shares(self, weights: Mapping[str, float], lengths: Mapping[str, float] | None) -> NDArray[np.float64]:
        for name in weights:
            if name not in self.names:
                raise unknown("source in weights", name, self.names)
        for what, values in (("weights", weights), ("lengths", lengths)):
            if values is not None and (missing := [n for n in self.names if n not in values]):
                raise InputError(f"{what} say nothing of source {missing[0]!r}")
        shares = np.array([weights[name] for name in self.names], dtype=np.float64)
        if not (np.isfinite(shares) & (shares >= 0)).all() or shares.sum() <= 0:
            raise InputError(f"weights {dict(weights)}: numbers of at least 0, one of them above, are expected")
        if lengths is not None:
            each = np.array([lengths[name] for name in self.names], dtype=np.float64)
            if not (np.isfinite(each) & (each > 0)).all():
                raise InputError(f"lengths {dict(lengths)}: positive numbers of tokens are expected")
            shares = shares / each
        shares /= shares.sum()
        for name, share, size in zip(self.names, shares, self.sizes, strict=True):
            if share > 0 and size == 0:
                raise InputError(f"source {name!r} has a share of {share:.3g} and no rows")
            if 0 < share < 1 / LONGEST:
                raise InputError(f"source {name!r} has a share of {share:.2g}: 0 or one in a million is expected")
        return shares

    def _period(self, shares: NDArray[np.float64], period: int | None) -> int:
        needed = math.ceil(1 / shares[shares > 0].min() - 1e-9)
        if period is None:
            return max(PERIOD, needed)
        if not needed <= period <= LONGEST:
            name = self.names[int(np.where(shares > 0, shares, 2).argmin())]
            raise InputError(
                f"period is {period}: {needed} visits at least are expected, for source {name!r} to come up in each"
            )
        return period


class MixtureStream(torch.utils.data.IterableDataset):
    """A mixture as a dataset for any training loop: endless rows, each with the sampler's order, and a state.

    Args:
        sources: indexable rows (lists, ``datasets.Dataset``) by name, in the order of the sampler's.
        sampler: which row comes when.
        visits: how many rows altogether, of all parts; ``None``: without end.
        part: which part of the visits this process takes, and of how many: ``(rank, world_size)`` in a loop of your
            own. The default, all of them, is right for ``transformers.Trainer`` and accelerate, which share out the
            rows of one stream among the processes themselves.

    Several workers of a ``DataLoader`` share their process' visits. ``state_dict`` says how many rows this process has
    given (set ``num_workers`` to 0 to resume exactly); ``load_state_dict`` continues there. Raises ``InputError`` for
    sources that are not the sampler's, and a part that is none.

    >>> sampler = MixtureSampler({"a": 2, "b": 1}, {"a": 1, "b": 1}, period=2)
    >>> stream = MixtureStream({"a": ["a0", "a1"], "b": ["b0"]}, sampler, visits=4)
    >>> sorted(stream)
    ['a0', 'a1', 'b0', 'b0']
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any]],
        sampler: MixtureSampler,
        visits: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if not 0 <= part[0] < part[1]:
            raise InputError(f"part is {part}: the number of a process, from 0, and how many there are, are expected")
        for name, size in zip(sampler.names, sampler.sizes, strict=True):
            if name not in sources or len(sources[name]) != size:
                there = len(sources[name]) if name in sources else "no"
                raise InputError(f"source {name!r} has {there} rows and the sampler knows {size}")
        self.sources, self.sampler, self.visits, self.part, self.given = sources, sampler, visits, part, 0

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        rank, ranks = self.part
        share, number = ranks * workers, rank * workers + own
        while self.visits is None or self.given * share + number < self.visits:
            visit = self.given * share + number
            source, place = self.sampler.source(visit)
            row = self.sources[self.sampler.names[source]][self.sampler._order(source, place)]
            self.given += 1
            yield row
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        """How many rows were given since the beginning."""
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where the state was taken."""
        self.given = int(state["given"])


class _Phase:
    """One set of shares from one visit on; counts of sources are those of all phases together."""

    def __init__(
        self, start: int, shares: NDArray[np.float64], period: int, before: NDArray[np.int64], names: tuple[int, int]
    ) -> None:
        self.start, self.shares, self.period, self.before, self.names = start, shares, period, before, names
        self._layouts: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def source(self, visit: int) -> tuple[int, int]:
        number, place = divmod(visit - self.start, self.period)
        sources, places = self._layout(number)
        return int(sources[place]), int(places[place])

    def counts(self, visits: int) -> NDArray[np.int64]:
        number, place = divmod(max(visits - self.start, 0), self.period)
        found = self.before + self._whole(number)
        if place:
            found += np.bincount(self._layout(number)[0][:place], minlength=len(self.shares))
        return found

    def _whole(self, periods: int) -> NDArray[np.int64]:
        """Visits to each source in so many whole periods: its share, rounded so that all sum up (largest remainders).

        A share times the period is 1 at least, so that no count ever falls from one period to the next.
        """
        exact = self.shares * (periods * self.period)
        counts = np.floor(exact + 1e-9).astype(np.int64)
        left = periods * self.period - int(counts.sum())
        counts[np.argsort(-(exact - counts), kind="stable")[:left]] += 1
        return counts

    def _layout(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every visit of a period its source, and how often that was visited before."""
        if number not in self._layouts:
            first = self._whole(number)
            each = self._whole(number + 1) - first
            sources = np.repeat(np.arange(len(each)), each)
            within = np.arange(len(sources)) - np.repeat(np.cumsum(each) - each, each)
            rng = np.random.default_rng(derive_seed("mixture period", *self.names, number))
            due = (within + rng.random(len(sources))) / each[sources]  # one visit in every part of the period
            order = np.argsort(due, kind="stable")
            self._layouts[number] = sources[order], (self.before + first)[sources[order]] + within[order]
            if len(self._layouts) > KEPT:
                self._layouts.popitem(last=False)
        return self._layouts[number]
