"""Where every tensor of a mixture comes from: the dense models' tensors, stacked or side by side, or shared ones.

Reach for ``bam``; this is its plan. Nothing is read before it is written, and what is read is one projection of one
model at a time, or a block of another tensor.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from downriver.core.errors import InputError, unknown
from downriver.merge.stores import Store
from downriver.models.mixture import MixtureConfig

FAMILIES = ("cohere", "llama", "mistral", "qwen2", "qwen3")
"""Architectures (``model_type``) that can be upcycled."""
_TAKEN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
_SAME = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rope_parameters",
    "tie_word_embeddings",
    "sliding_window",
    "rms_norm_eps",
    "layer_norm_eps",
    "logit_scale",
)
_BLOCK = 1 << 22  # elements
_IGNORED = "rotary_emb.inv_freq"

Block = tuple[int, Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of the mixture; ``blocks`` gives where in the flattened tensor each piece begins, and the piece."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Block]]


def mixture_config(dense: Any, base: Store, **settings: Any) -> MixtureConfig:
    """The configuration of a mixture of models like ``dense``, whose tensors ``base`` has.

    Raises ``InputError`` for a family that is not known, and for parts that a mixture does not have: biases in the
    feed-forward blocks, norms of whole heads (Cohere), windows in some layers only.
    """
    if dense.model_type not in FAMILIES:
        raise unknown("family to upcycle", dense.model_type, FAMILIES)
    names, layer = set(base.names()), "model.layers.0"
    for needed in ("model.embed_tokens.weight", f"{layer}.self_attn.q_proj.weight", f"{layer}.mlp.gate_proj.weight"):
        if needed not in names:
            raise InputError(f"{base.label} has no tensor {needed!r}: a whole causal language model is expected")
    if f"{layer}.mlp.gate_proj.bias" in names:
        raise InputError(f"{base.label}: {layer}.mlp.gate_proj.bias: feed-forward blocks without biases are expected")
    cohere = dense.model_type == "cohere"
    if cohere and f"{layer}.self_attn.q_norm.weight" in names:
        raise InputError(f"{base.label}: norms of whole heads (use_qk_norm) cannot be upcycled")
    if dense.model_type != "mistral" and "sliding_attention" in (getattr(dense, "layer_types", None) or ()):
        raise InputError(f"{base.label}: sliding windows in some layers only cannot be upcycled")
    return MixtureConfig(
        **{name: getattr(dense, name) for name in _TAKEN},
        head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        rms_norm_eps=dense.layer_norm_eps if cohere else dense.rms_norm_eps,
        norm="layer" if cohere else "rms",
        sliding_window=dense.sliding_window if dense.model_type == "mistral" else None,
        attention_bias=f"{layer}.self_attn.q_proj.bias" in names,
        output_bias=f"{layer}.self_attn.o_proj.bias" in names,
        qk_norm=f"{layer}.self_attn.q_norm.weight" in names,
        architectures=["MixtureForCausalLM"],
        **settings,
    )


def check_alike(base: Store, models: Sequence[Store], configs: Sequence[Any]) -> None:
    """Raise ``InputError`` listing every tensor that a model lacks, has too many or has in another shape than the base,
    or naming the entry of its configuration that differs."""

    def shapes(store: Store) -> dict[str, tuple[int, ...]]:
        return {n: store.shape(n) for n in store.names() if not n.endswith(_IGNORED) and n not in store.tied}

    mine = shapes(base)
    for model, config in zip(models, configs[1:], strict=True):
        for name in _SAME:
            left, right = (getattr(c, name, None) for c in (configs[0], config))
            if left != right:
                raise InputError(f"{model.label}: {name} is {right!r}, and {left!r} in the base {base.label}")
        its = shapes(model)
        wrong = [
            f"{n} {mine.get(n, 'not there')} / {its.get(n, 'not there')}"
            for n in sorted(mine.keys() | its.keys())
            if mine.get(n) != its.get(n)
        ]
        if wrong:
            listed = "; ".join(wrong[:20]) + (f" and {len(wrong) - 20} more" if len(wrong) > 20 else "")
            raise InputError(f"{model.label} has other tensors than the base {base.label} (base / model): {listed}")


def entries(
    config: MixtureConfig,
    dense: Any,
    experts: Sequence[Store],
    *,
    shared: Store,
    ffn: Sequence[Store],
    router: Callable[[int, str], Tensor],
) -> list[Entry]:
    """Every tensor of the mixture.

    ``experts`` give the attentions that are per expert, ``ffn`` the feed-forward experts, ``shared`` all else that is
    of dense models, ``router(layer, "mlp" | "self_attn")`` the rows (N, d) of a router.
    """
    n, d, f = config.num_experts, config.hidden_size, config.intermediate_size
    heads, keys, h = config.num_attention_heads, config.num_key_value_heads, cast(int, config.head_dim)
    cohere = dense.model_type == "cohere"
    runs = keys if config.attention == "kv_shared" else 1  # of heads that stay together: see MixtureAttention
    queries = [shared] if config.attention == "average" else experts
    key_values = experts if config.attention == "experts" else [shared]
    found: list[Entry] = []

    def add(name: str, shape: tuple[int, ...], blocks: Callable[[], Iterator[Block]]) -> None:
        found.append(Entry(name, shape, blocks))

    def plain(name: str, source: str | None = None, scale: float = 1.0) -> None:
        source = source or name
        add(name, shared.shape(source), partial(copied, shared, source, scale=scale))

    def attention(layer: str) -> None:
        for part, stores, count in (("q", queries, heads), ("k", key_values, keys), ("v", key_values, keys)):
            name = f"{layer}.self_attn.{part}_proj"
            split = runs if part == "q" else 1
            turned = cohere and part != "v"  # interleaved pairs of rotary dimensions become halves
            rows = len(stores) * count * h
            add(f"{name}.weight", (rows, d), partial(by_heads, stores, f"{name}.weight", split, count, h, d, turned))
            if config.attention_bias:
                add(f"{name}.bias", (rows,), partial(by_heads, stores, f"{name}.bias", split, count, h, 1, turned))
            if config.qk_norm and part != "v":
                norm = f"{layer}.self_attn.{part}_norm.weight"
                add(norm, (len(stores), h), partial(stacked, stores, [norm]))
        name = f"{layer}.self_attn.o_proj"
        rows = len(queries) * heads * h
        add(name, (rows, d), partial(by_heads, queries, f"{name}.weight", runs, heads, h, d, transposed=True))
        if config.output_bias:
            add(f"{layer}.self_attn.o_bias", (len(queries), d), partial(stacked, queries, [f"{name}.bias"]))
        if config.attention != "average":
            add(f"{layer}.self_attn.router", (n, d), partial(routing, layer, "self_attn"))

    def routing(layer: str, part: str) -> Iterator[Block]:
        yield 0, router(int(layer.rpartition(".")[2]), part).flatten()

    plain("model.embed_tokens.weight")
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        attention(layer)
        gate_up = [f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"]
        add(f"{layer}.mlp.gate_up", (n, 2 * f, d), partial(stacked, ffn, gate_up))
        add(f"{layer}.mlp.down", (n, d, f), partial(stacked, ffn, [f"{layer}.mlp.down_proj.weight"]))
        add(f"{layer}.mlp.router", (n, d), partial(routing, layer, "mlp"))
        plain(f"{layer}.input_layernorm.weight")
        second = f"{layer}.post_attention_layernorm.weight"
        plain(second, f"{layer}.input_layernorm.weight" if cohere else second)
    plain("model.norm.weight", scale=dense.logit_scale if cohere else 1.0)
    if not config.tie_word_embeddings:
        plain("lm_head.weight")
    return found


def copied(store: Store, name: str, start: int = 0, scale: float = 1.0) -> Iterator[Block]:
    """A whole tensor in blocks, to stand at ``start``."""
    size = math.prod(store.shape(name))
    for begin in range(0, size, _BLOCK):
        values = store.read(name, begin, min(size, begin + _BLOCK))
        yield start + begin, values if scale == 1.0 else values * scale


def stacked(stores: Sequence[Store], names: Sequence[str]) -> Iterator[Block]:
    """The tensors of the first model one after the other, then those of the second."""
    start = 0
    for store in stores:
        for name in names:
            yield from copied(store, name, start)
            start += math.prod(store.shape(name))


def by_heads(
    stores: Sequence[Store],
    name: str,
    runs: int,
    heads: int,
    h: int,
    width: int,
    turned: bool = False,
    transposed: bool = False,
) -> Iterator[Block]:
    """Rows (heads · h, width) of several models, in ``runs`` of heads: run 0 of every model, then run 1 of every model.

    ``turned`` puts the even rows of a head before the odd ones; ``transposed`` is for W_o, kept as (width, heads · h).
    """
    size = heads // runs * h * width
    for n, store in enumerate(stores):
        rows = store.read(name, 0, heads * h * width)
        if transposed:
            rows = rows.view(width, heads * h).T.contiguous().flatten()
        if turned:
            rows = rows.view(heads, h // 2, 2, width).transpose(1, 2).contiguous().flatten()
        for run in range(runs):
            yield (run * len(stores) + n) * size, rows[run * size : (run + 1) * size]
