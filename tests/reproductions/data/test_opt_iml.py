"""The reproduction of paper 20: its tasks are what they say, it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.data import opt_iml as module
from downriver.study.claims import verdicts
from downriver.tasks.generalization import overlap_report

ARMS = ["untrained", "proportional", "capped"]


def test_paper_and_claims():
    [listed] = find("opt_iml")
    assert (listed.number, listed.room, listed.title) == (20, "data", module.paper.title)
    assert listed.module == module.__name__ and module.reproduction.seeds >= 3
    assert [arm.name for arm in module.reproduction.arms()] == ARMS
    assert [claim.text for claim in module.reproduction.claims] == [
        "capped is better than proportional on exact match of fully supervised",
        "capped is better than proportional on exact match of small tasks",
        "capped keeps the exact match of largest task of proportional to within 0.03",
        "capped is better than untrained on exact match of partially supervised",
    ]


def test_the_tasks():
    world, again, other = module.World(0), module.World(0), module.World(1)
    assert world.sizes == again.sizes != other.sizes
    train, fully, partially, supervised = world.levels
    assert (len(train), len(fully), len(partially), len(supervised)) == (18, 4, 2, 18)
    assert min(world.sizes.values()) == 20 and max(world.sizes.values()) == 1000
    assert {task.name: len(task) for task in train} == world.sizes
    assert {len(task.templates) for tasks in world.levels for task in tasks} == {2}
    for trained, held in zip(train, supervised, strict=True):
        assert not {e["x"] for e in trained.examples} & {e["x"] for e in held.examples}
        assert len(held) == (200 if trained.name == world.largest else 50)
    assert overlap_report(world.levels).is_empty()
    known = set(world.tokenizer.get_vocab())
    for tasks in world.levels:
        for task in tasks:
            for template in task.templates:
                assert set(" ".join(template.render(task.examples[0])).split()) <= known


@pytest.mark.parametrize(
    ("category", "name", "x", "y"),
    [
        ("pick", "third", "a b c d", "c"),
        ("reorder", "swapped", "a b c d", "b a c d"),
        ("reorder", "rotated", "a b c", "b c a"),
        ("edit", "copy twice", "a b c", "a b c a b c"),
        ("digits", "decrease", "0 5 9", "9 4 8"),
        ("digits", "double", "7 2 0", "4 4 0"),
        ("summary", "median", "9 1 5", "5"),
        ("summary", "commonest", "3 1 3 2", "3"),
        ("count", "vowels", "a b e a", "3"),
        ("count", "repeats", "a b a a", "2"),
    ],
)
def test_the_answers(category, name, x, y):
    assert " ".join(module.KINDS[category].rules[name](x.split())) == y


def test_it_runs_at_tiny_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD", 2)
    monkeypatch.setattr(module, "HELD_LARGEST", 2)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(ARMS) and rows["task"].n_unique() == 5
    trained = rows.filter(pl.col("arm") != "untrained")
    assert set(trained["examples"]) == {4 * module.BATCH}  # equal steps
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 4
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_when_the_cap_does_nothing_and_ruins_the_largest():
    tasks = {"fully supervised": 0.4, "small tasks": 0.1, "largest task": 1.0, "partially supervised": 0.0}
    rows = pl.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                "task": task,
                "metric": "exact match",
                "value": value - (0.2 + 0.01 * seed) * (arm == "capped" and task == "largest task"),
                "direction": "higher",
            }
            for arm in ARMS
            for seed in range(3)
            for task, value in tasks.items()
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 4
