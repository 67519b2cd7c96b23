"""The reproduction of paper 43: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.merge import skill_grafting as module
from downriver.study.claims import verdicts

ARMS = ["pretrained", "fine-tuned", "learned", "movement", "random"]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("skill_grafting")
    assert (listed.number, listed.room, listed.title) == (43, "merge", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert found["fine-tuned", "accuracy"] > found["pretrained", "accuracy"] + 0.2
    assert found["learned", "accuracy"] > found["random", "accuracy"]
    sizes = {found[arm, "share of the parameters"] for arm in ARMS[2:]}
    assert len(sizes) == 1 and 0 < sizes.pop() < 1
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_when_random_entries_do_as_well():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": direction}
        for arm, accuracy in {"learned": 0.3, "movement": 0.4, "random": 0.5}.items()
        for metric, value, direction in (
            ("accuracy", accuracy, "higher"),
            ("share of the fine-tuned accuracy", accuracy, "higher"),
            ("share of the parameters", 0.1, "lower"),
        )
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 4
