"""Graph convolution: equal to torch_geometric's, dense equal to sparse, blind to the order of nodes and edges."""

import pytest
import torch

from downriver.nn.graph_conv import DENSE, GraphConv, GraphPredictor, Nodes, batch_graphs

TYPES = 5


def nodes(n: int, edges: int, seed: int) -> Nodes:
    """A random graph; some nodes have weights, and edges may repeat."""
    g = torch.Generator().manual_seed(seed)
    kernels = torch.randint(0, 4, (n, 2), generator=g)
    bias = torch.randint(0, 2, (n,), generator=g).float()
    op = torch.randint(0, TYPES + 1, (n,), generator=g)
    return op, torch.rand(n, 6, generator=g), kernels, bias, torch.randint(0, n, (2, edges), generator=g)


@pytest.fixture
def graphs() -> list[Nodes]:
    return [nodes(n, 2 * n, seed=n) for n in (3, 7, 12, 1)]


@pytest.fixture
def net() -> GraphPredictor:
    torch.manual_seed(0)
    net = GraphPredictor(TYPES)
    net.add_adapter("a")
    return net


def test_a_stack_equals_torch_geometric(graphs: list[Nodes]) -> None:
    reference = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    ours = [GraphConv(6, 32), GraphConv(32, 32), GraphConv(32, 8)]
    theirs = [reference.GraphConv(6, 32), reference.GraphConv(32, 32), reference.GraphConv(32, 8)]
    batch = batch_graphs(graphs, "sparse")
    x = y = batch.shapes
    for mine, other in zip(ours, theirs, strict=True):
        other.load_state_dict(mine.state_dict())
        x, y = torch.tanh(mine(x, batch)), torch.tanh(other(y, batch.edges))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.mean(x), reference.global_mean_pool(y, batch.graph), rtol=0, atol=1e-5)


def test_one_convolution_by_hand() -> None:
    conv = GraphConv(1, 1)
    with torch.no_grad():
        conv.lin_rel.weight.fill_(10), conv.lin_rel.bias.fill_(0.5), conv.lin_root.weight.fill_(1)
    features = (torch.zeros(3).long(), torch.zeros(3, 6), torch.zeros(3, 2).long(), torch.zeros(3))
    batch = batch_graphs([(*features, torch.tensor([[0, 1, 0], [2, 2, 1]]))])
    found = conv(torch.tensor([[[1.0], [2.0], [4.0]]]), batch)
    assert found.flatten().tolist() == [1.5, 12.5, 34.5]  # node 2 hears 1 + 2, node 1 hears 1, node 0 nobody


def test_dense_equals_sparse(net: GraphPredictor, graphs: list[Nodes]) -> None:
    dense, sparse = batch_graphs(graphs), batch_graphs(graphs, "sparse")
    assert dense.adjacency is not None and sparse.adjacency is None
    torch.testing.assert_close(net(dense), net(sparse), rtol=0, atol=1e-5)
    alone = torch.cat([net(batch_graphs([graph])) for graph in graphs])
    torch.testing.assert_close(net(dense), alone, rtol=0, atol=1e-5)


def test_large_graphs_are_not_padded() -> None:
    assert batch_graphs([nodes(DENSE, 5, 0)]).adjacency is not None
    assert batch_graphs([nodes(DENSE, 5, 0), nodes(DENSE + 1, 5, 0)]).adjacency is None


def test_weights_count_only_where_there_is_a_kernel(net: GraphPredictor) -> None:
    op, shapes, kernels, bias, edges = nodes(4, 4, 0)
    for kernel, same in ((torch.zeros_like(kernels), True), (torch.ones_like(kernels), False)):
        a, b = (net(batch_graphs([(op, shapes, kernel, other, edges)])) for other in (bias, 1 - bias))
        assert torch.equal(a, b) == same


def test_what_was_published_has_this_many_parameters() -> None:
    net = GraphPredictor(31)
    embedding = 32 * 24 + 32 * 14 + (6 * 8 + 8) + 8 * 4 + (2 * 2 + 2)  # one type more, for unknown operators
    convolutions = 6 * (2 * 32 * 32 + 32)
    head = 4 * (32 * 32 + 32) + 33
    assert sum(p.numel() for p in net.parameters()) == embedding + convolutions + head
    net.add_adapter("a")
    adapter = 6 * (2 * 64 * 32 + 32) + (64 * 32 + 32) + 3 * (32 * 32 + 32) + 33
    assert sum(p.numel() for p in net.parameters()) == embedding + convolutions + head + adapter


def test_an_adapter_reads_every_layer_of_the_base(net: GraphPredictor, graphs: list[Nodes]) -> None:
    batch = batch_graphs(graphs)
    states = [s.detach().requires_grad_() for s in net.states(batch)]
    net.adapters["a"](states, batch).sum().backward()
    assert all(s.grad is not None and s.grad.abs().sum() > 0 for s in states)
