"""Half-document retrieval tells an encoder that knows from one that says the same of everything."""

import numpy as np
import pytest
import torch

from downriver import models
from downriver.core import InputError
from downriver.evaluate import half_document_retrieval

rng = np.random.default_rng(0)
TOPICS = [" ".join(rng.choice([f"t{i}w{j}" for j in range(4)], 40)) for i in range(12)]


@pytest.fixture(scope="module")
def encoder():
    return models.small("text-encoder", "nano")


def test_an_encoder_of_words_finds_the_other_half(encoder, monkeypatch):
    def bag_of_words(model, texts, **settings):
        vocabulary = sorted({word for text in texts for word in text.split()})
        return np.array([[text.split().count(word) for word in vocabulary] for text in texts], dtype=np.float32)

    monkeypatch.setattr("downriver.evaluate.retrieval.extract", bag_of_words)
    assert half_document_retrieval(encoder, TOPICS) == {"recall@1": 1.0, "mrr": 1.0}


def test_a_collapsed_encoder_gets_the_lowest_score(encoder, monkeypatch):
    monkeypatch.setattr("downriver.evaluate.retrieval.extract", lambda model, texts, **_: np.ones((len(texts), 4)))
    assert half_document_retrieval(encoder, TOPICS) == {"recall@1": 0.0, "mrr": pytest.approx(1 / 12)}


def test_ranks_by_hand(encoder, monkeypatch):
    first = np.array([[1, 0], [0, 1], [1, 0.2]], dtype=np.float32)
    second = np.array([[1, 0.1], [1, 0], [0, 1]], dtype=np.float32)  # ranks of the own half: 2, 3, 3
    halves = np.stack([first, second], axis=1).reshape(6, 2)
    monkeypatch.setattr("downriver.evaluate.retrieval.extract", lambda *_, **__: halves)
    found = half_document_retrieval(encoder, TOPICS[:3])
    assert found == {"recall@1": 0.0, "mrr": pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)}


def test_the_head_does_not_count_and_the_seed_chooses_documents(encoder):
    headed = models.Model(
        encoder.backbone,
        kind=encoder.kind,
        head=torch.nn.Linear(32, 2),
        processor=encoder.processor,
        pooling=encoder.pooling,
        max_length=encoder.max_length,
    )
    assert half_document_retrieval(headed, TOPICS) == half_document_retrieval(encoder, TOPICS)
    mixed = [" ".join(rng.choice([f"w{j}" for j in range(40)], 30)) for _ in range(40)]
    some = [half_document_retrieval(encoder, mixed, seed, documents=20) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]


def test_short_texts_are_left_out(encoder):
    assert half_document_retrieval(encoder, [*TOPICS, "too short"]) == half_document_retrieval(encoder, TOPICS)
    with pytest.raises(InputError, match="1 of 2 texts have 16 words"):
        half_document_retrieval(encoder, [TOPICS[0], "too short"])


@pytest.mark.assets
def test_a_real_encoder_is_far_above_a_random_one(asset, encoder):
    from downriver import tasks

    asset("all-MiniLM-L6-v2"), asset("20newsgroups")
    real = models.load("all-MiniLM-L6-v2", max_length=48)
    texts = tasks.load("20newsgroups").sample("test", 80, seed=0).texts("test")
    found = [half_document_retrieval(model, texts, documents=40, words=30)["mrr"] for model in (real, encoder)]
    assert found[0] > 0.7
    assert found[1] < 0.4
