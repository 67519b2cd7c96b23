"""Read the public LLaDA checkpoints as a ``MaskedDiffusionLM``: other names for the same tensors.

Reach for it to measure or extend LLaDA-8B-Base, LLaDA-8B-Instruct or LLaDA-1.5 without running code from the hub.
Nie et al., "Large Language Diffusion Models" (2025).
"""

import json
import os
from pathlib import Path
from typing import Any, cast

from downriver.core.errors import InputError
from downriver.models.masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionLM


def load_llada(folder: str | os.PathLike[str], **settings: Any) -> MaskedDiffusionLM:
    """A model from a local folder in LLaDA's own layout: safetensors and ``config.json``.

    ``settings`` go to ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``). The folder's tokenizer
    loads with ``AutoTokenizer``. ``save_pretrained`` writes the model in downriver's own layout.

    Raises ``InputError`` for another model, one with parts that LLaDA does not have, and tensors that are missing or of
    another shape.
    """
    folder = Path(folder)
    config, names = _settings(folder)
    options: Any = {"config": config, "key_mapping": names, "output_loading_info": True, **settings}
    loaded: Any = MaskedDiffusionLM.from_pretrained(folder, **options)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys"):
        if info[kind]:
            what = f"{len(info[kind])} {kind.replace('_', ' ')}, first {sorted(info[kind])[0]!r}"
            raise InputError(f"{folder} is no LLaDA checkpoint: {what}")
    vars(model).pop("_weight_conversions", None)  # else save_pretrained would write LLaDA's names again
    return cast(MaskedDiffusionLM, model)


def _settings(folder: Path) -> tuple[MaskedDiffusionConfig, dict[str, str]]:
    """LLaDA's configuration in Llama's words, and Llama's names for its tensors, by patterns."""
    file = folder / "config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: the configuration of LLaDA is expected ({error})") from None
    if given.get("model_type") != "llada":
        raise InputError(f"{file} is of a {given.get('model_type')} model: llada is expected")
    plain = {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True}
    for name, value in plain.items():
        if given.get(name, value) != value:
            raise InputError(f"{file}: {name} is {given[name]!r}, and {value!r} is expected")
    for name in ("include_bias", "include_qkv_bias", "alibi", "scale_logits", "input_emb_norm", "attention_layer_norm"):
        if given.get(name):
            raise InputError(f"{file}: {name} is set, which LLaDA's models do not have")
    config = MaskedDiffusionConfig(
        vocab_size=given.get("embedding_size") or given["vocab_size"],
        hidden_size=given["d_model"],
        intermediate_size=given.get("mlp_hidden_size") or given["mlp_ratio"] * given["d_model"],
        num_hidden_layers=given["n_layers"],
        num_attention_heads=given["n_heads"],
        num_key_value_heads=given.get("n_kv_heads") or given["n_heads"],
        max_position_embeddings=given["max_sequence_length"],
        rms_norm_eps=given.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": float(given.get("rope_theta", 10_000.0))},
        tie_word_embeddings=bool(given.get("weight_tying", False)),
        mask_token_id=given.get("mask_token_id", 126336),
        pad_token_id=given.get("pad_token_id"),
        bos_token_id=given.get("bos_token_id"),
        eos_token_id=given.get("eos_token_id"),
    )
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
