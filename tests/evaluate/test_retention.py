"""Retention is one for a model that did not change, and falls for one that was spoilt."""

import copy

import datasets
import numpy as np
import pytest
import torch

from downriver import models, tasks
from downriver.core import InputError
from downriver.evaluate import evaluate, half_document_retrieval, retention
from downriver.tasks import Task

rng = np.random.default_rng(0)
TEXTS = [" ".join(rng.choice([f"w{j}" for j in range(40)], 30)) for _ in range(24)]
TASK = Task(
    "ref",
    "text-classification",
    {"test": datasets.Dataset.from_dict({"text": TEXTS, "y": [0, 1] * 12})},
    ("text",),
    "y",
)


def spoilt(model):
    worse = copy.deepcopy(model)
    with torch.no_grad():
        for p in worse.backbone.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    return worse


def values(measurements) -> dict[str, float]:
    return {m.metric: m.value for m in measurements}


def test_an_encoder_is_measured_by_retrieval_whatever_its_head():
    before = models.small("text-encoder", "nano")
    after = before.with_head(TASK)
    found = values(retention(before, after, TASK))
    assert found["mrr_before"] == half_document_retrieval(before, TEXTS)["mrr"]
    assert found == {
        "mrr_before": found["mrr_before"],
        "mrr_after": found["mrr_before"],
        "retention_change": 0.0,
        "retention": 1.0,
    }
    worse = values(retention(before, spoilt(after), TASK))
    assert worse["retention"] == pytest.approx(worse["mrr_after"] / worse["mrr_before"])
    assert worse["retention_change"] == pytest.approx(worse["mrr_after"] - worse["mrr_before"])
    assert worse["mrr_after"] != worse["mrr_before"]
    assert "recall@1_before" in values(retention(before, after, TASK, metric="recall@1"))


def test_a_language_model_is_measured_by_its_loss_even_behind_a_head():
    before = models.small("causal-lm", "nano")
    after = before.with_head(TASK)
    same = retention(before, after, TASK)
    assert values(same)["retention"] == 1.0
    assert [m.direction for m in same] == ["lower", "lower", "lower", "higher"]
    language = Task("lm", "language-modelling", {"test": datasets.Dataset.from_dict({"text": TEXTS})}, ("text",), None)
    assert values(same)["loss_before"] == pytest.approx(evaluate(before, language, metrics=["loss"])[0].value)
    assert values(retention(before, after, language)) == values(same)
    worse = values(retention(before, spoilt(before), TASK))
    assert worse["loss_after"] > worse["loss_before"]
    assert worse["retention"] == pytest.approx(worse["loss_before"] / worse["loss_after"])
    assert worse["retention"] < 1
    assert after.head is not None


def test_tables_are_measured_by_neighbours_and_heads_by_the_task():
    wine = tasks.load("wine")
    model = models.small("mlp", "nano").with_head(wine)
    assert values(retention(model, model, wine))["knn_accuracy_before"] > 0.6
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.neg_()
    assert values(retention(model, other, wine))["retention"] == 1.0  # the head is left aside
    by_task = values(retention(model, other, wine, metric="accuracy"))
    assert by_task["accuracy_after"] == evaluate(other, wine, metrics=["accuracy"])[0].value


def test_bad_requests_are_named():
    encoder = models.small("text-encoder", "nano")
    with pytest.raises(InputError, match="retention from a text-encoder to a causal-lm"):
        retention(encoder, models.small("causal-lm", "nano"), TASK)
    with pytest.raises(InputError, match="unknown metric of retention 'mr': did you mean 'mrr'"):
        retention(encoder, encoder, TASK, metric="mr")
    diabetes = tasks.load("diabetes")
    mlp = models.small("mlp", "nano").with_head(diabetes)
    with pytest.raises(InputError, match="needs a task with classes"):
        retention(mlp, mlp, diabetes)
