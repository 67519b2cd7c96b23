"""Tokenizers made on the spot, as transformers has them: of bytes, of words, or of byte pairs learnt from texts.

Reach for them where a small model is trained from nothing; a pretrained one brings its own.
"""

import collections
from collections.abc import Iterable

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from downriver.core.errors import InputError

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
UNKNOWN = "<unk>"


def byte_tokenizer(max_length: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of one token a byte (256, and four special ones), between ``<s>`` and ``</s>``.

    >>> byte_tokenizer(16)("ab")["input_ids"]
    [1, 68, 69, 2]
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    return _wrapped(_bytes(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), regex=False), max_length)


def bpe_tokenizer(texts: Iterable[str], size: int, *, context: int = 512) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of ``size`` tokens learnt from the texts; every text can be written in it and read back.

    ``size`` counts the four special tokens and the 256 bytes; fewer come out when the texts have no more pairs.
    ``context`` is where texts are cut. Raises ``InputError`` for a size below 260.

    >>> tokenizer = bpe_tokenizer(["the river and the sea"] * 9, 300)
    >>> tokenizer.decode(tokenizer("the río")["input_ids"], skip_special_tokens=True)
    'the río'
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(SPECIAL) + len(alphabet):
        raise InputError(f"size is {size}: {len(SPECIAL) + len(alphabet)} at least are expected, one token a byte")
    learnt = _bytes(Tokenizer(models.BPE()), regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    learnt.train_from_iterator(texts, trainer)
    return _wrapped(learnt, context)


def word_tokenizer(
    texts: Iterable[str], size: int | None = None, *, context: int = 512, lower: bool = True, end: bool = True
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of one token a word or punctuation mark: the ``size`` most frequent of the texts, or all of them.

    Other words become ``<unk>``. ``size`` counts the five special tokens. Equal frequencies go by alphabet, so that
    the same texts give the same tokenizer. ``lower`` puts everything in lower case; ``end`` closes a text with
    ``</s>``. Raises ``InputError`` when there is no word.

    >>> tokenizer = word_tokenizer(["the river , the sea"], 7)
    >>> tokenizer.convert_ids_to_tokens(tokenizer("The sea")["input_ids"])
    ['<s>', 'the', '<unk>', '</s>']
    """
    split = pre_tokenizers.Whitespace() if lower else pre_tokenizers.WhitespaceSplit()
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(text.lower() if lower else text))
    if not counts:
        raise InputError("texts hold no word: a tokenizer of words needs some")
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    special = [*SPECIAL, UNKNOWN]
    kept = [word for word in ranked if word not in special][: None if size is None else max(0, size - len(special))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *kept])}, unk_token=UNKNOWN))
    words.pre_tokenizer = split
    if lower:
        words.normalizer = normalizers.Lowercase()
    return _wrapped(words, context, unknown=UNKNOWN, end=end)


def _bytes(tokenizer: Tokenizer, *, regex: bool) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrapped(
    tokenizer: Tokenizer, max_length: int, *, unknown: str | None = None, end: bool = True
) -> transformers.PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A",
        pair="<s> $A </s> $B </s>" if end else "<s> $A $B",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token=unknown,
    )
