"""CoLoR-Filter: what the score does and does not depend on, nesting, adapters, and what is refused."""

import itertools

import numpy as np
import peft
import pytest
import torch

from downriver.core.errors import InputError
from downriver.data.score import LossScorer
from downriver.data.select.color_filter import ColorFilter, fit_conditional, select_by
from downriver.models import small, small_language_model, word_tokenizer

POOL = [f"the river number {i} runs to the sea past {i * 7} towns and {i % 5} mills" for i in range(48)]
TARGET = ["a mill on the river grinds the corn of seven towns every autumn day"] * 8


@pytest.fixture(scope="module")
def models():
    prior = small("causal-lm", "nano")
    return prior, fit_conditional(prior, TARGET, batch_size=2, learning_rate=3e-3)


def losses(n=200, seed=0):
    rng = np.random.default_rng(seed)
    return {"prior": rng.normal(5, 1, n), "conditional": rng.normal(5, 1, n), "current": rng.normal(5, 1, n)}


def test_select_by():
    found = losses()
    by = {
        "color": found["prior"] - found["conditional"],
        "rho": found["current"] - found["conditional"],
        "cond": -found["conditional"],
        "ppl": -found["prior"],
    }
    for rule, scores in by.items():
        assert select_by(found, rule, tau=9).indices.tolist() == sorted(np.argsort(-scores)[: 200 // 9])
    moved = {name: values + 2.0 for name, values in found.items()}
    assert select_by(moved, tau=9).indices.tolist() == select_by(found, tau=9).indices.tolist()
    assert len(select_by(found, tau=1).indices) == 200
    sets = [set(select_by(found, tau=tau).ids) for tau in (64, 32, 16, 7)]
    assert all(a < b for a, b in itertools.pairwise(sets)) and [len(s) for s in sets] == [3, 6, 12, 28]
    assert len(select_by(found, "random", k=5, seed=1).indices) == 5
    tokens = np.full(200, 10)
    assert len(select_by(found, budget_tokens=55, tokens=tokens).indices) == 5


def test_refused_losses():
    with pytest.raises(InputError, match="unknown rule 'colour'"):
        select_by(losses(), "colour", k=1)
    with pytest.raises(InputError, match="1 documents have no finite score, '0' the first"):
        select_by({"prior": np.array([np.nan, 1]), "conditional": np.ones(2)}, k=1)
    with pytest.raises(InputError, match="scores have lengths"):
        select_by({"prior": np.ones(2), "conditional": np.ones(3)}, k=1)
    with pytest.raises(InputError, match="the pool has 200 documents and tau is 201"):
        select_by(losses(), tau=201)


def test_the_filter_is_the_difference_of_mean_losses(models, tmp_path):
    prior, conditional = models
    chosen = ColorFilter(prior, conditional, tau=5).select(POOL, table=tmp_path / "losses")
    scores = LossScorer(prior).score(POOL) - LossScorer(conditional).score(POOL)
    np.testing.assert_allclose(chosen.scores, scores, atol=1e-5)
    assert chosen.indices.tolist() == sorted(np.argsort(-scores)[: 48 // 5]) and chosen.report["chosen"] == 9
    again = ColorFilter(prior, conditional, tau=12).select(POOL, table=tmp_path / "losses")
    assert set(again.ids) < set(chosen.ids)


def test_one_model_with_an_adapter():
    base = small("causal-lm", "nano")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base.backbone = peft.get_peft_model(
            base.backbone, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
    tuned = fit_conditional(base, TARGET, batch_size=2, learning_rate=1e-2)
    chosen = ColorFilter(None, tuned, tau=4).select(POOL)
    both = LossScorer(tuned).score(POOL)
    assert len(chosen.indices) == 12 and np.abs(both[:, 0] - both[:, 1]).max() > 1e-4
    np.testing.assert_allclose(chosen.scores, both[:, 0] - both[:, 1], atol=1e-5)
    with pytest.raises(InputError, match="give it alone"):
        ColorFilter(small("causal-lm", "nano"), tuned).select(POOL)


def test_refused_models(models):
    prior, conditional = models
    with pytest.raises(InputError, match="the same model: every score would be 0"):
        ColorFilter(prior, prior).select(POOL)
    other = small_language_model("causal-lm", word_tokenizer(POOL, 50), width=16)
    with pytest.raises(InputError, match="differ in tokenizer, context or reduction"):
        ColorFilter(prior, other).select(POOL)
    with pytest.raises(InputError, match="differ in tokenizer, context or reduction"):
        ColorFilter(LossScorer(prior, context=16), LossScorer(conditional, context=32)).select(POOL)
    with pytest.raises(InputError, match="must carry a peft adapter"):
        ColorFilter(None, conditional).select(POOL)
    with pytest.raises(InputError, match="the pool has 48 documents and tau is 64"):
        ColorFilter(prior, conditional, tau=64).select(POOL)
    with pytest.raises(InputError, match="the target sample has no texts"):
        fit_conditional(prior, [])
    with pytest.raises(InputError, match="epochs is 0"):
        fit_conditional(prior, TARGET, epochs=0)


def test_overlap_is_warned_of_and_seen_documents_are_flagged(models):
    prior, conditional = models
    pool = [*POOL, TARGET[0] + " and night"]
    with pytest.warns(RuntimeWarning, match="1 of 49 documents of the pool share 13 words in a row"):
        ColorFilter(prior, conditional, tau=7, target=TARGET).select(pool)
    seen = [f"{i:09d}" for i in range(10)]
    kept = ColorFilter(prior, conditional, tau=7, prior_saw=seen).select(POOL)
    assert kept.report["seen by the prior"] == 10
    left_out = ColorFilter(prior, conditional, tau=7, prior_saw=seen, exclude_seen=True).select(POOL)
    assert not set(left_out.ids) & set(seen) and len(left_out.indices) == 38 // 7
    assert [left_out.reasons[i] for i in range(10)] == ["the prior was trained on it"] * 10
