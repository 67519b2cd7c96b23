"""A bank holds what the model says of the rows, is found again by content, and refuses what it cannot hold."""

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
from scipy.special import softmax

from downriver import models
from downriver.core import InputError
from downriver.models.features import extract
from downriver.rank import FeatureBank
from downriver.tasks import Task

WORDS = ["aaaa", "zzzz", "aab", "zzy", "aba", "zyz", "baa", "yzz", "abab", "zyzy"]


@pytest.fixture
def task():
    rows = Dataset.from_dict({"text": WORDS, "label": [0, 1] * 5})
    return Task("letters", "text-classification", {"train": rows, "test": rows.select([0, 1])}, ("text",), "label")


@pytest.fixture
def encoder():
    return models.small("text-encoder", "nano")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache):
    return sorted(cache.glob("banks/*.safetensors"))


def test_features_and_labels_are_those_of_the_split(encoder, task):
    bank = FeatureBank.extract(encoder, task, split="train")
    np.testing.assert_array_equal(bank.X, extract(encoder, task.rows("train"), task))
    assert bank.y.tolist() == [0, 1] * 5 and bank.probs is None and bank.general is None
    assert bank.parameters == sum(p.numel() for p in encoder.backbone.parameters()) and bank.seconds > 0
    assert len(FeatureBank.extract(encoder, task, rows=4).X) == 4


def test_regression_has_numbers_for_labels(encoder):
    rows = Dataset.from_dict({"text": WORDS, "size": np.linspace(0, 1, 10)})
    bank = FeatureBank.extract(encoder, Task("s", "text-regression", {"train": rows}, ("text",), "size"))
    assert bank.y.dtype == np.float64 and bank.y[-1] == 1.0


def test_a_head_gives_source_probabilities(encoder, task):
    three = Task("t", "text-classification", {"train": task.rows("train")}, ("text",), "label", ("a", "b", "c"))
    model = encoder.with_head(three)
    with torch.no_grad():
        batch = model.collate(task)(list(task.rows("train")))
        expected = model(**batch)["logits"].softmax(dim=1).numpy()
    bank = FeatureBank.extract(model, task)
    assert bank.probs is not None
    np.testing.assert_allclose(bank.probs, expected, atol=1e-5)


def test_a_transformers_classifier_gives_source_probabilities(task, tmp_path):
    tokenizer = models.small("text-encoder", "nano").processor
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config.num_labels = 4
    classifier = transformers.BertForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    bank = FeatureBank.extract(tmp_path / "classifier", task)
    with torch.no_grad():
        inputs = tokenizer(WORDS, padding=True, return_tensors="pt")
        logits = classifier(**inputs).logits.numpy()
    assert bank.X.shape == (10, 32) and bank.probs is not None
    np.testing.assert_allclose(bank.probs, softmax(logits, axis=1), atol=1e-5)

    assert FeatureBank.extract(tmp_path / "classifier", task, probabilities=False).probs is None

    with torch.no_grad():  # the same backbone under another classifier is another bank
        classifier.classifier.bias.add_(torch.arange(4.0))
    classifier.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    other = FeatureBank.extract(tmp_path / "other", task)
    np.testing.assert_array_equal(other.X, bank.X)
    assert other.probs is not None and not np.allclose(other.probs, bank.probs)

    trained = models.load(tmp_path / "other")
    with torch.no_grad():
        next(iter(trained.backbone.parameters())).add_(1)
    assert FeatureBank.extract(trained, task).probs is None  # its classifier belongs to the old features


def test_general_statistics_are_of_the_same_model(encoder, task):
    general = Task(
        "g", "language-modelling", {"train": Dataset.from_dict({"text": ["one", "two", "three"]})}, ("text",), None
    )
    bank = FeatureBank.extract(encoder, task, general=general)
    found = extract(encoder, general.rows("train"), general).astype(np.float64)
    assert bank.general is not None
    np.testing.assert_allclose(bank.general[0], found.mean(axis=0))
    np.testing.assert_allclose(bank.general[1], found.std(axis=0))
    pair = (np.zeros(32), np.ones(32))
    assert FeatureBank.extract(encoder, task, general=pair).general is pair


def test_a_bank_is_found_again_by_content(encoder, task, cache, monkeypatch):
    first = FeatureBank.extract(encoder, task)
    with monkeypatch.context() as patched:
        patched.setattr(type(encoder), "features", None)  # nothing may be computed
        same = Task("other name", task.kind, task.splits, task.inputs, task.target)
        again = FeatureBank.extract(models.small("text-encoder", "nano"), same)
    np.testing.assert_array_equal(again.X, first.X)
    assert again.seconds == first.seconds and again.task == "other name" and len(files(cache)) == 1
    FeatureBank.extract(encoder, task, rows=6)
    FeatureBank.extract(encoder, task, split="test")
    FeatureBank.extract(encoder.with_head(task), task)
    FeatureBank.extract(encoder, task, general=(np.zeros(32), np.ones(32)))
    assert len(files(cache)) == 5
    with torch.no_grad():
        next(iter(encoder.backbone.parameters())).add_(1)
    assert not np.allclose(FeatureBank.extract(encoder, task).X, first.X)
    FeatureBank.extract(models.small("text-encoder", "tiny"), task, cache=False)
    assert len(files(cache)) == 6


def test_a_saved_bank_comes_back_whole(encoder, task, tmp_path):
    bank = FeatureBank.extract(encoder.with_head(task), task, general=(np.zeros(32), np.ones(32)))
    back = FeatureBank.load(bank.save(tmp_path / "mine.safetensors"))
    for name in ("X", "y", "probs"):
        np.testing.assert_array_equal(getattr(back, name), getattr(bank, name))
        assert getattr(back, name).dtype == getattr(bank, name).dtype
    assert (back.model, back.task, back.parameters) == (bank.model, bank.task, bank.parameters)
    assert back.general is not None and back.general[1].tolist() == [1.0] * 32


def test_what_is_no_bank_is_named(encoder, task, tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors is not there"):
        FeatureBank.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(InputError, match=r"text\.safetensors is no bank of features"):
        FeatureBank.load(tmp_path / "text.safetensors")
    encoder.save(tmp_path / "model")
    with pytest.raises(InputError, match="is no bank of features"):
        FeatureBank.load(tmp_path / "model" / "model.safetensors")
    X = np.zeros((3, 2), dtype=np.float32)
    with pytest.raises(InputError, match="bank of m: 2 labels for 3 rows"):
        FeatureBank("m", "t", X, np.array([0, 1]))
    with pytest.raises(InputError, match="features of m, row 2: a value is not finite"):
        FeatureBank("m", "t", np.where([[0], [1], [0]], np.nan, X), np.array([0, 1, 0]))
    similar = Dataset.from_dict({"a": WORDS, "b": WORDS, "s": np.linspace(0, 1, 10)})
    for other in (
        Task("l", "language-modelling", {"train": similar}, ("a",), None),
        Task("s", "text-similarity", {"train": similar}, ("a", "b"), "s"),
    ):
        with pytest.raises(InputError, match="classification or regression is expected"):
            FeatureBank.extract(encoder, other)
    with pytest.raises(InputError, match="max_length is for models that are loaded by name"):
        FeatureBank.extract(encoder, task, max_length=5)
    with pytest.raises(InputError, match="unknown split"):
        FeatureBank.extract(encoder, task, split="validation")


def test_models_by_name(task):
    bank = FeatureBank.extract("small:text-encoder:nano:0", task, max_length=3)
    assert bank.model == "small:text-encoder:nano:0"
    assert np.ptp(bank.X[[0, 2]], axis=0).max() < 1e-6  # <s>a and </s> are all that is read of aaaa and aab


@pytest.mark.assets
def test_a_real_classifier_knows_its_classes(asset, monkeypatch):
    monkeypatch.undo()  # the packaged weights are in the real cache
    asset("efficientnet-lite0")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    rows = Dataset.from_dict({"image": [fromarray(p) for p in pixels], "label": [0, 1] * 3}, features=features)
    task = Task("noise", "image-classification", {"train": rows}, ("image",), "label", labels=("a", "b"))
    bank = FeatureBank.extract("efficientnet-lite0", task, cache=False)
    assert bank.X.shape == (6, 1280) and bank.probs is not None and bank.probs.shape == (6, 1000)
    np.testing.assert_allclose(bank.probs.sum(axis=1), 1, atol=1e-5)
