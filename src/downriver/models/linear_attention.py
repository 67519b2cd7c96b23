"""Linear attention inside a loaded transformer: what replaces softmax, its constant-size cache, and its restoration.

Reach for ``compress.hedgehog``, which trains the feature maps. Queries and keys are taken where transformers hands them
to its attention function, after projections, norms and RoPE: any family that uses that interface works, without a list
of architectures.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from downriver.core.errors import InputError
from downriver.core.tensors import open_checkpoint
from downriver.models.surgery import attention_blocks
from downriver.nn.linear_attention import (
    FeatureMap,
    State,
    attention_weights,
    linear_attention,
    summed,
    windowed_attention,
    windowed_weights,
)

SETTINGS = "downriver_linear_attention"
"""The entry of a configuration that says which layers were converted, and how."""
INTERFACE = "downriver_linear"
PART = "linear_attention"
"""The name of the part that a converted attention block gets."""
Watch = Callable[["Seen"], None]


class Seen:
    """What one attention block did with one batch, softmax (teacher) and linear attention (student) side by side.

    ``teacher``, ``student``: weights (batch, heads, queries, keys); ``teacher_output``, ``student_output`` (batch,
    heads, queries, d); ``products`` qᵀk of the softmax, scaled; ``seen`` (batch or 1, 1, queries, keys); ``real``
    (batch, queries): queries that are no padding.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, part: "LinearAttention") -> None:
        own = k.shape[-2] - q.shape[-2]
        self.seen, self.real = seen, seen.diagonal(own, -2, -1)[:, 0]
        with torch.no_grad():
            self.products = (q.float() @ k.float().mT) * scale
            self.teacher = self.products.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            self.teacher_output = self.teacher @ v.float()
        features = part.query(q), part.keys(k)
        if part.window:
            own_weights: dict[str, Any] = {"window": part.window, "factor": part.factor(), "eps": part.eps}
            self.student = windowed_weights(*features, self.products, seen, **own_weights)
        else:
            self.student = attention_weights(*features, seen, part.eps)
        self.student_output = self.student @ v.float()


class LinearAttention(nn.Module):
    """The part that a converted attention block gets: a feature map of the queries and one of the keys.

    ``watch``: while it is set, softmax stays in charge of the block's output, and the function is told what both
    would do (``Seen``); that is how maps are trained on a model's true inputs, all layers at once.
    """

    watch: Watch | None = None

    def __init__(
        self,
        kind: str,
        heads: int,
        key_heads: int,
        dim: int,
        *,
        chunk: int = 64,
        eps: float = 1e-12,
        length: int = 2048,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.query, self.key = FeatureMap(kind, heads, dim, length), FeatureMap(kind, key_heads, dim, length)
        self.groups, self.chunk, self.eps, self.window = heads // key_heads, chunk, eps, window
        self.cache: LinearCacheLayer | None = None
        if window:
            with torch.no_grad():  # γ starts where a key of zeros counts the same within the window and beyond
                nothing = self.query(torch.zeros(1, heads, 1, dim)).square().sum(-1, keepdim=True)[0]
            self.log_factor = nn.Parameter(torch.where(nothing > 0, nothing, 1.0).log())

    def factor(self) -> Tensor:
        """γ (heads, 1, 1)."""
        return self.log_factor.float().exp()

    def keys(self, k: Tensor, offset: int = 0) -> Tensor:
        """Features of keys that were repeated for grouped queries already, each by its own key head's map."""
        plain = k[:, :: self.groups]
        return self.key(plain, offset).repeat_interleave(self.groups, 1)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, causal: bool, scale: float | None = None
    ) -> Tensor:
        """y (batch, heads, queries, d) from queries, keys and values (batch, heads, length, d); ``padding`` (batch,
        keys): True for real tokens; ``scale`` of qᵀk in the window, 1/√d by default. Keys before the first query, as an
        ordinary cache gives them, are seen by all."""
        cache = self.cache
        if cache is not None and cache.recent is not None:
            k, v = (
                torch.cat([old.repeat_interleave(self.groups, 1), new], 2)
                for old, new in zip(cache.recent, (k, v), strict=True)
            )
        earlier = k.shape[-2] - q.shape[-2] if causal else 0
        start = cache.seen - k.shape[-2] if cache is not None else 0
        features_q, features_k = self.query(q, start + earlier), self.keys(k, start)
        if padding is not None:
            padding = padding[:, -k.shape[-2] :].bool()
            features_k = features_k * padding[:, None, :, None]
        state = cache.state if cache is not None else None
        settings: dict[str, Any] = {"chunk": self.chunk, "eps": self.eps}
        if self.window:
            if not causal:
                raise InputError("a softmax window beside linear attention is for causal attention")
            settings |= {"window": self.window, "factor": self.factor(), "real": padding}
            settings["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
            y, state = windowed_attention(q, k, v, features_q, features_k, state=state, **settings)
        else:
            if earlier:
                state = summed(features_k[:, :, :earlier], v[:, :, :earlier], state)
            new_k, new_v = features_k[:, :, earlier:], v[:, :, earlier:]
            y, state = linear_attention(features_q, new_k, new_v, causal=causal, state=state, **settings)
        if cache is not None:
            cache.state = state
            if self.window:
                cache.recent = (
                    k[:, :: self.groups, -self.window :].clone(),
                    v[:, :: self.groups, -self.window :].clone(),
                )
        return y.to(v.dtype)


def convert(
    model: nn.Module,
    feature_map: str,
    *,
    layers: Literal["all"] | Sequence[int] = "all",
    chunk: int = 64,
    eps: float = 1e-12,
    keep_softmax_window: int = 0,
) -> None:
    """Put linear attention into a transformers model, in place, and write it into its configuration.

    With ``keep_softmax_window`` each query's last so many keys keep softmax's weights (``nn.windowed_attention``).

    ``models.load`` restores it from there; plain transformers ignores the entry and loads softmax attention with the
    other weights as they are.

    Raises ``InputError``, before anything is changed, for models that do not use transformers' attention interface,
    encoder–decoders, sliding windows, capped or sunk logits, layers that do not exist, and a softmax window in a model
    that is not causal; when it runs, where ``output_attentions`` is asked for.
    """
    blocks = _convertible(model)
    chosen = list(range(len(blocks))) if layers == "all" else [int(layer) for layer in layers]
    if not chosen or not all(0 <= layer < len(blocks) for layer in chosen) or len(set(chosen)) < len(chosen):
        raise InputError(f"layers is {layers!r}: different numbers from 0 to {len(blocks) - 1} are expected")
    if chunk < 1:
        raise InputError(f"chunk is {chunk}: at least 1 is expected")
    if keep_softmax_window < 0:
        raise InputError(f"keep_softmax_window is {keep_softmax_window}: a number of keys, 0 for none, is expected")
    if keep_softmax_window and not all(block.is_causal for _, block in blocks):
        raise InputError(f"keep_softmax_window: a {type(model).__name__} looks both ways, a causal model is expected")
    if any(hasattr(block, PART) for _, block in blocks):
        raise InputError("the model has linear attention already: convert the original")
    config: Any = model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    length = getattr(config, "max_position_embeddings", None) or 2048
    for layer in chosen:
        _, block = blocks[layer]
        dim = next(
            (
                int(getattr(block, name))
                for name in ("head_dim", "attention_head_size", "head_size")
                if hasattr(block, name)
            ),
            config.hidden_size // heads,
        )
        part = LinearAttention(
            feature_map, heads, key_heads, dim, chunk=chunk, eps=eps, length=length, window=keep_softmax_window
        )
        block.add_module(PART, part.to(next(block.parameters()).device).train(block.training))
        block.register_forward_pre_hook(_find_cache, with_kwargs=True)
    settings = {"feature_map": feature_map, "layers": chosen, "chunk": chunk, "eps": eps}
    setattr(config, SETTINGS, settings | {"keep_softmax_window": keep_softmax_window})
    model.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
    model.set_attn_implementation(INTERFACE)  # type: ignore[operator]


def restore_linear_attention(model: nn.Module, folder: str | Path) -> None:
    """Convert a model loaded from a folder as its configuration says, and read the feature maps from there."""
    settings = getattr(getattr(model, "config", None), SETTINGS, None)
    if not settings:
        return
    convert(model, **settings)
    weights = open_checkpoint(folder)
    stored = {name.split(".", 1)[-1]: name for name in weights.names()} | {name: name for name in weights.names()}
    own = {name: tensor for name, tensor in model.state_dict().items() if f".{PART}." in name}
    for name, tensor in own.items():
        source = stored.get(name) or stored.get(name.split(".", 1)[-1])  # with or without the prefix of a head's model
        if source is None or tuple(weights.shape(source)) != tuple(tensor.shape):
            found = "nothing" if source is None else tuple(weights.shape(source))
            raise InputError(
                f"{folder}: tensor {name!r} of linear attention: {tuple(tensor.shape)} expected, {found} found"
            )
        tensor.copy_(weights.read(source))


def parts(model: nn.Module) -> list[tuple[str, LinearAttention]]:
    """The converted blocks: the name of each, and its part."""
    return [(name, getattr(block, PART)) for name, block in attention_blocks(model) if hasattr(block, PART)]


class LinearCacheLayer(CacheLayerMixin):
    """One layer's state in place of its keys and values, and the last keys and values of a softmax window: its size
    does not grow with the length."""

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.recent: tuple[Tensor, Tensor] | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is set aside before the first state."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new keys and hands them on: the attention adds them to the state."""
        self.is_initialized = True
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask covers everything so far."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """As new."""
        self.state, self.recent, self.seen = None, None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams."""
        if self.state is not None:
            self.state = State(*(x.index_select(0, beam_idx.to(x.device)) for x in self.state))
        if self.recent is not None:
            k, v = (x.index_select(0, beam_idx.to(x.device)) for x in self.recent)
            self.recent = k, v


class LinearCache(Cache):
    """A cache for ``generate`` whose converted layers keep one state of constant size; others keep keys and values.

    >>> from downriver.models import small
    >>> lm = small("causal-lm", "nano").backbone.eval()
    >>> convert(lm, "hedgehog")
    >>> lm.generate(torch.tensor([[1, 2, 3]]), past_key_values=LinearCache(lm), max_new_tokens=2).shape
    torch.Size([1, 5])
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = attention_blocks(model)
        if not any(hasattr(block, PART) for _, block in blocks):
            raise InputError(f"a {type(model).__name__} without linear attention: convert it first (compress.hedgehog)")
        super().__init__(layers=[LinearCacheLayer() if hasattr(b, PART) else DynamicLayer() for _, b in blocks])


def _convertible(model: nn.Module) -> list[tuple[str, nn.Module]]:
    what, config = type(model).__name__, getattr(model, "config", None)
    if hasattr(model, "merge_and_unload"):
        raise InputError("the model has adapters: merge them first (adapt.merge_adapter)")
    if getattr(config, "alibi", False) or getattr(config, "model_type", None) in ("bloom", "mpt"):
        raise InputError(f"a {what} adds ALiBi's biases to its attention: plain softmax attention is expected")
    if not hasattr(model, "set_attn_implementation") or config is None or not model._can_set_attn_implementation():  # type: ignore[operator]
        raise InputError(
            f"a {what} does not use transformers' attention interface: Llama, GPT-2, BERT and their like do"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"a {what} is an encoder–decoder: a model of one stack is expected")
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None)):
        window = getattr(config, "sliding_window", None)
        raise InputError(
            f"a {what} attends through a sliding window (sliding_window: {window}): full attention is expected"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise InputError(f"a {what} caps its attention logits: plain softmax attention is expected")
    blocks = attention_blocks(model)
    if not blocks:
        raise InputError(f"a {what} has no attention blocks")
    if hasattr(blocks[0][1], "sinks"):
        raise InputError(f"a {what} has attention sinks: plain softmax attention is expected")
    return blocks


def _refuse_weights(model: Any, arguments: Any, named: dict[str, Any]) -> None:
    if named.get("output_attentions", getattr(model.config, "output_attentions", False)):
        raise InputError(
            f"output_attentions: linear attention makes no weights, so a converted {type(model).__name__} has none "
            "(compress.attention_fidelity writes them out)"
        )


def _find_cache(block: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
    """Before a block runs: give its part the state that the caller's cache keeps for it."""
    cache = named.get("past_key_values")
    layer = cache.layers[block.layer_idx] if isinstance(cache, LinearCache) else None  # type: ignore[index]
    getattr(block, PART).cache = layer if isinstance(layer, LinearCacheLayer) else None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of softmax attention: (batch, heads, length, d) to (batch, length, heads, d)."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise InputError("linear attention takes masks of padding, (batch, length), and none of four dimensions")
    if kwargs.get("position_bias") is not None:
        raise InputError("linear attention has no place for a position bias")
    causal = bool(module.is_causal if is_causal is None else is_causal)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    part: LinearAttention | None = getattr(module, PART, None)
    if part is not None and part.watch is None:
        return part(query, key, value, attention_mask, causal, scaling).transpose(1, 2), None
    seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    seen = (seen.tril(key.shape[-2] - query.shape[-2]) if causal else seen)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, -key.shape[-2] :].bool()
    if part is not None and part.watch is not None:
        found = Seen(query, key, value, seen, query.shape[-1] ** -0.5 if scaling is None else scaling, part)
        part.watch(found)
        return found.teacher_output.to(value.dtype).transpose(1, 2), None
    visible = seen | ~seen.any(-1, keepdim=True)  # a row of padding sees something, or it would not be a number
    y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    return y.transpose(1, 2), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """(batch, keys): which tokens are real, or None where all are."""
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    return None if bool(mask.all()) else mask


AttentionInterface.register(INTERFACE, _attention)
AttentionMaskInterface.register(INTERFACE, _mask)
