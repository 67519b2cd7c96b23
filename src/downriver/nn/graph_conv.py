"""Graph convolution on batches of small directed graphs, and a predictor of one number a graph, in plain torch.

``GraphConv`` is Morris et al. 2019 (the operator of that name in torch_geometric, same parameters and results); the
predictor with its stacked adapters is that of AIO-P, 2022-11. Batches whose graphs have at most 64 nodes are padded
and multiplied by adjacency matrices; larger ones gather and add along edges. Both give the same values.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

DENSE = 64  # nodes up to which a batch is padded
SHAPE_WIDTH, KERNEL_WIDTH, BIAS_WIDTH = 8, 4, 2
KERNELS = 8  # sizes told apart, the last is 7 and above; 0 is for operators without weights


@dataclass(frozen=True)
class GraphBatch:
    """Graphs side by side: node features with leading dimensions (graphs, nodes) if dense, else (nodes of all,).

    ``op`` ids, ``shapes`` (..., 6), ``kernels`` (..., 2), ``bias`` (...). Dense: ``adjacency`` (graphs, nodes, nodes)
    with a one at [i, j] for an edge j to i, ``present`` (graphs, nodes, 1) marks what is no padding. Sparse: ``edges``
    (2, e), ``graph`` (nodes of all,) says whose each node is.
    """

    op: Tensor
    shapes: Tensor
    kernels: Tensor
    bias: Tensor
    size: int
    adjacency: Tensor | None = None
    present: Tensor | None = None
    edges: Tensor | None = None
    graph: Tensor | None = None

    def neighbours(self, x: Tensor) -> Tensor:
        """For every node the sum of x over the nodes with an edge to it."""
        if self.adjacency is not None:
            return self.adjacency @ x
        assert self.edges is not None
        return torch.zeros_like(x).index_add(0, self.edges[1], x[self.edges[0]])

    def mean(self, x: Tensor) -> Tensor:
        """(graphs, width): the mean of x over the nodes of each graph."""
        if self.present is not None:
            return (x * self.present).sum(dim=1) / self.present.sum(dim=1)
        assert self.graph is not None
        sums = x.new_zeros(self.size, x.shape[1]).index_add(0, self.graph, x)
        return sums / torch.bincount(self.graph, minlength=self.size)[:, None]

    def take(self, rows: Tensor) -> "GraphBatch":
        """Some graphs of a dense batch."""
        assert self.adjacency is not None and self.present is not None
        features = (self.op[rows], self.shapes[rows], self.kernels[rows], self.bias[rows])
        return GraphBatch(*features, len(rows), adjacency=self.adjacency[rows], present=self.present[rows])


Nodes = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one graph: op ids (n,), shapes (n, 6), kernels (n, 2), bias (n,), edges (2, e)."""


def batch_graphs(graphs: Sequence[Nodes], layout: Literal["auto", "dense", "sparse"] = "auto") -> GraphBatch:
    """Put graphs into one batch; ``auto`` is dense where no graph has more than 64 nodes.

    >>> edge = torch.tensor([[0], [1]])
    >>> two = (torch.tensor([0, 1]), torch.zeros(2, 6), torch.zeros(2, 2).long(), torch.zeros(2), edge)
    >>> batch_graphs([two, two]).neighbours(torch.ones(2, 2, 1)).flatten().tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    counts = [len(nodes[0]) for nodes in graphs]
    features = [list(column) for column in zip(*(nodes[:4] for nodes in graphs), strict=True)]
    if layout == "dense" or (layout == "auto" and max(counts) <= DENSE):
        op, shapes, kernels, bias = (nn.utils.rnn.pad_sequence(column, batch_first=True) for column in features)
        adjacency = shapes.new_zeros(len(graphs), max(counts), max(counts))
        for row, (*_, edges) in zip(adjacency, graphs, strict=True):
            row.index_put_((edges[1], edges[0]), row.new_ones(()), accumulate=True)
        present = (torch.arange(max(counts)) < torch.tensor(counts)[:, None])[..., None].to(shapes)
        return GraphBatch(op, shapes, kernels, bias, len(graphs), adjacency=adjacency, present=present)
    op, shapes, kernels, bias = (torch.cat(column) for column in features)
    starts = [0, *itertools.accumulate(counts)]
    edges = torch.cat([nodes[4] + start for nodes, start in zip(graphs, starts, strict=False)], dim=1)
    graph = torch.arange(len(graphs)).repeat_interleave(torch.tensor(counts))
    return GraphBatch(op, shapes, kernels, bias, len(graphs), edges=edges, graph=graph)


class GraphConv(nn.Module):
    """``x_i' = W_root x_i + W_rel sum_{j to i} x_j + b``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin_rel = nn.Linear(inputs, outputs)
        self.lin_root = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        return self.lin_rel(batch.neighbours(x)) + self.lin_root(x)


class NodeEmbedding(nn.Module):
    """Type and shape of a node; of one with weights (kernel not 0) also kernel size and bias. One type more than
    ``types`` stands for all that are not known."""

    def __init__(self, types: int, width: int) -> None:
        super().__init__()
        self.regular = nn.Embedding(types + 1, width - SHAPE_WIDTH)
        self.weighted = nn.Embedding(types + 1, width - SHAPE_WIDTH - 2 * KERNEL_WIDTH - BIAS_WIDTH)
        self.shape = nn.Linear(6, SHAPE_WIDTH)
        self.kernel = nn.Embedding(KERNELS, KERNEL_WIDTH)
        self.bias = nn.Linear(2, BIAS_WIDTH)

    def forward(self, batch: GraphBatch) -> Tensor:
        shape = self.shape(batch.shapes)
        regular = torch.cat([self.regular(batch.op), shape], dim=-1)
        kernel = self.kernel(batch.kernels.clamp(max=KERNELS - 1)).flatten(-2)
        bias = self.bias(torch.stack([1 - batch.bias, batch.bias], dim=-1))
        weighted = torch.cat([self.weighted(batch.op), shape, kernel, bias], dim=-1)
        return torch.where(batch.kernels[..., :1] > 0, weighted, regular)


class GraphAdapter(nn.Module):
    """Convolutions beside frozen ones: layer i reads the base's layer i and its own layer i − 1."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(GraphConv(2 * width, width) for _ in range(layers))

    def forward(self, states: Sequence[Tensor], batch: GraphBatch) -> Tensor:
        x = states[0]
        for conv, state in zip(self.convs, states[1:], strict=True):
            x = torch.tanh(conv(torch.cat([state, x], dim=-1), batch))
        return x


class GraphPredictor(nn.Module):
    """A graph network with a head, and any number of adapters with a head each, whose outputs are averaged."""

    alpha: Tensor | None
    b: Tensor | None

    def __init__(self, types: int, width: int = 32, layers: int = 6) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.embed = NodeEmbedding(types, width)
        self.convs = nn.ModuleList(GraphConv(width, width) for _ in range(layers))
        self.head = _head(width, width)
        self.adapters, self.adapter_heads = nn.ModuleDict(), nn.ModuleDict()
        self.register_parameter("alpha", None)
        self.register_parameter("b", None)

    def add_adapter(self, name: str) -> None:
        """A new adapter and its head; scales learnt for the earlier ones are dropped."""
        self.adapters[name] = GraphAdapter(self.width, self.layers)
        self.adapter_heads[name] = _head(2 * self.width, self.width)
        self.alpha = self.b = None

    def heads(self) -> list[nn.Sequential]:
        """The heads that predict: those of the adapters, or the base's own while there is none."""
        return list(self.adapter_heads.values()) or [self.head]  # type: ignore[arg-type]

    def add_scales(self) -> None:
        """Scales (α·1 + b) for the last layer of every head, its bias included; random normal, as published."""
        self.alpha = nn.Parameter(torch.randn(len(self.heads())))
        self.b = nn.Parameter(torch.randn(len(self.heads()), self.width + 1))

    def states(self, batch: GraphBatch) -> list[Tensor]:
        """The node embedding and the output of every layer."""
        states = [self.embed(batch)]
        for conv in self.convs:
            states.append(torch.tanh(conv(states[-1], batch)))
        return states

    def forward(self, batch: GraphBatch, only: str | None = None) -> Tensor:
        """(graphs,): the mean over the heads, or the output of one adapter's alone."""
        states = self.states(batch)
        base = batch.mean(states[-1])
        names = [only] if only is not None else list(self.adapters)
        outputs = []
        for k, name in enumerate(names):
            vector = torch.cat([base, batch.mean(self.adapters[name](states, batch))], dim=-1)
            outputs.append(self._out(self.adapter_heads[name], vector, k))
        return torch.stack(outputs).mean(dim=0) if outputs else self._out(self.head, base, 0)

    def _out(self, head: nn.Module, vector: Tensor, k: int) -> Tensor:
        if self.alpha is None or self.b is None:
            return head(vector)[:, 0]
        assert isinstance(head, nn.Sequential)
        scale = self.alpha[k] + self.b[k]  # α·1 + b
        last: nn.Linear = head[-1]  # type: ignore[assignment]
        hidden = head[:-1](vector)
        return hidden @ (scale[:-1] * last.weight[0]) + scale[-1] * last.bias[0]


def _head(inputs: int, width: int) -> nn.Sequential:
    """Linear-Linear-ReLU-Linear-Linear and a last linear layer, as published."""
    wide = [nn.Linear(inputs, width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*wide, nn.Linear(width, width), nn.Linear(width, 1))
