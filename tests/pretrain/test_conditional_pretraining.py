"""From texts and a scorer to a model: what each objective makes of the same task."""

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

from downriver.core.errors import InputError
from downriver.core.registry import check_parameters, resolve
from downriver.data.condition import sample_aligned
from downriver.models import small, small_language_model, word_tokenizer
from downriver.models.language import language_model
from downriver.pretrain import Conditional, Unlikelihood, conditional_pretraining
from downriver.pretrain import conditional_pretraining as method
from downriver.pretrain.feedback import OBJECTIVES
from downriver.tasks.task import Task

TEXTS = ["good good day . bad bad night .", "good day good day .", "bad night bad night ."] * 4
WORDS = word_tokenizer(TEXTS, context=32)
TASK = Task("days", "language-modelling", {"train": Dataset.from_dict({"text": TEXTS})}, ("text",), None)


def bad(texts):
    return np.array([float("bad" in text) for text in texts])


def test_it_is_found_by_name():
    assert resolve("pretrain", "conditional_pretraining") is method
    assert check_parameters(method, {"scorer": "pii", "objective": "awr"}, "x") == {"scorer": "pii", "objective": "awr"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_a_copy(objective):
    model = small_language_model("causal-lm", WORDS, width=16, heads=2, context=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = conditional_pretraining(
        model, TASK, "3 steps", scorer=bad, objective=objective, threshold=0.5, batch_size=2, learning_rate=1e-2
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(tuned.processor) - len(WORDS) == (2 if objective == "conditional" else 0)
    assert not torch.equal(tuned.backbone.model.norm.weight, model.backbone.model.norm.weight)


def test_the_good_tag_keeps_the_bad_words_away():
    model = small_language_model("causal-lm", WORDS, width=32, heads=2, context=32)
    tuned = conditional_pretraining(
        model, TASK, "80 steps", scorer=bad, threshold=0.5, batch_size=4, learning_rate=2e-2, warmup=0.1
    )
    good, worse = (
        bad(sample_aligned(tuned, ["good"], tag=tag, n=60, max_new_tokens=4)).mean()
        for tag in ("aligned", "misaligned")
    )
    assert good < 0.3 < 0.7 < worse


def test_unlikelihood_by_name_starts_above_the_worst_that_is_wanted(monkeypatch):
    from downriver.pretrain import feedback

    seen = []
    loss = Unlikelihood.loss
    monkeypatch.setattr(feedback.Unlikelihood, "loss", lambda self, *a: seen.append(self.threshold) or loss(self, *a))
    model = small_language_model("causal-lm", WORDS, width=16, heads=2, context=32)
    conditional_pretraining(
        model, TASK, "1 steps", scorer=lambda texts: bad(texts) + 0.25, objective="unlikelihood", threshold=0.5
    )
    assert set(seen) == {0.25}


def test_a_family_that_ignores_positions_gets_the_mask(monkeypatch):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=32,
    )
    model = language_model(transformers.OPTForCausalLM(config), WORDS)
    objective = Conditional()
    conditional_pretraining(model, TASK, "1 steps", scorer=bad, objective=objective, threshold=0.5, batch_size=2)
    assert objective.explicit_mask
    conditional_pretraining(
        model, TASK, "1 steps", scorer=bad, objective=objective, threshold=0.5, batch_size=2, isolate=False
    )
    assert not objective.explicit_mask


def test_bad_input():
    model = small("causal-lm", "nano")
    mood = Task(
        "mood",
        "text-classification",
        {"train": Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})},
        ("text",),
        "label",
    )
    for task, settings, message in [
        (mood, {"scorer": bad}, "task 'mood' is text-classification: language-modelling is expected"),
        (TASK, {"scorer": "pep9"}, "unknown scorer 'pep9': did you mean 'pep8'"),
        (TASK, {"scorer": bad, "objective": "ppo"}, "unknown objective 'ppo'"),
        (TASK, {"scorer": lambda texts: np.zeros(3)}, r"scores of shape \(3,\)"),
    ]:
        with pytest.raises(InputError, match=message):
            conditional_pretraining(model, task, "1 steps", **settings)
