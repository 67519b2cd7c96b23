"""The reproduction of paper 55: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.compress import hedgehog as module
from downriver.study.claims import verdicts

ARMS = ["softmax", "hedgehog", "hedgehog, untrained", "t2r", "relu", "elu"]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("hedgehog")
    assert (listed.number, listed.room, listed.title) == (55, "compress", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert found["hedgehog", module.KL] < found["hedgehog, untrained", module.KL]
    assert found["t2r", module.KL] == found["relu", module.KL]  # the same before any training
    assert found["hedgehog", module.RATIO] == pytest.approx(
        found["hedgehog", module.TUNED] / found["softmax", module.TUNED]
    )
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_when_mimicry_hurts():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "lower"}
        for arm in ARMS
        for metric in (module.KL, module.AFTER, module.TUNED, module.RATIO)
        for value in [3.0 if arm == "hedgehog" else 2.0]
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 7
