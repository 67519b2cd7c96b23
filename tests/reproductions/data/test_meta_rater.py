"""The reproduction of paper 17: its proxy is a bigram model, it runs at tiny scale, and its claims can fail."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.data import meta_rater as module
from downriver.study.claims import verdicts

ARMS = ["random", "best single score", "equal weights", "meta-rater"]


def test_paper_and_claims():
    [listed] = find("meta_rater")
    assert (listed.number, listed.room, listed.title) == (17, "data", module.paper.title)
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert [claim.text for claim in module.reproduction.claims][3] == (
        "meta-rater is below 0.125 on weight of the noise score"
    )


def test_the_proxy_is_the_formula():
    pool, held = [["a", "b", "a"], ["b", "c"], ["c", "c"]], [["a", "b", "c"]]
    proxy = module.Bigrams(pool, held)
    word = {"b": (1 + 100 / 3) / (3 + 100), "c": (1 + 100 / 3) / (3 + 100)}  # second words of rows 0, 1: b, a, c
    expected = [(1 + 5 * word["b"]) / (1 + 5), (1 + 5 * word["c"]) / (2 + 5)]
    assert proxy.loss(np.array([0, 1])) == pytest.approx(-np.mean(np.log(expected)))
    assert proxy.loss(np.array([0])) > proxy.loss(np.array([0, 1]))  # b c was not seen


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path, asset):
    asset("20newsgroups"), asset("reuters-r8")
    world = module.World(0, 120, 50, 30, 80, 60)
    assert len(world.pool) == 280 and world.scores.columns == ["id", *module.NAMES]
    repeated, clean = (world.scores["types"].to_numpy()[part] for part in (slice(170, 200), slice(120)))
    assert repeated.max() < clean.min() + 0.2 and repeated.mean() < 0.2 < clean.mean()
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    found = {(arm, metric): value for arm, metric, value in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS) and all(map(math.isfinite, found.values()))
    assert 0 <= found["meta-rater", module.NOISE] < 1
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_on_weights_that_were_not_learned():
    values = {"random": 4.95, "best single score": 4.99, "equal weights": 5.1, "meta-rater": 5.2}
    rows = [
        (arm, metric, value, "lower") for arm, value in values.items() for metric in (module.LOSS, module.CONFIRMED)
    ]
    rows.append(("meta-rater", module.NOISE, 0.3, "lower"))
    frame = pl.DataFrame(
        [
            {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": way}
            for arm, metric, value, way in rows
            for seed in range(3)
        ]
    )
    found = verdicts(module.reproduction.claims, frame, ARMS, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 5
