"""A mixture with one attention as transformers' own Mixtral or Qwen3-MoE, weight for weight.

Reach for it to serve what ``merge.bam(..., attention="average")`` made (or trained) by anything that knows these two:
vLLM, llama.cpp, transformers without downriver. Mixtures of several attentions have no such form.
"""

from typing import Any

import torch
import transformers
from torch import Tensor

from downriver.core.errors import InputError
from downriver.models.mixture import MixtureForCausalLM
from downriver.models.model import Model

_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "router_aux_loss_coef",
)


def export_mixture(model: Any) -> Any:
    """A copy as ``MixtralForCausalLM``, or as ``Qwen3MoeForCausalLM`` where queries and keys are normed.

    A ``Model`` gives a ``Model`` (whose ``save`` writes the tokenizer too), a ``MixtureForCausalLM`` the bare
    transformers model. Logits are the same; in training, transformers counts the balance of all layers together.

    A z-loss of the routers is left out, which changes training only. Raises ``InputError`` naming what has no such
    form: several attentions, a parallel block, layer norms, biases where these two have none.

    >>> from downriver.models.mixture import MixtureConfig
    >>> config = MixtureConfig(vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, num_experts=3, attention="average", eos_token_id=None)
    >>> mixture, ids = MixtureForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    >>> torch.allclose(export_mixture(mixture).eval()(ids).logits, mixture(ids).logits, atol=1e-6)
    True
    """
    if isinstance(model, Model):
        settings: Any = {"pooling": model.pooling, "max_length": model.max_length, "source": model.source}
        return Model(export_mixture(model.backbone), kind="causal-lm", processor=model.processor, **settings)
    if not isinstance(model, MixtureForCausalLM):
        raise InputError(f"a {type(model).__name__} is no mixture: what merge.bam gives is expected")
    config = model.config
    wrong = {
        f'attention={config.attention!r} (build it with attention="average")': config.attention != "average",
        "a parallel block": config.parallel,
        "layer norms": config.norm != "rms",
        "biases of queries, keys and values": config.attention_bias and not (config.qk_norm and config.output_bias),
        "a bias of the attention's output": config.output_bias and not (config.qk_norm and config.attention_bias),
    }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise InputError(f"the mixture has {' and '.join(found)}: Mixtral and Qwen3-MoE have no such form")
    taken: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    taken |= {"num_experts_per_tok": config.ffn_top_k}
    if config.qk_norm:
        own: Any = {"num_experts": config.num_experts, "moe_intermediate_size": config.intermediate_size}
        own |= {"norm_topk_prob": True, "attention_bias": config.attention_bias, "mlp_only_layers": []}
        own |= {"use_sliding_window": config.sliding_window is not None, "decoder_sparse_step": 1}
        target: Any = transformers.Qwen3MoeConfig(**taken, **own)
    else:
        own = {"num_local_experts": config.num_experts, "intermediate_size": config.intermediate_size}
        target = transformers.MixtralConfig(**taken, **own)
    kind: Any = transformers.Qwen3MoeForCausalLM if config.qk_norm else transformers.MixtralForCausalLM
    with torch.random.fork_rng(devices=[]):
        exported: Any = kind(target).to(model.dtype)
    exported.load_state_dict(_renamed(model))
    exported.generation_config = model.generation_config
    return exported.to(model.device).train(model.training)


def _renamed(model: MixtureForCausalLM) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("o_proj"):
            name, value = f"{name}.weight", value.T
        elif name.endswith("o_bias"):
            name, value = name.replace("o_bias", "o_proj.bias"), value[0]
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value = value[0]
        for ours, theirs in (
            ("router", "gate.weight"),
            ("gate_up", "experts.gate_up_proj"),
            ("down", "experts.down_proj"),
        ):
            if name.endswith(f".mlp.{ours}"):
                name = name.removesuffix(ours) + theirs
        state[name] = value
    return state
