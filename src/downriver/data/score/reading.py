"""What scorers with a model share: batches of rows of like length, FLOPs, the fingerprint of weights.

Reach for it wherever a model reads texts of many lengths and the order does not matter.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from downriver.core.cost import charge, count_flops

T = TypeVar("T")


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[np.ndarray]:
    """Row numbers in batches, the longest rows first, so that rows times longest row is at most ``tokens`` (a row
    that is longer comes alone).

    >>> [batch.tolist() for batch in by_length([3, 9, 4, 2, 3], 9)]
    [[1], [2, 0], [4, 3]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    at = 0
    while at < len(order):
        rows = max(1, tokens // max(int(lengths[order[at]]), 1))
        yield order[at : at + rows]
        at += rows


def charged(forward: Callable[[], T], tokens: int, per_token: float) -> tuple[T, float]:
    """Call ``forward`` and charge its tokens and FLOPs; gives its result and the FLOPs a token.

    They are counted by torch in the first call (``per_token`` 0) and then taken to be in proportion to the tokens.
    """
    found: list[T] = []
    if per_token:
        found.append(forward())
    else:
        per_token = count_flops(lambda: found.append(forward())) / tokens
    charge(tokens=tokens, flops=per_token * tokens)
    return found[0], per_token


def weights_fingerprint(module: nn.Module) -> str:
    """A digest of every weight's name, type, shape and bytes.

    >>> weights_fingerprint(nn.Linear(2, 2)) == weights_fingerprint(nn.Linear(2, 2))
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
