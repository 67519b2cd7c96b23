"""The reproduction of paper 68: its programs, its corruption, its tiny run, and claims that can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.data.annotate import HeuristicAnnotator
from downriver.reproductions import find
from downriver.reproductions.data import tulutalk as module
from downriver.study.claims import verdicts

ARMS = ["source A", "source B", "A and B", "random", "quality only", "curated"]


def test_paper_and_claims():
    [listed] = find("tulutalk")
    assert (listed.number, listed.room, listed.title) == (68, "data", module.paper.title)
    assert listed.module == module.__name__ and module.reproduction.seeds >= 3
    assert [arm.name for arm in module.reproduction.arms()] == ARMS
    assert len(module.reproduction.claims) == 6
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_world():
    world, again = module.World(0), module.World(0)
    rows = world.source("A", 2000)
    assert rows == again.source("A", 2000)
    assert np.mean([row["corrupted"] for row in rows]) == pytest.approx(0.3 + 0.7 / 12, abs=0.04)
    for category in module.CATEGORIES:
        for _ in range(50):
            asked, answer = world.request(category)
            assert world.corrupt(category, answer) != answer
            ids = world.tokenizer(f"{asked} . {answer} ?")["input_ids"]
            assert world.tokenizer.unk_token_id not in ids and len(ids) <= 24
    counts = {c: sum(row["category"] == c for row in rows) for c in module.CATEGORIES}
    assert min(counts["sum"], counts["number"]) > 2 * max(counts["largest"], counts["after"])


def test_the_annotator_tells_the_categories_apart():
    world = module.World(1)
    chats = [module._chat({"id": str(i), "source": "A", "asked": f"{world.request(c)[0]} .", "answer": "x"})
             for i, c in enumerate(module.CATEGORIES)]  # fmt: skip
    frame = HeuristicAnnotator().annotate(chats).frame
    assert frame["task"].n_unique() == 8 and "others" not in frame["task"] and set(frame["quality"]) == {"excellent"}
    vague = module._chat({"id": "v", "source": "A", "asked": "do it", "answer": "x"})
    bare = module._chat({"id": "b", "source": "A", "asked": world.request("sort")[0], "answer": "x"})
    assert HeuristicAnnotator().annotate([vague, bare]).frame["quality"].to_list() == ["poor", "good"]


def test_it_runs_at_tiny_scale(tmp_path):
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    found = {(arm, metric): value for arm, metric, value in rows.select("arm", "metric", "value").iter_rows()}
    assert set(rows["arm"]) == set(ARMS) and found["A and B", "rows"] == 300
    assert found["curated", "rows"] == found["random", "rows"] == 129
    assert found["curated", "mix off by"] < found["quality only", "mix off by"]
    assert {verdict.verdict for verdict in result.verdicts()} == {"undecided"}


def test_the_claims_fail_on_a_curation_that_does_harm():
    values = {"source A": 0.5, "source B": 0.5, "A and B": 0.55, "random": 0.56, "quality only": 0.6, "curated": 0.4}
    rows = pl.DataFrame(
        [
            {
                "arm": a,
                "seed": s,
                "task": "",
                "metric": m,
                "value": v + 0.001 * s * (a == "curated"),
                "direction": "higher",
            }
            for a, level in values.items()
            for m, v in (("exact match", level), ("starved categories", level), ("mix off by", 1 - level))
            for s in range(4)
        ]
    )
    found = verdicts(module.reproduction.claims, rows, ARMS, range(4))
    assert [verdict.verdict for verdict in found] == ["fails"] * 6
