"""TIES of one block in a single pass over its values, compiled; ``Ties`` takes it on a CPU where numba is installed.

It gives bit for bit what the tensor operations of ``Ties.delta`` give when all weights are equal.
"""

from collections.abc import Sequence

import numba
import numpy as np
from torch import Tensor, from_numpy

from downriver.merge.method import Tally

PIECE = 1024


def fused(
    base: Tensor, models: Sequence[Tensor], cuts: Sequence[float], weights: Sequence[float], majority: int, mean: bool
) -> tuple[Tensor, Tally]:
    """τm in float64 and its counts, of float32 blocks on the CPU; the sign elected is that of the larger total mass.

    ``cuts``: the magnitude that each model's entries must reach. ``majority``: the sign where votes cancel, 0 for none.
    ``mean``: over the models that agree; else their sum.
    """
    merged = np.empty(base.numel())
    kept, squares = np.zeros(len(models)), np.zeros(len(models))
    blocks = tuple(model.contiguous().view(-1).numpy() for model in models)
    limits, shares = np.array(cuts, dtype=np.float32), np.array(weights, dtype=np.float64)
    smallest = min((w for w in weights if w), default=1.0)
    flat = base.contiguous().view(-1).numpy()
    counts = _merge(flat, blocks, limits, shares, majority, smallest if mean else 0.0, merged, kept, squares)
    touched, conflicts, agreeing, cancelled, balance = counts
    tally = Tally(
        kept,
        squares,
        touched=touched,
        conflicts=conflicts,
        agreeing=agreeing,
        cancelled=cancelled,
        balance=balance,
    )
    return from_numpy(merged).view(base.shape), tally


@numba.njit(cache=True, nogil=True)
def _merge(base, models, cuts, weights, majority, smallest, merged, kept, squares):  # type: ignore[no-untyped-def]
    """Piece by piece, so that what is known of a piece stays in the cache and loops over it are vectorised."""
    count, size = len(models), len(base)
    touched = conflicts = agreeing = cancelled = balance = 0
    taus, hats = np.empty(PIECE, np.float32), np.empty((count, PIECE), np.float32)
    votes, total, weight = np.empty(PIECE), np.empty(PIECE), np.empty(PIECE)
    present, against, gamma = np.empty(PIECE, np.int32), np.empty(PIECE, np.int32), np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        origin = base[start : start + n]
        votes[:] = 0
        total[:] = 0
        weight[:] = 0
        present[:] = 0
        # 1. trim: τ̂t is τt where its magnitude reaches the cut, else 0
        for t in range(count):
            values, hat, cut, share = models[t][start : start + n], hats[t], cuts[t], weights[t]
            own = 0
            for j in range(n):
                tau = values[j] - origin[j]
                taus[j] = tau
                hat[j] = tau if abs(tau) >= cut else np.float32(0)
                here = 1 if hat[j] != 0 else 0
                own += here
                present[j] += here
                votes[j] += share * np.float64(hat[j])
            kept[t] += own
            squares[t] += _square(taus[:n])
        # 2. elect: γ, one sign an entry
        for j in range(n):
            sign = (1 if votes[j] > 0 else 0) - (1 if votes[j] < 0 else 0)
            balance += sign
            touched += 1 if present[j] > 0 else 0
            cancelled += 1 if present[j] > 0 and sign == 0 else 0
            gamma[j] = sign if sign != 0 else majority
        # 3. disjoint merge: Σ wt·θt − (Σ wt)·θ0 over At, the models whose trimmed value has the elected sign
        against[:] = present
        for t in range(count):
            values, hat, share = models[t][start : start + n], hats[t], weights[t]
            for j in range(n):
                agrees = hat[j] * gamma[j] > 0
                total[j] += share * np.float64(values[j]) if agrees else 0.0
                weight[j] += share if agrees else 0.0
                against[j] -= 1 if agrees else 0
        for j in range(n):
            total[j] -= weight[j] * np.float64(origin[j])
            merged[start + j] = total[j] / max(weight[j], smallest) if smallest > 0 else total[j]
            agreeing += present[j] - against[j]
            conflicts += 1 if against[j] > 0 else 0
    return touched, conflicts, agreeing, cancelled, balance


@numba.njit(cache=True, nogil=True, fastmath={"reassoc"})
def _square(values):  # type: ignore[no-untyped-def]
    """‖x‖² in float64, added up in any order."""
    found = 0.0
    for value in values:
        found += np.float64(value) * np.float64(value)
    return found
