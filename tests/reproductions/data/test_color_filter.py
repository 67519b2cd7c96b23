"""The reproduction of paper 12: its world is what it says, it runs at tiny scale, and its claims can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.data import color_filter as module
from downriver.study.claims import verdicts

ARMS = ["random", "conditional only", "CoLoR"]


def test_paper_and_claims():
    [listed] = find("color_filter")
    assert (listed.number, listed.room, listed.title) == (12, "data", module.paper.title)
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert [claim.text for claim in module.reproduction.claims] == [
        "CoLoR is better than random on validation loss by more than 0.05",
        "CoLoR is better than conditional only on validation loss",
        "CoLoR is above 3 on share of the target over its share of the pool",
    ]


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path, asset):
    asset("20newsgroups")
    world, again = module.World(0, 400, 60, 30), module.World(0, 400, 60, 30)
    assert world.pool == again.pool and world.on_target.sum() == 40 and len(world.target) == 60
    assert not {*world.target} & {*world.held} and {len(text.split()) for text in world.pool} == {31}
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(ARMS)
    losses = rows.filter(metric=module.LOSS)["value"].to_numpy()
    assert len(np.unique(losses)) == 3 and (losses > 5).all()  # six steps teach next to nothing
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_on_a_score_of_the_wrong_sign():
    values = {"random": (6.03, 1.0), "conditional only": (6.04, 1.5), "CoLoR": (6.15, 0.2)}
    rows = pl.DataFrame(
        [
            {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": way}
            for arm, pair in values.items()
            for (metric, way), value in zip(((module.LOSS, "lower"), (module.RICHER, "higher")), pair, strict=True)
            for seed in range(3)
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 3
