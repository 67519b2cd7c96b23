"""Features come in the order of the rows, whatever the batches; kept ones are those of the same weights and rows."""

import datasets
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from downriver import models, tasks
from downriver.core import InputError
from downriver.models.features import batches, extract
from downriver.tasks import Task

TEXTS = ["rain", "the river runs down to the sea and on", "a hill", "snow falls upon the old mill", "two words"]


@pytest.fixture
def encoder():
    return models.small("text-encoder", "nano")


def test_features_are_those_of_each_text_alone(encoder):
    found = extract(encoder, TEXTS, batch_size=2)
    with torch.no_grad():
        single = [encoder.features(**encoder.processor([t], return_tensors="pt"))[0].numpy() for t in TEXTS]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(single), atol=1e-5)
    rows = datasets.Dataset.from_dict({"text": TEXTS, "y": [0, 1, 0, 1, 0]})
    task = Task("t", "text-classification", {"test": rows}, ("text",), "y")
    np.testing.assert_array_equal(extract(encoder.with_head(task), rows, task, batch_size=2), found)


def test_a_masked_model_reads_language_unmasked():
    model = models.small("masked-lm", "nano")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    task = Task("t", "language-modelling", {"test": rows}, ("text",), None)
    np.testing.assert_array_equal(extract(model, rows, task), extract(model, TEXTS))


def test_batches_hold_like_lengths_longest_first():
    task = Task("t", "language-modelling", {"test": datasets.Dataset.from_dict({"text": TEXTS})}, ("text",), None)
    found = list(batches(task.rows("test"), task, 2))
    assert found == [[1, 3], [4, 2], [0]]


def test_kept_features_follow_weights_rows_and_settings(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path))
    first = extract(encoder, TEXTS, cache=True)
    files = lambda: len(list(tmp_path.glob("features/*.npy")))  # noqa: E731
    assert files() == 1

    def refuse(**batch):
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr(encoder, "features", refuse)
        np.testing.assert_array_equal(extract(encoder, TEXTS, cache=True), first)
    extract(encoder, TEXTS[:4], cache=True)
    encoder.pooling = "cls"
    extract(encoder, TEXTS, cache=True)
    encoder.pooling = "mean"
    with torch.no_grad():
        next(iter(encoder.backbone.parameters())).add_(1)
    assert not np.allclose(extract(encoder, TEXTS, cache=True), first)
    assert files() == 4


def test_the_mode_of_the_model_comes_back_and_empty_is_refused(encoder):
    encoder.train()
    extract(encoder, TEXTS)
    assert encoder.training
    with pytest.raises(InputError, match="features of no rows"):
        extract(encoder, [])


@pytest.mark.assets
def test_real_features_tell_newsgroups_apart(asset):
    asset("all-MiniLM-L6-v2"), asset("20newsgroups")
    model = models.load("all-MiniLM-L6-v2", max_length=48)
    task = tasks.load("20newsgroups").sample("train", 160, seed=0).sample("test", 100, seed=0)
    train, test = (extract(model, task.rows(split), task) for split in ("train", "test"))
    assert train.shape == (160, 384)
    probe = LogisticRegression(C=10, max_iter=300).fit(train, task.targets("train"))
    assert probe.score(test, task.targets("test")) > 0.4  # chance is 0.05
