"""The reproduction of paper 33: its world is what it says, it runs at tiny scale, and its claims can fail."""

import dataclasses
import math

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.evaluate import editing_collapse as module
from downriver.study.claims import verdicts

ARMS = ["unedited", "single C-ROME", "sequential C-ROME", "sequential FT", "pooled", "guarded FT"]


def test_paper_and_claims():
    [listed] = find("editing_collapse")
    assert (listed.number, listed.room, listed.title) == (33, "evaluate", module.paper.title)
    assert listed.module == module.__name__
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert [claim.text for claim in module.reproduction.claims] == [
        "single C-ROME is above 0.9 on efficacy",
        "pooled is below -0.8 on Spearman of log perplexity and accuracy",
        "guarded FT is below 10.5 on edits made",
        "guarded FT is above 0.95 on accuracy",
    ]


def test_the_world():
    world, again, other = module.World(0), module.World(0), module.World(1)
    assert world.edits == again.edits != other.edits and world.held == again.held
    assert len(world.edits) == 30 and len(world.others) == 240 - 30
    facts = {
        (e["prompt"], e["subject"]): f"o{world.object[int(e['subject'][1:]), int(e['prompt'][1])]}" for e in world.edits
    }
    assert len({e["subject"] for e in world.edits}) == 30  # another subject each time
    assert all(e["target_new"] != facts[e["prompt"], e["subject"]] for e in world.edits)  # none is true already
    assert not {(o["prompt"], o["subject"]) for o in world.others} & facts.keys()
    assert len(module.VOCABULARY) == 128 and all(len(text.split()) == 12 for text in world.held)
    assert set(world.passage()) <= set(module.VOCABULARY) and len(world.passage()) == 24
    assert len(world.contexts) == 20


def test_it_runs_at_tiny_scale(tmp_path):
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(ARMS) and (rows["flops"] > 1e8).all()
    found = {(arm, metric): value for arm, metric, value in rows.select("arm", "metric", "value").iter_rows()}
    assert found["unedited", "accuracy"] < 0.3  # eight steps teach next to nothing
    assert found["pooled", "models"] == 6
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 4  # one seed decides nothing
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_on_a_guard_that_sleeps_and_a_surrogate_that_is_blind():
    values = {
        ("single C-ROME", "efficacy"): 0.04,
        ("pooled", module.CORRELATION): -0.2,
        ("guarded FT", "edits made"): 31.0,
        ("guarded FT", "accuracy"): 0.3,
    }
    rows = pl.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                "task": "",
                "metric": metric,
                "value": value + 0.001 * seed,
                "direction": "higher",
            }
            for (arm, metric), value in values.items()
            for seed in range(3)
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 4


def test_correlations_over_all_models_and_over_the_sound_ones():
    rows = {m.metric: m.value for m in module.correlated([10, 11, 12, 40, 90], [0.9, 0.9, 0.8, 0.2, 0.1], 10.0)}
    assert rows["models"] == 5 and rows["models below 1.5 times"] == 3
    assert rows[module.CORRELATION] == pytest.approx(-0.97, abs=0.01)
    assert not math.isnan(rows[f"{module.CORRELATION}, below 1.5 times"])
