"""The reproduction of paper 30: it runs at tiny scale, the released table is read whole, and its claims can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.data import damo as module
from downriver.study.claims import verdicts

ARMS = [*module.KINDS, "proposed", "uniform", "best of the runs"]


def test_paper_and_claims():
    [listed] = find("damo")
    assert (listed.number, listed.room, listed.title) == (30, "data", module.paper.title)
    assert [arm.name for arm in module.reproduction.arms()] == ARMS
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path, asset):
    for name in ("dict-gcide", "linux-doc", "spam-assassin", "python-doc", "metamath", "fortunes"):
        asset(name)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert found["lightgbm", "rho"] > 0.5
    assert -10 < found["proposed", module.SCORE] < -3
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 3  # one seed decides nothing


def test_the_released_table(monkeypatch, shared_data):
    pytest.importorskip("openpyxl")
    monkeypatch.setenv("DOWNRIVER_SHARED_DATA", str(shared_data("damo").parent))
    ratios, steps, scores, runs = module.released()
    assert ratios.shape == (200, 12) and scores.shape == (200, 10)
    assert sorted(np.unique(runs, return_counts=True)[1].tolist()) == [4] * 50
    assert sorted(set(steps.tolist())) == list(range(4)) or len(set(steps.tolist())) == 4


def test_without_the_table(monkeypatch):
    monkeypatch.delenv("DOWNRIVER_SHARED_DATA", raising=False)
    with pytest.raises(InputError, match="DOWNRIVER_SHARED_DATA"):
        module.released()


def test_the_claims_fail_when_the_proposal_is_worse():
    scores = {"proposed": -6.0, "uniform": -5.0, "best of the runs": -5.0}
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "higher"}
        for (arm, metric), value in {
            ("lightgbm", "rho"): 0.2,
            **{(arm, module.SCORE): value for arm, value in scores.items()},
        }.items()
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 3
