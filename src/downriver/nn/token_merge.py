"""Merge the hidden states of neighbouring tokens by group, and copy a group's state back to its members.

Reach for ``compress.add_token_merging``, which puts it into a loaded model; this module knows tensors only.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.core.errors import InputError, unknown

Mode = Literal["mean", "learned", "max", "first"]
Position = Literal["reindex", "first"]
SCORER = 128
"""Width of the scorer of ``learned``, where the model is not narrower."""


@dataclass(frozen=True, eq=False)
class MergeMap:
    """Which token belongs to which group: ``groups`` (batch, T), numbers 0, 1, 2, ... in a row, -1 for padding.

    Raises ``InputError`` naming the text whose groups are not consecutive runs that start at 0.

    >>> merging = MergeMap(torch.tensor([[0, 1, 1, 2], [0, 0, 1, -1]]))
    >>> merging.lengths.tolist(), merging.mask.tolist()
    ([3, 2], [[1, 1, 1], [1, 1, 0]])
    >>> merging.unmerge(torch.tensor([[[5.0], [6.0], [7.0]], [[8.0], [9.0], [0.0]]])).squeeze(-1).tolist()
    [[5.0, 6.0, 6.0, 7.0], [8.0, 8.0, 9.0, 0.0]]
    """

    groups: Tensor

    def __post_init__(self) -> None:
        groups = self.groups
        if groups.ndim != 2 or groups.is_floating_point() or not self.real.any():
            raise InputError(
                f"group_ids is {groups.dtype} {tuple(groups.shape)}: integers (batch, T) are expected, not all -1"
            )
        before = F.pad(groups, (1, 0), value=-1)[:, :-1]
        step, starts = groups - before, self.real & (before < 0)
        wrong = (self.real & (step != 0) & (step != 1)).any(1) | (starts.sum(1) > 1) | (groups < -1).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise InputError(
                f"group_ids of text {row} are {groups[row].tolist()[:20]}: numbers that start at 0 and stay or grow by "
                "one from token to token, and -1 for padding, are expected"
            )

    @cached_property
    def real(self) -> Tensor:
        """(batch, T): True where a token is no padding."""
        return self.groups >= 0

    @cached_property
    def lengths(self) -> Tensor:
        """(batch): how many groups a text has."""
        return self.groups.amax(1) + 1

    @cached_property
    def longest(self) -> int:
        """K, the groups of the text that has most."""
        return int(self.lengths.max())

    @cached_property
    def mask(self) -> Tensor:
        """(batch, K): 1 for groups, 0 for padding."""
        return (torch.arange(self.longest, device=self.groups.device) < self.lengths[:, None]).long()

    @cached_property
    def first(self) -> Tensor:
        """(batch, T): True for the first token of every group."""
        return self.real & (self.groups != F.pad(self.groups, (1, 0), value=-1)[:, :-1])

    @cached_property
    def flat(self) -> Tensor:
        """(batch x T): the row of the flattened merged states that a token goes to, of padding any."""
        rows = torch.arange(len(self.groups), device=self.groups.device)[:, None] * self.longest
        return (rows + self.groups.clamp(min=0)).flatten()

    def total(self, values: Tensor) -> Tensor:
        """Sums over the members of every group: (batch, T, ...) to (batch, K, ...); values of padding must be 0."""
        flat = values.new_zeros(len(values) * self.longest, *values.shape[2:])
        flat = flat.index_add(0, self.flat, values.flatten(0, 1))
        return flat.view(len(values), self.longest, *values.shape[2:])

    def unmerge(self, merged: Tensor) -> Tensor:
        """Give every token the state of its group: (batch, K, ...) to (batch, T, ...), 0 for padding."""
        back = merged.flatten(0, 1)[self.flat].view(*self.groups.shape, *merged.shape[2:])
        return back * self.real.view(*self.real.shape, *[1] * (merged.ndim - 2)).to(back.dtype)

    def pairs(self, seen: Tensor) -> Tensor:
        """(batch, K, K): whether any member of a group sees any of another, from (batch, T, T)."""
        keys = self.total((seen & self.real[:, :, None]).float())
        return self.total(keys.mT * self.real[:, :, None]).mT > 0

    def positions(self, kind: Position = "reindex") -> Tensor:
        """(1 or batch, K): where a group stands, 0, 1, ... K-1, or the place of its first token among the real ones."""
        if kind == "reindex":
            return torch.arange(self.longest, device=self.groups.device)[None]
        return self.total((self.real.cumsum(1) - 1) * self.first)


class TokenMerge(nn.Module):
    """Merged states of the groups, (batch, K, width), from states (batch, T, width) and a ``MergeMap``.

    ``mean``: of the members. ``learned``: Σ_j w_j h_j with w = softmax_j(u · tanh(V h_j)); u starts at 0, so that it
    starts as the mean, and V at random, since with both at 0 no gradient reaches either. ``max``: of each dimension.
    ``first``: the first member's state.

    ``layer`` and ``position`` say where in a model it stands. The layer is part of the weights, too, so that a
    checkpoint with merging is never taken for one without.

    >>> merge = TokenMerge(2, mode="mean")
    >>> merge(torch.tensor([[[1.0, 0.0], [3.0, 4.0], [5.0, 5.0]]]), MergeMap(torch.tensor([[0, 0, 1]]))).tolist()
    [[[2.0, 2.0], [5.0, 5.0]]]
    """

    layer: Tensor

    def __init__(self, width: int, *, layer: int = 0, mode: Mode = "mean", position: Position = "reindex") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise unknown("mode", mode, get_args(Mode))
        if position not in get_args(Position):
            raise unknown("position", position, get_args(Position))
        self.mode, self.position = mode, position
        self.register_buffer("layer", torch.tensor(layer))
        if mode == "learned":
            self.V = nn.Linear(width, min(width, SCORER), bias=False)
            self.u = nn.Linear(min(width, SCORER), 1, bias=False)
            nn.init.zeros_(self.u.weight)

    def forward(self, hidden: Tensor, merging: MergeMap) -> Tensor:
        """Merge."""
        if hidden.shape[:2] != merging.groups.shape:
            shape = tuple(merging.groups.shape)
            raise InputError(f"group_ids have the shape {shape} and the hidden states {tuple(hidden.shape)}")
        if self.mode == "max":
            flat = hidden.new_zeros(len(hidden) * merging.longest, hidden.shape[2])
            index = merging.flat[:, None].expand(-1, hidden.shape[2])
            lowest = hidden.masked_fill(~merging.real[:, :, None], -torch.inf).flatten(0, 1)
            highest = flat.scatter_reduce(0, index, lowest, "amax", include_self=False)
            return highest.view(len(hidden), merging.longest, -1).masked_fill(merging.mask[:, :, None] == 0, 0)
        weights = self._weights(hidden, merging)[:, :, None].to(hidden.dtype)
        states = hidden.masked_fill(~merging.real[:, :, None], 0)
        return merging.total(weights * states)

    def _weights(self, hidden: Tensor, merging: MergeMap) -> Tensor:
        """(batch, T): w_j, which sum to 1 over a group."""
        if self.mode == "first":
            return merging.first.float()
        if self.mode == "mean":
            return merging.real / merging.unmerge(merging.total(merging.real.float())).clamp(min=1)
        s = self.u(torch.tanh(self.V(hidden)))[:, :, 0].float()
        s = s.masked_fill(~merging.real, -torch.inf)
        highest = s.new_full((len(s) * merging.longest,), -torch.inf)
        highest = highest.scatter_reduce(0, merging.flat, s.detach().flatten(), "amax")
        e = torch.exp(s - highest[merging.flat].view(s.shape)).masked_fill(~merging.real, 0)
        return e / merging.unmerge(merging.total(e)).masked_fill(~merging.real, 1)
