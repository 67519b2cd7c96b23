"""Checkpoints in LLaDA's own layout: what is read, what is saved again, what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from downriver.core.errors import InputError
from downriver.models import byte_tokenizer, extend_context, load
from downriver.models.masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionLM

MASK = 3
IDS = torch.tensor([[5, 60, 7, MASK, 9, 130]])
CONFIG = {  # the entries of LLaDA-8B's configuration that tell what is computed
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "block_type": "llama", "layer_norm_type": "rms",
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "activation_type": "silu", "rope": True, "alibi": False, "include_bias": False, "include_qkv_bias": False,
    "input_emb_norm": False, "attention_layer_norm": False, "scale_logits": False, "n_layers": 2, "n_heads": 4,
    "d_model": 32, "n_kv_heads": 2, "mlp_ratio": 4, "mlp_hidden_size": 64, "vocab_size": 258, "embedding_size": 260,
    "max_sequence_length": 64, "rms_norm_eps": 1e-3, "rope_theta": 500000.0, "weight_tying": False,
    "mask_token_id": MASK, "eos_token_id": 2, "pad_token_id": 2, "multi_query_attention": None,
}  # fmt: skip
BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "self_attn.o_proj": "attn_out",
    "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
    "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MaskedDiffusionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=260, mask_token_id=MASK, rms_norm_eps=1e-3, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    return MaskedDiffusionLM(config).eval()


def write(folder, model, without=(), **more):
    """The model's weights as LLaDA's authors name and configure them, without some tensors or settings."""
    state = {}
    for key, value in model.state_dict().items():
        name = key.removesuffix(".weight")
        number, _, part = name.removeprefix("model.layers.").partition(".")
        new = f"blocks.{number}.{BLOCK[part]}" if name.startswith("model.layers.") else OUTSIDE[name]
        state[f"model.transformer.{new}.weight"] = value.contiguous()
    state = {name: value for name, value in state.items() if name not in without}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    given = {name: value for name, value in (CONFIG | more).items() if name not in without}
    (folder / "config.json").write_text(json.dumps(given))
    byte_tokenizer(64).save_pretrained(folder)
    return folder


def test_it_loads_as_any_model(model, tmp_path):
    found = load(write(tmp_path / "llada", model))
    assert found.kind == "masked-lm" and isinstance(found.backbone, MaskedDiffusionLM) and found.max_length == 64
    assert torch.equal(found.backbone(IDS).logits, model(IDS).logits)
    assert found.backbone.config.mask_token_id == MASK and found.backbone.config.rms_norm_eps == 1e-3
    assert found.processor("ab")["input_ids"] == [1, 68, 69, 2]
    assert load(tmp_path / "llada", dtype="bfloat16").backbone.dtype == torch.bfloat16
    assert extend_context(found, 256, train_len=64) > 1 and found.max_length == 256


def test_what_is_saved_is_a_masked_diffusion_model(model, tmp_path):
    found = load(write(tmp_path / "llada", model))
    extend_context(found, 256)
    found.save(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.kind == "masked-lm" and again.max_length == 256
    assert torch.equal(again.backbone(IDS).logits, found.backbone(IDS).logits)
    found.backbone.save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(plain(IDS).logits, found.backbone(IDS).logits)
    found.processor.save_pretrained(tmp_path / "plain")
    assert load(tmp_path / "plain").kind == "masked-lm"


def test_tied_weights_and_a_width_from_the_ratio(model, tmp_path):
    model.lm_head.weight.data = model.model.embed_tokens.weight.data
    outside = ("model.transformer.ff_out.weight", "mlp_hidden_size")
    found = load(write(tmp_path, model, outside, weight_tying=True, mlp_ratio=2))
    assert torch.equal(found.backbone(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("more", "without", "message"),
    [
        ({"layer_norm_type": "default"}, (), "layer_norm_type is 'default', and 'rms' is expected"),
        ({}, ("block_type",), "block_type is None, and 'llama' is expected"),
        ({"include_qkv_bias": True}, (), "include_qkv_bias is set"),
        ({}, ("rope_theta",), "lacks 'rope_theta'"),
        ({"n_layers": "two"}, (), "cannot be loaded: .*num_hidden_layers"),
        ({"d_model": 64}, (), r"has the shape \(\d+, 32\).*64"),
        ({}, ("model.transformer.blocks.1.up_proj.weight",), "first 'model.layers.1.mlp.up_proj.weight'"),
    ],
)
def test_what_is_refused(more, without, message, model, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, model, without, **more))
