"""The report on a mixture: shares that add up, domains told apart, dead experts, costs."""

import polars as pl
import pytest
import torch
from datasets import Dataset

from downriver.core.errors import InputError
from downriver.merge import bam, moe_report
from downriver.models import small
from downriver.tasks.task import Task


@pytest.fixture(scope="module")
def task():
    rows = {"text": ["aa ab ba", "abba", "12 34", "5 6", "78"], "domain": ["prose"] * 2 + ["sums"] * 3}
    return Task("two", "language-modelling", {"test": Dataset.from_dict(rows)}, ("text",), None, group="domain")


@pytest.fixture(scope="module")
def models():
    return [small("causal-lm", "nano", seed) for seed in range(3)]


def test_shares_and_costs(models, task):
    mixture = bam(models, models[0], ffn_top_k=2, router_std=1.0, expert_names=["a", "b", "c"])
    report = moe_report(mixture, task, batch_size=2)
    sums = report.routing.group_by("layer", "part", "domain").agg(pl.col("gate", "load").sum())
    assert sums.height == 2 * 2 * 2 and sums["gate"].to_list() == pytest.approx([1.0] * 8, abs=1e-5)
    assert sums["load"].to_list() == pytest.approx([1.0] * 8, abs=1e-5)
    assert set(report.by_domain().columns) == {"part", "domain", "expert", "gate"} and report.by_domain().height == 12
    one_ffn = 3 * 32 * 128
    assert report.parameters == sum(p.numel() for p in mixture.parameters())
    assert report.parameters - report.active_parameters == 2 * one_ffn
    assert report.cache == 2 * 2 * 3 * 32 * 4  # keys and values, layers, experts, width, bytes
    shared = moe_report(bam(models, models[0], attention="kv_shared", ffn_top_k=1), task)
    assert shared.cache == report.cache // 3 and shared.flops < report.flops
    assert moe_report(mixture, task, batch_size=5).routing["gate"].to_list() == pytest.approx(
        report.routing["gate"].to_list(), abs=1e-5
    )


def test_experts_that_nobody_uses(models, task):
    mixture = bam(models, models[0], attention="average", router_init="zero")
    report = moe_report(mixture, task)  # all experts alike: one of them gets everything
    assert [layer for layer, part, _ in report.dead] == [0, 0, 1, 1] and len(set(report.dead)) == 4
    entropy = report.routing["entropy"].to_list()
    assert entropy == pytest.approx([float(torch.tensor(3.0).log())] * len(entropy))


def test_domains_are_told_apart(models, task):
    texts = [["ab aab", "baba"], ["91 23", "4 5 6"]]
    mixture = bam(models[:1] * 2, models[0], router_init="domain_centroids", texts=texts, expert_names=["ab", "12"])
    loads = moe_report(mixture, task).routing.filter(part="mlp")
    own = {("prose", "ab"), ("sums", "12")}
    for row in loads.iter_rows(named=True):
        assert (row["load"] > 0.5) == ((row["domain"], row["expert"]) in own)


def test_what_is_refused(models, task):
    with pytest.raises(InputError, match="is no mixture"):
        moe_report(models[0], task)
    mixture = bam(models, models[0])
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    labelled = Task("mood", "text-classification", {"test": rows}, ("text",), "label")
    with pytest.raises(InputError, match="language modelling is expected"):
        moe_report(mixture, labelled)
