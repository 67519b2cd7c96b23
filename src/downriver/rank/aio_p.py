"""AIO-P: one predictor of how well an architecture will do, pretrained on one task and carried to others by adapters.

Reach for it when you have scores of many architectures on some tasks and only a handful on yours: train on the first
task, add an adapter for each related one, fine-tune on at least five labelled architectures (the paper has 20), and
rank the rest. AIO-P, 2022-11 (AAAI-23). Defaults are those of its public code: 6 graph convolutions of width 32, Adam
1e-4, gradient norm 5, 40 epochs for the base, 100 for an adapter, 100 of batch 1 for fine-tuning, labels divided by
log10(FLOPs + 1) + 1 and standardised, by the labels at hand alone. Departures: graphs come from torch modules and may
differ in size within a batch. Left out: the paper's pseudo-labels (a detection or pose head shared by the bodies of a
once-for-all supernet); bring measured scores instead.
"""

import copy
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.stats import spearmanr
from torch import Tensor, nn

from downriver.core.cost import charge
from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_write
from downriver.core.seeds import seeded
from downriver.models.compute_graph import VOCABULARY, ComputeGraph
from downriver.nn.graph_conv import DENSE, GraphBatch, GraphPredictor, Nodes, batch_graphs

Array = NDArray[np.float64]
Scaling = Literal["stand", "stand_flops"]
Mode = Literal["heads+base", "all", "adapters", "rescale"]
SCALINGS, MODES = ("stand", "stand_flops"), ("heads+base", "all", "adapters", "rescale")
FEWEST = 5  # labelled architectures of a target
CLIP, LEARNING_RATE = 5.0, 1e-4  # of the public code
FORMAT = 1  # of saved predictors
AT_ONCE = 512  # graphs that are predicted together


class LabelScaler:
    """Standardise scores by their own mean and deviation, ``stand_flops`` after dividing by log10(FLOPs + 1) + 1.

    Attributes: ``mean_``, ``scale_``. Equal scores, scores that are not finite, and ``stand_flops`` without positive
    FLOPs are an ``InputError``.

    >>> scaler = LabelScaler("stand_flops").fit([0.7, 0.8], flops=[1e9, 2e9])
    >>> z = scaler.transform([0.7, 0.8], flops=[1e9, 2e9])
    >>> scaler.inverse_transform(z, flops=[1e9, 2e9]).round(12).tolist()
    [0.7, 0.8]
    """

    def __init__(self, kind: Scaling = "stand_flops") -> None:
        if kind not in SCALINGS:
            raise unknown("label scaling", kind, SCALINGS)
        self.kind = kind

    def fit(self, y: Any, flops: Any = None) -> "LabelScaler":
        """Take mean and deviation of the scores (n,), with the FLOPs (n,) of their architectures."""
        scaled = _scores(y) / self._quotient(y, flops)
        self.mean_, self.scale_ = float(scaled.mean()), float(scaled.std())
        if not self.scale_ > 1e-12 * abs(self.mean_):
            raise InputError(f"the {len(scaled)} labels are all the same: there is nothing to scale or to learn")
        return self

    def transform(self, y: Any, flops: Any = None) -> Array:
        """Scores to standardised ones."""
        return (_scores(y) / self._quotient(y, flops) - self.mean_) / self.scale_

    def inverse_transform(self, z: Any, flops: Any = None) -> Array:
        """Standardised scores back to scores."""
        return (_scores(z) * self.scale_ + self.mean_) * self._quotient(z, flops)

    def _quotient(self, y: Any, flops: Any) -> Array:
        if self.kind == "stand":
            return np.ones(len(y))
        if flops is None or not (np.asarray(flops, np.float64) > 0).all() or not np.isfinite(flops).all():
            raise InputError("scaling 'stand_flops' needs the positive FLOPs of every architecture; 'stand' needs none")
        return np.log10(_same_length(flops, y) + 1) + 1


class ArchPredictor:
    """Predict and rank the scores of architectures from their graphs.

    Parameters
    ----------
    hidden, layers, conv
        Width (at least 20), number and kind of the graph convolutions; ``graph`` is the only kind.
    scaling
        ``stand_flops`` (the paper's) or ``stand``, see ``LabelScaler``.
    vocabulary
        The operator types; it is saved with the predictor. Any other type counts as one unknown type, with a warning.
    seed
        Equal seeds and data give equal predictors.

    ``flops`` of the methods default to the graphs' own. Attributes: ``net_``, ``scaler_`` (of the labels seen last;
    those of the base, an adapter's or the target's), ``largest_`` (what shapes are divided by).

    >>> ops = ("Input", "Conv", "ReLU", "Output")
    >>> graphs = [ComputeGraph(ops[:1] + ops[1:3] * n + ops[3:], edge_index=[range(2 * n + 1), range(1, 2 * n + 2)])
    ...           for n in range(1, 9)]
    >>> predictor = ArchPredictor(scaling="stand").fit(graphs, range(8), epochs=30, learning_rate=3e-3)
    >>> predictor.rank(graphs)[:2].tolist()
    [7, 6]
    """

    def __init__(
        self,
        hidden: int = 32,
        layers: int = 6,
        conv: Literal["graph"] = "graph",
        scaling: Scaling = "stand_flops",
        vocabulary: Sequence[str] = VOCABULARY,
        seed: int = 0,
    ) -> None:
        if conv != "graph":
            raise unknown("graph convolution", conv, ["graph"])
        if hidden < 20 or layers < 1:
            raise InputError(f"hidden {hidden}, layers {layers}: a width of at least 20 and at least 1 layer expected")
        LabelScaler(scaling)
        self.hidden, self.layers, self.conv, self.scaling = hidden, layers, conv, scaling
        self.vocabulary, self.seed = tuple(vocabulary), seed

    def fit(
        self,
        graphs: Sequence[ComputeGraph],
        y: Any,
        flops: Any = None,
        *,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = LEARNING_RATE,
        validation: float = 0.1,
    ) -> "ArchPredictor":
        """Train the base on scores ``y`` (n,); of the epochs the one best on the held-out share is kept."""
        labels, scaler = self._labels(graphs, y, flops, 2)
        self.largest_ = np.maximum(np.max([graph.shapes.max(axis=0) for graph in graphs], axis=0), 1)
        with seeded("aio_p", self.seed, "base"):
            self.net_ = GraphPredictor(len(self.vocabulary), self.hidden, self.layers)
            self._train(self.net_.parameters(), graphs, labels, epochs, batch_size, learning_rate, validation)
        self.scaler_ = scaler
        return self

    def add_adapter(
        self,
        name: str,
        graphs: Sequence[ComputeGraph],
        y: Any,
        flops: Any = None,
        *,
        epochs: int = 100,
        batch_size: int = 32,
        learning_rate: float = LEARNING_RATE,
        validation: float = 0.1,
    ) -> "ArchPredictor":
        """Learn a related task in layers beside the base, which stays as it is."""
        self._check_fitted()
        if not name.isidentifier() or name in self.net_.adapters:
            raise InputError(f"adapter {name!r}: a new name of letters, digits and underscores is expected")
        labels, scaler = self._labels(graphs, y, flops, 2)
        with seeded("aio_p", self.seed, "adapter", name):
            self.net_.add_adapter(name)
            trained = [*self.net_.adapters[name].parameters(), *self.net_.adapter_heads[name].parameters()]
            self._train(trained, graphs, labels, epochs, batch_size, learning_rate, validation, only=name)
        self.scaler_ = scaler
        return self

    def finetune(
        self,
        graphs: Sequence[ComputeGraph],
        y: Any,
        flops: Any = None,
        *,
        mode: Mode = "heads+base",
        epochs: int = 100,
        batch_size: int = 1,
        learning_rate: float = LEARNING_RATE,
        validation: float = 0.0,
    ) -> "ArchPredictor":
        """Go on with the few labelled architectures of the target, at least five.

        ``mode`` says what is trained: ``heads+base`` (the adapters' heads and the base's convolutions), ``all`` (the
        adapters' convolutions too), ``adapters`` (heads and adapters, the base frozen), ``rescale`` (only factors
        α + b on the last layers). With many epochs a ``validation`` share guards against learning the labels by heart.
        """
        self._check_fitted()
        if mode not in MODES:
            raise unknown("mode of fine-tuning", mode, MODES)
        if mode in ("all", "adapters") and not self.net_.adapters:
            raise InputError(f"mode {mode!r} trains adapters, and this predictor has none: add_adapter first")
        labels, scaler = self._labels(graphs, y, flops, FEWEST)
        with seeded("aio_p", self.seed, "target"):
            trained = [p for head in self.net_.heads() for p in head.parameters()]
            if mode == "rescale":
                self.net_.add_scales()
                trained = [p for p in (self.net_.alpha, self.net_.b) if isinstance(p, nn.Parameter)]
            if mode in ("heads+base", "all"):
                trained += self.net_.convs.parameters()
            if mode in ("all", "adapters"):
                trained += self.net_.adapters.parameters()
            self._train(trained, graphs, labels, epochs, batch_size, learning_rate, validation)
        self.scaler_ = scaler
        return self

    def predict(self, graphs: Sequence[ComputeGraph], flops: Any = None, scaler: LabelScaler | None = None) -> Array:
        """(n,) scores: the mean over the adapters' heads (the base's while there is none), in the unit of the labels
        seen last; ``scaler`` gives another unit, for example from the few scores known of a target."""
        self._check_fitted()
        nodes, scaler = self._nodes(graphs), scaler or self.scaler_
        with torch.no_grad():
            z = [self.net_(batch_graphs(nodes[i : i + AT_ONCE])) for i in range(0, len(nodes), AT_ONCE)]
        return scaler.inverse_transform(torch.cat(z).numpy(), _flops(graphs, flops, scaler.kind))

    def rank(self, graphs: Sequence[ComputeGraph], flops: Any = None) -> NDArray[np.int64]:
        """(n,): the places of the graphs, the best first."""
        return np.argsort(-self.predict(graphs, flops), kind="stable")

    def compare(self, graphs: Sequence[ComputeGraph], y: Any, flops: Any = None) -> dict[str, dict[str, float]]:
        """Spearman correlation (``srcc``) and mean absolute error (``mae``) on architectures of known score.

        Rank by FLOPs and rank by parameters always stand beside the predictor, so far as the graphs tell them: more is
        taken for better.
        """
        y, predicted = _scores(y), self.predict(graphs, flops)
        found = {
            "predictor": {
                "srcc": srcc(predicted, y),
                "mae": float(np.abs(predicted - _same_length(y, predicted)).mean()),
            }
        }
        own = {"FLOPs": [g.flops for g in graphs] if flops is None else flops, "parameters": [g.params for g in graphs]}
        return found | {name: {"srcc": srcc(size, y)} for name, size in own.items() if np.ptp(size) > 0}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file: weights, and in its header the settings, vocabulary and label scale."""
        self._check_fitted()
        names = ("hidden", "layers", "conv", "scaling", "vocabulary", "seed")
        header = {
            "format": FORMAT,
            "settings": {name: getattr(self, name) for name in names},
            "adapters": list(self.net_.adapters),
            "scaler": vars(self.scaler_),
            "largest": self.largest_.tolist(),
        }
        tensors = {k: v.contiguous() for k, v in self.net_.state_dict().items()}
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={"aio_p": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ArchPredictor":
        """Read what ``save`` wrote; anything else is an ``InputError`` naming the file."""
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist: a saved predictor is expected")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["aio_p"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']}, {FORMAT} is expected")
            predictor = cls(**header["settings"])
            predictor.largest_ = np.array(header["largest"])
            predictor.net_ = GraphPredictor(len(predictor.vocabulary), predictor.hidden, predictor.layers)
            for name in header["adapters"]:
                predictor.net_.add_adapter(name)
            if "alpha" in tensors:
                predictor.net_.add_scales()
            predictor.net_.load_state_dict(tensors)
            predictor.scaler_ = LabelScaler(header["scaler"]["kind"])
            vars(predictor.scaler_).update(header["scaler"])
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError) as error:
            raise InputError(f"{path} is no saved predictor ({str(error).splitlines()[0]})") from None
        return predictor

    def _train(
        self,
        trained: Iterable[Tensor],
        graphs: Sequence[ComputeGraph],
        labels: Array,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        validation: float,
        only: str | None = None,
    ) -> None:
        """Adam on the squared error of the standardised labels, for the given parameters alone."""
        if epochs < 1 or batch_size < 1 or not learning_rate > 0 or not 0 <= validation < 1:
            raise InputError(
                f"epochs {epochs}, batch_size {batch_size}, learning_rate {learning_rate}, validation {validation}:"
                " at least 1, at least 1, above 0 and a share of at least 0 and below 1 are expected"
            )
        trained, net, nodes = list(trained), self.net_, self._nodes(graphs)
        target = torch.tensor(labels, dtype=torch.float32)
        order = torch.randperm(len(nodes))
        held, rows = order[: int(validation * len(nodes))], order[int(validation * len(nodes)) :]
        whole = batch_graphs(nodes) if max(len(n[0]) for n in nodes) <= DENSE else None  # padded once, 16 kB a graph

        def batch(part: Tensor) -> GraphBatch:
            return batch_graphs([nodes[i] for i in part]) if whole is None else whole.take(part)

        held_batch = batch(held) if len(held) else None
        best, kept = math.inf, None
        net.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimiser = torch.optim.Adam(trained, lr=learning_rate, fused=True)
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].split(batch_size):
                optimiser.zero_grad()
                loss = (net(batch(part), only) - target[part]).square().mean()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, CLIP)
                optimiser.step()
            if held_batch is not None:
                with torch.no_grad():
                    error = float((net(held_batch, only) - target[held]).square().mean())
                if error < best:
                    best, kept = error, copy.deepcopy(net.state_dict())
        if kept is not None:
            net.load_state_dict(kept)
        net.requires_grad_(False)
        charge(
            examples=epochs * len(rows),
            parameters=sum(p.numel() for p in net.parameters()),
            trained_parameters=sum(p.numel() for p in trained),
        )

    def _labels(self, graphs: Sequence[ComputeGraph], y: Any, flops: Any, fewest: int) -> tuple[Array, LabelScaler]:
        y = _same_length(_scores(y), graphs)
        if len(y) < fewest:
            raise InputError(f"{len(y)} labelled architectures: at least {fewest} are expected")
        flops = _flops(graphs, flops, self.scaling)
        scaler = LabelScaler(self.scaling).fit(y, flops)
        return scaler.transform(y, flops), scaler

    def _nodes(self, graphs: Sequence[ComputeGraph]) -> list[Nodes]:
        """The graphs as tensors, their shapes divided by the largest of the base's training graphs."""
        if not len(graphs):
            raise InputError("no graphs: at least one is expected")
        known = set(self.vocabulary)
        if strange := {op for graph in graphs for op in set(graph.ops) - known}:
            n = sum(op in strange for graph in graphs for op in graph.ops)
            listed = ", ".join(sorted(strange))
            warnings.warn(f"{n} operators outside the vocabulary count as unknown: {listed}", stacklevel=3)
        return [
            (
                torch.from_numpy(graph.op_ids(self.vocabulary)),
                torch.tensor(graph.shapes / self.largest_, dtype=torch.float32),
                torch.from_numpy(graph.kernels),
                torch.tensor(graph.bias, dtype=torch.float32),
                torch.from_numpy(graph.edge_index),
            )
            for graph in graphs
        ]

    def _check_fitted(self) -> None:
        if not hasattr(self, "net_"):
            raise InputError("this predictor has not been fitted: fit(graphs, y) comes first")


@dataclass(frozen=True)
class Smaller:
    """What a search for a smaller architecture found: the graph, its predicted score and that of the start, every
    step's (FLOPs, predicted score), and whether the budget was reached."""

    graph: ComputeGraph
    score: float
    start_score: float
    path: tuple[tuple[float, float], ...]
    reached: bool


def search_smaller(
    predictor: ArchPredictor,
    graph: ComputeGraph,
    mutate: Callable[[ComputeGraph], Iterable[ComputeGraph]],
    flops_budget: float,
    *,
    max_drop: float = math.inf,
    max_steps: int = 1000,
) -> Smaller:
    """Edit a graph greedily until it fits a FLOPs budget, keeping the predicted score as high as may be.

    ``mutate`` gives the graphs one edit away, each with its own FLOPs (trace the edited module with
    ``compute_graph``). Of those that cost less than the present one, the best by prediction is taken; within the
    budget the search goes on while the prediction rises. It stops where nothing smaller is left, and before the
    prediction falls more than ``max_drop`` below the start's: ``reached`` says whether the budget was met.
    """
    if not flops_budget > 0 or not graph.flops > 0:
        raise InputError(f"flops_budget {flops_budget}, the graph's FLOPs {graph.flops}: both must be positive")
    start = score = float(predictor.predict([graph])[0])
    path = [(graph.flops, score)]
    for _ in range(max_steps):
        limit = graph.flops if graph.flops > flops_budget else math.inf
        near = [g for g in mutate(graph) if g.flops < limit and (limit < math.inf or g.flops <= flops_budget)]
        if not near:
            break
        predicted = predictor.predict(near)
        best = int(predicted.argmax())
        if predicted[best] < start - max_drop or (limit == math.inf and predicted[best] <= score):
            break
        graph, score = near[best], float(predicted[best])
        path.append((graph.flops, score))
    return Smaller(graph, score, start, tuple(path), graph.flops <= flops_budget)


def srcc(predicted: Any, y: Any) -> float:
    """Spearman's rank correlation; 0 where the predictions are all the same.

    >>> srcc([1, 2, 4], [10, 20, 30])
    1.0
    """
    predicted = _same_length(predicted, y)
    return float(spearmanr(predicted, _scores(y)).statistic) if np.ptp(predicted) > 0 else 0.0


def _flops(graphs: Sequence[ComputeGraph], flops: Any, kind: str) -> Array | None:
    if kind == "stand":
        return None
    return _same_length([graph.flops for graph in graphs] if flops is None else flops, graphs)


def _scores(y: Any) -> Array:
    values = np.asarray(list(y) if isinstance(y, range) else y, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"scores of shape {values.shape}: a list of finite numbers is expected")
    return values


def _same_length(values: Any, others: Any) -> Array:
    values = _scores(values)
    if len(values) != len(others):
        raise InputError(f"{len(values)} numbers for {len(others)} architectures: one each is expected")
    return values
