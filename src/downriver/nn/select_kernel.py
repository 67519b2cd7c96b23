"""Counting the digits of a radix select in one pass over the values, compiled; ``RadixSelect`` takes it on a CPU."""

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def count_digits(bits: np.ndarray, prefix: int, low: int, width: int) -> np.ndarray:
    """How many magnitudes with the prefix above ``low + width`` bits have each value of the ``width`` bits above
    ``low``. ``bits``: float32 values seen as int32.

    >>> bits = np.array([1.0, -1.0, 2.0], dtype=np.float32).view(np.int32)
    >>> np.flatnonzero(count_digits(bits, 0, 23, 8)).tolist()  # exponents 127 and 128
    [127, 128]
    """
    counts = np.zeros(1 << width, np.int64)
    mask = (1 << width) - 1
    for value in bits:
        digit = (value & 0x7FFFFFFF) >> low
        if digit >> width == prefix:
            counts[digit & mask] += 1
    return counts
