"""Small models of any modality, with random weights from a seed, through transformers' own configuration classes.

Reach for it in tests, in studies that pretrain from nothing, and for size ladders. Text models come with a byte-level
tokenizer that needs no download.
"""

from typing import Any, Literal

import transformers

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import seeded
from downriver.models.images import ImageProcessor
from downriver.models.mlp import Mlp, MlpConfig
from downriver.models.model import Model
from downriver.models.tokenizers import byte_tokenizer

# width, layers, attention heads, longest text in tokens, image side in pixels
SIZES = {"nano": (32, 2, 2, 128, 32), "tiny": (128, 4, 4, 256, 32), "small": (384, 6, 6, 512, 64)}
KINDS = ("causal-lm", "masked-lm", "text-encoder", "vit", "resnet", "mlp")


def small(kind: str, size: str = "tiny", seed: int = 0) -> Model:
    """Build a small model with random weights.

    Parameters
    ----------
    kind
        ``causal-lm`` (Llama), ``masked-lm`` and ``text-encoder`` (BERT), ``vit``, ``resnet``, or ``mlp`` for tables.
    size
        ``nano`` (width 32, 2 layers), ``tiny`` (128, 4) or ``small`` (384, 6). Texts are cut at 128, 256 and 512 bytes,
        images scaled to 32, 32 and 64 pixels.
    seed
        Equal seeds give equal weights, whatever was drawn before.

    Raises ``InputError`` for an unknown kind or size.

    Example
    -------
    >>> lm = small("causal-lm", "nano")
    >>> lm.kind, lm.processor.decode(lm.processor("río")["input_ids"], skip_special_tokens=True)
    ('causal-lm', 'río')
    """
    if kind not in KINDS:
        raise unknown("kind of small model", kind, KINDS)
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    width, layers, heads, length, side = SIZES[size]
    source = f"small:{kind}:{size}:{seed}"
    with seeded("small", kind, size, seed):
        if kind == "mlp":
            mlp = Mlp(MlpConfig(hidden_size=width, layers=layers, seed=seed))
            return Model(mlp, kind="module", source=source, max_length=length)
        if kind in ("vit", "resnet"):
            vision = _vit(width, layers, heads, side) if kind == "vit" else _resnet(width, layers)
            images = ImageProcessor(height=side, width=side)
            return Model(vision, kind="vision-encoder", processor=images, pooling="mean", source=source)
        tokenizer = byte_tokenizer(length)
        if kind == "causal-lm":
            llama = _llama(width, layers, heads, length, tokenizer)
            return Model(llama, kind="causal-lm", processor=tokenizer, pooling="last", source=source, max_length=length)
        config = _bert(width, layers, heads, length, tokenizer)
        if kind == "masked-lm":
            bert: Any = transformers.BertForMaskedLM(config)
            return Model(bert, kind="masked-lm", processor=tokenizer, pooling="mean", source=source, max_length=length)
        bert = transformers.BertModel(config, add_pooling_layer=False)
        return Model(bert, kind="text-encoder", processor=tokenizer, pooling="mean", source=source, max_length=length)


def from_source(source: str) -> Model:
    """The model that a source of the form ``small:kind:size:seed`` names."""
    _, *parts = source.split(":")
    if len(parts) != 3 or not parts[2].isdigit():
        raise InputError(f"{source!r}: small:kind:size:seed is expected, like small:causal-lm:tiny:0")
    return small(parts[0], parts[1], int(parts[2]))


def small_language_model(
    kind: Literal["causal-lm", "masked-lm"],
    tokenizer: Any,
    *,
    width: int = 64,
    layers: int = 1,
    heads: int = 4,
    context: int = 64,
    seed: int = 0,
) -> Model:
    """A small language model with random weights over a tokenizer's own vocabulary.

    Parameters
    ----------
    kind
        ``causal-lm`` (Llama, MLP of 4 x width, tied embeddings) or ``masked-lm`` (BERT).
    tokenizer
        Of transformers: see ``word_tokenizer`` and ``bpe_tokenizer``. It must know a padding token.
    width, layers, heads, context
        ``width`` must be a multiple of ``heads``; texts are cut at ``context`` tokens.
    seed
        Equal seeds give equal weights, whatever was drawn before.

    Raises ``InputError`` for another kind, a width that the heads do not divide, or no padding token.

    >>> lm = small_language_model("causal-lm", byte_tokenizer(32), width=32, heads=2, context=32)
    >>> lm.kind, sum(p.numel() for p in lm.parameters())
    ('causal-lm', 24800)
    """
    if kind not in ("causal-lm", "masked-lm"):
        raise unknown("kind of small language model", kind, ("causal-lm", "masked-lm"))
    if width < 1 or width % heads:
        raise InputError(f"width {width}, heads {heads}: a width that the heads divide is expected")
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token: give it one")
    with seeded("small", kind, width, layers, heads, seed):
        if kind == "causal-lm":
            module: Any = _llama(width, layers, heads, context, tokenizer)
        else:
            module = transformers.BertForMaskedLM(_bert(width, layers, heads, context, tokenizer))
    pooling: Literal["last", "mean"] = "last" if kind == "causal-lm" else "mean"
    return Model(module, kind=kind, processor=tokenizer, pooling=pooling, max_length=context)


def _llama(width: int, layers: int, heads: int, length: int, tokenizer: Any) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def _bert(width: int, layers: int, heads: int, length: int, tokenizer: Any) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vit(width: int, layers: int, heads: int, side: int) -> transformers.PreTrainedModel:
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=side // 8,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def _resnet(width: int, layers: int) -> transformers.PreTrainedModel:
    stages = [width // 4 * 2**i for i in range(min(layers, 3))]
    config = transformers.ResNetConfig(
        embedding_size=stages[0], hidden_sizes=stages, depths=[2] * len(stages), layer_type="basic"
    )
    return transformers.ResNetModel(config)
