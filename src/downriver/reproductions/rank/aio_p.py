"""AIO-P on real scores of graph networks: base on one data set, adapter on a second, 20 labels of a third.

The paper's targets are vision tasks, whose tables are not packaged anywhere. NAS-Bench-Graph has the same form: 26 206
architectures, each measured on every data set. The base learns Cora, the adapter Amazon Computers, the target is Amazon
Photo; no architecture of one part is in another. Labels are standardised without FLOPs, which the table does not
have. Pretraining is short for a CPU, so its learning rate is 1e-3; fine-tuning is as published. The rival trained from
nothing on the same 20 labels gets the larger rate too.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from downriver.core import Budget, InputError, Measurement, assets
from downriver.core.seeds import generator
from downriver.models.compute_graph import ComputeGraph
from downriver.rank.aio_p import ArchPredictor, LabelScaler, srcc
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, above, better, shared, study
from downriver.tasks.architectures import OPERATIONS, Architectures, nas_bench_graph

paper = Paper(
    number=66,
    slug="aio_p",
    title="AIO-P: Expanding Neural Performance Predictors Beyond Image Classification",
    date="2022-11",
    room="rank",
    claim="A predictor of architectures pretrained on one task and widened by adapters for others ranks architectures "
    "on a new task from 20 labels, better than one trained on these labels alone.",
)

BASE, ADAPTER, TARGET = "cora", "computers", "photo"
SIZES = {BASE: 3000, ADAPTER: 1000, TARGET: 20, "test": 1500}
PRETRAINING = {"learning_rate": 1e-3, "batch_size": 32}
EPOCHS = {BASE: 12, ADAPTER: 40, TARGET: 100}
SCALES = {"small": 1.0, "tiny": 0.02}  # of architectures (never fewer than 20) and epochs; tiny shows nothing
VOCABULARY = ("Input", "Output", *OPERATIONS)


@dataclass(frozen=True)
class Part:
    """Architectures and their test accuracy in points."""

    graphs: list[ComputeGraph]
    score: np.ndarray


@study(
    "aio-p",
    title="Graph networks ranked on Photo from Cora, Computers and 20 labels",
    claims=[
        better("AIO-P", than="from scratch", on="srcc"),
        better("adapter, zero-shot", than="base, zero-shot", on="srcc"),
        better("AIO-P", than="by parameters", on="srcc"),
        above("AIO-P", on="srcc", value=0.5),
        better("AIO-P", than="from scratch", on="mae"),
    ],
    seeds=5,
)
def graph_networks(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the architectures of every part and the weights."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    epochs = {name: max(2, round(n * SCALES[scale])) for name, n in EPOCHS.items()}

    @shared
    def parts() -> Mapping[str, Part]:
        return draw(seed, SCALES[scale])

    @shared
    def base() -> ArchPredictor:
        part = parts()[BASE]
        return predictor(seed).fit(part.graphs, part.score, epochs=epochs[BASE], **PRETRAINING)  # type: ignore[arg-type]

    @shared
    def widened() -> ArchPredictor:
        part, made = parts()[ADAPTER], copy.deepcopy(base())
        return made.add_adapter(ADAPTER, part.graphs, part.score, epochs=epochs[ADAPTER], **PRETRAINING)  # type: ignore[arg-type]

    def tuned() -> ArchPredictor:
        part, made = parts()[TARGET], copy.deepcopy(widened())
        return made.finetune(part.graphs, part.score, epochs=epochs[TARGET])

    def scratch() -> ArchPredictor:
        part = parts()[TARGET]
        rate = PRETRAINING["learning_rate"]
        return predictor(seed).fit(
            part.graphs, part.score, epochs=epochs[TARGET], batch_size=1, learning_rate=rate, validation=0.0
        )

    def measured(made: ArchPredictor) -> list[Measurement]:
        test, few = parts()["test"], parts()[TARGET]
        predicted = made.predict(test.graphs, scaler=LabelScaler("stand").fit(few.score))  # the 20 labels give the unit
        mae = float(np.abs(predicted - test.score).mean())
        return [Measurement("srcc", srcc(predicted, test.score)), Measurement("mae", mae, direction="lower")]

    def mean() -> list[Measurement]:
        error = np.abs(parts()["test"].score - parts()[TARGET].score.mean()).mean()
        return [Measurement("srcc", 0.0), Measurement("mae", float(error), direction="lower")]

    def by_parameters() -> list[Measurement]:
        test = parts()["test"]
        return [Measurement("srcc", srcc([graph.params for graph in test.graphs], test.score))]

    yield Arm("mean of the labels", mean)
    yield Arm("by parameters", by_parameters)
    yield Arm("from scratch", lambda: measured(scratch()))
    yield Arm("base, zero-shot", lambda: measured(base()))
    yield Arm("adapter, zero-shot", lambda: measured(widened()))
    yield Arm("AIO-P", lambda: measured(tuned()))


studies: tuple[Study, ...] = (graph_networks,)


def predictor(seed: int) -> ArchPredictor:
    """The paper's predictor for graphs of this table's operations."""
    return ArchPredictor(scaling="stand", vocabulary=VOCABULARY, seed=seed)


def draw(seed: int, share: float) -> dict[str, Part]:
    """Base, adapter, target and test architectures of a seed, none of them in two parts."""
    folder = assets.path("nas-bench-graph")
    tables = {name: nas_bench_graph(folder / f"{name}.bench") for name in (BASE, ADAPTER, TARGET)}
    rows = generator("aio-p", seed).permutation(len(tables[BASE]))
    parts, start = {}, 0
    for name, size in SIZES.items():
        size = max(20, round(size * share))
        table = tables[TARGET if name == "test" else name]
        mine = rows[start : start + size]
        parts[name] = Part([cell(table, i) for i in mine], 100 * table.score[mine])
        start += size
    return parts


def cell(table: Architectures, row: int) -> ComputeGraph:
    """The graph of one architecture: four operations wired to the input or to one another, those unused to the output.

    Node 0 is the input, 1 to 4 the operations, 5 the output.
    """
    links = table.links[row]
    edges = [(link, node) for node, link in enumerate(links, start=1)]
    edges += [(node, 5) for node in range(1, 5) if node not in links]
    ops = ("Input", *(OPERATIONS[i] for i in table.operations[row]), "Output")
    return ComputeGraph(ops, edge_index=np.array(edges).T, params=round(1e6 * table.params[row]))
