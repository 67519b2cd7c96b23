"""Token merging: one hidden state in place of the several subtokens of a unit of the text, such as an identifier.

Reach for it to make encoders of code cheaper where their tokenizers cut names into pieces: BERT, RoBERTa (CodeBERT,
GraphCodeBERT, UniXcoder) and T5 (CodeT5, CodeT5+). "On the Effect of Token Merging on Pre-trained Models for Code"
(arXiv:2507.14423, July 2025). Groups come with the batch: ``domains.code`` makes them from a lexer. The layer, the form
of the scorer and what stays single are not published and are assumed. The scorer's u starts at zero, its V does not,
or neither would ever learn. Of a mask of pairs (batch, 1, T, T), as GraphCodeBERT's between code and data flow, a group
sees what any of its members sees; its nodes are groups of one.
A decoder alone (Llama) can score texts, not predict tokens, since a merged state knows the end of its unit.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import nn

from downriver.core.errors import InputError
from downriver.models.model import Model
from downriver.models.token_merging import DECODERS, ENCODER_DECODERS, family, merge_tokens, merging_of
from downriver.models.token_merging import restore_token_merging as restore_token_merging
from downriver.nn.token_merge import SCORER, Mode, Position
from downriver.nn.token_merge import MergeMap as MergeMap
from downriver.nn.token_merge import TokenMerge as TokenMerge
from downriver.training.engine import clone

M = TypeVar("M", bound=nn.Module)


class Grouper(Protocol):
    """What makes group ids; ``domains.code.SubtokenGrouper`` does."""

    def tokenizer(self, tokenizer: Any) -> Any:
        """A tokenizer that gives ``group_ids`` beside ``input_ids``."""

    def settings(self) -> dict[str, Any]:
        """What the configuration keeps, so that the same grouper can be made again."""


def add_token_merging(
    model: M,
    grouper: Grouper | None = None,
    *,
    layer: int = 0,
    mode: Mode = "mean",
    position: Position = "reindex",
    unmerge: bool | None = None,
) -> M:
    """A copy of the model that merges the hidden states of every group of tokens before layer number ``layer``.

    From there on mask and positions are those of the K groups. Batches need ``group_ids`` (batch, T): numbers 0, 1, ...
    in a row, -1 for padding (an attention mask (batch, T) marks it, too). Outputs are of the same class as before, with
    a ``merge_map`` besides: ``groups``, ``lengths``, ``mask`` and ``unmerge(states)``. Fine-tune the model afterwards,
    as the paper does.

    Parameters
    ----------
    model
        A ``Model``, or a transformers model of one of the families named above.
    grouper
        Replaces a ``Model``'s tokenizer by one that gives group ids, so that every method of downriver merges. Without
        it, batches must bring them.
    layer
        0 (default): after the embeddings.
    mode
        ``mean`` (default) and ``learned`` are the paper's: w = softmax_j(u · tanh(V h_j)) over the members, trained
        with the task. ``max`` and ``first`` are there to compare.
    position
        Of T5's relative bias and rotary positions: the groups' numbers (``reindex``) or each group's first token
        (``first``). Absolute positions are in the states already.
    unmerge
        Whether the last hidden state is copied back to the tokens, so that pooling and heads of tokens work as before.
        Default: yes, except for an encoder–decoder, whose decoder reads the merged states.

    ``save`` keeps everything and ``models.load`` restores it (``restore_token_merging`` after transformers' own
    ``from_pretrained``); the tokenizer is saved as it was without groups. To generate, encode first:
    ``states = model.get_encoder()(**batch)``, then
    ``model.generate(encoder_outputs=states, attention_mask=states.merge_map.mask)``.

    Raises ``InputError`` for other families, layers that do not exist, adapters, a second merge, unknown modes; when it
    runs, for missing group ids and groups that are not consecutive.

    >>> import torch
    >>> from downriver.models import small
    >>> merged = add_token_merging(small("text-encoder", "nano").backbone)
    >>> ids, groups = torch.tensor([[1, 70, 71, 72, 2]]), torch.tensor([[0, 1, 1, 1, 2]])
    >>> out = merged(ids, group_ids=groups)
    >>> out.last_hidden_state.shape, out.merge_map.lengths.tolist()
    (torch.Size([1, 5, 32]), [3])
    """
    given: Any = model
    merged: Any = clone(given) if isinstance(given, Model) else copy.deepcopy(given)
    backbone = merged.backbone if isinstance(merged, Model) else merged
    if grouper is not None and not isinstance(merged, Model):
        raise InputError(
            f"a {type(backbone).__name__} comes without a tokenizer: a Model is expected where a grouper is given"
        )
    if isinstance(merged, Model) and unmerge is False and merged.pooling in ("mean", "last", "tokens"):
        raise InputError(f"unmerge is False: pooling {merged.pooling!r} needs the tokens, pooling 'cls' is expected")
    ready = grouper.tokenizer(merged.processor) if grouper is not None else None
    groups = grouper.settings() if grouper is not None else None
    merge_tokens(backbone, layer=layer, mode=mode, position=position, unmerge=unmerge, groups=groups)
    if ready is not None:
        merged.processor = ready
    return merged


def flops(model: Any, lengths: Sequence[int], merged: Sequence[int] | None = None) -> np.ndarray:
    """FLOPs of one forward pass of the layers for each text, (texts,), by the formula; embeddings and heads left out.

    ``lengths`` are the tokens T of the texts, ``merged`` the groups K; without it nothing is merged. Layers below the
    merge count with T, the others with K: of each 2K (4d² + 2 d d_ff) + 4K² d, and the scorer of ``learned`` besides. A
    model that does not merge (yet), or a configuration in the place of a model, counts as one that merges by the mean
    before its first layer. Of an encoder–decoder this is the encoder.

    Raises ``InputError`` for other families, and a text with more groups than tokens.

    >>> from downriver.models import small
    >>> encoder = small("text-encoder", "nano")  # two layers, d = 32, d_ff = 128
    >>> flops(encoder, [10]), 2 * (2 * 10 * (4 * 32**2 + 2 * 32 * 128) + 4 * 10**2 * 32)
    (array([517120.]), 517120)
    >>> (1 - flops(encoder, [10], [8]) / flops(encoder, [10])).round(3)
    array([0.208])
    """
    backbone: Any = model.backbone if isinstance(model, Model) else model
    config = getattr(backbone, "config", backbone)
    family(config)
    before = np.asarray(lengths, dtype=np.float64)
    after = before if merged is None else np.asarray(merged, dtype=np.float64)
    if before.shape != after.shape or (after > before).any() or (after < 0).any():
        raise InputError("merged must hold one number of groups a text, from 0 to what it has of tokens")
    part = merging_of(backbone) if isinstance(backbone, nn.Module) else None
    below = 0 if part is None else int(part.layer)
    found = below * _layer(config, before) + (config.num_hidden_layers - below) * _layer(config, after)
    if part is not None and part.mode == "learned" and merged is not None:
        found = found + 2 * before * min(config.hidden_size, SCORER) * (config.hidden_size + 1)
    return found


def _layer(config: Any, n: np.ndarray) -> np.ndarray:
    """One layer on n positions: 2n (projections + feed-forward) for the matrices, 4n² (heads' width) for attention."""
    d, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or d // heads
    wide = heads * head
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head
    d_ff = next(getattr(config, name) for name in ("intermediate_size", "hidden_dim", "d_ff") if hasattr(config, name))
    gated = config.model_type in DECODERS or (
        config.model_type in ENCODER_DECODERS and getattr(config, "is_gated_act", False)
    )
    return 2 * n * (2 * d * wide + 2 * d * keys + (3 if gated else 2) * d * d_ff) + 4 * n**2 * wide
