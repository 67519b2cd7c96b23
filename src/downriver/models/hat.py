"""HAT: a language model without a vocabulary. Bytes of a word → one vector, a Llama over words, bytes of the next word.

Reach for it where a tokenizer hurts: misspelt input, a new language, long sequences of short tokens; and to put such
input and output on a pretrained Llama (``from_pretrained_backbone``). "Hierarchical Autoregressive Transformers:
Combining Byte- and Word-Level Processing for Robust, Adaptable Language Models" (2025). Where the paper's figure is
silent: projections are linear without bias, the backbone's vector stands in the place of [W] in the decoder, and a word
that the limit cuts is two words. The end of a document is a word of one symbol, after which nothing is predicted.
In the connector ``cross`` [W] stays in the stream of bytes and ends every word; the later public models leave it out.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from downriver.core.errors import InputError
from downriver.models.hat_generate import spell
from downriver.models.hat_layers import HATConfig, Stack, WordQuery, Words, in_order, words_of
from downriver.models.hat_stream import HATStreamTokenizer
from downriver.models.hat_tokenizer import PAD, HATTokenizer
from downriver.models.model import Model

__all__ = [
    "HATConfig",
    "HATForCausalLM",
    "HATForSequenceClassification",
    "HATModel",
    "HATStreamTokenizer",
    "HATTokenizer",
    "Score",
    "flops_per_byte",
]

Texts = str | bytes | Sequence[str | bytes]


class HATPreTrainedModel(transformers.PreTrainedModel):
    """What the models below share: how weights start, and a backbone taken from a pretrained Llama."""

    config: HATConfig
    config_class = HATConfig
    base_model_prefix = "model"
    main_input_name = "byte_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "InjectedLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name in ("query", "start"):
            if isinstance(weight := module._parameters.get(name), Tensor):
                init.normal_(weight, std=self.config.initializer_range)

    @classmethod
    def from_pretrained_backbone(cls, llama: Any, config: HATConfig | None = None, **settings: Any) -> Any:
        """A model round the layers of a pretrained Llama, whose embedding and output layer are left behind.

        Parameters
        ----------
        llama
            A ``LlamaForCausalLM``, a ``LlamaModel``, a ``Model`` round one, or a folder or name of a checkpoint.
        config, settings
            Encoder, decoder and connector: a ``HATConfig``, of which the backbone's part is replaced, or its entries.

        The backbone's weights are copied bit by bit, in their type; encoder, decoder and connectors start at random
        and are to be trained. Raises ``InputError`` for a model that is no Llama.

        >>> from downriver.models import small
        >>> nano = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = HATForCausalLM.from_pretrained_backbone(small("causal-lm", "nano"), encoder=nano, decoder=nano)
        >>> model.config.backbone.hidden_size
        32
        """
        if isinstance(llama, str | os.PathLike):
            llama = transformers.AutoModelForCausalLM.from_pretrained(llama)
        llama = llama.backbone if isinstance(llama, Model) else llama
        trunk = getattr(llama, "model", llama)
        if not isinstance(trunk, transformers.LlamaModel) or isinstance(trunk, Stack):
            raise InputError(f"a {type(llama).__name__} was given as backbone: a Llama is expected")
        entries = config.to_dict() if config is not None else {}
        model: Any = cls(HATConfig(**entries | settings | {"backbone": trunk.config}))
        state = {k: v for k, v in trunk.state_dict().items() if not k.startswith("embed_tokens.")}
        stack = getattr(model, "model", model).backbone
        model.to(trunk.dtype)
        stack.load_state_dict(state)
        return model.eval()


class HATModel(HATPreTrainedModel):
    """Encoder and backbone: a vector for every word, from it and the words before it."""

    def __init__(self, config: HATConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.encoder.hidden_size, PAD)
        self.encoder = Stack(config.encoder)
        width = config.backbone.hidden_size
        if config.connector == "cross":
            self.up: nn.Module = WordQuery(config.encoder, width)
        else:
            self.up = nn.Linear(config.encoder.hidden_size, width, bias=False)
        self.backbone = Stack(config.backbone)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = cast(nn.Embedding, value)

    def word_vectors(self, words: Words, states: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """e, (N, D), of every word, and with the connector ``cross`` the encoder's states (S, d), or those given."""
        embedded, vectors, numbers = self.embed(words.ids), [], []
        if self.config.connector == "cross" and states is None:
            padded, real = words.documents(embedded)
            states = self.encoder.run(padded, real)[real]
        for chosen, symbols, real in words.by_length():
            if states is None:
                vectors.append(self.up(self.encoder.run(embedded[symbols], real)[:, 0]))
            else:
                vectors.append(self.up(states[symbols], real))
            numbers.append(chosen)
        return in_order(vectors, numbers), states

    def contexts(self, words: Words, vectors: Tensor) -> Tensor:
        """p, (B, M, D): the backbone over the words of each document."""
        e = vectors.new_zeros(*words.mask.shape, vectors.shape[-1]).masked_scatter(words.mask[..., None], vectors)
        positions = words.positions
        return self.backbone.run(e) if positions is None else self.backbone.run(e, position_ids=positions)

    def forward(
        self,
        byte_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
        byte_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """``last_hidden_state``: (B, M, D) of the words, for streams (B, T, D) of every symbol's word; see
        ``HATForCausalLM.forward``."""
        words = words_of(byte_ids, word_mask, byte_mask, input_ids, attention_mask, position_ids, None)
        hidden = self.contexts(words, self.word_vectors(words)[0])
        if input_ids is not None:
            each = hidden[words.mask].repeat_interleave(words.lengths, 0)
            hidden = each.new_zeros(*words.where.shape, each.shape[1]).masked_scatter(words.where[..., None], each)
        return BaseModelOutput(last_hidden_state=hidden)


@dataclass(frozen=True)
class Score:
    """A text's words and the bits that each of them takes, its end included."""

    words: tuple[bytes, ...]
    bits: tuple[float, ...]

    @property
    def bits_per_byte(self) -> float:
        """All bits over all bytes."""
        return sum(self.bits) / sum(map(len, self.words))

    @property
    def words_per_byte(self) -> float:
        """How many steps of the backbone a byte takes."""
        return len(self.words) / sum(map(len, self.words))


class HATForCausalLM(HATPreTrainedModel):
    """The language model: p of every word spells the next one, byte by byte, up to [W].

    >>> nano = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = HATForCausalLM(HATConfig(encoder=nano, backbone=nano, decoder=nano)).eval()
    >>> batch = HATTokenizer()(["the river", "and the sea"], labels=True)
    >>> out = model(**batch, return_logits=True)
    >>> out.logits.shape, bool(6 < out.loss / math.log(2) < 10)
    (torch.Size([2, 3, 7, 259]), True)
    >>> len(model.generate("the ", max_bytes=5))
    5
    """

    def __init__(self, config: HATConfig) -> None:
        super().__init__(config)
        self.model = HATModel(config)
        d, width = config.decoder.hidden_size, config.backbone.hidden_size
        self.start = nn.Parameter(torch.empty(width))
        self.cross = config.connector == "cross"
        self.decoder = Stack(config.decoder, injected=width if self.cross else None)
        self.down = None if self.cross else nn.Linear(width, d, bias=False)
        self.decoder_embed = None if self.cross else nn.Embedding(config.vocab_size, d, PAD)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        byte_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
        byte_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """``loss`` where there are labels, and ``logits`` of what follows each symbol.

        Parameters
        ----------
        byte_ids, word_mask, byte_mask
            As ``HATTokenizer`` gives them: (B, M, C), (B, M), (B, M, C). Padding is recognised without the masks.
        input_ids, attention_mask
            Instead: the symbols as streams (B, T), [W] before every word, as ``HATTokenizer.stream`` gives them.
        labels
            In the shape of the symbols, which they repeat, with -100 where no loss is taken; at a word's [W] that is
            the loss at the word's end. The loss is the mean cross-entropy over bytes and ends.
        position_ids
            Where they are 0 a new document begins, (B, M) or as the stream: several in a row do not see one another.
        num_items_in_batch
            What the loss is divided by instead of the number of its terms: the Trainer's for accumulated steps.
        return_logits
            By default only without labels: (B, M, C, 259) is large. ``logits[..., j, :]`` follows the symbol j of the
            same word. They are (B, T, 259) for streams.

        Raises ``InputError`` for symbols that are no words behind [W], and padding elsewhere than at the right.
        """
        words = words_of(byte_ids, word_mask, byte_mask, input_ids, attention_mask, position_ids, labels)
        logits = self.lm_head(self._spelled(words))  # (S, V)
        loss, padded = None, None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), words.labels, reduction="sum")
            counted = (words.labels >= 0).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / counted
        if return_logits or (return_logits is None and labels is None):
            padded = logits.new_zeros(*words.where.shape, logits.shape[-1])
            padded[words.where] = logits
        return CausalLMOutput(loss=loss, logits=padded)

    def _spelled(self, words: Words) -> Tensor:
        """The decoder's states (S, d) of all symbols."""
        vectors, states = self.model.word_vectors(words)
        p = self.model.contexts(words, vectors)[words.mask]
        before = torch.where(words.first[:, None], self.start, p.roll(1, 0))  # p of the word before, (N, D)
        if states is not None:
            x, real = words.documents(states)
            p, _ = words.documents(before.repeat_interleave(words.lengths, 0))
            return self.decoder.run(x, real, p=p)[real]
        spelled, numbers = [], []
        for chosen, symbols, real in words.by_length():
            spelled.append(self.decoder.run(self.spell_inputs(words.ids[symbols], before[chosen]))[real])
            numbers.append(symbols[real])
        return in_order(spelled, numbers)

    def spell_inputs(self, ids: Tensor, p: Tensor | None) -> Tensor:
        """The decoder's inputs (n, length, d): with ``p`` (n, D), its projection is in the place of the first one."""
        embedded = cast(nn.Module, self.decoder_embed)(ids)
        if p is None:
            return embedded
        return torch.cat([cast(nn.Module, self.down)(p)[:, None], embedded[:, 1:]], 1)

    @torch.no_grad()
    def score(
        self, texts: Texts, *, tokenizer: HATTokenizer | None = None, batch_size: int = 16, progress: bool = True
    ) -> Any:
        """How many bits each word takes: a ``Score`` for a text, a list of them for several.

        ``tokenizer`` cuts the words (by default ``HATTokenizer()``). A text's beginning is known, its end does not
        count, so that bits per byte compare with other models'.
        """
        several = [texts] if isinstance(texts, str | bytes) else list(texts)
        tokenizer = tokenizer or HATTokenizer()
        scores = []
        for start in tqdm(range(0, len(several), batch_size), desc="score", disable=not progress, delay=2):
            batch = tokenizer(several[start : start + batch_size], labels=True).to(self.device)
            words = words_of(**{**dict.fromkeys(("input_ids", "attention_mask", "position_ids")), **batch})
            nats = F.cross_entropy(self.lm_head(self._spelled(words)).float(), words.labels, reduction="none")
            owner = torch.arange(len(words.lengths), device=nats.device).repeat_interleave(words.lengths)
            bits = nats.new_zeros(len(words.lengths)).index_add(0, owner, nats) / math.log(2)
            parts = bits.split(words.mask.sum(1).tolist())
            for text, own in zip(several[start : start + batch_size], parts, strict=True):
                scores.append(Score(tuple(bytes(word[1:]) for word in tokenizer.words(text)), tuple(own.tolist())))
        return scores[0] if isinstance(texts, str | bytes) else scores

    @torch.no_grad()
    def generate(
        self,
        texts: Texts,
        max_bytes: int = 256,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        tokenizer: HATTokenizer | None = None,
        progress: bool = True,
    ) -> Any:
        """Continue a text by at most ``max_bytes`` bytes: ``bytes``, or a list of them for several texts.

        The text's last word is taken as unfinished: what follows may go on with it. The backbone advances by a word
        when [W] comes, the decoder by a byte; both have caches, and texts are continued side by side. Words grow to
        the tokenizer's limit at most, and a text ends early with its document. An empty text starts a document.

        ``temperature`` 0 takes the likeliest byte; else bytes are drawn, by ``seed``.

        Raises ``InputError`` for a number of bytes below 1 or a negative temperature.
        """
        if max_bytes < 1 or temperature < 0:
            raise InputError(f"max_bytes {max_bytes}, temperature {temperature}: at least 1 and 0 are expected")
        several = [texts] if isinstance(texts, str | bytes) else list(texts)
        if not several:
            return []
        found = spell(self, tokenizer or HATTokenizer(), several, max_bytes, temperature, seed, progress)
        return found[0] if isinstance(texts, str | bytes) else found


class HATForSequenceClassification(HATPreTrainedModel):
    """Encoder and backbone with a linear head on the last word's vector; ``config.num_labels`` classes, or 1: a value.

    >>> nano = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = HATConfig(encoder=nano, backbone=nano, decoder=nano, num_labels=3)
    >>> HATForSequenceClassification(config)(**HATTokenizer()(["a river", "sea"])).logits.shape
    torch.Size([2, 3])
    """

    def __init__(self, config: HATConfig) -> None:
        super().__init__(config)
        self.model = HATModel(config)
        self.head = nn.Linear(config.backbone.hidden_size, cast(int, config.num_labels), bias=False)
        self.post_init()

    def forward(
        self,
        byte_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
        byte_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """``logits`` (B, labels), and the mean cross-entropy or, for one label, squared error as ``loss``."""
        words = words_of(byte_ids, word_mask, byte_mask, input_ids, attention_mask, None, None)
        hidden = self.model.contexts(words, self.model.word_vectors(words)[0])
        last = words.mask.sum(1) - 1
        logits = self.head(hidden[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            one = logits.shape[1] == 1
            loss = F.mse_loss(logits[:, 0].float(), labels.float()) if one else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def flops_per_byte(config: HATConfig, text: str | bytes, *, tokenizer: HATTokenizer | None = None) -> float:
    """Floating-point operations of one forward pass over the text, a byte: encoder and decoder pay by byte, the
    backbone by word.

    Products only, a multiplication and an addition counted as two, without padding; attention counts all pairs that
    can be computed at once (a causal mask halves nothing). Training takes three times as many.

    >>> config = HATConfig(backbone={"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192})
    >>> flops_per_byte(config, "a b c d e f") > flops_per_byte(config, "abcdef ghij")
    True
    """
    lengths = [len(word) for word in (tokenizer or HATTokenizer()).words(text)]
    symbols, words = sum(lengths), len(lengths)
    enc, back, dec = config.encoder, config.backbone, config.decoder
    d, width = dec.hidden_size, back.hidden_size
    total = _stack(back, words, words**2) + 2 * symbols * d * config.vocab_size
    if config.connector == "cross":
        total += _stack(enc, symbols, symbols**2) + _stack(dec, symbols, symbols**2)
        query = 2 * d * d + 2 * words * d * width + 2 * symbols * 2 * d * d + 4 * symbols * d
        total += query + dec.num_hidden_layers * 2 * symbols * (width * d + d * d)
    else:
        pairs = sum(length**2 for length in lengths)
        total += _stack(enc, symbols, pairs) + _stack(dec, symbols, pairs)
        total += 2 * words * width * (enc.hidden_size + d)
    return total / (symbols - words)


def _stack(config: Any, steps: int, pairs: int) -> float:
    """Products of a stack of Llama layers: linear maps a step, scores and sums a pair of steps."""
    d, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    linear = 2 * d * inner + 2 * d * config.num_key_value_heads * config.head_dim + 3 * d * config.intermediate_size
    return config.num_hidden_layers * (2.0 * steps * linear + 4.0 * pairs * inner)


transformers.AutoConfig.register(HATConfig.model_type, HATConfig, exist_ok=True)
transformers.AutoModel.register(HATConfig, HATModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(HATConfig, HATForCausalLM, exist_ok=True)
transformers.AutoModelForSequenceClassification.register(HATConfig, HATForSequenceClassification, exist_ok=True)
