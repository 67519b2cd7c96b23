"""Rotary positions: the published scales, families of models, what is kept on disk, and what is refused."""

import copy
import math

import pytest
import torch
import transformers

from downriver.core.errors import InputError
from downriver.models import load, small
from downriver.models.rope import RECORD, critical_dim, extend_context, ntk_scale
from downriver.models.surgery import layer_stack

SMALL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 99}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}
LENGTH = {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def built(family, **more):
    config = getattr(transformers, f"{family}Config")(**SMALL, **LENGTH, **more)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("base", "trained", "dims", "figures"),
    [
        (500_000, 4096, 64, {8: (3.4, 4), 16: (13.6, 14), 24: (30.6, 31), 32: (54.4, 55)}),  # LLaDA-8B
        (500_000, 8192, 70, {16: (3.5, 4), 32: (12.5, 13)}),  # Llama-3-8B
        (1_000_000, 2048, 54, {4: (4.7, 5)}),  # Dream-7B
    ],
)
def test_the_published_scales(base, trained, dims, figures):
    assert critical_dim(base, 128, trained) == dims
    for thousands, (exact, whole) in figures.items():
        assert round(ntk_scale(base, 128, trained, 1024 * thousands, round=False), 1) == exact
        assert ntk_scale(base, 128, trained, 1024 * thousands) == whole


def test_the_critical_dimensions_period_fits_the_target():
    """The last dimension that went through a period in training does so at the target length with the new base."""
    base, dims, trained, target = 500_000, 128, 4096, 16384
    d_c = critical_dim(base, dims, trained)

    def period(base):
        return 2 * math.pi * base ** (d_c / dims)

    assert period(base ** (1 - 2 / d_c)) < period(base)
    assert period(base * ntk_scale(base, dims, trained, target, round=False)) == pytest.approx(target)


def test_no_longer_target_needs_no_change():
    for target in (1000, 4096):
        assert ntk_scale(500_000, 128, 4096, target) == ntk_scale(500_000, 128, 4096, target, round=False) == 1.0
    assert (4096 / (2 * math.pi)) ** (128 / 64) / 500_000 <= 1  # the formula itself at T = T_train
    model = built("Llama", rope_theta=500.0)
    before = copy.deepcopy(model.config.to_dict())
    assert extend_context(model, 128) == 1.0
    assert model.config.to_dict() == before


def test_both_ways_doubles_both_lengths():
    assert critical_dim(500_000, 128, 4096, bidirectional=True) == critical_dim(500_000, 128, 8192)
    both = ntk_scale(500_000, 128, 4096, 16384, bidirectional=True, round=False)
    assert both == pytest.approx((32768 / (2 * math.pi)) ** (128 / 70) / 500_000)


def test_frequencies_are_those_of_a_model_built_with_the_new_base():
    model, dims = built("Llama"), 32
    scale = extend_context(model, 512)
    assert scale == ntk_scale(10_000, dims, 128, 512) > 1
    expected = 1 / (10_000 * scale) ** (torch.arange(0, dims, 2).float() / dims)
    rotary = model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, expected)
    assert torch.equal(rotary.original_inv_freq, expected)
    other = built("Llama", rope_parameters={"rope_type": "default", "rope_theta": 10_000 * scale})
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert not torch.equal(built("Llama")(IDS).logits, model(IDS).logits)
    assert model.config.max_position_embeddings == rotary.max_seq_len_cached == 512


@pytest.mark.parametrize(
    ("family", "more", "dims"),
    [
        ("Llama", {}, 32),
        ("Mistral", {}, 32),
        ("Qwen2", {}, 32),
        ("Qwen3", {"head_dim": 16}, 16),
        ("Gemma", {"head_dim": 16}, 16),
        ("Olmo2", {}, 32),
        ("GPTNeoX", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 16),
        ("Phi", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 16),
    ],
)
def test_families(family, more, dims, tmp_path):
    model = built(family, **more)
    base = model.config.rope_parameters["rope_theta"]
    scale = extend_context(model, 512)
    assert scale == ntk_scale(base, dims, 128, 512)
    assert model.config.rope_parameters["rope_theta"] == base * scale
    model.save_pretrained(tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert getattr(again.config, RECORD)["scale"] == scale
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    fresh = type(config)(**SMALL, **LENGTH, **more)
    assert extend_context(fresh, 512) == scale  # from the configuration alone
    assert fresh.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]


def test_sliding_layers_keep_their_positions():
    model = built("Gemma3Text", head_dim=16, layer_types=["sliding_attention", "full_attention"])
    rotary = model.model.rotary_emb
    before = {name: value.clone() for name, value in rotary.named_buffers()}
    scale = extend_context(model, 4096, train_len=256)
    bases = {name: entry["rope_theta"] for name, entry in model.config.rope_parameters.items()}
    assert scale > 1 and bases == {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0 * scale}
    assert torch.equal(rotary.sliding_attention_inv_freq, before["sliding_attention_inv_freq"])
    assert (rotary.full_attention_inv_freq[1:] < before["full_attention_inv_freq"][1:]).all()
    assert model(IDS).logits.shape == (1, 6, 99)


def test_a_second_call_starts_from_the_original():
    once, twice = built("Llama"), built("Llama")
    extend_context(once, 512)
    extend_context(twice, 256)
    assert extend_context(twice, 512) == ntk_scale(10_000, 32, 128, 512)
    assert torch.equal(once(IDS).logits, twice(IDS).logits)
    assert once.config.to_dict() == twice.config.to_dict()
    assert extend_context(twice, 128) == 1.0  # and back again
    assert torch.equal(built("Llama")(IDS).logits, twice(IDS).logits)
    assert twice.config.max_position_embeddings == 128


def test_a_model_of_ours_is_saved_and_loaded(tmp_path):
    model = small("causal-lm", "tiny")
    extend_context(model, 1024)
    assert model.max_length == 1024
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.max_length == 1024
    assert torch.equal(again.backbone(IDS).logits, model.eval().backbone(IDS).logits)


def test_under_an_adapter():
    import peft

    tuned = peft.get_peft_model(built("Llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    extend_context(tuned, 512)
    plain = built("Llama")
    extend_context(plain, 512)
    assert torch.equal(tuned(IDS).logits, plain(IDS).logits)


def test_an_adapter_is_saved_with_the_positions_below_it(tmp_path):
    import peft

    small("causal-lm", "tiny").save(tmp_path / "base")
    model = load(tmp_path / "base")
    extend_context(model, 1024)
    model.backbone = peft.get_peft_model(model.backbone, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    model.save(tmp_path / "tuned")
    again = load(tmp_path / "tuned")
    assert again.max_length == 1024 and torch.equal(again.backbone(IDS).logits, model.backbone(IDS).logits)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_another_scaling_is_dropped_only_when_asked(kind):
    settings = {"rope_type": kind, "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    model = built("Llama", rope_parameters=settings)
    before, logits = copy.deepcopy(model.config.to_dict()), model(IDS).logits
    with pytest.raises(InputError, match=f"scaled already \\({kind}\\): override=True"):
        extend_context(model, 512)
    assert model.config.to_dict() == before and torch.equal(model(IDS).logits, logits)
    scale = extend_context(model, 512, override=True)
    assert scale == ntk_scale(10_000, 32, 64, 512)
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000 * scale}
    assert model.model.rotary_emb.attention_scaling == 1.0
    other = built("Llama", rope_parameters={"rope_type": "default", "rope_theta": 10_000 * scale})
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_given_trained_length_and_a_half_precision_model():
    model = built("Llama").to(torch.bfloat16)
    assert extend_context(model, 512, train_len=64) == ntk_scale(10_000, 32, 64, 512)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # as transformers loads it
    assert model(IDS).logits.dtype == torch.bfloat16 and len(layer_stack(model)[1]) == 2


def test_what_is_refused():
    with pytest.raises(InputError, match="head_dim is 31: an even number"):
        critical_dim(10_000, 31, 128)
    with pytest.raises(InputError, match="rope_theta is 1: a base above 1"):
        critical_dim(1, 32, 128)
    with pytest.raises(InputError, match="train_len is 6: more than one period"):
        critical_dim(10_000, 32, 6)
    with pytest.raises(InputError, match="target_len is 0: at least one token"):
        ntk_scale(10_000, 32, 128, 0)
    with pytest.raises(InputError, match="train_len is 0"):
        extend_context(built("Llama"), 512, train_len=0)
    assert ntk_scale(20, 32, 128, 128) == 1.0  # nothing is asked for
    with pytest.raises(InputError, match=r"critical dimension 34.*nothing to extend"):
        ntk_scale(20, 32, 128, 512)
    with pytest.raises(InputError, match="bert model has no rotary positions"):
        extend_context(small("masked-lm", "nano"), 512)
    with pytest.raises(InputError, match="a dict was given: a transformers model"):
        extend_context({}, 512)
    model = built("Llama", rope_theta=20.0)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(InputError, match="nothing to extend"):
        extend_context(model, 512)
    assert model.config.to_dict() == before
    config = transformers.Gemma3TextConfig(**SMALL, **LENGTH, layer_types=["sliding_attention"] * 2)
    with pytest.raises(InputError, match="no rotary positions beyond sliding windows"):
        extend_context(config, 512)
