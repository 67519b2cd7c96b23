"""The reproduction of paper 66: its parts are what it says, it runs, and its claims can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from downriver.core import InputError
from downriver.reproductions.rank import aio_p as module
from downriver.study.claims import verdicts
from downriver.tasks.architectures import OPERATIONS, Architectures

ARMS = ["mean of the labels", "by parameters", "from scratch", "base, zero-shot", "adapter, zero-shot", "AIO-P"]


def test_the_paper_and_its_claims() -> None:
    assert (module.paper.number, module.paper.slug, module.paper.room) == (66, "aio_p", "rank")
    assert [c.text for c in module.graph_networks.claims] == [
        "AIO-P is better than from scratch on srcc",
        "adapter, zero-shot is better than base, zero-shot on srcc",
        "AIO-P is better than by parameters on srcc",
        "AIO-P is above 0.5 on srcc",
        "AIO-P is better than from scratch on mae",
    ]
    assert module.graph_networks.seeds == 5
    assert module.SIZES == {"cora": 3000, "computers": 1000, "photo": 20, "test": 1500}


def test_the_graph_of_an_architecture() -> None:
    one = np.array([0.8])
    links, operations = np.array([[0, 0, 1, 3]]), np.array([[1, 0, 8, 4]])
    graph = module.cell(Architectures(np.array([0]), links, operations, one, one, one, np.array([1.5])), 0)
    assert graph.ops == ("Input", "gcn", "gat", "skip", "sage", "Output") and graph.params == 1_500_000
    edges = {(graph.ops[a], graph.ops[b]) for a, b in graph.edge_index.T}
    assert edges == {
        *(("Input", "gcn"), ("Input", "gat"), ("gcn", "skip"), ("skip", "sage")),
        *(("gat", "Output"), ("sage", "Output")),
    }
    assert set(module.VOCABULARY) == {"Input", "Output", *OPERATIONS}


@pytest.mark.assets
def test_the_parts_share_no_architecture(asset) -> None:  # type: ignore[no-untyped-def]
    asset("nas-bench-graph")
    parts, again, other = (module.draw(seed, 0.02) for seed in (0, 0, 1))
    assert {name: len(part.graphs) for name, part in parts.items()} == {
        **{"cora": 60, "computers": 20},
        **{"photo": 20, "test": 30},
    }
    seen = [(g.ops, g.edge_index.tobytes()) for part in parts.values() for g in part.graphs]
    assert len(set(seen)) == len(seen) == 130
    assert (parts["test"].score == again["test"].score).all() and (parts["test"].score != other["test"].score).any()


@pytest.mark.assets
def test_one_seed_runs_at_tiny_scale(asset, tmp_path) -> None:  # type: ignore[no-untyped-def]
    asset("nas-bench-graph")
    result = dataclasses.replace(module.graph_networks, scale="tiny").run(
        tmp_path, executor="serial", seeds=1, progress=False
    )
    assert not result.failures and list(result.arms) == ARMS
    rows = result.rows()
    assert rows["value"].is_finite().all() and rows.filter(pl.col("metric") == "srcc")["value"].n_unique() == len(ARMS)
    examples = {arm: rows.filter(arm=arm)["examples"].max() for arm in ("base, zero-shot", "adapter, zero-shot")}
    assert 0 < examples["base, zero-shot"] < examples["adapter, zero-shot"]  # shared work is charged to every user
    assert {v.verdict for v in result.verdicts()} == {"undecided"}


def test_its_claims_can_fail() -> None:
    found = dict.fromkeys(ARMS, (0.4, 3.0)) | {"AIO-P": (0.3, 3.5), "adapter, zero-shot": (0.6, 2.0)}
    directions = {"srcc": "higher", "mae": "lower"}
    rows = pl.DataFrame(
        {"arm": arm, "seed": i, "task": "", "metric": metric, "value": value + i / 100, "direction": directions[metric]}
        for arm, values in found.items()
        for metric, value in zip(directions, values, strict=True)
        for i in range(5)
    )
    judged = verdicts(module.graph_networks.claims, rows, ARMS, list(range(5)))
    assert [v.verdict for v in judged] == ["fails", "holds", "fails", "fails", "fails"]


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.graph_networks, scale="huge").arms()
