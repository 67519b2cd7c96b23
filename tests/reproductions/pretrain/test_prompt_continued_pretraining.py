"""The reproduction of paper 82: its articles, a tiny run, and claims that can fail."""

import collections
import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.pretrain import prompt_continued_pretraining as module
from downriver.study.claims import verdicts

ARMS = ["prompt-FT", "TAPT + FT", "PCP zero-shot", "PCP + FT", "self-training", "random init + FT"]


def test_paper_and_claims():
    [listed] = find("prompt_continued_pretraining")
    assert (listed.number, listed.room, listed.title, listed.date) == (82, "pretrain", module.paper.title, "2023-05")
    assert listed.module == module.__name__
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert [claim.text for claim in module.reproduction.claims] == [
        "PCP + FT is better than prompt-FT on accuracy by more than 0.02",
        "PCP + FT keeps the accuracy of TAPT + FT",
    ]


def test_the_articles(asset):
    asset("reuters-r8")
    asset("20newsgroups")
    rows = module.draw(0)
    assert collections.Counter(row["label"] for row in rows["labelled"]) == dict.fromkeys(range(6), 16)
    assert max(collections.Counter(row["label"] for row in rows["unlabelled"]).values()) == 284
    texts = {name: {row["text"] for row in its} for name, its in rows.items()}
    for name in ("labelled", "unlabelled", "others"):
        assert not texts[name] & texts["test"], name
    assert not texts["labelled"] & texts["unlabelled"]
    assert all(len(ids) == 1 for ids in module.TEMPLATE.label_ids(module.tokenizer()))


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path, asset):
    asset("reuters-r8")
    asset("20newsgroups")
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    rows = result.rows()
    assert not result.failures and set(rows["arm"]) == set(ARMS)
    assert (rows.filter(metric="accuracy")["value"] < 0.6).all()  # two steps teach next to nothing
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_where_pretraining_does_harm():
    values = {"prompt-FT": 0.6, "TAPT + FT": 0.62, "PCP + FT": 0.55}
    rows = pl.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                "task": "r",
                "metric": "accuracy",
                "value": value + seed / 1000,
                "direction": "higher",
            }
            for arm, value in values.items()
            for seed in range(3)
        ]
    )
    assert [v.verdict for v in verdicts(module.reproduction.claims, rows, ARMS, range(3))] == ["fails"] * 2
