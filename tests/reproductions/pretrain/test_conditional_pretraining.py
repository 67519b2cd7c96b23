"""The reproduction of paper 13: its lines and words are what it says, it runs at tiny scale, its claims can fail."""

import dataclasses
import importlib

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.study.claims import verdicts

module = importlib.import_module("downriver.reproductions.pretrain.conditional_pretraining")
ARMS = ["MLE", "good tag", "bad tag", "filtering"]


def test_paper_and_claims():
    [listed] = find("conditional_pretraining")
    assert (listed.number, listed.room, listed.title) == (13, "pretrain", module.paper.title)
    assert listed.module == module.__name__
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert [claim.text for claim in module.reproduction.claims] == [
        "good tag is better than MLE on share of samples with a negative word",
        "MLE is better than bad tag on share of samples with a negative word",
        "filtering is better than MLE on share of samples with a negative word",
        "good tag is below 1.01 on that loss over MLE's",
    ]
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_lines_and_words(asset):
    asset("friends-transcripts")
    asset("vader-lexicon")
    episodes = module.transcript()
    lines = [line for episode in episodes for line in episode]
    assert len(episodes) > 200 and 39000 < len(lines) < 42000
    assert all(4 <= len(line.split()) <= 24 for line in lines)
    words = module.negative_words()
    assert 3500 < len(words) < 4200 and {"awful", "bad", "no"} <= set(words) and not {"good", "love"} & set(words)


def test_it_runs_at_tiny_scale(asset, tmp_path, monkeypatch):
    asset("friends-transcripts")
    asset("vader-lexicon")
    episodes = module.transcript()[:20]
    monkeypatch.setattr(module, "transcript", lambda: episodes)
    world = module.World(0, 50)
    assert (world.scorer.score(world.held) == 0).all() and len(world.task.rows("train")) > 1000
    assert len(set(world.held) & set(world.task.rows("train")["text"])) < 0.1 * len(world.held)  # stock phrases
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(ARMS) and (rows["flops"] > 1e8).all()
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 4  # one seed decides nothing


def test_the_claims_fail_on_a_tag_that_means_nothing():
    values = {
        ("MLE", module.RATE): 0.15,
        ("good tag", module.RATE): 0.16,
        ("bad tag", module.RATE): 0.14,
        ("filtering", module.RATE): 0.17,
        ("good tag", module.RELATIVE): 1.05,
    }
    rows = pl.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                "task": "",
                "metric": metric,
                "value": value * (1 + 0.001 * seed),
                "direction": "lower",
            }
            for (arm, metric), value in values.items()
            for seed in range(3)
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 4
