"""The reproduction of paper 14 and its little model: whole at tiny scale, and claims that can fail."""

import dataclasses

import polars as pl
import pytest
import torch

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions import tiny_aligned_lm as fixture
from downriver.reproductions.adapt import alignment_recovery as module
from downriver.study.claims import verdicts

ARMS = [
    "aligned",
    "fine-tuned",
    "recovered",
    "recovered, deeper",
    "recovered with rollback",
    "random",
    "random, deeper",
]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("alignment_recovery")
    assert (listed.number, listed.room, listed.title) == (14, "adapt", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert 0.1 < found["recovered", "share put back"] <= 0.201
    assert found["recovered with rollback", "share put back"] < found["recovered", "share put back"]
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


@pytest.mark.slow
def test_the_little_model_refuses_and_forgets():
    aligned = fixture.tiny_aligned_lm(11)
    assert fixture.harmful_rate(aligned.model) < 0.02 and fixture.accuracy(aligned.model, "benign") > 0.95
    tuned = fixture.fine_tune(aligned)
    assert fixture.harmful_rate(tuned) > 0.9 and fixture.accuracy(tuned, "task") > 0.9


def test_rows_say_what_they_should():
    benign = fixture.rows(("benign",), (1.0,), 5, 0)
    assert torch.equal(benign[:, 2:6], benign[:, 7:11]) and (benign[:, 11] == fixture.EOS).all()
    task = fixture.rows(("task",), (1.0,), 5, 0)
    assert torch.equal(task[:, 2:6].flip(1), task[:, 7:11])
    assert (fixture.rows(("harm",), (1.0,), 5, 0)[:, 7:11] == fixture.REFUSE).all()
    answered = fixture.rows(("harm",), (1.0,), 5, 0, refuse=False)
    assert torch.equal(answered[:, 2:6], answered[:, 7:11])
    assert fixture.prompts("harm", 3, 1) == fixture.prompts("harm", 3, 1) != fixture.prompts("harm", 3, 2)


def test_the_claims_fail_when_chance_does_as_well():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": direction}
        for arm in ARMS
        for metric, value, direction in (
            ("harmful rate", 0.5, "lower"),
            ("task accuracy", {"fine-tuned": 1.0, "recovered": 0.5}.get(arm, 0.4), "higher"),
        )
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 5
