"""Sweeps over λ: every run is the one that its settings give, the front is what no run beats, and what is refused."""

import pytest
import torch
from datasets import Dataset

from downriver.adapt import AlignGuard, FisherSubspace, alignguard_lora, lambda_sweep, update_norm
from downriver.core import InputError, metered
from downriver.models import small
from downriver.tasks.task import Task

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SETTINGS = {"batch_size": 2, "learning_rate": 1e-2, "rank": 2, "target_modules": TARGETS}


def texts(*rows):
    return Task("texts", "language-modelling", {"train": Dataset.from_dict({"text": list(rows)})}, ("text",), None)


NEW = texts("Rivers run to the sea.", "Boats go up and down.", "Fish swim.", "Water is wet.")


@pytest.fixture(scope="module")
def subspace():
    kept = texts("I refuse to do that.", "That I cannot do.", "No.")
    return FisherSubspace.estimate(small("causal-lm", "nano"), kept, rank=2, targets=TARGETS)


def test_every_run_is_that_of_its_settings(subspace):
    model = small("causal-lm", "nano")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def drift(tuned):
        return AlignGuard(subspace)(tuned)["fisher"].item()

    def score(tuned):
        ids = tuned.processor("Fish swim.", return_tensors="pt")["input_ids"]
        return -tuned.eval().backbone(input_ids=ids, labels=ids).loss.item()

    with metered() as meter:
        found = lambda_sweep(
            model, NEW, "6 steps", alignment=subspace, score=score, drift=drift, strengths=[1.0, 30.0], norms=[0.01],
            **SETTINGS,
        )  # fmt: skip
    assert meter.cost.examples == 4 * 12
    assert found["method"].to_list() == ["lora", "alignguard", "alignguard", "norm"]
    assert found["strength"].to_list() == [0, 1, 30, 0.01]
    assert found["drift"][2] < found["drift"][1] < found["drift"][0]
    guarded = alignguard_lora(model, NEW, "6 steps", alignment=subspace, lam_a=7.5, lam_t=15, lam_nc=3, **SETTINGS)
    assert (score(guarded), drift(guarded)) == (found["score"][2], found["drift"][2])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_front_is_what_no_run_beats(subspace):
    answers = iter([(0.9, 0.5), (0.9, 0.2), (0.8, 0.2), (0.7, 0.1), (0.95, 0.6), (0.9, 0.2)])
    current = {}

    def score(tuned):
        current["pair"] = next(answers)
        return current["pair"][0]

    found = lambda_sweep(
        small("causal-lm", "nano"), NEW, "1 steps", alignment=subspace, score=score,
        drift=lambda tuned: current["pair"][1], strengths=[1, 2, 3], norms=[0.1, 0.2], progress=False, **SETTINGS,
    )  # fmt: skip
    assert found["front"].to_list() == [False, True, False, True, True, True]


def test_what_is_refused(subspace):
    model, settings = small("causal-lm", "nano"), {"alignment": subspace, "score": float, "drift": float}
    with pytest.raises(InputError, match=r"strengths are \[0\]"):
        lambda_sweep(model, NEW, "1 steps", strengths=[0], **settings)
    with pytest.raises(InputError, match="norms are"):
        lambda_sweep(model, NEW, "1 steps", norms=[float("nan")], **settings)
    nothing = {"score": lambda tuned: float("nan"), "drift": lambda tuned: update_norm(tuned).item()}
    with pytest.raises(InputError, match="lora at 0: score and drift are"):
        lambda_sweep(model, NEW, "1 steps", **(settings | nothing), **SETTINGS)
