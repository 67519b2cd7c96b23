"""The exact k-th magnitude of values that are never all in memory at once.

Reach for it to trim, threshold or rank across a whole model: memory is one chunk and its counters, whatever the total.
The magnitude of a float32 grows with its bit pattern without the sign, ``bits & 0x7fffffff``; a radix select counts the
leading digits of that pattern, then the trailing digits inside the bucket that holds rank k. Two passes over the chunks
give the k-th smallest magnitude bit for bit as ``torch.kthvalue(x.abs(), k)`` does.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from downriver.core.compiled import WORTHWHILE, compiled
from downriver.core.errors import InputError

TWO_PASSES = (15, 16)
"""Digits of 15 and 16 bits: at most 65 536 counters (512 KiB)."""
THREE_PASSES = (11, 10, 10)
"""One more pass, at most 2 048 counters (16 KiB)."""

Chunks = Tensor | Sequence[Tensor] | Callable[[], Iterable[Tensor]]


class RadixSelect:
    """One selection under way: count every chunk, narrow, and again until ``passes_left`` is zero; then read ``value``.

    ``rank`` is k, from 1 for the smallest magnitude, or a function that gives it from the number of values. ``counts``
    changes nothing and may be called from several threads.

    >>> x = torch.tensor([3.0, -1.0, 2.0])
    >>> select = RadixSelect(2)
    >>> while select.passes_left:
    ...     select.narrow(select.counts(x))
    >>> select.value
    2.0
    """

    def __init__(self, rank: int | Callable[[int], int], digits: Sequence[int] = TWO_PASSES) -> None:
        self._rank = rank
        self._digits = list(digits)
        self._prefix, self._known = 0, 0  # the leading bits found so far, and how many they are

    @property
    def passes_left(self) -> int:
        """How often the chunks must still be counted."""
        return len(self._digits)

    @property
    def value(self) -> float:
        """The magnitude of rank k, once no pass is left."""
        return torch.tensor(self._prefix, dtype=torch.int32).view(torch.float32).item()

    def fits(self, count: int) -> bool:
        """Whether the rank is one of so many values."""
        return 1 <= (self._rank(count) if callable(self._rank) else self._rank) <= count

    def counts(self, x: Tensor) -> Tensor:
        """How many values of a float32 chunk have each value of the present digit, among those with the known
        prefix."""
        if x.dtype != torch.float32:
            raise InputError(f"a chunk is {x.dtype}: magnitudes are selected among float32 values")
        width = self._digits[0]
        below = 31 - self._known - width
        bits = x.reshape(-1).view(torch.int32)
        if x.device.type == "cpu" and len(bits) >= WORTHWHILE and (kernel := compiled("downriver.nn.select_kernel")):
            return torch.from_numpy(kernel.count_digits(bits.numpy(), self._prefix, below, width))
        bits = bits & 0x7FFFFFFF
        if self._known:
            bits = bits[(bits >> (below + width)) == self._prefix] & ((1 << (below + width)) - 1)
        return torch.bincount(bits >> below, minlength=1 << width)

    def narrow(self, counts: Tensor) -> None:
        """Take the counts of all chunks together and go on to the next digit."""
        width = self._digits.pop(0)
        upto = counts.cumsum(0)
        if callable(self._rank):
            self._rank = self._rank(int(upto[-1]))
        if not 1 <= self._rank <= int(upto[-1]):
            raise InputError(f"rank {self._rank} of {int(upto[-1])} values: 1 to the number of values is expected")
        bucket = int(torch.searchsorted(upto, self._rank))
        self._rank -= int(upto[bucket] - counts[bucket])
        self._prefix, self._known = self._prefix << width | bucket, self._known + width


def kth_magnitude(chunks: Chunks, k: int, digits: Sequence[int] = TWO_PASSES) -> float:
    """The k-th smallest magnitude of float32 values, exactly.

    Parameters
    ----------
    chunks
        A tensor, a sequence of tensors, or a function without arguments that gives a fresh iterator over tensors each
        time it is called (it is called once a pass), so that they need not be in memory together.
    k
        The rank, 1 for the smallest magnitude.
    digits
        Bits resolved by each pass, 31 together.

    Raises
    ------
    InputError
        A rank outside 1 to the number of values, or values that are not float32.

    Example
    -------
    >>> x = torch.tensor([0.5, -4.0, 0.0, 2.0])
    >>> kth_magnitude([x[:2], x[2:]], 3) == torch.kthvalue(x.abs(), 3).values.item()
    True
    """
    return _select(chunks, k, digits)


def quantile(chunks: Chunks, p: float, digits: Sequence[int] = TWO_PASSES) -> float:
    """The smallest magnitude that at least a share ``p`` of the values does not exceed (numpy's ``inverted_cdf``).

    >>> quantile(torch.tensor([1.0, -2.0, 3.0, -4.0]), 0.5)
    2.0
    """
    if not 0 <= p <= 1:
        raise InputError(f"quantile {p}: a share from 0 to 1 is expected")
    return _select(chunks, lambda n: max(1, math.ceil(p * n)), digits)


def _select(chunks: Chunks, rank: int | Callable[[int], int], digits: Sequence[int]) -> float:
    hold_pages()
    select = RadixSelect(rank, digits)
    while select.passes_left:
        every = chunks() if callable(chunks) else [chunks] if isinstance(chunks, Tensor) else chunks
        total = None
        for chunk in every:
            counts = select.counts(chunk)
            total = counts if total is None else total.add_(counts)
        if total is None:
            raise InputError("no values to select from: at least one chunk is expected")
        select.narrow(total)
    return select.value


@functools.cache
def hold_pages() -> None:
    """Free a large block that was never touched: glibc then keeps freed blocks of up to this size for the next request,
    instead of giving them to the kernel and taking them back page by page, which costs more than the arithmetic."""
    torch.empty((32 << 20) - (1 << 13), dtype=torch.uint8)
