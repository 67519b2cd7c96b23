"""The sparse half of a gated feed-forward block on a CPU, compiled: a row is read where its gate is not 0."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor


def gated_mlp(x: Tensor, a: Tensor, up: Tensor, down_t: Tensor) -> Tensor:
    """As ``sparse_gated_mlp``; neurons are shared among as many threads as torch has."""
    x_, a_, up_, down_ = (tensor.detach().contiguous().numpy() for tensor in (x, a, up, down_t))
    threads = torch.get_num_threads()
    if threads == 1:
        return torch.from_numpy(_rows(x_, a_, up_, down_, 0, len(up_)))
    edges = np.linspace(0, len(up), threads + 1).astype(int).tolist()
    parts = _pool(threads).map(lambda ends: _rows(x_, a_, up_, down_, ends[0], ends[1]), itertools.pairwise(edges))
    return torch.from_numpy(functools.reduce(np.add, parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse-mlp")


@numba.njit(cache=True, nogil=True)
def _rows(x, a, up, down_t, first, last):  # type: ignore[no-untyped-def]
    """What neurons from ``first`` to ``last`` add to y."""
    y = np.zeros_like(x)
    for i in range(first, last):
        for token in range(len(x)):
            if a[token, i] != 0:
                _add(y[token], a[token, i] * _dot(up[i], x[token]), down_t[i])
    return y


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dot(left, right):  # type: ignore[no-untyped-def]
    found = np.float32(0)
    for j in range(len(left)):
        found += left[j] * right[j]
    return found


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _add(y, factor, row):  # type: ignore[no-untyped-def]
    for j in range(len(y)):
        y[j] += factor * row[j]
