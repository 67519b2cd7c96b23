"""The computation graph of any PyTorch module: typed operators with their shapes, and the data flow between them.

Reach for it when architectures themselves are the data: to predict how well one will do (``rank.ArchPredictor``), to
compare two, or to count their work. Paper: AIO-P, 2022-11, whose graphs of TensorFlow models have the same features.
Departures: graphs come from torch.fx, or torch.export where torch.fx fails; types that the paper lacks (attention,
embedding, norms, ...) extend its list; operators that only rename or reorder elements (reshape, transpose, dropout in
evaluation) leave no node, and edges pass through them.
"""

import contextlib
import inspect
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from downriver.core.cost import count_flops
from downriver.core.errors import InputError, require
from downriver.core.io import atomic_write
from downriver.models.operators import NO_NODE, TURNS, TYPE_OF, VOCABULARY, plain


@dataclass(frozen=True, eq=False)
class ComputeGraph:
    """A graph of n operators and e edges; two are equal when all of it is.

    Attributes
    ----------
    ops
        The type of each node, a name of ``VOCABULARY`` or of the reader's own.
    shapes
        (n, 6): height, width and channels of the first input and of the output, without the batch. Tokens count as
        height; a vector has height and width 1. Zeros where nothing is known.
    kernels
        (n, 2): kernel height and width of a weighted operator, 1 × 1 for a linear layer, 0 for operators without
        weights.
    bias
        (n,): whether a weighted operator adds a bias.
    edge_index
        (2, e): each column leads from a node to one that uses its output.
    flops, params
        Floating-point operations of one call on the example, multiply and add counted as two; parameters.

    Sizes that disagree, edges to nodes that are not there and numbers that are not finite are an ``InputError``.

    >>> graph = ComputeGraph(("Input", "ReLU", "Output"), edge_index=[[0, 1], [1, 2]])
    >>> graph.shapes.shape, graph.edge_index.tolist()
    ((3, 6), [[0, 1], [1, 2]])
    """

    ops: tuple[str, ...]
    shapes: Any = None
    kernels: Any = None
    bias: Any = None
    edge_index: Any = ()
    flops: float = 0.0
    params: int = 0

    def __post_init__(self) -> None:
        ops = tuple(str(op) for op in self.ops)
        n = len(ops)
        fill: dict[str, tuple[Any, type]] = {"shapes": ((n, 6), np.int64), "kernels": ((n, 2), np.int64)}
        fill["bias"] = ((n,), np.bool_)
        for name, (shape, dtype) in fill.items():
            given = getattr(self, name)
            array = np.zeros(shape, dtype) if given is None else np.array(given, dtype)
            if array.shape != shape:
                raise InputError(f"compute graph of {n} nodes: {name} has shape {array.shape}, {shape} is expected")
            object.__setattr__(self, name, array)
        edges = np.array(self.edge_index, np.int64)
        edges = edges if edges.size else edges.reshape(2, 0)
        if not n or len(edges) != 2 or edges.ndim != 2 or (edges.size and not (edges.min() >= 0 and edges.max() < n)):
            raise InputError(
                f"compute graph of {n} nodes, edge_index of shape {edges.shape}: at least one node, and two rows of"
                f" edges between 0 and {n - 1}, expected"
            )
        if not (np.isfinite(self.flops) and self.flops >= 0 and self.params >= 0 and self.shapes.min() >= 0):
            raise InputError("compute graph: flops, params and shapes must be finite and not negative")
        object.__setattr__(self, "ops", ops)
        object.__setattr__(self, "edge_index", edges)
        object.__setattr__(self, "flops", float(self.flops))
        object.__setattr__(self, "params", int(self.params))

    def __len__(self) -> int:
        return len(self.ops)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ComputeGraph):
            return NotImplemented
        mine, theirs = vars(self), vars(other)
        return all(np.array_equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def count(self, op: str) -> int:
        """How many nodes have this type."""
        return self.ops.count(op)

    def op_ids(self, vocabulary: Sequence[str] = VOCABULARY) -> np.ndarray:
        """(n,): the place of each node's type in the vocabulary; its length for a type that is not there."""
        place = {op: i for i, op in enumerate(vocabulary)}
        return np.array([place.get(op, len(place)) for op in self.ops])

    def to_pyg(self, vocabulary: Sequence[str] = VOCABULARY) -> Any:
        """A ``torch_geometric.data.Data`` with op, shapes, kernels, bias, edge_index, flops and params.

        Raises ``MissingExtra`` without torch_geometric.
        """
        data = require("torch_geometric.data", "graph").Data
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in ("shapes", "kernels", "bias", "edge_index")}
        op = torch.from_numpy(self.op_ids(vocabulary))
        return data(op=op, num_nodes=len(self), flops=self.flops, params=self.params, **tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` of plain arrays, atomically."""
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, **{k: np.asarray(v) for k, v in vars(self).items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ComputeGraph":
        """Read what ``save`` wrote; no pickle is ever read. Anything else is an ``InputError`` naming the file."""
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist: an .npz file of a compute graph is expected")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in cls.__dataclass_fields__}
            ops, flops, params = arrays.pop("ops").tolist(), float(arrays.pop("flops")), int(arrays.pop("params"))
            return cls(tuple(ops), flops=flops, params=params, **arrays)
        except Exception as error:  # numpy and zipfile raise whatever a broken file leads to
            raise InputError(f"{path} is no compute graph ({error})") from None


def compute_graph(module: nn.Module, example_input: Any) -> ComputeGraph:
    """Trace a module on an example and give back its graph, in evaluation mode; the module is left as it was.

    Parameters
    ----------
    module
        Any ``nn.Module`` that torch.fx or torch.export can trace. On the ``meta`` device nothing is computed.
    example_input
        A tensor, a sequence of positional arguments, or a mapping of keyword arguments. Images are (batch, channels,
        height, width), texts (batch, tokens) or (batch, tokens, features). FLOPs are those of this call.

    Raises
    ------
    InputError
        The module fails on the example, or neither tracer can follow it: the message names the submodule and the last
        operator that was traced.

    Operators of no known type keep their own name and are warned about with their number; a predictor sees them as one
    unknown type.

    Example
    -------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> graph = compute_graph(net, torch.zeros(1, 3, 16, 16))
    >>> graph.ops, graph.kernels[1].tolist(), graph.shapes[1].tolist()
    (('Input', 'Conv', 'ReLU', 'Global', 'Output'), [3, 3], [16, 16, 3, 16, 16, 8])
    >>> graph.edge_index.tolist(), graph.flops == 2 * 16 * 16 * 8 * 3 * 9, graph.params
    ([[0, 1, 2, 3], [1, 2, 3, 4]], True, 224)
    """
    args, kwargs = _arguments(example_input)
    name = type(module).__name__
    with _evaluating(module), torch.no_grad():
        try:
            flops = count_flops(lambda: module(*args, **kwargs))
        except Exception as error:
            raise InputError(f"{name} fails on the example input: {_brief(error)}") from error
        tracer = _Tracer()
        try:
            traced = _by_fx(tracer, module, args, kwargs)
        except Exception as first:
            try:
                traced = _by_export(module, args, kwargs)
            except Exception as second:
                raise InputError(
                    f"{name} cannot be traced: torch.fx stops in {tracer.where(module)} ({_brief(first)});"
                    f" torch.export: {_brief(second)}"
                ) from second
    nodes = _nodes(*traced)
    unknown = Counter(op for op in nodes["ops"] if op not in VOCABULARY)
    if unknown:
        listed = ", ".join(f"{op} ({n})" for op, n in sorted(unknown.items()))
        warnings.warn(f"{name}: {unknown.total()} operators outside the vocabulary: {listed}", stacklevel=2)
    return ComputeGraph(**nodes, flops=flops, params=sum(p.numel() for p in module.parameters()))


class _Tracer(fx.Tracer):
    """torch.fx that remembers where it stopped and looks into torch's own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return own and (plain(type(m).__name__) in TYPE_OF or not any(m.children()))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(f"{self.path_of_module(m)} ({type(m).__name__})")
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result

    def where(self, module: nn.Module) -> str:
        last = next(iter(reversed(self.graph.nodes)), None) if hasattr(self, "graph") else None
        after = f" after operator {last.name}" if last is not None else ""
        return f"{self.inside[-1] if self.inside else type(module).__name__}{after}"


class _Shapes(fx.Interpreter):
    """Runs a traced module and notes the shape of the first tensor of every node's value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = _shape(value)
        return value


# what a tracer gives: the nodes, the submodules, and the nodes that are parameters or constants of the module
_Traced = tuple[fx.Graph, Mapping[str, nn.Module], frozenset[str]]


def _by_fx(tracer: _Tracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Traced:
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    given = set(bound.arguments)
    variable = {n for n, p in signature.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if given & variable:
        raise TypeError(f"torch.fx cannot tell what {', '.join(sorted(given & variable))} holds")
    bound.apply_defaults()
    values = {name: value for name, value in bound.arguments.items() if name not in variable}
    fixed = {name: value for name, value in values.items() if name not in given}
    graph = tracer.trace(module, concrete_args=fixed or None)
    traced = fx.GraphModule(module, graph)
    _Shapes(traced).run(*values.values())
    return graph, dict(traced.named_modules()), frozenset(n.name for n in graph.nodes if n.op == "get_attr")


def _by_export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Traced:
    with warnings.catch_warnings(), _quiet():
        program = torch.export.export(module, args, kwargs, strict=False)
    for node in program.graph.nodes:
        node.meta["shape"] = _shape(node.args if node.op == "output" else node.meta.get("val"))
    inputs = {*program.graph_signature.user_inputs}
    own = {n.name for n in program.graph.nodes if n.op == "get_attr"}
    return program.graph, {}, frozenset(own | {n.name for n in program.graph.find_nodes(op="placeholder")} - inputs)


def _nodes(graph: fx.Graph, modules: Mapping[str, nn.Module], own: frozenset[str]) -> dict[str, Any]:
    """The features and edges of the operators among the traced nodes."""
    ops: list[str] = []
    shapes: list[tuple[int, ...]] = []
    kernels: list[tuple[int, int]] = []
    bias: list[bool] = []
    edges: dict[tuple[int, int], None] = {}
    sources: dict[fx.Node, tuple[int, ...]] = {}  # the operators whose output a traced node hands on
    channels_first: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        name, raw = _name(node, modules)
        flow = [i for i in node.all_input_nodes if i.name not in own]
        before = tuple(dict.fromkeys(s for i in flow for s in sources.get(i, ())))
        first = next((i for i in flow if i.meta.get("shape") is not None), None)
        channels_first[node] = raw.endswith("1d") or (first is not None and channels_first[first] and name not in TURNS)
        shape = node.meta.get("shape")
        unused = node.op == "placeholder" and not node.users
        if node.name in own or unused or (shape is None and node.op != "output"):
            continue  # parameters, constants, sizes
        if name in NO_NODE:
            sources[node] = before
            continue
        came = shape if first is None else first.meta["shape"]
        came_first = raw.endswith("1d") or (first is not None and channels_first[first])
        weight, has_bias = _weight(node, modules, own)
        op, kernel = _typed(node, name, came, shape, weight)
        has_bias = has_bias and kernel != (0, 0)
        number = len(ops)
        ops.append(op)
        shapes.append((*_hwc(came, came_first), *_hwc(shape, channels_first[node])))
        kernels.append(kernel)
        bias.append(has_bias)
        edges.update(dict.fromkeys((s, number) for s in before))
        sources[node] = (number,)
    return {
        "ops": tuple(ops),
        "shapes": shapes,
        "kernels": kernels,
        "bias": bias,
        "edge_index": np.array(list(edges), np.int64).reshape(-1, 2).T,
    }


def _typed(
    node: fx.Node, name: str, came: tuple[int, ...], shape: tuple[int, ...] | None, weight: tuple[int, ...] | None
) -> tuple[str, tuple[int, int]]:
    """The type of an operator, and the kernel of a weighted one."""
    if node.op in ("placeholder", "output"):
        return ("Input" if node.op == "placeholder" else "Output"), (0, 0)
    op = TYPE_OF.get(name, name)
    if op == "Avgpool" and "adaptive" in name and shape and set(shape[2:]) == {1}:
        op = "Global"
    if weight is None or op not in ("Conv", "Deconv", "MatMul"):
        return op, (0, 0)
    if op == "MatMul":
        return op, (1, 1)
    if op == "Conv" and weight[1] == 1 and len(came) > 1 and came[1] > 1:
        op = "Depthwise"  # one input channel a filter, several channels
    size = (*weight[2:], 1)
    return op, (size[0], size[1])


def _weight(
    node: fx.Node, modules: Mapping[str, nn.Module], own: frozenset[str]
) -> tuple[tuple[int, ...] | None, bool]:
    """The shape of the matrix or kernel that an operator multiplies by, and whether it adds a bias."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        weight = getattr(module, "weight", None)
        has_bias = getattr(module, "bias", None) is not None
        return (tuple(weight.shape), has_bias) if isinstance(weight, Tensor) and weight.ndim > 1 else (None, False)
    held = [i.meta.get("shape") or () for i in node.all_input_nodes if i.name in own]
    matrices = [shape for shape in held if len(shape) > 1]
    return (matrices[0], any(len(shape) == 1 for shape in held)) if matrices else (None, False)


def _name(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The plain name of a node's operator, and its own name without underscores."""
    if node.op == "call_module":
        own = type(modules[str(node.target)]).__name__
    elif node.op == "call_function":
        target: Any = getattr(node.target, "overloadpacket", node.target)
        own = str(getattr(target, "__name__", target))
    else:
        own = str(node.target)
    return plain(own), own.strip("_").lower()


def _hwc(shape: tuple[int, ...] | None, channels_first: bool) -> tuple[int, int, int]:
    """Height, width and channels of a tensor with a leading batch dimension."""
    inner = tuple(shape or ())[1:]
    if len(inner) >= 3:
        return int(np.prod(inner[1:-1])), inner[-1], inner[0]
    if len(inner) == 2:
        return (inner[1], 1, inner[0]) if channels_first else (inner[0], 1, inner[1])
    return (1, 1, inner[0]) if inner else (1, 1, 1)


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor, or of the first one in a nested value."""
    if isinstance(value, fx.Node):
        return value.meta.get("shape")
    if isinstance(value, Tensor):
        return tuple(int(s) for s in value.shape)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((s for s in map(_shape, inner) if s is not None), None)


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise InputError(f"the example input is a {type(example).__name__}: a tensor, a sequence or a mapping is expected")


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, and no cache of keys and values in a language model of transformers."""
    modes = [(m, m.training) for m in module.modules()]
    config = getattr(module, "config", None)
    cache = getattr(config, "use_cache", None)
    module.eval()
    if cache:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if cache:
            config.use_cache = cache  # type: ignore[union-attr]
        for m, training in modes:
            m.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the listings that torch.export prints before it fails; the error says what matters."""
    warnings.simplefilter("ignore")
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
