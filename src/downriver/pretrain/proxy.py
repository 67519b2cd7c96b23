"""Small stand-ins for a large run: what a mixture of domains leads to, in milliseconds or in seconds.

Reach for them to sweep mixtures before the large run: Liu et al. 2024, «RegMix», arXiv:2407.01492, trains 512 models of
1M parameters. ``ProxyTrainer`` trains a small transformer on the mixture; ``NgramProxy`` counts pairs of words, which
takes no training at all and ranks mixtures of texts by what they share with the validation texts. Both are called with
the weights of the domains and give the loss on each validation domain.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from downriver.core.errors import InputError
from downriver.data.mix.sampler import MixtureSampler
from downriver.models import small_language_model, word_tokenizer
from downriver.models.features import inference
from downriver.models.model import Model
from downriver.training import TokenRows, fine_tune
from downriver.training.rows import in_blocks

Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ProxyResult:
    """Loss in nats a token by validation domain, how often each training domain was read, and the model, if any."""

    losses: dict[str, float]
    epochs: dict[str, float]
    model: Model | None = None


class NgramProxy:
    """An interpolated bigram model of words, trained on any mixture in milliseconds.

    p(w | h) = (c(h, w) + κ p(w)) / (c(h) + κ), where counts c are those that ``tokens`` words of the mixture have on
    average (a domain that is too small for its share is repeated), and p(w) = (c(w) + β / V) / (N + β). Everything but
    the weights is prepared once.

    Args:
        domains: texts to train on, by domain.
        validation: texts to measure on, by domain.
        tokens: words of the simulated run; by default as many as the domains have.
        vocabulary: the most frequent words of the training texts are kept, the others are one word.
        kappa, beta: strength of the two interpolations (5 and 100: plain choices, not tuned).

    Raises ``InputError`` for a domain without words.

    >>> proxy = NgramProxy({"a": ["the river runs"] * 9, "b": ["x y z"] * 9}, {"a": ["the river runs"]})
    >>> proxy({"a": 1, "b": 0}).losses["a"] < proxy({"a": 0.1, "b": 0.9}).losses["a"]
    True
    """

    def __init__(
        self,
        domains: Texts,
        validation: Texts,
        *,
        tokens: float | None = None,
        vocabulary: int = 20_000,
        kappa: float = 5.0,
        beta: float = 100.0,
    ) -> None:
        tokenizer = word_tokenizer([text for texts in domains.values() for text in texts], vocabulary)
        self.size, self.kappa, self.beta = len(tokenizer), kappa, beta
        self.names = tuple(domains)
        counted = {name: _words(texts, tokenizer, name) for name, texts in domains.items()}
        self.available = {name: len(words) for name, words in counted.items()}
        self.tokens = float(tokens or sum(self.available.values()))
        if not self.tokens > 0:
            raise InputError(f"tokens is {tokens}: a positive number is expected")
        self._validation = {}
        for name, texts in validation.items():
            pairs, times = np.unique(_pairs(_words(texts, tokenizer, name), self.size), return_counts=True)
            self._validation[name] = times, [self._seen(counted[d], pairs) for d in self.names]

    def __call__(self, weights: Mapping[str, float], seed: int = 0) -> ProxyResult:
        """The losses of the mixture; ``seed`` changes nothing here."""
        shares = _shares(weights, self.names)
        scale = [shares[name] * self.tokens / self.available[name] for name in self.names]
        losses = {}
        for name, (times, seen) in self._validation.items():
            pair, first, second = (sum(s * counts[k] for s, counts in zip(scale, seen, strict=True)) for k in range(3))
            unigram = (second + self.beta / self.size) / (self.tokens + self.beta)
            losses[name] = float(-(times @ np.log((pair + self.kappa * unigram) / (first + self.kappa))) / times.sum())
        return ProxyResult(losses, dict(zip(self.names, scale, strict=True)))

    def _seen(self, words: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How often a domain has each pair, its first word followed by any, and its second word."""
        found, counts = np.unique(_pairs(words, self.size), return_counts=True)
        place = np.minimum(np.searchsorted(found, pairs), len(found) - 1)
        pair = np.where(found[place] == pairs, counts[place], 0)
        first = np.bincount(words[:-1], minlength=self.size)[pairs // self.size]
        second = np.bincount(words, minlength=self.size)[pairs % self.size]
        return pair, first, second


class ProxyTrainer:
    """A small Llama trained on any mixture of the domains; every call trains one from nothing.

    Args:
        domains, validation: texts by domain.
        steps, batch_size: steps of ``batch_size`` blocks of ``context`` tokens.
        width, layers, heads, context: of the model. The paper's are 256, 2, 8 and 2048, and 1000 steps of 512 blocks.
        learning_rate: constant after a tenth of warm-up, as the paper's 4e-4; the small model here takes 3e-3.
        vocabulary: words of a tokenizer made from the training texts; or give a ``tokenizer``.

    Runs of one seed start from the same weights, so that two mixtures can be compared in pairs.

    >>> texts = {"a": ["the river runs to the sea . " * 9] * 9, "b": ["x y z . " * 20] * 9}
    >>> proxy = ProxyTrainer(texts, {"a": texts["a"][:1]}, steps=3, batch_size=4, width=16, context=16)
    >>> sorted(proxy({"a": 0.5, "b": 0.5}, seed=1).losses)
    ['a']
    """

    def __init__(
        self,
        domains: Texts,
        validation: Texts,
        *,
        steps: int = 200,
        batch_size: int = 32,
        width: int = 64,
        layers: int = 1,
        heads: int = 4,
        context: int = 64,
        learning_rate: float = 3e-3,
        vocabulary: int = 4096,
        tokenizer: Any = None,
    ) -> None:
        if tokenizer is None:
            every = [text for texts in domains.values() for text in texts]
            tokenizer = word_tokenizer(every, vocabulary, context=context)
        self.tokenizer, self.steps, self.batch_size = tokenizer, steps, batch_size
        self.size = {"width": width, "layers": layers, "heads": heads, "context": context}
        self.learning_rate = learning_rate
        blocks = {name: _blocks(texts, tokenizer, context, name) for name, texts in domains.items()}
        self.sizes = {name: len(rows) for name, rows in blocks.items()}
        rows = datasets.Dataset.from_dict({"input_ids": [row for rows in blocks.values() for row in rows]})
        self._rows = TokenRows("mixture", {"train": rows}, pad=tokenizer.pad_token_id)
        self._validation = {
            name: torch.tensor(_blocks(texts, tokenizer, context, name)) for name, texts in validation.items()
        }

    def __call__(self, weights: Mapping[str, float], seed: int = 0) -> ProxyResult:
        """Train on the mixture and measure; charges what the training took."""
        sampler = MixtureSampler(self.sizes, _shares(weights, self.sizes), seed=seed)
        model = fine_tune(
            small_language_model("causal-lm", self.tokenizer, seed=seed, **self.size),
            self._rows,
            f"{self.steps} steps",
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            schedule="constant",
            seed=seed,
            order=sampler.row,
            in_place=True,
        )
        losses = {name: _loss(model, blocks) for name, blocks in self._validation.items()}
        return ProxyResult(losses, sampler.epochs(self.steps * self.batch_size), model)


def _loss(model: Model, blocks: torch.Tensor, batch: int = 64) -> float:
    with inference(model):
        parts = [
            model(input_ids=ids, labels=ids)["loss"].item() * len(ids) for ids in blocks.to(model.device).split(batch)
        ]
    return sum(parts) / len(blocks)


def _shares(weights: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    from downriver.data.mix.space import shares

    known = tuple(names)
    rows, _ = shares({name: [value] for name, value in weights.items()}, known, "weights")
    return dict(zip(known, rows[0].tolist(), strict=True))


def _words(texts: Sequence[str], tokenizer: Any, name: str) -> np.ndarray:
    encoded = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"] if len(texts) else []
    words = np.array([word for row in encoded for word in row], dtype=np.int64)
    if len(words) <= 2 * len(texts):
        raise InputError(f"domain {name!r} holds no words")
    return words


def _pairs(words: np.ndarray, size: int) -> np.ndarray:
    return words[:-1] * size + words[1:]


def _blocks(texts: Sequence[str], tokenizer: Any, context: int, name: str) -> list[list[int]]:
    found = list(in_blocks(texts, tokenizer, context))
    if not found:
        raise InputError(f"domain {name!r} fills no block of {context} tokens: more text is expected")
    return found
