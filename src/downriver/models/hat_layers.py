"""What a hierarchical transformer is made of: its settings, stacks of Llama layers, and the words of a batch.

Reach for ``models.hat``, which puts them together. "Hierarchical Autoregressive Transformers" (2025). Sizes of encoder
and decoder are left open by the paper's figure; the defaults are six layers of width 1024 each, about 2 % of a backbone
of 7B parameters. Encoder and decoder have embeddings of their own in the first connector, since widths may differ.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaRMSNorm

from downriver.core.errors import InputError, unknown
from downriver.models.hat_tokenizer import END, IGNORED, PAD, VOCABULARY, WORD

Connector = Literal["prefix", "cross"]
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16}


@strict
class HATConfig(transformers.PreTrainedConfig):
    """Sizes of the three parts, each a ``LlamaConfig`` or a dictionary of its entries.

    Parameters
    ----------
    encoder, decoder
        Bytes of one word; six layers of width 1024 by default.
    backbone
        Words of a document; Llama's defaults, those of 7B parameters.
    connector
        ``prefix``: the encoder reads one word, both ways, and its output at [W] is the word's vector; the decoder
        spells one word, and the backbone's vector stands in the place of [W]. ``cross``, as in the models published
        later: the encoder reads the whole document causally, a learned query attends to the word's bytes; the decoder
        goes on from the encoder's states over the whole document, and each of its layers adds the backbone's vector.
    initializer_range
        Standard deviation of the fresh weights (0.02, Llama's).
    """

    model_type = "downriver_hat"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": LlamaConfig, "backbone": LlamaConfig, "decoder": LlamaConfig}

    encoder: Any = None
    backbone: Any = None
    decoder: Any = None
    connector: str = "prefix"
    vocab_size: int = VOCABULARY
    pad_token_id: int | None = PAD
    eos_token_id: int | list[int] | None = END
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, default in (("encoder", SMALL), ("backbone", {}), ("decoder", SMALL)):
            part = getattr(self, name)
            if isinstance(part, LlamaConfig):
                part = part.to_dict()
            elif part is not None and not isinstance(part, dict):
                raise InputError(f"{name} is a {type(part).__name__}: a LlamaConfig or its entries are expected")
            entries = default if part is None else {k: v for k, v in part.items() if k != "model_type"}
            symbols = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
            causal = {"is_causal": name != "encoder" or self.connector == "cross"}
            setattr(self, name, LlamaConfig(**entries | symbols | causal))
        if self.connector not in get_args(Connector):
            raise unknown("connector", self.connector, get_args(Connector))
        if self.connector == "cross" and self.encoder.hidden_size != self.decoder.hidden_size:
            widths = f"{self.encoder.hidden_size} and {self.decoder.hidden_size}"
            raise InputError(f"encoder and decoder have the widths {widths}: the connector 'cross' needs equal ones")
        super().__post_init__(**kwargs)


class Words(NamedTuple):
    """The words of a batch without padding: all symbols one after the other, S of them, in N words."""

    ids: Tensor  # (S,) every word with its [W] first
    lengths: Tensor  # (N,) symbols of a word
    mask: Tensor  # (B, M) which words of a padded batch there are
    where: Tensor  # the positions of the symbols in the batch as it came: a mask of its shape
    labels: Tensor  # (S,) what is predicted at each symbol, -100 for nothing
    first: Tensor  # (N,) whether a document begins with the word

    @property
    def starts(self) -> Tensor:
        """(N,) where the words begin in ``ids``."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def positions(self) -> Tensor | None:
        """(B, M) the place of every word in its document where a row has several documents, else nothing."""
        if int(self.first.sum()) == len(self.mask):
            return None
        number = torch.arange(len(self.first), device=self.first.device)
        places = number - number[self.first][self.first.cumsum(0) - 1]
        return torch.zeros_like(self.mask, dtype=torch.long).masked_scatter(self.mask, places)

    def by_length(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Buckets of words of similar length, so that little is padded: their numbers (n,), the positions of their
        symbols in ``ids`` (n, width), and which of these are real. The bounds are powers of two."""
        below, bound, longest, starts = 0, 2, int(self.lengths.max()), self.starts
        while below < longest:
            chosen = torch.nonzero((self.lengths > below) & (self.lengths <= bound)).flatten()
            if len(chosen):
                steps = torch.arange(min(bound, longest), device=chosen.device)
                real = steps < self.lengths[chosen, None]
                yield chosen, (starts[chosen, None] + steps).clamp(max=len(self.ids) - 1), real
            below, bound = bound, 2 * bound

    def documents(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Values a symbol, (S, …), padded by documents, (documents, longest, …), and which of them are real."""
        document = self.first.cumsum(0) - 1
        sizes = torch.bincount(document, weights=self.lengths.double()).long()
        padded = pad_sequence(list(flat.split(sizes.tolist())), batch_first=True)
        return padded, torch.arange(padded.shape[1], device=flat.device) < sizes[:, None]


def words_of(
    byte_ids: Tensor | None,
    word_mask: Tensor | None,
    byte_mask: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
) -> Words:
    """Read a batch in either layout: rows of bytes, or streams of symbols in which [W] opens every word."""
    if (byte_ids is None) == (input_ids is None):
        raise InputError("either byte_ids or input_ids is expected")
    symbols = cast(Tensor, byte_ids if byte_ids is not None else input_ids)
    rows = byte_ids is not None
    if symbols.dim() != (3 if rows else 2):
        shape = "byte_ids (B, M, C)" if rows else "input_ids (B, T)"
        raise InputError(f"the symbols have the shape {tuple(symbols.shape)}: {shape} are expected")
    given = byte_mask if rows else attention_mask
    where = symbols != PAD if given is None else given.bool()
    if rows and word_mask is not None:
        where = where & word_mask.bool()[..., None]
    ids = symbols[where]
    if not len(ids) or bool((ids >= PAD).any()) or bool((ids < 0).any()):
        raise InputError(f"the symbols are not all from 0 to {END} where there is no padding, or there are none")
    opens = ids == WORD
    if not bool((symbols.flatten(1)[:, 0] == WORD).all()) or not bool(where.flatten(1)[:, 0].all()):
        raise InputError("a document does not begin with [W] at its first place: padding is expected at the right")
    numbers = torch.nonzero(opens).flatten()
    lengths = torch.diff(numbers, append=numbers.new_tensor([len(ids)]))
    if rows:
        mask, right = where[..., 0], bool((where[:, 1:, 0] <= where[:, :-1, 0]).all())
        if not right or not torch.equal(lengths, where.sum(-1)[mask]):
            raise InputError("every row of byte_ids is expected to be one word after its [W], padded at the right")
    else:
        if bool((where[:, 1:] > where[:, :-1]).any()):
            raise InputError("a stream of input_ids has padding before its end: padding is expected at the right")
        counts = (where & (symbols == WORD)).sum(1)
        mask = torch.arange(int(counts.max()), device=ids.device) < counts[:, None]
    if position_ids is None:
        first = torch.zeros_like(mask)
        first[:, 0] = True
        first = first[mask]
    else:
        first = (position_ids == 0)[mask] if rows else (position_ids == 0)[where][opens]
    return Words(ids, lengths, mask, where, _targets(ids, lengths, None if labels is None else labels[where]), first)


def _targets(ids: Tensor, lengths: Tensor, labels: Tensor | None) -> Tensor:
    """What follows every symbol within its word; after the last one [W], and nothing after END.

    The label at a word's own [W] says whether the loss at its end counts.
    """
    known = ids if labels is None else labels
    following = known.roll(-1)
    last = lengths.cumsum(0) - 1
    closing = torch.full_like(last, WORD).masked_fill(ids[last] == END, IGNORED)
    return following.index_copy(0, last, closing.masked_fill(known[last - lengths + 1] == IGNORED, IGNORED))


def in_order(parts: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    """The rows of all buckets by their numbers, which are all from 0."""
    return torch.cat(list(parts))[torch.cat(list(numbers)).argsort()]


class Stack(LlamaModel):
    """Llama's layers on vectors, without an embedding; the weights are named as Llama's.

    Causal unless ``config.is_causal`` is false. With ``injected`` each layer adds a vector of so many entries.
    """

    def __init__(self, config: LlamaConfig, *, injected: int | None = None) -> None:
        super().__init__(config)
        self.embed_tokens: Any = None
        if injected is not None:
            self.layers = nn.ModuleList(InjectedLayer(config, i, injected) for i in range(config.num_hidden_layers))
        for layer in self.layers:
            cast(Any, layer).self_attn.is_causal = config.is_causal

    def run(self, x: Tensor, real: Tensor | None = None, **more: Any) -> Tensor:
        """(n, length, width) → the same; ``real`` (n, length) is needed where padding could be seen."""
        return self(inputs_embeds=x, attention_mask=real, use_cache=False, **more).last_hidden_state


class InjectedLayer(LlamaDecoderLayer):
    """A layer before which a vector of the backbone is added to every state: h + O V norm(p)."""

    def __init__(self, config: LlamaConfig, layer_idx: int, width: int) -> None:
        super().__init__(config, layer_idx)
        self.word_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.word_v = nn.Linear(width, config.hidden_size, bias=False)
        self.word_o = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        p = self.word_norm(kwargs.pop("p"))
        return super().forward(hidden_states + self.word_o(self.word_v(p)), *args, **kwargs)


class WordQuery(nn.Module):
    """A learned query attends to the states of one word's symbols: (n, width, d) → (n, D)."""

    def __init__(self, config: LlamaConfig, width: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Parameter(torch.empty(d))
        self.norm = LlamaRMSNorm(d, eps=config.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(d, width, bias=False)

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        states = self.norm(states)
        q = self.q_proj(self.query).expand(len(states), 1, -1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, self.k_proj(states), self.v_proj(states))
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return self.o_proj(attended.transpose(1, 2).flatten(1))


class Cached:
    """A stack with its cache, for a batch whose rows advance by different numbers of steps."""

    def __init__(self, stack: Stack, rows: int) -> None:
        self.stack = stack
        self.cache = DynamicCache(config=stack.config)
        self.seen = torch.zeros(rows, 0, dtype=torch.bool, device=stack.device)

    def run(self, x: Tensor, real: Tensor | None = None, **more: Any) -> Tensor:
        """Go on by (rows, length, width), of which ``real`` (rows, length) counts."""
        new = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        self.seen = torch.cat([self.seen, new], 1)
        positions = (self.seen.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        return self.stack(
            inputs_embeds=x,
            attention_mask=self.seen,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        ).last_hidden_state
