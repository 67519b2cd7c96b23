"""Token merging inside a loaded transformer: the hooks that shorten its sequence at one layer, and its restoration.

Reach for ``compress.add_token_merging``. What a batch merges travels with the call, as an argument that layers take off
again, so that threads and gradient checkpointing are safe and nothing is left in the model between two batches.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from downriver.core.errors import InputError
from downriver.core.tensors import open_checkpoint
from downriver.models.surgery import layer_stack
from downriver.nn.token_merge import MergeMap, Mode, Position, TokenMerge

SETTINGS = "downriver_token_merging"
"""The entry of a configuration that says where and how tokens are merged."""
PART = "token_merge"
"""The name of the part that the model of the layers gets."""
ENCODERS = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
ENCODER_DECODERS = ("mt5", "t5")
DECODERS = ("llama",)
_CALL = "downriver_merging"


@dataclass
class _Call:
    """One batch on its way through the layers."""

    map: MergeMap
    pairs: Tensor | None = None  # (batch, T, T): which token sees which, where the attention mask says so
    holder: Any = None
    arguments: dict[str, Any] | None = None  # what the layers above the merge get in place of their own


def merge_tokens(
    model: nn.Module,
    *,
    layer: int = 0,
    mode: Mode = "mean",
    position: Position = "reindex",
    unmerge: bool | None = None,
    groups: dict[str, Any] | None = None,
) -> None:
    """Put token merging into a transformers model, in place, and write it into its configuration.

    The model then takes ``group_ids`` (batch, T) with every batch, and its outputs have a ``merge_map``. See
    ``compress.add_token_merging`` for the arguments; ``groups`` says how group ids are made, and is only kept.

    Raises ``InputError``, before anything is changed, for other families, a layer that does not exist, a second merge.
    """
    holder = _holder(model)
    config: Any = model.config
    _, stack = layer_stack(holder)
    if layer not in range(len(stack)):
        raise InputError(f"layer is {layer!r}: a {type(model).__name__} has the layers 0 to {len(stack) - 1}")
    if hasattr(holder, PART):
        raise InputError("the model merges tokens already: give the original")
    both = config.model_type in ENCODER_DECODERS and hasattr(_top(model), "decoder")
    if both and unmerge:
        raise InputError("unmerge is True: the decoder reads the merged states, an encoder alone is expected")
    part = TokenMerge(config.hidden_size, layer=layer, mode=mode, position=position).train(holder.training)
    holder.add_module(PART, part.to(next(holder.parameters())))
    holder.unmerge_tokens = not both if unmerge is None else unmerge
    settings = {"layer": layer, "mode": mode, "position": position, "unmerge": holder.unmerge_tokens, "groups": groups}
    setattr(config, SETTINGS, settings)

    for number, block in enumerate(stack):
        block.register_forward_pre_hook(partial(_before_layer, number, layer), with_kwargs=True)
    for module in {model, _top(model)} - {holder}:
        module.register_forward_pre_hook(_before_model, with_kwargs=True)
        module.register_forward_hook(_after_model, with_kwargs=True)
    holder.register_forward_pre_hook(_before_holder, with_kwargs=True)
    holder.register_forward_hook(_after_holder, with_kwargs=True)
    if both:
        _top(model).decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)


def restore_token_merging(model: nn.Module, folder: str | Path) -> None:
    """Merge tokens in a model loaded from a folder as its configuration says, with the scorer's weights from there.

    ``models.load`` does it by itself; after transformers' own ``from_pretrained``, which knows the entry but not what
    it means, call it with the model and the folder.
    """
    settings = getattr(getattr(model, "config", None), SETTINGS, None)
    if not settings:
        return
    merge_tokens(model, **settings)
    weights = open_checkpoint(folder)
    stored = {name.partition(f"{PART}.")[2]: name for name in weights.names() if f"{PART}." in name}
    for name, tensor in getattr(_holder(model), PART).state_dict().items():
        source = stored.get(name)
        if source is None or tuple(weights.shape(source)) != tuple(tensor.shape):
            found = "nothing" if source is None else tuple(weights.shape(source))
            raise InputError(f"{folder}: tensor '{PART}.{name}': {tuple(tensor.shape)} expected, {found} found")
        tensor.copy_(weights.read(source))


def merging_of(model: nn.Module) -> TokenMerge | None:
    """The part of a model that merges tokens, or ``None``."""
    return next((module for module in model.modules() if isinstance(module, TokenMerge)), None)


def _top(model: Any) -> Any:
    """The model below a task's head; it is the model itself where there is none."""
    return getattr(model, "base_model", model)


def family(model: Any) -> str:
    """The family of a model or a configuration; ``InputError`` for one that cannot merge tokens."""
    kind = getattr(getattr(model, "config", model), "model_type", type(model).__name__)
    if kind not in (*ENCODERS, *ENCODER_DECODERS, *DECODERS):
        known = ", ".join(sorted((*ENCODERS, *ENCODER_DECODERS, *DECODERS)))
        raise InputError(f"a model of the family {kind!r} cannot merge tokens: one of {known} is expected")
    return kind


def _holder(model: Any) -> Any:
    """The module that runs the layers: a T5's encoder, otherwise the model below the head."""
    kind = family(model)
    if hasattr(model, "merge_and_unload"):
        raise InputError("the model has adapters: merge them first (adapt.merge_adapter)")
    if kind in ENCODERS and getattr(model.config, "is_decoder", False):
        raise InputError(f"a {type(model).__name__} is set up as a decoder: an encoder is expected")
    return _top(model).encoder if kind in ENCODER_DECODERS else _top(model)


def _before_model(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The head's model, or an encoder–decoder: group ids become the call that travels on."""
    if named.get("group_ids") is None:
        return None
    if module.config.model_type in DECODERS and hasattr(module, "lm_head"):
        raise InputError(
            f"a {type(module).__name__} predicts the next token, which a merged state knows already: merging in a "
            "decoder is for scoring whole texts (a classifier, or a Model with a head)"
        )
    return arguments, _with_call(module, arguments, named)


def _before_holder(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if _CALL not in named:
        if named.get("group_ids") is None:
            raise InputError(
                f"a {type(module).__name__} that merges tokens needs group_ids beside input_ids: a SubtokenGrouper's "
                "tokenizer gives both (decoders cannot generate with merging)"
            )
        named = _with_call(module, arguments, named)
    named[_CALL].holder = module
    if module.config.model_type in DECODERS:
        if named.get("past_key_values") is not None or named.get("use_cache"):
            raise InputError(
                f"a {type(module).__name__} that merges tokens keeps no cache: use_cache=False is expected"
            )
        named["use_cache"] = False
    return arguments, named


def _with_call(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(module.forward).bind_partial(*arguments, **named).arguments
    groups, mask, pairs = named["group_ids"], bound.get("attention_mask"), None
    if mask is not None and mask.shape == (len(groups), 1, groups.shape[-1], groups.shape[-1]):
        if module.config.model_type in DECODERS:
            raise InputError(f"attention_mask of a {type(module).__name__}: (batch, T) is expected where tokens merge")
        pairs = (mask >= 0 if mask.is_floating_point() else mask.bool())[:, 0]
    elif mask is not None:
        if mask.shape != groups.shape:
            shapes = f"{tuple(mask.shape)} and {tuple(groups.shape)}"
            raise InputError(f"attention_mask and group_ids have the shapes {shapes}: both (batch, T) are expected")
        groups = groups.masked_fill(mask == 0, -1)
    call = _Call(MergeMap(groups), pairs)
    return {name: value for name, value in named.items() if name != "group_ids"} | {_CALL: call}


def _before_layer(number: int, layer: int, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    call: _Call | None = named.pop(_CALL, None)
    if call is None or number < layer:
        return arguments, named
    bound = inspect.signature(module.forward).bind(*arguments, **named)
    if number == layer:
        first = next(iter(bound.arguments))
        bound.arguments[first] = getattr(call.holder, PART)(bound.arguments[first], call.map)
        call.arguments = _above(call, bound.signature.parameters, bound.arguments[first])
    more = bound.arguments.get("kwargs", {})
    for name, value in (call.arguments or {}).items():
        if name in bound.signature.parameters:
            if name != "position_bias" or number == layer:  # a T5's layers hand it on themselves
                bound.arguments[name] = value
        elif name in more:
            more[name] = value
    return bound.args, bound.kwargs


def _above(call: _Call, parameters: Any, merged: Tensor) -> dict[str, Any]:
    """Mask and positions of the shorter sequence."""
    holder, positions = call.holder, call.map.positions(getattr(call.holder, PART).position)
    settings = {"config": holder.config, "inputs_embeds": merged, "attention_mask": call.map.mask}
    mask: Any
    if call.pairs is not None:
        unseen = ~call.map.pairs(call.pairs)[:, None]
        mask = merged.new_zeros(unseen.shape).masked_fill(unseen, torch.finfo(merged.dtype).min)
    elif holder.config.model_type in DECODERS:
        mask = create_causal_mask(**settings, past_key_values=None)
    else:
        mask = create_bidirectional_mask(**settings)
    found: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    if "position_bias" in parameters:
        found["position_bias"] = _relative_bias(layer_stack(holder)[1], positions)
    if hasattr(holder, "rotary_emb"):
        found["position_embeddings"] = holder.rotary_emb(merged, position_ids=positions)
    return found


def _relative_bias(stack: Any, positions: Tensor) -> Tensor:
    """T5's bias (1 or batch, heads, K, K) of positions (1 or batch, K), by the first layer's table."""
    attention = stack[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(
        positions[:, None, :] - positions[:, :, None],
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)


def _before_decoder(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    call: _Call | None = named.pop(_CALL, None)
    if call is not None:
        named["encoder_attention_mask"] = call.map.mask
    return arguments, named


def _after_holder(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    merging = named[_CALL].map
    if module.unmerge_tokens:
        if isinstance(output, tuple):
            output = (merging.unmerge(output[0]), *output[1:])
        else:
            output["last_hidden_state"] = merging.unmerge(output["last_hidden_state"])
    return _after_model(module, arguments, named, output)


def _after_model(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    if _CALL in named and not isinstance(output, tuple | Tensor):
        output.merge_map = named[_CALL].map
    return output
