"""The reproduction of paper 41: no helper knows a test post, it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.study import cocktail as module
from downriver.study.claims import verdicts
from downriver.study.cocktail import cocktail_report
from downriver.tasks.generalization import shared_ngrams

ARMS = ["posts", "posts + groups", "posts + reuters", "posts + books", "posts + quotations", "chosen"]


@pytest.fixture
def data(asset):
    for name in ("20newsgroups", "reuters-r8", "book-excerpts", "fortunes"):
        asset(name)


def test_paper_and_claims():
    [listed] = find("cocktail effect")
    assert (listed.number, listed.room, listed.title) == (41, "study", module.paper.title)
    assert listed.module == module.__name__ and module.reproduction.seeds == 5
    assert [arm.name for arm in module.reproduction.arms()] == ARMS
    assert [claim.text for claim in module.reproduction.claims] == [
        "chosen is better than posts on test exact_match of posts",
        "posts + groups is better than posts + reuters on test exact_match of posts",
    ]


@pytest.mark.slow
def test_the_ingredients(data):
    found = module.draw(0, 10)
    target = found["posts"]
    assert len(target.train) == 16 * 6 and len(target.validation) == len(target.test) == 60
    labels = [example["label"] for example in target.train.examples]
    assert {labels.count(label) for label in module.GROUPS.values()} == {16}
    held = [e["text"] for part in (target.validation, target.test) for e in part.examples]
    for name, ingredient in found.items():
        assert not shared_ngrams([e["text"] for e in ingredient.train.examples], held).any(), name
    assert {e["label"] for e in found["groups"].train.examples}.isdisjoint(module.GROUPS.values())
    assert len({i.train.templates[0].source for i in found.values()}) == 5, "every task is told in words of its own"
    assert module.draw(1, 10)["posts"].train.examples != target.train.examples
    assert max(len(e["text"].split()) for e in found["books"].train.examples) == module.WORDS


@pytest.mark.slow
def test_it_runs_at_tiny_scale(data, tmp_path):
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(ARMS)
    assert set(rows.filter(metric="steps")["value"]) == {2.0}
    report = cocktail_report(result, module.DESIGN)
    assert set(report.ranking) == set(ARMS) - {"chosen"} and "alone on test rows" in report.text
    value = dict(rows.filter(metric=module.SCORE).select("arm", "value").iter_rows())
    assert value["chosen"] == value[report.chosen]
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 2


def test_an_unknown_scale():
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_when_helpers_harm():
    value = {"posts": 0.5, "chosen": 0.48, "posts + groups": 0.3, "posts + reuters": 0.4}
    rows = pl.DataFrame(
        [
            {
                "arm": arm,
                "seed": s,
                "task": "posts",
                "metric": module.SCORE,
                "value": v + s * 0.001 * len(arm),
                "direction": "higher",
            }
            for arm, v in value.items()
            for s in range(5)
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails", "fails"]
