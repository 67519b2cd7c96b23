"""Full fine-tuning: the budget it shares with its probe, where the head starts, what it changes."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from downriver.adapt import fine_tune, full, linear_probe, lora
from downriver.adapt.heads import ready
from downriver.core import InputError, metered, registry
from downriver.models import small
from downriver.tasks import Task
from downriver.training.engine import Budget


@pytest.mark.parametrize("head", ["probe", "random"])
def test_it_learns_and_the_model_given_stays(encoder, letters, score, weights, head):
    before = weights(encoder)
    tuned = full(encoder, letters, "640 examples", learning_rate=1e-3, head=head)
    assert score(tuned, letters)[0] > 0.95
    assert encoder.head is None
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not torch.equal(
        tuned.backbone.encoder.layer[0].output.dense.weight, before["backbone.encoder.layer.0.output.dense.weight"]
    )


def test_the_probe_is_part_of_the_budget(encoder, letters):
    with metered() as meter:
        full(encoder, letters, "320 examples")
    assert meter.cost.examples == 80 + 240
    with metered() as few:
        full(encoder, letters.sample("train", 20, seed=0), "320 examples")
    assert few.cost.examples == 20 + 288  # 300 left: 18 steps of 16
    with metered() as random:
        full(encoder, letters, "320 examples", head="random")
    assert random.cost.examples == 320
    with metered() as steps:
        full(encoder, letters, "20 steps")
    assert steps.cost.examples == 320
    size = sum(p.numel() for p in encoder.parameters()) + 66
    assert meter.cost.parameters == meter.cost.trained_parameters == size


@pytest.mark.parametrize("unit", ["tokens", "flops"])
def test_a_budget_in(encoder, letters, unit):
    with metered() as meter:
        full(encoder, letters, "320 examples")
    amount = getattr(meter.cost, unit)
    with metered() as again:
        full(encoder, letters, f"{amount} {unit}")
    assert 0.8 * amount < getattr(again.cost, unit) <= amount


def test_training_starts_from_the_probes_head(encoder, letters):
    start, left = ready(encoder, letters, Budget(320), head="probe", batch_size=16, seed=4)
    probed = linear_probe(encoder, letters, "80 examples", seed=4)
    assert torch.equal(start.head.weight, probed.head.weight)
    assert left == Budget(240)


def test_keep_continues_with_the_head_there_is(encoder, letters):
    probed = linear_probe(encoder, letters, "120 examples")
    kept, left = ready(probed, letters, Budget(320), head="keep", batch_size=16, seed=0)
    assert left == Budget(320)
    assert kept is not probed
    assert torch.equal(kept.head.weight, probed.head.weight)
    with pytest.raises(InputError, match="has no head"):
        full(encoder, letters, "32 examples", head="keep")


def test_the_random_head_depends_on_the_seed_alone(encoder, letters):
    a, b, c = (ready(encoder, letters, Budget(320), head="random", batch_size=16, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_one_seed_gives_one_result(encoder, letters):
    first, again, other = (full(encoder, letters, "96 examples", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_an_adapter_is_merged_first(encoder, letters):
    adapted = lora(encoder, letters, "64 examples")
    tuned = full(adapted, letters, "64 examples", head="keep", learning_rate=1e-9)
    assert type(tuned.backbone).__name__ == "BertModel"
    batch = encoder.collate(letters)([{"text": "abc"}, {"text": "xyz"}])
    torch.testing.assert_close(tuned(**batch)["logits"], adapted(**batch)["logits"], atol=1e-5, rtol=0)


def test_what_was_frozen_learns_and_is_frozen_again(encoder, letters):
    encoder.requires_grad_(False)
    tuned = full(encoder, letters, "64 examples", head="random", learning_rate=1e-3)
    assert not torch.equal(
        tuned.backbone.embeddings.word_embeddings.weight, encoder.backbone.embeddings.word_embeddings.weight
    )
    assert not any(p.requires_grad for p in tuned.backbone.parameters())


def test_a_language_model_needs_no_head(score):
    rows = Dataset.from_dict({"text": ["one river two rivers", "two rivers one river", "three rivers"] * 8})
    task = Task("rivers", "language-modelling", {"train": rows, "test": rows}, ("text",), None)
    model = small("causal-lm", "nano")
    with metered() as meter:
        tuned = full(model, task, "256 examples", learning_rate=5e-3)
    assert meter.cost.examples == 256
    assert score(tuned, task)[1] < 0.7 * score(model, task)[1]


def test_a_saved_model_comes_back_the_same(encoder, letters, tmp_path):
    from downriver import models

    tuned = full(encoder, letters, "64 examples")
    back = models.load(tuned.save(tmp_path / "tuned"))
    batch = tuned.collate(letters)([{"text": "abc"}])
    assert torch.equal(back(**batch)["logits"], tuned(**batch)["logits"])
    assert back.labels == ("early", "late")


def test_checkpoints_serve_the_training_that_follows_the_probe(encoder, letters, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 8:
                raise KeyboardInterrupt

    start, left = ready(encoder, letters, Budget(256), head="probe", batch_size=16, seed=0)
    settings = {"learning_rate": 5e-5, "weight_decay": 0.01, "trainable": lambda name: True, "checkpoints": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fine_tune(start, letters, left, callbacks=[Stop()], **settings)
    continued = full(encoder, letters, "256 examples", checkpoints=tmp_path)
    whole = full(encoder, letters, "256 examples")
    assert all(torch.equal(a, b) for a, b in zip(continued.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "20 examples"}, r"a quarter is for the probe .* head='random'"),
        ({"budget": "1 steps"}, "what is left does not pay for one step"),
        ({"head": "prob"}, "did you mean 'probe'"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_a_bad_parameter_is_named(encoder, letters, settings, message):
    with pytest.raises(InputError, match=message):
        full(encoder, letters, **({"budget": "64 examples"} | settings))


@pytest.mark.parametrize("name", ["full", "linear_probe", "lora"])
def test_every_method_is_known_by_name_with_its_parameters(name):
    method = registry.resolve("adapt", name)
    assert registry.check_parameters(method, {"seed": 3}, name) == {"seed": 3}
    with pytest.raises(InputError, match="unknown parameter"):
        registry.check_parameters(method, {"learning_rat": 3}, name)
