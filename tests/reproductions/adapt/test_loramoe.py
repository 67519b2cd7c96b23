"""The reproduction of paper 81: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.adapt import loramoe as module
from downriver.study.claims import verdicts

ARMS = ["base", *(f"{arm}, {n}" for n in module.PORTIONS for arm in ("full", "LoRA", "LoRAMoE")), "LoRAMoE, δ 0, 20"]


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("loramoe")
    assert (listed.number, listed.room, listed.title) == (81, "adapt", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert 0 < found["LoRAMoE, 20", "reserved share of facts"] < 1
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_new_tasks_are_what_they_say():
    for question, answer in module.lists(0, 30, module.NEW):
        name, *letters = question.removesuffix(" :").split()
        assert module.NEW[name](letters) == answer.split()
    facts = module.facts_of(1, 40)
    assert len({question for question, _ in facts}) == 40


def test_the_claims_fail_when_facts_are_forgotten():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "higher"}
        for arm in ARMS
        for metric, value in (
            ("facts", 0.1 if arm.startswith("LoRAMoE") else 0.5),
            ("tasks", 0.5),
            ("reserved share, facts over tasks", -0.1),
        )
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 4
