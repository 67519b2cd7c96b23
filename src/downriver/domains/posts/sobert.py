"""SOBert: an encoder pretrained on whole posts of one site, text and code together, in long blocks.

Reach for it when posts, tickets or threads of one's own are many and a general encoder does not know their language.
Mukherjee and Hellendoorn 2023, «Stack Over-Flowing with Results: The Case for Domain-Specific Pre-Training Over
One-Size-Fits-All Models», arXiv:2306.03268. No code was released: the vocabulary of 50 048 (about 50 000), one vote as
the filter, and the large model's 24 layers of width 1536 are assumed; with them the sizes come out as published (125
and 762 million parameters).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from downriver.core import Budget, unknown
from downriver.domains.posts.corpus import PostCorpus
from downriver.models import bpe_tokenizer, small_language_model
from downriver.models.model import Model
from downriver.pretrain.masked_lm import masked_lm

Size = Literal["tiny", "base", "large"]
SIZES: dict[str, tuple[int, int, int]] = {"tiny": (64, 2, 4), "base": (768, 12, 12), "large": (1536, 24, 24)}
VOCABULARY, CONTEXT = 50_048, 2048


def sobert(
    corpus: PostCorpus | Iterable[str],
    budget: Budget | str,
    *,
    size: Size = "base",
    tokenizer: Any = None,
    context: int = CONTEXT,
    batch_tokens: int = 524_288,
    learning_rate: float = 1e-4,
    min_score: int = 1,
    seed: int = 0,
    checkpoints: str | Path | None = None,
) -> Model:
    """Pretrain an encoder on a corpus of posts (or plain texts) from nothing: a masked LM with its tokenizer.

    Parameters
    ----------
    budget
        The paper's is ``"27e9 tokens"``: some 54 000 steps of half a million tokens.
    size
        ``base`` (12 layers, width 768; the paper finds it often enough), ``large`` (24, 1536), ``tiny`` (2, 64).
    tokenizer
        By default a byte-level BPE of 50 048 tokens learnt on the corpus, which keeps the white space of code.
    context
        Longest input, in tokens. Padding is never trained on: posts follow one another in blocks of this length.
    min_score
        Posts with fewer votes are left out.
    checkpoints
        A folder from which a killed run continues.

    The model saves and loads as every other: ``model.save(folder)`` gives a folder for ``AutoModelForMaskedLM``.

    >>> texts = [f"def f{i}(x):\\n    return x + {i}" for i in range(200)]
    >>> model = sobert(texts, "2 steps", size="tiny", context=32, batch_tokens=256)
    >>> model.kind, model.max_length
    ('masked-lm', 32)
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    texts = corpus.texts(min_score=min_score) if isinstance(corpus, PostCorpus) else corpus
    kept = list(texts)  # read twice: for the tokenizer, and for the blocks
    if tokenizer is None:
        tokenizer = train_tokenizer(kept, context=context)
    return masked_lm(
        untrained(size, tokenizer, context=context, seed=seed),
        kept,
        budget,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        seed=seed,
        checkpoints=checkpoints,
    )


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY, *, context: int = CONTEXT) -> Any:
    """A byte-level BPE learnt on the domain: nothing is unknown to it, and white space stays as it is.

    >>> tokenizer = train_tokenizer(["if x:\\n    return y"] * 50, 300)
    >>> tokenizer.decode(tokenizer("if x:\\n    return z")["input_ids"], skip_special_tokens=True)
    'if x:\\n    return z'
    """
    return bpe_tokenizer(texts, vocabulary, context=context)


def untrained(size: Size, tokenizer: Any, *, context: int = CONTEXT, seed: int = 0) -> Model:
    """The architecture with random weights: BERT with learned positions up to ``context``."""
    width, layers, heads = SIZES[size]
    return small_language_model(
        "masked-lm", tokenizer, width=width, layers=layers, heads=heads, context=context, seed=seed
    )
