"""The reproduction of paper 49: it runs at tiny scale, the public tables bear it out, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.data import regmix as module
from downriver.study.claims import verdicts

ARMS = [*module.REGRESSORS, "proposed", "natural", "uniform", "median"]


def test_paper_and_claims():
    [listed] = find("regmix")
    assert (listed.number, listed.room, listed.title) == (49, "data", module.paper.title)
    assert [arm.name for arm in module.reproduction.arms()] == ARMS
    assert len(module.reproduction.claims) == 7 and module.reproduction.seeds == 3
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
    assert 3 < found["proposed", module.LOSS] < 10
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 7  # one seed decides nothing


def test_the_public_tables(monkeypatch, shared_data, tmp_path):
    monkeypatch.setenv("DOWNRIVER_SHARED_DATA", str(shared_data("regmix").parent))
    result = module.public.run(tmp_path, executor="serial", progress=False)
    assert [verdict.verdict for verdict in result.verdicts()] == ["holds", "holds"]


def test_the_claims_fail_when_the_proposal_is_worse():
    values = {("lightgbm", "rho"): 0.2} | {
        (arm, metric): 5.0 + (arm == "proposed")
        for arm in ARMS[-4:]
        for metric in (module.LOSS, f"transformer's {module.LOSS}")
    }
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "task": "",
            "metric": metric,
            "value": value + 0.001 * seed,
            "direction": "higher" if metric == "rho" else "lower",
        }
        for (arm, metric), value in values.items()
        for seed in range(3)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 7
