"""A causal language model with several dense models inside: soft mixtures of attention, sparse mixtures of FFNs.

Reach for ``merge.bam``, which fills one with the weights of dense models; this is the architecture. ``AutoConfig``
and ``AutoModelForCausalLM`` know it once this module, or anything that makes or loads downriver's models, is imported.
It stands on transformers' Mistral, whose embeddings, rotary positions, masks, cache and ``generate`` it keeps. A single
chosen FFN has the gate 1 whatever its router says; its gradient is that of log p, since the router would learn nothing
from the text otherwise.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import (
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from downriver.nn.moe import (
    Routed,
    Routing,
    gated_experts,
    load_balance_loss,
    report,
    route,
    router_z_loss,
    routing_context,
)

MixedAttention = Literal["experts", "kv_shared", "average"]
Norm = Literal["rms", "layer"]


@strict
class MixtureConfig(transformers.MistralConfig):
    """What a mixture is made of; the entries that it shares with Mistral are those of the dense models.

    Parameters
    ----------
    num_experts
        N: so many FFNs in every layer and, unless ``attention="average"``, so many attentions.
    attention
        ``experts``: N whole attentions, and N times the cache. ``kv_shared``: N query and output projections on one
        set of keys and values. ``average``: one attention.
    ffn_top_k
        How many FFN experts a token uses.
    attn_top_k
        How many attentions a token uses; ``None``: all, weighted (soft). The others' keys and values are computed
        all the same, since later tokens may need them.
    parallel
        h + attention(norm(h)) + FFN(norm'(h)) instead of one after the other.
    norm
        ``rms``, or ``layer`` without bias (Cohere).
    attention_bias, output_bias, qk_norm
        What the dense models' attention has: biases of queries, keys and values, of the output, norms of queries and
        keys.
    router_aux_loss_coef, router_z_loss_coef
        Weights of the load balance of the FFN routers, and of their z-loss, in the training loss.
    expert_names, provenance
        Where the weights are from.
    """

    model_type = "downriver_mixture"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # Mistral's names other parameters

    sliding_window: int | None = None
    num_experts: int = 1
    attention: MixedAttention = "experts"
    ffn_top_k: int = 1
    attn_top_k: int | None = None
    parallel: bool = False
    norm: Norm = "rms"
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    expert_names: list[str] | None = None
    provenance: list[dict[str, Any]] | None = None


class LayerNorm(nn.LayerNorm):
    """Without bias, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), None, self.eps).to(x.dtype)


class HeadRMSNorm(nn.Module):
    """RMS norm of single heads with the weights of their experts; heads lie in ``runs`` of all experts."""

    def __init__(self, experts: int, runs: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(experts, head_dim))
        self.runs, self.eps = runs, eps

    def forward(self, x: Tensor) -> Tensor:
        unit = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)  # (B, heads, T, h)
        parts = unit.unflatten(1, (self.runs, len(self.weight), -1))
        return (parts * self.weight[:, None, None]).flatten(1, 3)


def _norm(config: MixtureConfig) -> Any:
    kind = LayerNorm if config.norm == "layer" else MistralRMSNorm
    return kind(config.hidden_size, config.rms_norm_eps)


class MixtureAttention(nn.Module):
    """y = Σ_n g_n(x) · Attn_n(x) over all experts at once: one attention of N · H heads, whose outputs are scaled by
    the gates before the one output projection.

    Heads lie expert after expert. With shared keys and values they lie by the key head that they read, and within it
    expert after expert, so that each run of heads reads one key head, as grouped attention wants it.
    """

    def __init__(self, config: MixtureConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.experts = 1 if config.attention == "average" else config.num_experts
        self.head_dim = cast(int, config.head_dim)
        heads = self.experts * config.num_attention_heads
        self.key_heads = config.num_key_value_heads * (self.experts if config.attention == "experts" else 1)
        self.num_key_value_groups = heads // self.key_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, h = config.hidden_size, self.head_dim
        self.q_proj = nn.Linear(width, heads * h, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, self.key_heads * h, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, self.key_heads * h, bias=config.attention_bias)
        self.o_proj = nn.Parameter(torch.empty(heads * h, width))  # transposed: an expert is a run of rows
        self.o_bias = nn.Parameter(torch.empty(self.experts, width)) if config.output_bias else None
        self.runs = self.key_heads if config.attention == "kv_shared" else 1
        key_experts = self.experts if config.attention == "experts" else 1
        eps = config.rms_norm_eps
        self.q_norm = HeadRMSNorm(self.experts, self.runs, h, eps) if config.qk_norm else None
        self.k_norm = HeadRMSNorm(key_experts, 1, h, eps) if config.qk_norm else None
        mixed = config.attention != "average"
        self.router = nn.Parameter(torch.empty(config.num_experts, width)) if mixed else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        q, k, v = (
            project(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        o, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )  # (B, T, heads, h)
        gates = None
        if self.router is not None:
            routed = route(F.linear(hidden_states, self.router), self.config.attn_top_k)
            report(f"layers.{self.layer_idx}.self_attn", routed)
            gates = routed.dense().to(o.dtype)  # (B, T, N)
            o = o.reshape(*shape, self.runs, self.experts, -1, self.head_dim) * gates[:, :, None, :, None, None]
        y = o.reshape(*shape, -1) @ self.o_proj
        if self.o_bias is not None:
            y = y + (self.o_bias[0] if gates is None else gates @ self.o_bias)
        return y, weights


class MixtureMLP(nn.Module):
    """N gated FFNs, of which every token uses ``ffn_top_k``."""

    def __init__(self, config: MixtureConfig, layer_idx: int) -> None:
        super().__init__()
        self.top_k, self.layer_idx = config.ffn_top_k, layer_idx
        n, d, f = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up = nn.Parameter(torch.empty(n, 2 * f, d))
        self.down = nn.Parameter(torch.empty(n, d, f))
        self.router = nn.Parameter(torch.empty(n, d))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        routed = route(F.linear(hidden_states, self.router), self.top_k)
        if self.top_k == 1:
            p = routed.logits.softmax(-1).gather(-1, routed.chosen)
            routed = routed._replace(gates=p / p.detach())
        report(f"layers.{self.layer_idx}.mlp", routed)
        flat = Routed(*(part.flatten(0, -2) for part in routed))
        tokens = hidden_states.flatten(0, -2)
        return gated_experts(tokens, self.gate_up, self.down, flat, self.act_fn).view_as(hidden_states)


class MixtureLayer(GradientCheckpointingLayer):
    """One block, sequential or parallel."""

    def __init__(self, config: MixtureConfig, layer_idx: int) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.self_attn = MixtureAttention(config, layer_idx)
        self.mlp = MixtureMLP(config, layer_idx)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        before = hidden_states if self.parallel else attended
        return attended + self.mlp(self.post_attention_layernorm(before))


class MixturePreTrainedModel(MistralPreTrainedModel):
    """How weights start: normal, as transformers starts linear layers."""

    config: MixtureConfig
    config_class = MixtureConfig
    _no_split_modules = ["MixtureLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": MixtureLayer, "attentions": MixtureAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MixtureAttention | MixtureMLP):
            for name, weight in module.named_parameters(recurse=False):
                if name == "o_bias":
                    init.zeros_(weight)
                else:
                    init.normal_(weight, std=self.config.initializer_range)


class MixtureModel(MixturePreTrainedModel, MistralModel):
    """The stack of layers, without the output layer."""

    def __init__(self, config: MixtureConfig) -> None:
        super(MistralModel, self).__init__(config)  # Mistral's own layers are not made
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MixtureLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.rotary_emb = MistralRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


@dataclass
class MixtureOutput(CausalLMOutputWithPast):
    """In training: ``router_loss`` is what routers add to the loss, with its weight; ``loss`` has it already."""

    router_loss: Tensor | None = None


class MixtureForCausalLM(MixturePreTrainedModel, MistralForCausalLM):
    """The language model. In training mode the routers' losses are in its loss.

    >>> config = MixtureConfig(vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, num_experts=3, eos_token_id=None)
    >>> model = MixtureForCausalLM(config)
    >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 5])
    """

    def __init__(self, config: MixtureConfig) -> None:
        super(MistralForCausalLM, self).__init__(config)
        self.model = MixtureModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        with routing_context(mask=mask if mask is not None and mask.dim() == 2 else None) as routing:
            outputs = super().forward(*args, **kwargs | {"return_dict": True})
        extra = self.router_loss(routing)
        loss = None if outputs.loss is None else outputs.loss + extra
        return MixtureOutput(**outputs | {"loss": loss}, router_loss=extra)

    def router_loss(self, routing: Routing) -> Tensor:
        """Load balance and z-loss of the FFN routers with their weights, as means over the layers; the attention's
        soft routers are left to themselves."""
        ffn = {name: routed for name, routed in routing.layers.items() if name.endswith(".mlp")}
        balance, z = self.config.router_aux_loss_coef, self.config.router_z_loss_coef

        def one_layer(routed: Routed) -> Tensor:
            loss = balance * load_balance_loss(routed, routing.mask)
            return loss + z * router_z_loss(routed, routing.mask) if z else loss

        if not self.model.layers[0].mlp.router.requires_grad:
            return torch.stack([one_layer(routed) for routed in ffn.values()]).mean()
        return Routing(layers=ffn).total(one_layer) / len(ffn)


transformers.AutoConfig.register(MixtureConfig.model_type, MixtureConfig, exist_ok=True)
transformers.AutoModel.register(MixtureConfig, MixtureModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(MixtureConfig, MixtureForCausalLM, exist_ok=True)
