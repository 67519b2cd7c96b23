"""One run in two phases: the switch, what goes on across it, which documents each phase has."""

import importlib
import warnings

import datasets
import pytest
import torch
import transformers

from downriver.core.errors import InputError
from downriver.core.registry import check_parameters, resolve
from downriver.models import small
from downriver.models.language import language_model
from downriver.models.tokenizers import byte_tokenizer
from downriver.pretrain import MeCoSchedule, meco
from downriver.pretrain.meco import shared_out, warn_of_overlap
from downriver.tasks.task import Task
from downriver.training import TokenRows, fine_tune

PAGES = {
    "text": [f"page {i} of the book" for i in range(20)],
    "url": [f"https://{'ab'[i % 2]}.org/{i}" for i in range(20)],
}
TASK = Task("pages", "language-modelling", {"train": datasets.Dataset.from_dict(PAGES)}, ("text",), None, group="url")


def blocks(first, number, length=6):
    return datasets.Dataset.from_dict({"input_ids": [[first + i] * length for i in range(number)]})


@pytest.mark.parametrize(("steps", "cooldown", "switch"), [(40000, 0.1, 36000), (10, 0.25, 7), (10, 0.9, 1), (7, 0, 7)])
def test_the_switch(steps, cooldown, switch):
    schedule = MeCoSchedule(steps, conditioned=blocks(10, 3), plain=blocks(50, 4), cooldown=cooldown, batch_size=5)
    assert schedule.switch == switch
    assert len(schedule.rows) == 7
    assert max(schedule(visit) for visit in range(switch * 5 - 20, switch * 5) if visit >= 0) < 3
    if cooldown:
        assert min(schedule(visit) for visit in range(switch * 5, switch * 5 + 20)) >= 3


def test_every_block_once_before_any_twice():
    schedule = MeCoSchedule(8, conditioned=blocks(10, 6), plain=blocks(50, 4), cooldown=0.5, batch_size=3, seed=1)
    first, second = [schedule(v) for v in range(12)], [schedule(v) for v in range(12, 24)]
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6)) and first[:6] != first[6:]
    assert sorted(second[:4]) == sorted(second[4:8]) == list(range(6, 10))
    assert [schedule(v) for v in (17, 3, 14)] == [second[5], first[3], second[2]]  # a function of the visit alone


def test_rate_and_moments_go_on_across_the_switch():
    rates = []

    class Rates(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "learning_rate" in logs:
                rates.append(logs["learning_rate"])

    schedule = MeCoSchedule(20, conditioned=blocks(10, 9), plain=blocks(50, 9), cooldown=0.5, batch_size=2)
    settings = {"learning_rate": 1e-2, "batch_size": 2, "warmup": 0.0, "schedule": "cosine"}
    model = small("causal-lm", "nano")
    switched = fine_tune(
        model, TokenRows("two", {"train": schedule.rows}), "20 steps", order=schedule, callbacks=[Rates()], **settings
    )
    assert len(rates) == 20 and rates == sorted(rates, reverse=True)
    # one run over the same rows in one piece, with nothing that could know of phases
    laid_out = schedule.rows.select([schedule(visit) for visit in range(40)])
    whole = fine_tune(model, TokenRows("one", {"train": laid_out}), "20 steps", order=lambda visit: visit, **settings)
    assert all(torch.equal(a, b) for a, b in zip(switched.parameters(), whole.parameters(), strict=True))


def test_without_cooldown_and_with_nearly_nothing_else():
    conditioned, plain = blocks(10, 3), blocks(50, 3)
    only = MeCoSchedule(10, conditioned=conditioned, plain=plain.select([]), cooldown=0, batch_size=2)
    assert all(only(visit) < 3 for visit in range(20))
    nearly = MeCoSchedule(10, conditioned=conditioned, plain=plain, cooldown=1 - 1e-6, batch_size=2)
    assert nearly.switch == 0 and all(nearly(visit) >= 3 for visit in range(20))


def test_the_phases_have_different_documents():
    first, second = shared_out(TASK.rows("train"), 0.1, seed=3)
    assert len(second) == 2 and set(first["text"]) | set(second["text"]) == set(PAGES["text"])
    assert not set(first["text"]) & set(second["text"])
    assert shared_out(TASK.rows("train"), 0.1, seed=4)[1]["text"][:] != second["text"][:]
    assert len(shared_out(TASK.rows("train"), 0.0, seed=3)[1]) == 0
    with pytest.raises(InputError, match="1 documents are too few for two phases"):
        shared_out(TASK.rows("train").select([0]), 0.1, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_overlap(first["text"], second["text"])
    with pytest.warns(UserWarning, match="1 of 2 texts of the cooldown are among those with metadata"):
        warn_of_overlap(["a", "b"], ["b", "c"])


def test_the_method(monkeypatch):
    module, seen = importlib.import_module("downriver.pretrain.meco"), {}
    real = module.fine_tune

    def spy(model, rows, budget, **settings):
        seen.update(settings, rows=rows.rows("train"), budget=str(budget))
        return real(model, rows, budget, **settings)

    monkeypatch.setattr(module, "fine_tune", spy)
    model = small("causal-lm", "nano")
    tuned = meco(model, TASK, "1600 tokens", block=40, batch_size=4, cooldown=0.2, strategy="bfd", seed=2)
    assert seen["budget"] == "10 steps" and seen["order"].switch == 8 and seen["objective"] is None
    given = [seen[name] for name in ("learning_rate", "weight_decay", "warmup", "betas", "schedule")]
    assert given == [3e-3, 0.033, 0.05, (0.9, 0.95), "cosine"]
    texts = [model.processor.decode(ids) for ids in seen["rows"]["input_ids"]]
    shown = [text for text in texts if "URL" in text]
    assert 0 < len(shown) < len(texts) and texts[: len(shown)] == shown  # with sources first, then without
    assert all(f"URL: {c}.org\n\npage" in "".join(shown) for c in "ab")
    assert not torch.equal(tuned.backbone.model.norm.weight, model.backbone.model.norm.weight)
    again = meco(model, TASK, "10 steps", block=40, batch_size=4, cooldown=0.2, strategy="bfd", seed=2)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
    with pytest.warns(UserWarning, match="texts of the cooldown"):
        twice = datasets.Dataset.from_dict({"text": ["same"] * 9, "url": ["a.org"] * 9})
        meco(model, Task("twice", "language-modelling", {"train": twice}, ("text",), None), "2 steps", field="url")


def test_a_family_that_ignores_positions_gets_the_mask(monkeypatch):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=260, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    model = language_model(transformers.OPTForCausalLM(config), byte_tokenizer(64))
    assert meco(model, TASK, "2 steps", batch_size=2, cooldown=0.5).kind == "causal-lm"


def test_it_is_found_by_name():
    assert resolve("pretrain", "meco") is meco
    assert check_parameters(meco, {"view": "domain", "cooldown": 0.2}, "meco")["view"] == "domain"
    with pytest.raises(InputError, match="parameter 'view' of meco is 'hosts'"):
        check_parameters(meco, {"view": "hosts"}, "meco")


def test_bad_input():
    model = small("causal-lm", "nano")
    mood = Task(
        "mood",
        "text-classification",
        {"train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})},
        ("text",),
        "label",
    )
    for task, budget, settings, message in [
        (mood, "1 steps", {}, "task 'mood' is text-classification"),
        (TASK, "1 steps", {"cooldown": 1.0}, "cooldown is 1.0: a share of the steps, from 0 to below 1"),
        (TASK, "1 steps", {"field": "site"}, "task 'pages' has no column 'site'"),
        (TASK, "9 seconds", {}, "steps, examples or tokens are expected"),
        (TASK, "1 steps", {"template": "URL:"}, "it must hold {meta}"),
        (TASK, "1 steps", {"block": 8}, "which fills a block of 8"),
    ]:
        with pytest.raises(InputError, match=message):
            meco(model, task, budget, **settings)
    for settings, message in [
        ({"cooldown": -0.1}, "cooldown is -0.1"),
        ({"cooldown": 0.1, "plain": blocks(5, 1).select([])}, "no plain blocks for their part"),
        ({"cooldown": 0.1, "conditioned": blocks(5, 1).select([])}, "no conditioned blocks"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"plain": blocks(5, 1).add_column("x", [1])}, "plain ones .* the same are expected"),
    ]:
        with pytest.raises(InputError, match=message):
            MeCoSchedule(10, **({"conditioned": blocks(5, 2), "plain": blocks(9, 2), "batch_size": 2} | settings))
