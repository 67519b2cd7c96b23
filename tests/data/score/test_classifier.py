"""Classifiers: the expected class of transformers' own logits, whatever the batch."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers

from downriver.core.errors import DownriverError, InputError
from downriver.data.score import ClassifierScorer
from downriver.models import Model, small
from downriver.models.small import byte_tokenizer
from downriver.tasks import from_datasets

TEXTS = ["a", "the river runs to the sea " * 3, "boats", "x" * 300, "the sea is wide"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier of six classes, as transformers saves it."""
    folder = tmp_path_factory.mktemp("rater")
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, num_labels=6,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)
    return folder


def test_expected_value_of_a_transformers_classifier(folder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        encoded = [tokenizer(text, return_tensors="pt", truncation=True) for text in TEXTS]
        shares = [model(**batch).logits.softmax(-1)[0].numpy() for batch in encoded]
    wanted = np.array(shares) @ np.arange(6)
    for tokens in (1, 200, 10_000):
        got = ClassifierScorer(folder, batch_tokens=tokens).score(TEXTS)
        assert np.allclose(got, wanted, rtol=0, atol=1e-5)
    whole = ClassifierScorer(folder, expected_value=False)
    assert whole.columns == tuple(f"p_LABEL_{i}" for i in range(6))
    assert np.allclose(whole.score(TEXTS), shares, rtol=0, atol=1e-5)
    assert whole.fingerprint != ClassifierScorer(folder).fingerprint == ClassifierScorer(str(folder)).fingerprint


def test_a_model_with_a_head_and_its_folder(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(12)], "label": [0, 1, 2] * 4})
    task = from_datasets(rows, text="text", label="label", name="toy")
    model = small("text-encoder", "nano").with_head(task)
    with torch.no_grad():
        logits = torch.cat([model(**model.collate(task)([{"text": t, "label": 0}]))["logits"] for t in TEXTS])
    wanted = logits.softmax(-1).double().numpy() @ np.arange(3)
    assert np.allclose(ClassifierScorer(model).score(TEXTS), wanted, rtol=0, atol=1e-5)
    model.save(tmp_path / "saved")
    saved = ClassifierScorer(tmp_path / "saved")
    assert np.allclose(saved.score(TEXTS), wanted, rtol=0, atol=1e-5)
    model.train()
    assert np.allclose(ClassifierScorer(model).score(TEXTS), wanted, rtol=0, atol=1e-5) and model.training


def test_one_output_is_the_score_itself() -> None:
    encoder = small("text-encoder", "nano")
    model = Model(encoder.backbone, kind="text-encoder", head=torch.nn.Linear(32, 1), processor=encoder.processor,
                  pooling="mean", max_length=128)  # fmt: skip
    scorer = ClassifierScorer(model)
    with torch.no_grad():
        wanted = model(**encoder.processor("the sea", return_tensors="pt"))["logits"].item()
    assert scorer.columns == ("expected",) and scorer.score(["the sea"])[0] == pytest.approx(wanted, abs=1e-6)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(DownriverError, match="document 'n': the model's output is not finite"):
        scorer.score([{"text": "a", "id": "n"}])


def test_what_is_no_classifier_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="has no head or no tokenizer"):
        ClassifierScorer(small("text-encoder", "nano"))
    with pytest.raises(InputError, match="is no text classifier"):
        ClassifierScorer(tmp_path / "nothing")
    bare = transformers.AutoModel.from_pretrained(folder)
    bare.save_pretrained(tmp_path / "bare")
    byte_tokenizer(128).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"has no weights for classifier\.bias"):
        ClassifierScorer(tmp_path / "bare")
    with pytest.raises(InputError, match="at least 1 is expected"):
        ClassifierScorer(folder, batch_tokens=0)
    with pytest.raises(InputError, match="document 0: its text is empty"):
        ClassifierScorer(folder).score([" "])
