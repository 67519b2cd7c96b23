"""The reproduction of paper 3: it runs at tiny scale, its rows do not mix, and its claims can fail."""

import dataclasses

import polars as pl
import pytest
import torch

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.merge import talking_models as module
from downriver.study.claims import verdicts

ARMS = ["no teacher", "teacher's probe", "soft labels", "hint", "relations", "interactive"]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("talking_models")
    assert (listed.number, listed.room, listed.title) == (3, "merge", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, metric in found if metric == "accuracy"} == set(ARMS)
    assert 0 <= found["interactive", "CKA of state and answer"] <= 1 and len(found) == len(ARMS) + 5
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_rows_of_teacher_student_and_test_are_apart():
    source, task, more = module.digits(0)
    assert (len(task.rows("train")), len(more)) == (module.LABELLED, module.UNLABELLED)
    assert len(task.rows("test")) > 400 and len(source.rows("train")) == 4 * 898
    sets = [set(map(tuple, rows["pixels"])) for rows in (task.rows("train"), more, task.rows("test"))]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert set(task.rows("test")["label"]) == set(range(module.GROUPS))


def test_shifted_images():
    image = torch.zeros(1, 64)
    image[0, 0] = 1
    assert module.shifted(image, 1, 0)[0, 8] == 1 and module.shifted(image, 0, 1)[0, 1] == 1
    assert module.shifted(image, -1, 0).sum() == 0


def test_the_claims_fail_for_a_worse_student():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": "accuracy", "value": value, "direction": "higher"}
        for arm in ARMS
        for seed in range(10)
        for value in [(0.5 if arm == "interactive" else 0.7) + 0.001 * seed]
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(10))
    assert [verdict.verdict for verdict in found] == ["fails"] * 5
