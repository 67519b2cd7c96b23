"""Parts of a mixture of experts: gates, experts side by side, the losses that balance them, and who got what.

Reach for them when a method routes tokens to experts, as ``adapt.loramoe`` does.
Gates are made in float32 whatever the model computes in. Layers report their routing to the ``routing_context`` that
is open, so that a loss over all layers needs no change of any signature on the way.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from downriver.core.errors import DownriverError, InputError


class Routed(NamedTuple):
    """Where tokens go: ``gates`` (..., k) that sum to 1, the experts ``chosen`` (..., k), and the router's ``logits``
    (..., N); gates and logits in float32. When every token uses all experts, they are chosen in their own order."""

    gates: Tensor
    chosen: Tensor
    logits: Tensor

    def dense(self) -> Tensor:
        """The gate of every expert, (..., N): 0 for those not chosen."""
        if self.gates.shape == self.logits.shape:
            return self.gates
        return torch.zeros_like(self.logits).scatter(-1, self.chosen, self.gates)


def route(logits: Tensor, top_k: int | None = None) -> Routed:
    """Softmax over the experts in float32; with ``top_k`` the largest k of them, scaled to sum to 1.

    >>> routed = route(torch.tensor([[0.0, 0.0, -9.0]]), top_k=2)
    >>> routed.gates.tolist(), routed.dense().tolist()
    ([[0.5, 0.5]], [[0.5, 0.5, 0.0]])
    """
    logits = logits.float()
    experts = logits.shape[-1]
    if top_k is not None and not 1 <= top_k <= experts:
        raise InputError(f"top_k is {top_k}: 1 to {experts} is expected, there are {experts} experts")
    probabilities = logits.softmax(-1)
    if top_k is None or top_k == experts:
        return Routed(probabilities, torch.arange(experts, device=logits.device).expand_as(logits), logits)
    gates, chosen = probabilities.topk(top_k, -1)
    return Routed(gates / gates.sum(-1, keepdim=True), chosen, logits)


def gated_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, routed: Routed, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """Σ gate_n · W_down,n (act(W_gate,n x) ⊙ W_up,n x) over the experts chosen for every token.

    ``x`` is (tokens, d), ``gate_up`` (N, 2f, d) with the gate's rows first, ``down`` (N, d, f), as Mixtral keeps them.
    When every token uses all experts, three batched products do it. Otherwise the tokens are sorted by expert and
    every expert that was chosen takes its own stretch: as many operations as tokens need, in N products (within a fifth
    of torch's grouped product on a CPU, which knows neither float64 nor counts its operations).

    >>> x, gate_up, down = torch.ones(2, 3), torch.ones(4, 2, 3), torch.ones(4, 3, 1)
    >>> gated_experts(x, gate_up, down, route(torch.zeros(2, 4), 1), torch.relu)[0]
    tensor([9., 9., 9.])
    """
    experts = len(gate_up)
    if routed.chosen.shape[-1] == experts:
        gate, up = torch.matmul(x, gate_up.mT).chunk(2, -1)  # (N, tokens, f)
        return torch.einsum("tn,ntd->td", routed.gates.to(x.dtype), torch.matmul(activation(gate) * up, down.mT))
    flat = routed.chosen.flatten()
    order = flat.argsort(stable=True)
    token = order // routed.chosen.shape[-1]
    sizes = torch.bincount(flat, minlength=experts).tolist()
    parts = []
    for expert, part in enumerate(x[token].split(sizes)):
        if len(part):
            gate, up = F.linear(part, gate_up[expert]).chunk(2, -1)
            parts.append(F.linear(activation(gate) * up, down[expert]))
    weighted = torch.cat(parts) * routed.gates.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted.to(x.dtype))


def load_balance_loss(routed: Routed, mask: Tensor | None = None) -> Tensor:
    """N · Σ load_n · p_n: the share of choices that went to each expert, times its mean probability; 1 when even.

    Fedus et al., «Switch Transformers» (2021), for k choices a token too. ``mask`` (as the logits without their last
    dimension) says which tokens count.

    >>> even, all_to_one = torch.tensor([[99.0, 0.0], [0.0, 99.0]]), torch.tensor([[99.0, 0.0], [99.0, 0.0]])
    >>> load_balance_loss(route(even, 1)), load_balance_loss(route(all_to_one, 1))
    (tensor(1.), tensor(2.))
    """
    experts = routed.logits.shape[-1]
    real = _weights(routed, mask)
    chosen = F.one_hot(routed.chosen, experts).float().mean(-2)
    load, p = (torch.einsum("...,...n->n", real, part) for part in (chosen, routed.logits.softmax(-1)))
    return experts * (load * p).sum()


def router_z_loss(routed: Routed, mask: Tensor | None = None) -> Tensor:
    """The mean of (log Σ exp logits)², which keeps a router's logits small (Zoph et al., «ST-MoE», 2022)."""
    return (_weights(routed, mask) * routed.logits.logsumexp(-1).square()).sum()


def _weights(routed: Routed, mask: Tensor | None) -> Tensor:
    """1 / (number of real tokens) for real tokens, 0 for padding."""
    shape = routed.logits.shape[:-1]
    real = routed.logits.new_ones(shape) if mask is None else mask.reshape(shape).to(routed.logits.dtype)
    return real / real.sum().clamp(min=1)


@dataclass
class Routing:
    """What one forward pass reported: the ``Routed`` of every layer by its name; ``types`` (B) and ``mask`` (B, T) are
    those of the batch."""

    types: Tensor | None = None
    mask: Tensor | None = None
    layers: dict[str, Routed] = field(default_factory=dict)

    def total(self, loss: Callable[[Routed], Tensor]) -> Tensor:
        """The sum of a loss over all layers.

        Raises ``DownriverError`` when routers learn and their gates carry no gradient, as under reentrant gradient
        checkpointing, and ``InputError`` when no layer reported.
        """
        if not self.layers:
            raise InputError("no layer reported its routing: run the model within routing_context first")
        lost = [name for name, routed in self.layers.items() if not routed.logits.requires_grad]
        if torch.is_grad_enabled() and lost:
            raise DownriverError(
                f"the gates of {lost[0]!r} carry no gradient: a loss on routing needs a router that learns, a forward "
                "pass with gradients, and use_reentrant=False where activations are checkpointed"
            )
        return torch.stack([loss(routed) for routed in self.layers.values()]).sum()


_open: contextvars.ContextVar[Routing | None] = contextvars.ContextVar("routing", default=None)


@contextlib.contextmanager
def routing_context(types: Tensor | None = None, mask: Tensor | None = None) -> Iterator[Routing]:
    """Within the block every layer with experts reports its routing; a second forward pass replaces the first one's.

    A context within another one hands on what it was told. ``types`` (B): the type of every sample; ``mask`` (B, T):
    1 for real tokens, 0 for padding.

    >>> with routing_context() as routing:
    ...     report("layer 0", route(torch.zeros(1, 5, 2)))
    >>> routing.layers["layer 0"].gates.shape
    torch.Size([1, 5, 2])
    """
    routing, around = Routing(types, mask), _open.get()
    token = _open.set(routing)
    try:
        yield routing
    finally:
        _open.reset(token)
        if around is not None:
            around.layers |= routing.layers


def report(layer: str, routed: Routed) -> None:
    """Tell the open context, if there is one. Nothing is computed here, so that a layer that is run again for its
    gradient does the same operations with and without a context."""
    if (routing := _open.get()) is not None:
        routing.layers[layer] = routed


class RoutingTally:
    """Adds up routing over batches: mean gates and choices by layer, group of tokens and expert.

    >>> tally = RoutingTally(["prose", "code"])
    >>> with routing_context(types=torch.tensor([0, 1])) as routing:
    ...     report("layer 0", route(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]]), top_k=1))
    >>> tally.add(routing)
    >>> tally.shares().tolist(), tally.dead()
    ([[[1.0, 0.0], [0.0, 1.0]]], [])
    """

    def __init__(self, groups: list[str]) -> None:
        self.groups = groups
        self.layers: list[str] = []
        self._gates: list[np.ndarray] = []
        self._choices: list[np.ndarray] = []
        self._entropy: list[np.ndarray] = []
        self._tokens = np.zeros(len(groups))

    def add(self, routing: Routing) -> None:
        """Take the routing of one batch; samples without a type belong to the first group."""
        first = next(iter(routing.layers.values())).logits
        types = first.new_zeros(len(first), dtype=torch.long) if routing.types is None else routing.types
        mask = first.new_ones(first.shape[:2]) if routing.mask is None else routing.mask.float()
        member = F.one_hot(types, len(self.groups)).float()  # (B, groups)
        if not self.layers:
            self.layers = list(routing.layers)
            shape = (len(self.groups), first.shape[-1])
            self._gates, self._choices = ([np.zeros(shape) for _ in self.layers] for _ in range(2))
            self._entropy = [np.zeros(len(self.groups)) for _ in self.layers]
        for i, routed in enumerate(routing.layers.values()):
            gates = routed.dense().detach()
            p = routed.logits.detach().softmax(-1)
            entropy = torch.special.entr(p).sum(-1)
            chosen = F.one_hot(routed.chosen, gates.shape[-1]).float().mean(-2)
            self._gates[i] += _by_group(member, mask, gates)
            self._choices[i] += _by_group(member, mask, chosen)
            self._entropy[i] += _by_group(member, mask, entropy[..., None])[:, 0]
        self._tokens += (member.T @ mask.sum(1, keepdim=True))[:, 0].double().cpu().numpy()

    def shares(self) -> np.ndarray:
        """Mean gate, (layers, groups, experts); rows sum to 1, and are NaN for a group without tokens."""
        return self._mean(self._gates)

    def loads(self) -> np.ndarray:
        """Share of the choices, (layers, groups, experts)."""
        return self._mean(self._choices)

    def entropy(self) -> np.ndarray:
        """Mean entropy of the router in nats, (layers, groups); log N when it does not tell tokens apart."""
        return self._mean([e[:, None] for e in self._entropy])[..., 0]

    def dead(self, share: float = 0.01) -> list[tuple[str, int]]:
        """Layer and expert of those that get less than this share of all choices."""
        total = np.stack(self._choices).sum(1) / self._tokens.sum()
        return [(self.layers[i], int(n)) for i, n in zip(*np.nonzero(total < share), strict=True)]

    def _mean(self, sums: list[np.ndarray]) -> np.ndarray:
        if not sums:
            raise InputError("no routing was added")
        with np.errstate(invalid="ignore"):
            return np.stack(sums) / self._tokens[:, None]


def _by_group(member: Tensor, mask: Tensor, values: Tensor) -> np.ndarray:
    """Sums over the real tokens of each group's samples: (B, G), (B, T), (B, T, N) → (G, N)."""
    return torch.einsum("bg,bt,btn->gn", member, mask, values).double().cpu().numpy()
