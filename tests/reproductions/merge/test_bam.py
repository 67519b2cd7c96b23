"""The reproduction of paper 27: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest
import torch

from downriver.core.errors import InputError
from downriver.models import small
from downriver.reproductions import find
from downriver.reproductions.merge import bam as module
from downriver.study.claims import verdicts

ARMS = ["dense", "average", "ensemble", "BAM", "BAM, shared keys", "BTX", "sparse upcycling", "BAM, BTX's compute"]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("bam upcycling")
    assert (listed.number, listed.room, listed.title) == (27, "merge", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert all(0 < value < 10 for value in found.values())
    assert {arm for arm, metric in found if metric == module.START} == set(module.MIXTURES)
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_domains_are_real_and_apart():
    task = module.domains(0, 20)
    held, train = task.rows("validation"), task.rows("train")
    assert set(held["domain"][:]) == set(module.DOMAINS) and len(held) == 60
    assert not set(held["text"][:]) & set(train["text"][:])
    shares = {}
    for domain in module.DOMAINS:
        text = "".join(row["text"] for row in train if row["domain"] == domain)
        shares[domain] = sum(c.isdigit() for c in text) / len(text), sum(c in "()_=" for c in text) / len(text)
        assert len(text) > 50_000
    assert shares["tables"][0] > 0.5 and shares["prose"][0] < 0.02
    assert shares["code"][1] > 2 * shares["prose"][1]


def test_an_ensemble_of_one_is_the_model():
    task, model = module.domains(0, 5), small("causal-lm", "nano")
    alone = module.score(module.BITS, model, task).value
    assert module.ensemble([model], task) == pytest.approx(alone, rel=1e-4)
    assert module.ensemble([model, model], task) == pytest.approx(alone, rel=1e-4)
    batch = model.collate(task)(list(task.rows("validation").select(range(2))))
    assert module.log_likelihoods(model, batch).shape == torch.Size([2, batch["labels"].shape[1] - 1])


def test_the_claims_fail_when_attentions_do_harm():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "lower"}
        for arm in ARMS
        for metric in (module.BITS, module.START)
        for value in [2.5 if arm.startswith("BAM") else 2.0]
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 5
