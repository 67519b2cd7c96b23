"""Scores of models on tasks of every kind, against the same numbers worked out row by row."""

import sys

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from downriver import models, tasks
from downriver.core import InputError, metered
from downriver.core.seeds import seeded
from downriver.evaluate import evaluate, predict
from downriver.tasks import Task

TEXTS = [
    "rain",
    "the river runs down to the sea and on",
    "a hill",
    "snow falls upon the old mill",
    "two words",
    "fog",
] * 3


def texts(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, **columns})


@pytest.fixture(scope="module")
def encoder():
    return models.small("text-encoder", "nano")


@pytest.fixture(scope="module")
def classification():
    rows = texts(label=[i % 3 for i in range(18)])
    return Task("c", "text-classification", {"train": rows, "test": rows}, ("text",), "label")


def with_head(model, task, seed=0):
    with seeded("head", seed):
        return model.with_head(task)


def test_scores_come_in_the_order_of_the_rows_whatever_the_batch(encoder, classification):
    model = with_head(encoder, classification)
    found = predict(model, classification, batch_size=4)
    collate = model.collate(classification)
    with torch.no_grad():
        single = [model(**collate([row]))["logits"][0].numpy() for row in classification.rows("test")]
    assert found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, np.stack(single), atol=1e-5)
    assert found.targets.tolist() == [i % 3 for i in range(18)]


def test_classification_measurements_are_those_of_the_scores(encoder, classification):
    model = with_head(encoder, classification)
    scores = torch.from_numpy(predict(model, classification).scores)
    found = {m.metric: m for m in evaluate(model, classification)}
    assert set(found) == set(classification.metrics)
    assert found["accuracy"].value == pytest.approx((scores.argmax(1).numpy() == classification.targets("test")).mean())
    loss = F.cross_entropy(scores, torch.from_numpy(classification.targets("test"))).item()
    assert found["loss"].value == pytest.approx(loss, rel=1e-5)
    assert (found["loss"].direction, found["loss"].unit, found["accuracy"].direction) == ("lower", "nats", "higher")
    assert found["ece"].cost.parameters == sum(p.numel() for p in model.parameters())


def test_nothing_is_charged_or_changed(encoder, classification):
    model = with_head(encoder, classification)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with metered() as meter:
        evaluate(model, classification)
    assert (meter.cost.examples, meter.cost.tokens, meter.cost.flops) == (0, 0, 0)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_regression(encoder):
    rows = texts(y=[float(i) for i in range(18)])
    task = Task("r", "text-regression", {"test": rows}, ("text",), "y")
    model = with_head(encoder, task)
    guess = predict(model, task).scores[:, 0]
    found = {m.metric: m.value for m in evaluate(model, task, metrics=["rmse", "loss"])}
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((guess - np.arange(18)) ** 2)), rel=1e-5)
    assert found["loss"] == pytest.approx(found["rmse"] ** 2)


def test_similarity_is_the_cosine_of_a_bare_encoder(encoder):
    rows = datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS[::-1], "y": [i / 18 for i in range(18)]})
    task = Task("s", "text-similarity", {"test": rows}, ("a", "b"), "y")
    assert [m.metric for m in evaluate(encoder, task)] == ["spearman"]
    batch = lambda words: encoder.features(**encoder.processor(words, return_tensors="pt", padding=True))  # noqa: E731
    with torch.no_grad():
        expected = F.cosine_similarity(batch(TEXTS), batch(TEXTS[::-1]))
    np.testing.assert_allclose(predict(encoder, task, batch_size=5).scores[:, 0], expected.numpy(), atol=1e-5)


def test_language_loss_by_domain_is_that_of_each_text(monkeypatch):
    model = models.small("causal-lm", "nano")
    rows = texts(domain=["x", "y", "y"] * 6)
    task = Task("lm", "language-modelling", {"test": rows}, ("text",), None, group="domain")
    nats, tokens, size = [], [], []
    for text in TEXTS:
        ids = model.processor(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"][0]
        nats.append(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item())
        tokens.append(ids.shape[1] - 1)
        size.append(len(model.processor.decode(ids[0, 1:], skip_special_tokens=True)))
    nats, tokens, size = np.array(nats), np.array(tokens), np.array(size)
    found = {
        m.metric: m.value for m in evaluate(model, task, metrics=["loss", "perplexity", "bits_per_byte"], batch_size=5)
    }
    assert found["loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / size.sum(), rel=1e-5)
    x = np.array(["x", "y", "y"] * 6) == "x"
    assert found["loss/x"] == pytest.approx(nats[x].sum() / tokens[x].sum(), rel=1e-5)
    assert found["loss/y"] == pytest.approx(nats[~x].sum() / tokens[~x].sum(), rel=1e-5)
    monkeypatch.setattr(sys.modules[predict.__module__], "MOST_LOGITS", 1)  # a text at a time
    small = {m.metric: m.value for m in evaluate(model, task, metrics=["loss"], batch_size=5)}
    assert small["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_a_masked_language_model_repeats_itself_exactly():
    model = models.small("masked-lm", "nano")
    task = Task("lm", "language-modelling", {"test": texts()}, ("text",), None)
    first, second = (evaluate(model, task, metrics=["loss"], batch_size=size)[0].value for size in (3, 18))
    assert first == pytest.approx(second, rel=1e-5)
    assert 0 < first < 20


def test_real_tables_and_images_run():
    wine = tasks.load("wine")
    assert len(evaluate(with_head(models.small("mlp", "nano"), wine), wine)) == 4
    rng = np.random.default_rng(0)
    pictures = datasets.Dataset.from_dict(
        {"image": [rng.integers(0, 255, (28, 28)).tolist() for _ in range(6)], "y": [0, 1] * 3},
        features=datasets.Features(image=datasets.Array2D((28, 28), "uint8"), y=datasets.Value("int64")),
    )
    task = Task("p", "image-classification", {"test": pictures}, ("image",), "y")
    assert predict(with_head(models.small("vit", "nano"), task), task).scores.shape == (6, 2)


def test_what_cannot_be_scored_is_refused(encoder, classification):
    model = with_head(encoder, classification)
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        evaluate(model, classification, metrics=["acuracy"])
    with pytest.raises(InputError, match="a list of metric names"):
        evaluate(model, classification, metrics="accuracy")
    with pytest.raises(InputError, match="unknown split of task 'c' 'validation'"):
        evaluate(model, classification, split="validation")
    with pytest.raises(InputError, match="has no head"):
        evaluate(encoder, classification)
    with pytest.raises(InputError, match=r"needs 2 output\(s\), and the model .* gives \(3,\)"):
        evaluate(model, classification.only(["0", "1"]))
    with pytest.raises(InputError, match=r"needs 3 output\(s\)"):
        evaluate(models.small("masked-lm", "nano"), classification)
    with pytest.raises(InputError, match="batch_size 0"):
        evaluate(model, classification, batch_size=0)
    with torch.no_grad():
        model.head.bias[1] = float("nan")
    with pytest.raises(InputError, match=r"split 'test', row 1: the model's score is not finite"):
        evaluate(model, classification)
