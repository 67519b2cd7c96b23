"""The reproduction of paper 71: its facts, its slices, a tiny run, and claims that can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.adapt import kaft as module
from downriver.study.claims import verdicts

ARMS = ["base", "standard", "relevant + counterfactual", "KAFT"]


def test_paper_and_claims():
    [listed] = find("kaft")
    assert (listed.number, listed.room, listed.title, listed.date) == (71, "adapt", module.paper.title, "2022-11")
    assert listed.module == module.__name__
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert [claim.text for claim in module.reproduction.claims][:3] == [
        "KAFT is better than standard on controllability by more than 0.1",
        "KAFT is better than standard on robustness by more than 0.1",
        "KAFT is above 0.4 on robustness",
    ]


def test_the_facts():
    facts = module.facts(0, 150)
    assert len(facts) == 600 and len({f["question"] for f in facts}) == 600 and facts == module.facts(0, 150)
    assert facts != module.facts(1, 150) and len({f["answer"] for f in facts}) == module.OBJECTS
    assert all(f["context"] == f"{f['question']} {f['answer']} ." for f in facts)


def test_it_runs_at_tiny_scale(tmp_path):
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    rows = result.rows()
    assert not result.failures and set(rows["arm"]) == set(ARMS) and (rows["flops"] > 0).all()
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_where_the_slices_change_nothing():
    metrics = ["controllability", "robustness", "closed-book"]
    rows = pl.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                "task": "facts",
                "metric": metric,
                "value": 0.1 + seed / 100,
                "direction": "higher",
            }
            for arm in ARMS
            for seed in range(3)
            for metric in metrics
        ]
    )
    assert [v.verdict for v in verdicts(module.reproduction.claims, rows, ARMS, range(3))] == ["fails"] * 5
