"""Graphs of modules: the right operators, shapes, edges and work, whichever tracer is used."""

import copy
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from downriver.core import InputError
from downriver.core.cost import count_flops
from downriver.core.errors import MissingExtra
from downriver.models import small
from downriver.models.compute_graph import ComputeGraph, compute_graph
from downriver.models.operators import NO_NODE, TYPE_OF, VOCABULARY

IMAGE = torch.zeros(1, 3, 64, 64)


def resnet18() -> transformers.PreTrainedModel:
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    return transformers.ResNetForImageClassification(config)


class Block(nn.Module):
    """A residual block that torch.fx can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = self.drop(torch.relu_(self.norm(self.wide(x))))
        return (x + y).mean(dim=(2, 3)).reshape(x.size(0), -1)


class Stubborn(nn.Module):
    """Branches on a value, which no tracer follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.fixture(scope="module")
def resnet() -> transformers.PreTrainedModel:
    return resnet18()


@pytest.fixture(scope="module")
def graph(resnet: transformers.PreTrainedModel) -> ComputeGraph:
    return compute_graph(resnet, IMAGE)


def test_resnet18_has_its_operators(graph: ComputeGraph) -> None:
    counts = {op: graph.count(op) for op in set(graph.ops)}
    assert counts == {
        **{"Input": 1, "Conv": 20, "BatchNorm": 20, "ReLU": 17, "Maxpool": 1},
        **{"Add": 8, "Global": 1, "MatMul": 1, "Output": 1},
    }
    assert graph.params == 11_689_512  # as published for ResNet-18
    incoming = np.bincount(graph.edge_index[1], minlength=len(graph))
    assert all(incoming[i] == (2 if op == "Add" else 0 if op == "Input" else 1) for i, op in enumerate(graph.ops))


def test_resnet18_work_follows_from_its_shapes_and_kernels(
    resnet: transformers.PreTrainedModel, graph: ComputeGraph
) -> None:
    weighted = np.isin(graph.ops, ["Conv", "MatMul"])
    channels_in, out = graph.shapes[weighted, 2], graph.shapes[weighted, 3:].prod(axis=1)
    by_hand = 2 * (out * channels_in * graph.kernels[weighted].prod(axis=1)).sum()
    with torch.no_grad():
        counted = count_flops(lambda: resnet(IMAGE))
    assert graph.flops == pytest.approx(by_hand, rel=0.01) == pytest.approx(counted, rel=0.01)
    assert graph.kernels[1].tolist() == [7, 7] and graph.shapes[1].tolist() == [64, 64, 3, 32, 32, 64]


def test_a_deep_copy_has_the_same_graph_and_the_module_is_as_before(
    resnet: transformers.PreTrainedModel, graph: ComputeGraph
) -> None:
    resnet.train()
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    assert compute_graph(copy.deepcopy(resnet), IMAGE) == graph == compute_graph(resnet, IMAGE)
    assert all(m.training for m in resnet.modules())
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())


def test_another_architecture_has_another_graph() -> None:
    one, two = (compute_graph(nn.Sequential(nn.Linear(4, n)), torch.zeros(2, 4)) for n in (3, 5))
    assert one != two and one.ops == two.ops and one.flops == 2 * 2 * 4 * 3


def test_torch_fx_and_torch_export_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("downriver.models.compute_graph")

    def broken(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as only_fx:
        only_fx.setattr(module, "_by_export", broken)
        by_fx = compute_graph(Block(), torch.zeros(1, 4, 8, 8))
    assert by_fx.ops == ("Input", "Depthwise", "BatchNorm", "ReLU", "Add", "Mean", "Output")
    assert by_fx.edge_index.T.tolist() == [[0, 1], [1, 2], [2, 3], [0, 4], [3, 4], [4, 5], [5, 6]]

    monkeypatch.setattr(module, "_by_fx", broken)
    assert compute_graph(Block(), {"x": torch.zeros(1, 4, 8, 8)}) == by_fx


def test_a_vision_transformer() -> None:
    graph = compute_graph(small("vit", "nano").backbone, {"pixel_values": torch.zeros(1, 3, 32, 32)})
    assert {op: graph.count(op) for op in ("Attention", "LayerNorm", "GeLU", "Conv")} == {
        **{"Attention": 2, "LayerNorm": 5},
        **{"GeLU": 2, "Conv": 1},
    }
    assert graph.count("MatMul") == 12  # two layers of query, key, value, output and two of the perceptron
    assert set(graph.ops) <= set(VOCABULARY)
    tokens = graph.shapes[graph.ops.index("LayerNorm")]
    assert tokens.tolist() == [65, 1, 32, 65, 1, 32]


def test_a_language_model_keeps_its_cache_setting() -> None:
    model = small("causal-lm", "nano").backbone
    model.config.use_cache = True
    graph = compute_graph(model, {"input_ids": torch.ones(1, 16, dtype=torch.long)})
    assert model.config.use_cache is True
    assert graph.count("Attention") == 2 and graph.count("Embedding") == 1 and graph.count("MatMul") >= 15


def test_one_dimensional_signals_have_channels_first() -> None:
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU())
    graph = compute_graph(net, torch.zeros(1, 4, 10))
    assert graph.shapes[1].tolist() == [10, 1, 4, 8, 1, 6] and graph.kernels[1].tolist() == [3, 1]
    assert graph.shapes[2, 3:].tolist() == [8, 1, 6]


def test_an_unknown_operator_is_counted_and_warned_about() -> None:
    class Fourier(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(x).abs() + torch.fft.rfft(x).abs()

    with pytest.warns(UserWarning, match=r"Fourier: 2 operators outside the vocabulary: fftrfft \(2\)"):
        graph = compute_graph(Fourier(), torch.zeros(1, 8))
    assert graph.op_ids().max() == len(VOCABULARY)
    assert (graph.op_ids((*VOCABULARY, "fftrfft")) == len(VOCABULARY)).sum() == 2


def test_an_untraceable_module_is_named_with_its_operator() -> None:
    net = nn.Sequential(nn.Linear(2, 2), Stubborn())
    with pytest.raises(InputError, match=r"Sequential cannot be traced: torch.fx stops in 1 \(Stubborn\).*operator gt"):
        compute_graph(net, torch.zeros(1, 2))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="Linear fails on the example input"):
        compute_graph(nn.Linear(2, 2), torch.zeros(1, 3))
    with pytest.raises(InputError, match="example input is a str"):
        compute_graph(nn.Linear(2, 2), "text")
    with pytest.raises(InputError, match="edges between 0 and 1"):
        ComputeGraph(("Input", "Output"), edge_index=[[0], [2]])
    with pytest.raises(InputError, match=r"edge_index of shape \(3, 2\)"):
        ComputeGraph(("Input", "Output"), edge_index=[[0, 1], [0, 1], [0, 1]])
    with pytest.raises(InputError, match=r"kernels has shape \(1, 2\)"):
        ComputeGraph(("Input", "Output"), kernels=[[1, 1]])
    with pytest.raises(InputError, match="finite"):
        ComputeGraph(("Input",), flops=float("nan"))


def test_saved_and_loaded_without_a_pickle(graph: ComputeGraph, tmp_path) -> None:  # type: ignore[no-untyped-def]
    graph.save(tmp_path / "graph.npz")
    assert ComputeGraph.load(tmp_path / "graph.npz") == graph
    with np.load(tmp_path / "graph.npz", allow_pickle=False) as file:
        assert set(file.files) == {"ops", "shapes", "kernels", "bias", "edge_index", "flops", "params"}
    np.savez(tmp_path / "evil.npz", ops=np.array([object()], dtype=object))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    for name in ("evil.npz", "broken.npz"):
        with pytest.raises(InputError, match=name):
            ComputeGraph.load(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        ComputeGraph.load(tmp_path / "none.npz")


def test_for_torch_geometric(graph: ComputeGraph) -> None:
    pytest.importorskip("torch_geometric")
    data = graph.to_pyg()
    assert data.num_nodes == len(graph) and data.edge_index.shape == graph.edge_index.shape and data.validate()
    assert [VOCABULARY[i] for i in data.op] == list(graph.ops)


def test_without_torch_geometric_the_extra_is_named(graph: ComputeGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(MissingExtra, match=r"downriver\[graph\]"):
        graph.to_pyg()


def test_the_vocabulary_is_the_papers_and_ours() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) and VOCABULARY[:3] == ("Input", "Output", "Conv")
    assert VOCABULARY.index("Reserved5") == 30  # the paper has 31 types
    assert set(TYPE_OF.values()) <= set(VOCABULARY) and not NO_NODE & TYPE_OF.keys()
