"""The public LLaDA checkpoints as a ``MaskedDiffusionLM``: other names for the same settings and tensors.

Reach for ``models.load("GSAI-ML/LLaDA-8B-Base")``, which asks here; the same for LLaDA-8B-Instruct, LLaDA-1.5 and any
folder in their layout. No code from the hub is run. Nie et al., "Large Language Diffusion Models" (2025).
"""

import json
from pathlib import Path

from downriver.core.errors import InputError
from downriver.models.masked_diffusion import MaskedDiffusionConfig

PLAIN = {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True}
ABSENT = ("include_bias", "include_qkv_bias", "alibi", "scale_logits", "input_emb_norm", "attention_layer_norm")


def llada_layout(folder: Path) -> tuple[MaskedDiffusionConfig, dict[str, str]] | None:
    """LLaDA's configuration in Llama's words, and patterns that give its tensors Llama's names.

    None for a folder whose ``config.json`` is not of LLaDA. Raises ``InputError`` for a model with parts that LLaDA's
    do not have, and for a setting that is missing.
    """
    file = folder / "config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # for transformers to tell
    if not isinstance(given, dict) or given.get("model_type") != "llada":
        return None
    for name, value in PLAIN.items():
        if given.get(name) != value:
            raise InputError(f"{file}: {name} is {given.get(name)!r}, and {value!r} is expected")
    for name in ABSENT:
        if given.get(name):
            raise InputError(f"{file}: {name} is set, which LLaDA's models do not have")
    try:
        config = MaskedDiffusionConfig(
            vocab_size=given.get("embedding_size") or given["vocab_size"],
            hidden_size=given["d_model"],
            intermediate_size=given.get("mlp_hidden_size") or given["mlp_ratio"] * given["d_model"],
            num_hidden_layers=given["n_layers"],
            num_attention_heads=given["n_heads"],
            num_key_value_heads=given.get("n_kv_heads") or given["n_heads"],
            max_position_embeddings=given["max_sequence_length"],
            rms_norm_eps=given["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": float(given["rope_theta"])},
            tie_word_embeddings=bool(given["weight_tying"]),
            mask_token_id=given["mask_token_id"],
            pad_token_id=given.get("pad_token_id"),
            bos_token_id=given.get("bos_token_id"),
            eos_token_id=given.get("eos_token_id"),
        )
    except KeyError as missing:
        raise InputError(f"{file} lacks {missing}, which LLaDA's configurations have") from None
    parts = {
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    } | {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    names = {rf"^model\.transformer\.blocks\.(\d+)\.{old}\.": rf"model.layers.\1.{new}." for old, new in parts.items()}
    names |= {
        r"^model\.transformer\.wte\.": "model.embed_tokens.",
        r"^model\.transformer\.ln_f\.": "model.norm.",
        r"^model\.transformer\.ff_out\.": "lm_head.",
    }
    return config, names
