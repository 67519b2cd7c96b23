"""The reproduction of paper 16: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.compress import cats as module
from downriver.study.claims import verdicts

ARMS = ["dense", "CATS 0.5", "CATS 0.7", "ReLU", "random 0.5", "random 0.7", "CATS 0.5, tuned", "ReLU, tuned"]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("cats thresholding")
    assert (listed.number, listed.room, listed.title) == (16, "compress", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert abs(found["CATS 0.5", "sparsity"] - 0.5) < 0.05 and abs(found["CATS 0.7", "sparsity"] - 0.7) < 0.05
    assert found["dense", "perplexity over the dense model's"] == 1
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_claims_fail_when_the_threshold_costs_more():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "lower"}
        for arm in ARMS
        for metric, value in (
            ("perplexity", 9.0 if arm.startswith("CATS") else 5.0),
            ("perplexity over the dense model's", 1.8),
        )
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 5
