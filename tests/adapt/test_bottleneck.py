"""Bottleneck adapters: identity, gradients against a naive block, places in every family, files, bad input."""

import json
import math

import pytest
import torch
import transformers
from torch import nn

from downriver.adapt import BottleneckConfig, Bottlenecked, load_bottleneck, peft
from downriver.adapt.bottleneck import Bottleneck, sites
from downriver.core import InputError
from downriver.models import Model, small
from downriver.training.engine import clone

PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]


def batch(model):
    ids = torch.randint(10, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bottleneck." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_fresh_adapter_gives_zero():
    adapter = Bottleneck(8, 3)
    assert torch.equal(adapter(torch.randn(4, 8)), torch.zeros(4, 8))
    assert float(adapter.down.weight.detach().abs().sum()) > 0  # so that gradients reach the projection up


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_gradients_are_those_of_a_naive_block(scale):
    torch.manual_seed(0)
    adapter = Bottleneck(6, 3, "relu", scale).double()
    nn.init.normal_(adapter.up.weight)
    x = torch.randn(5, 6, dtype=torch.double, requires_grad=True)
    D, b, U, c = (p.detach().clone().requires_grad_() for p in adapter.parameters())
    naive = scale * ((x @ D.T + b).clamp(min=0) @ U.T + c)
    torch.testing.assert_close(adapter(x), naive)
    weight = torch.randn(5, 6, dtype=torch.double)
    wanted = torch.autograd.grad((naive * weight).sum(), [x, D, b, U, c])
    found = torch.autograd.grad((adapter(x) * weight).sum(), [x, *adapter.parameters()])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(adapter, x)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["causal-lm", "text-encoder", "masked-lm", "vit"])
def test_a_fresh_adapter_changes_nothing(kind, placement):
    model = small(kind, "nano")
    given = {"pixel_values": torch.randn(2, 3, 32, 32)} if kind == "vit" else batch(model)
    adapted = Bottlenecked(model, BottleneckConfig(width=4, placement=placement))
    assert torch.equal(adapted.features(**given), model.features(**given))
    assert not torch.allclose(moved(adapted).features(**given), model.features(**given), atol=1e-4)
    learns = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in adapted.named_parameters() if ".bottleneck." in name}
    assert len(learns) == 4 * 2 * (2 if placement == "houlsby" else 1)


def test_the_arithmetic_of_the_placements():
    """Against the feed-forward block of a Llama, computed by hand."""
    model, x = small("causal-lm", "nano"), torch.randn(2, 5, 32)
    plain = model.backbone.model.layers[0].mlp(x)
    for placement in PLACEMENTS:
        adapted = moved(Bottlenecked(model, BottleneckConfig(width=4, placement=placement, scale=2.0)))
        block = adapted.backbone.model.layers[0].mlp
        adapter = block.down_proj.bottleneck
        wanted = plain + adapter(x if placement == "parallel" else plain)
        torch.testing.assert_close(block(x), wanted)
        assert adapter.beside is None  # nothing is kept after the call


def families():
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    gated = common | {"intermediate_size": 48}
    return {
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)),
        "neox": transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**gated)),
        "gemma": transformers.GemmaForCausalLM(transformers.GemmaConfig(**gated, head_dim=32, num_key_value_heads=1)),
        "roberta": transformers.RobertaModel(transformers.RobertaConfig(**gated), add_pooling_layer=False),
        "opt": transformers.OPTForCausalLM(transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32)),
    }


@pytest.mark.parametrize(
    ("family", "attention", "feed_forward"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"),
        ("neox", "gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        ("gemma", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ("roberta", "encoder.layer.1.attention.output.dense", "encoder.layer.1.output.dense"),
        ("opt", "model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2"),
    ],
)
def test_places_in_other_families(family, attention, feed_forward):
    backbone = families()[family].eval()
    attentions, feed_forwards = sites(backbone)
    assert (attentions[1].output.name, feed_forwards[1].output.name) == (attention, feed_forward)
    model = Model(backbone, kind="text-encoder" if family == "roberta" else "causal-lm", pooling="mean")
    given = {"input_ids": torch.randint(5, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    for placement in PLACEMENTS:
        adapted = Bottlenecked(model, BottleneckConfig(width=3, placement=placement))
        assert torch.equal(adapted.features(**given), model.features(**given))
        assert not torch.allclose(moved(adapted).features(**given), model.features(**given), atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_copies_are_independent(placement):
    """Hooks of a copy belong to the copy."""
    model = small("causal-lm", "nano")
    first = Bottlenecked(model, BottleneckConfig(width=4, placement=placement))
    before = first.features(**batch(model))
    second = moved(clone(first))
    assert torch.equal(first.features(**batch(model)), before)
    assert not torch.allclose(second.features(**batch(model)), before, atol=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_saved_and_loaded(placement, letters, tmp_path, score):
    config = {"width": 8, "placement": placement}
    tuned = peft(
        small("text-encoder", "nano"),
        letters,
        "480 examples",
        tuner="bottleneck",
        learning_rates=[2e-2],
        settings=config,
        head="random",
    )
    assert score(tuned, letters)[0] > 0.85
    folder = tuned.save(tmp_path / "adapters")
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["bottleneck.json", "bottleneck.safetensors"]  # the base is named
    again = load_bottleneck(folder)
    assert score(again, letters) == score(tuned, letters)
    assert again.bottleneck == tuned.bottleneck == BottleneckConfig(**config)
    assert again.labels == tuned.labels


def test_a_changed_base_is_kept_beside(tmp_path):
    model = small("masked-lm", "nano")
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.01)
    adapted = moved(Bottlenecked(model, BottleneckConfig(width=4)))
    folder = adapted.save(tmp_path / "adapters")
    again = load_bottleneck(folder)
    assert torch.equal(again(**batch(model))["logits"], adapted(**batch(model))["logits"])
    assert (folder / "base" / "config.json").is_file()
    transformers.BertForMaskedLM.from_pretrained(folder / "base")  # a plain base
    with pytest.raises(InputError, match="exists already"):
        adapted.save(folder)


def test_bad_input(tmp_path, letters):
    with pytest.raises(InputError, match="unknown placement 'inside'"):
        BottleneckConfig(placement="inside")
    with pytest.raises(InputError, match="width is 0"):
        BottleneckConfig(width=0)
    with pytest.raises(InputError, match="unknown activation 'glue'"):
        BottleneckConfig(activation="glue")
    with pytest.raises(InputError, match="scale is nan"):
        BottleneckConfig(scale=math.nan)
    with pytest.raises(InputError, match="has no stack of layers"):
        Bottlenecked(small("mlp", "nano").with_head(_wine()), BottleneckConfig())
    adapted = Bottlenecked(small("text-encoder", "nano"), BottleneckConfig(width=4))
    with pytest.raises(InputError, match="has adapters"):
        Bottlenecked(adapted, BottleneckConfig())
    with pytest.raises(InputError, match="cannot be read"):
        load_bottleneck(tmp_path)
    folder = adapted.save(tmp_path / "adapters")
    settings = json.loads((folder / "bottleneck.json").read_text())
    settings["config"]["width"] = 5
    (folder / "bottleneck.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"has the shape \(4, 32\): \(5, 32\) is expected"):
        load_bottleneck(folder)
    settings["config"] |= {"width": 4, "placement": "pfeiffer"}
    (folder / "bottleneck.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="does not fit the base: the first tensor in question"):
        load_bottleneck(folder)


def _wine():
    from downriver import tasks

    return tasks.load("wine")
