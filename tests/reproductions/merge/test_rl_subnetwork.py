"""The reproduction of paper 07: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.merge import rl_subnetwork as module
from downriver.study.claims import verdicts

ARMS = ["foreign text", "own samples", "DPO", "DPO, subnetwork", "DPO, random weights"]


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("rl_subnetwork")
    assert (listed.number, listed.room, listed.title) == (7, "merge", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert found["DPO", "margin over DPO's"] == 1
    assert found["DPO", "sparsity, bfloat16"] >= found["DPO", "sparsity, float32"]
    assert found["DPO, subnetwork", "unchanged, bfloat16"] >= found["DPO", "unchanged, bfloat16"]
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_as_many_weights_at_random():
    model = module.small_language_model("causal-lm", module.byte_tokenizer(16), width=8, heads=2, context=16)
    mask = module.scattered(model, 100, 0)
    assert mask.count == 100 and mask.total == sum(p.numel() for p in model.backbone.parameters())


def test_the_claims_fail_when_everything_moves():
    values = {"weights as in DPO": 0.2, "loss away from DPO's": 0.5, "bfloat16 above float32": -0.1}
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": direction}
        for arm in ARMS
        for metric, value, direction in [
            ("sparsity, float32", 0.1 if arm == "DPO" else 0.5, "higher"),
            ("sparsity, bfloat16", 0.1 if arm == "DPO" else 0.5, "higher"),
            ("margin over DPO's", 0.9 if "random" in arm else 0.1, "higher"),
            *((name, value, "lower" if "away" in name else "higher") for name, value in values.items()),
        ]
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert {verdict.verdict for verdict in found} == {"fails"}
