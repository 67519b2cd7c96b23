"""The reproduction of paper 86: its sums, its tiny run, and claims that can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.data import reversegen as module
from downriver.study.claims import verdicts

ARMS = ["target", "exploration", "warm-up", "failures", "half and half", "capped failures", "last round, raw"]


def test_paper_and_claims():
    [listed] = find("reversegen")
    assert (listed.number, listed.room, listed.title) == (86, "data", module.paper.title)
    assert listed.module == module.__name__ and module.reproduction.seeds == 8
    assert [arm.name for arm in module.reproduction.arms()] == ARMS
    assert [claim.text for claim in module.reproduction.claims] == [
        "exploration is above 0 on smallest rise",
        "exploration is above 3 on growth",
        "exploration is above 0.9 on validity",
        "failures is better than warm-up on accuracy",
        "failures keeps the easy accuracy of target to within 0.01",
    ]
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_sums():
    rng = np.random.default_rng(0)
    easy, every = module.sums(rng, 500, carry=False), module.sums(rng, 500)
    assert len(easy) == len(every) == 500 and all(module.valid(easy + every))
    assert all(int(q[0]) + int(q[3]) < 10 and int(q[1]) + int(q[4]) < 10 for q in easy)
    assert np.mean([int(q[1]) + int(q[4]) >= 10 for q in every]) == pytest.approx(0.45, abs=0.07)
    assert module.solve(["99+99=", "00+05="]) == ["891", "500"]
    assert module.valid(["1+2=", "12+34", "12+34=5"]) == [False] * 3


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path):
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    rows = result.rows()
    assert {"target", "exploration"} <= set(rows["arm"])
    # a target that learnt next to nothing fails everywhere, and a proposer may write nothing valid: both say so
    assert all("data hold no query" in failure.error for failure in result.failures)
    found = {(arm, metric): value for arm, metric, value in rows.select("arm", "metric", "value").iter_rows()}
    assert found["target", "accuracy"] < 0.3 and found["exploration", "target calls"] <= 120
    assert {verdict.verdict for verdict in result.verdicts()} == {"undecided"}  # one seed decides nothing


def test_the_claims_fail_on_a_proposer_that_does_not_learn():
    values = {
        ("exploration", "smallest rise"): -0.01,
        ("exploration", "growth"): 1.1,
        ("exploration", "validity"): 0.4,
        ("failures", "accuracy"): 0.80,
        ("warm-up", "accuracy"): 0.83,
        ("failures", "easy accuracy"): 0.90,
        ("target", "easy accuracy"): 0.97,
    }
    rows = pl.DataFrame(
        [
            {
                "arm": a,
                "seed": s,
                "task": "",
                "metric": m,
                "value": v + 0.001 * s * (a != "target"),
                "direction": "higher",
            }
            for (a, m), v in values.items()
            for s in range(5)
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 5
