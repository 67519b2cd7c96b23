"""LoRA: what learns and what does not, peft's own counts, saving, merging, every kind of backbone."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from torch import nn

from downriver import models
from downriver.adapt import linear_probe, lora, merge_adapter
from downriver.core import InputError, metered
from downriver.models import Model, small
from downriver.models.model import base_state
from downriver.tasks import Task


@pytest.fixture(scope="module")
def adapted(letters):
    with metered() as meter:
        model = lora(small("text-encoder", "nano"), letters, "640 examples", rank=4, head="random", learning_rate=5e-3)
    return model, meter.cost


def batch_of(model, task):
    return model.collate(task)(list(task.rows("train"))[:8])


def test_it_learns_beside_weights_that_stay(adapted, letters, score):
    model, _ = adapted
    assert isinstance(model.backbone, PeftModel)
    assert score(model, letters)[0] > 0.95
    original = small("text-encoder", "nano").backbone.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base_state(model).items())
    learnt = [p for name, p in model.backbone.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in learnt)  # every adapter moved from its start at zero


def test_the_model_given_stays(encoder, letters, weights):
    before = weights(encoder)
    lora(encoder, letters, "64 examples")
    assert type(encoder.backbone).__name__ == "BertModel"
    assert before.keys() == encoder.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_cost_is_pefts_count_and_the_head(adapted):
    model, cost = adapted
    trainable, everything = model.backbone.get_nb_trainable_parameters()
    assert cost.trained_parameters == trainable + 32 * 2 + 2
    assert cost.parameters == everything + 32 * 2 + 2
    layers = 2 * (4 * 4 * (32 + 32) + 2 * 4 * (32 + 128))  # a layer: four square matrices, two of 32 x 128; rank 4
    assert trainable == layers
    assert cost.examples == 640


def test_merging_changes_no_output(adapted, letters):
    model, _ = adapted
    merged = merge_adapter(model)
    assert type(merged.backbone).__name__ == "BertModel"
    assert merged.backbone.state_dict().keys() == small("text-encoder", "nano").backbone.state_dict().keys()
    batch = batch_of(model, letters)
    torch.testing.assert_close(merged(**batch)["logits"], model(**batch)["logits"], atol=1e-5, rtol=1e-5)
    assert isinstance(model.backbone, PeftModel)
    assert all(p.requires_grad for p in merged.parameters())


def test_an_adapter_is_saved_and_loaded_as_one(adapted, letters, tmp_path):
    model, _ = adapted
    folder = model.save(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    back = models.load(folder)
    batch = batch_of(model, letters)
    assert isinstance(back.backbone, PeftModel)
    assert torch.equal(back(**batch)["logits"], model(**batch)["logits"])
    torch.testing.assert_close(merge_adapter(back)(**batch)["logits"], model(**batch)["logits"], atol=1e-5, rtol=1e-5)


def test_one_seed_gives_one_result(encoder, letters):
    first, again, other = (lora(encoder, letters, "64 examples", seed=seed, rank=2, dropout=0.1) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_head_starts_from_a_probe(encoder, letters):
    probed = linear_probe(encoder, letters, "80 examples")
    tuned = lora(encoder, letters, "320 examples", learning_rate=1e-12)
    torch.testing.assert_close(tuned.head.weight, probed.head.weight)
    batch = batch_of(encoder, letters)  # B starts at zero: the untrained adapter changes nothing
    torch.testing.assert_close(tuned(**batch)["logits"], probed(**batch)["logits"], atol=1e-4, rtol=1e-4)


def test_a_language_model_keeps_its_head_and_generates(score):
    rows = Dataset.from_dict({"text": ["one river two rivers", "two rivers one river", "three rivers"] * 8})
    task = Task("rivers", "language-modelling", {"train": rows, "test": rows}, ("text",), None)
    model = small("causal-lm", "nano")
    tuned = lora(model, task, "256 examples", learning_rate=2e-2)
    assert score(tuned, task)[1] < score(model, task)[1] - 0.3
    assert not any("lm_head" in name for name, _ in tuned.backbone.named_parameters() if "lora_" in name)
    prompt = torch.tensor([[1, 69, 70]])
    out = tuned.backbone.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False
    )
    assert out.shape[1] > 3


def test_convolutions_are_adapted_where_there_is_nothing_linear(score):
    rng = np.random.default_rng(0)
    labels = [0, 1] * 20
    images = [(np.full((8, 8), 60 + 120 * label) + rng.integers(30, size=(8, 8))).astype(np.uint8) for label in labels]
    rows = Dataset.from_dict({"image": images, "label": labels}, features=Features(image=Image(), label=Value("int64")))
    task = Task("grey", "image-classification", {"train": rows}, ("image",), "label")
    tuned = lora(small("resnet", "nano"), task, "160 examples", rank=2, learning_rate=1e-2)
    assert score(tuned, task, "train")[0] > 0.95
    batch = batch_of(tuned, task)
    torch.testing.assert_close(merge_adapter(tuned)(**batch)["logits"], tuned(**batch)["logits"], atol=1e-4, rtol=1e-4)


def test_your_own_module_is_adapted():
    x = np.random.default_rng(0).normal(size=(64, 2))
    rows = {"a": x[:, 0].tolist(), "b": x[:, 1].tolist(), "y": (x[:, 0] * x[:, 1] > 0).astype(int).tolist()}
    task = Task("xor", "tabular-classification", {"train": Dataset.from_dict(rows)}, ("a", "b"), "y")
    torch.manual_seed(0)
    mine = Model(nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()))
    tuned = lora(mine, task, "1280 examples", rank=4, learning_rate=3e-2)
    batch = tuned.collate(task)(list(task.rows("train")))
    assert (tuned(**batch)["logits"].argmax(1) == batch["labels"]).float().mean() > 0.9
    torch.testing.assert_close(merge_adapter(tuned)(**batch)["logits"], tuned(**batch)["logits"], atol=1e-4, rtol=1e-4)


def test_layers_are_named_as_peft_names_them(encoder, letters):
    tuned = lora(encoder, letters, "64 examples", target_modules=["query", "value"])
    adapted = {
        name.split(".lora_")[0].split(".")[-1] for name, _ in tuned.backbone.named_parameters() if "lora_" in name
    }
    assert adapted == {"query", "value"}
    with pytest.raises(InputError, match=r"'qurey'.*layers there are: dense, key, query, value"):
        lora(encoder, letters, "64 examples", target_modules=["qurey"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0: at least 1"),
        ({"alpha": 0}, "alpha is 0: at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"budget": "20 examples"}, "a quarter is for the probe"),
    ],
)
def test_a_bad_parameter_is_named(encoder, letters, settings, message):
    with pytest.raises(InputError, match=message):
        lora(encoder, letters, **({"budget": "64 examples"} | settings))


def test_nothing_to_adapt_or_to_merge_is_said(encoder, letters):
    rows = Dataset.from_dict({"a": [0.0, 1.0, 0.1, 0.9] * 8, "y": [0, 1, 0, 1] * 8})
    task = Task("t", "tabular-classification", {"train": rows}, ("a",), "y")
    with pytest.raises(InputError, match="Identity has no linear layer and no convolution"):
        lora(Model(nn.Identity()), task, "64 examples")
    with pytest.raises(InputError, match="carries no adapter to merge"):
        merge_adapter(encoder)
