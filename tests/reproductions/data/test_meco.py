"""The reproduction of paper 19: its world is what it says, it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.data.condition import condition
from downriver.reproductions import find
from downriver.reproductions.data import meco as module
from downriver.study.claims import verdicts

ARMS = ["baseline", "metadata only", "cooldown 10 %", "cooldown 20 %"]


def test_paper_and_claims():
    [listed] = find("meco")
    assert (listed.number, listed.room, listed.title) == (19, "data", module.paper.title)
    assert listed.module == module.__name__
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert [claim.text for claim in module.reproduction.claims] == [
        *(f"{arm} is above 0 on loss saved by the right source, not a wrong one" for arm in ARMS[1:]),
        "baseline is better than metadata only on loss without a source",
        "cooldown 10 % is above 0 on nats recovered beyond 60 % of the gap",
        "cooldown 20 % is better than cooldown 10 % on loss without a source",
    ]
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_world(asset):
    asset("20newsgroups")
    world = module.World(0, 60, 30)
    assert len(world.held) == len(world.misled) == 30
    assert all(
        a["text"] == b["text"] and a["group"] != b["group"] for a, b in zip(world.held, world.misled, strict=True)
    )
    assert all(10 <= len(row["text"].split()) <= 35 for row in world.held)
    row = condition(world.held[:1], module.SOURCE, world.tokenizer)[0]
    prefix = world.tokenizer.convert_ids_to_tokens(row["input_ids"][1 : row["labels"].count(-100)])
    assert prefix[0] == "url" and "<unk>" not in prefix
    assert "".join(prefix[1:]) == world.held[0]["group"]


def test_it_runs_at_tiny_scale(asset, tmp_path):
    asset("20newsgroups")
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(ARMS) and (rows["flops"] > 1e8).all()
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 6  # one seed decides nothing


def test_the_claims_fail_on_a_model_that_does_not_read_its_source():
    values = {
        ("baseline", module.NONE): 5.3,
        ("metadata only", module.NONE): 5.1,
        ("cooldown 10 %", module.NONE): 5.1,
        ("cooldown 20 %", module.NONE): 5.2,
        ("cooldown 10 %", module.RECOVERED): -0.1,
        **{(arm, module.STEERED): -0.01 for arm in ARMS},
    }
    rows = pl.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                "task": "",
                "metric": metric,
                "value": value + 0.001 * seed,
                "direction": "lower" if metric == module.NONE else "higher",
            }
            for (arm, metric), value in values.items()
            for seed in range(3)
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 6
