"""Perplexity of causal language models, text by text, and a small fixed set of texts that stands for a model's health.

Reach for ``perplexity`` to score texts of your own, and for ``SurrogatePerplexity`` after every change of weights,
where benchmarks would cost too much. Yang et al., "The Butterfly Effect of Model Editing" (2024). Departures: the
default texts are sentences that package registries ship (the authors' ME-PPL file is read where you have it);
exponentials are taken in float64, so a text turns infinite at 709 nats a token instead of 88; NaN counts as infinite.
"""

import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.evaluate.predict import MOST_LOGITS
from downriver.models.features import inference
from downriver.models.language import language_model
from downriver.models.model import Model

Reduction = Literal["mean_of_exp", "exp_of_mean"]

PACKAGED = {"packaged_50": 50, "packaged_1k": 1000, "packaged_10k": 10_000}
"""Sets of packaged sentences by name; the sizes are the paper's."""


@dataclass(frozen=True, eq=False)
class PerplexityReport:
    """What ``perplexity`` found: ``score``, the ``per_text`` perplexities (n,) float64, and ``n_tokens`` (n,), how many
    tokens of each text were predicted. ``float(report)`` is the score."""

    score: float
    per_text: np.ndarray
    n_tokens: np.ndarray

    @property
    def infinite(self) -> int:
        """How many texts have an infinite perplexity."""
        return int(np.isinf(self.per_text).sum())

    def __float__(self) -> float:
        return self.score


def perplexity(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Any = None,
    *,
    reduction: Reduction = "mean_of_exp",
    batch_size: int = 16,
    start_token: bool = False,
    max_length: int | None = None,
) -> PerplexityReport:
    """The perplexity of every text, exp(mean negative log-likelihood of its tokens), and of all together.

    Log-likelihoods are taken in float32 whatever the model's type. Texts are padded here, on the right and masked, so
    neither the tokenizer's padding nor the batch size changes a value. The model's mode is left as it was.

    Parameters
    ----------
    model, tokenizer
        A ``Model`` of kind ``causal-lm``, or a transformers model with its tokenizer.
    texts
        At least two tokens each (one with a start token): the first has nothing to be predicted from.
    reduction
        ``mean_of_exp`` (default, the paper's): the mean of the texts' perplexities, which one broken text moves.
        ``exp_of_mean``: exp of the mean over all tokens, what is usually called the perplexity of a corpus.
    batch_size
        Texts at once (16, the paper's); fewer where their logits would take more than 256 MB.
    start_token
        Put the tokenizer's beginning-of-text token before every text. Off by default, as in the paper.
    max_length
        Cut texts at so many tokens, the start token included; by default what the model takes.

    Raises ``InputError`` for no texts, a text that is too short (its number is named), no start token, and parameters
    out of range.

    >>> from downriver.models import small
    >>> found = perplexity(small("causal-lm", "nano"), ["a river", "the sea"])
    >>> found.n_tokens.tolist(), found.score == float(found.per_text.mean())
    ([6, 6], True)
    """
    if reduction not in get_args(Reduction):
        raise unknown("reduction of perplexities", reduction, get_args(Reduction))
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1 is expected")
    lm = language_model(model, tokenizer)
    rows = _encode(lm, texts, start_token, lm.max_length if max_length is None else max_length)
    lengths = np.array([len(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    nats, n_tokens, done = np.empty(len(rows)), lengths - 1, 0
    with inference(lm):
        while done < len(rows):
            longest = int(lengths[order[done]])
            size = max(1, min(batch_size, MOST_LOGITS // (longest * len(lm.processor))))
            batch = order[done : done + size]
            nats[batch] = _nats(lm, [rows[i] for i in batch])
            done += size
    with np.errstate(over="ignore"):
        per_text = np.exp(nats / n_tokens)
        score = per_text.mean() if reduction == "mean_of_exp" else np.exp(nats.sum() / n_tokens.sum())
    return PerplexityReport(float(score), per_text, n_tokens)


@dataclass(frozen=True)
class SurrogatePerplexity:
    """Perplexity on one fixed set of texts, called on a model: a cheap stand-in for benchmarks.

    Parameters
    ----------
    texts
        ``packaged_50`` (default), ``packaged_1k``, ``packaged_10k``: so many sentences of ``packaged_texts``. A list of
        texts of your own: the nearer to what the model is for, the better the stand-in. A path: ``.txt`` with a text a
        line, or ``.json`` with a list of texts or of objects with the key ``Text`` (the authors' ``ME-PPL_50.json``,
        from ``data/ME-PPL`` of github.com/WanliYoung/Collapse-in-Model-Editing).
    reduction, batch_size, start_token, max_length
        As in ``perplexity``; the defaults are the paper's.

    >>> from downriver.models import small
    >>> surrogate = SurrogatePerplexity(["a river", "the sea"])
    >>> round(surrogate(small("causal-lm", "nano")).score) in range(200, 320)  # 260 tokens, nothing learnt
    True
    """

    texts: Sequence[str] | str | os.PathLike[str] = "packaged_50"
    reduction: Reduction = "mean_of_exp"
    batch_size: int = 16
    start_token: bool = False
    max_length: int | None = None

    def __call__(self, model: nn.Module, tokenizer: Any = None) -> PerplexityReport:
        """The perplexity of the model on the texts."""
        return perplexity(
            model,
            self.loaded,
            tokenizer,
            reduction=self.reduction,
            batch_size=self.batch_size,
            start_token=self.start_token,
            max_length=self.max_length,
        )

    @functools.cached_property
    def loaded(self) -> tuple[str, ...]:
        """The texts themselves, read once."""
        if not isinstance(self.texts, str | os.PathLike):
            return tuple(self.texts)
        if str(self.texts) in PACKAGED:
            return packaged_texts(PACKAGED[str(self.texts)])
        if not Path(self.texts).suffix:
            raise unknown("set of texts", self.texts, PACKAGED)
        return tuple(_read(Path(self.texts)))


def packaged_texts(n: int = 50) -> tuple[str, ...]:
    """Sentences of real English of 60 to 200 characters, by turns from Python's manual and from quotations.

    Always the same ones, and the first of any larger number. Whole sentences only: one odd fragment with a perplexity
    of ten thousands would be all that a mean of perplexities shows. Fetched on first use: ``AssetUnavailable`` where
    the Debian packages cannot be had; ``InputError`` for more sentences than there are.
    """
    turns = _packaged()
    most = len(turns) * min(map(len, turns))
    if not 1 <= n <= most:
        raise InputError(f"{n} packaged texts: from 1 to {most} are expected")
    return tuple(text for turn in zip(*turns, strict=False) for text in turn)[:n]


def sentences(text: str) -> list[str]:
    """The plain sentences of a text: 60 to 200 characters, from a capital to a full stop, no markup.

    >>> sentences("Title\\n===\\n\\nA river carries water from the hills\\nthrough many towns to the sea. See *here*.")
    ['A river carries water from the hills through many towns to the sea.']
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if re.fullmatch(r"[A-Z][\w ,;'’()?!-]{58,198}[.?!]", sentence):
                found.append(sentence)
    return found


@functools.cache
def _packaged() -> list[list[str]]:
    """All sentences of each source, each once, in an order that is drawn once and for all."""
    from downriver.tasks.builtin import SOURCES

    turns = []
    for name in ("manual", "quotations"):
        found = list(dict.fromkeys(s for document in sorted(SOURCES[name]()) for s in sentences(document)))
        turns.append([found[i] for i in generator("packaged texts", name).permutation(len(found))])
    return turns


def _read(file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(f"texts: there is no file {file}")
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            return [line for line in content.splitlines() if line.strip()]
        if file.suffix == ".json":
            rows = json.loads(content)
            if not isinstance(rows, list):
                raise TypeError(f"it holds a {type(rows).__name__}")
            return [row["Text"] if isinstance(row, dict) else row for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} holds no texts: a JSON list of texts, or of objects with the key 'Text', is expected ({error})"
        ) from None
    raise InputError(f"{file}: a .txt or .json file of texts is expected")


def _encode(lm: Model, texts: Sequence[str], start_token: bool, max_length: int) -> list[list[int]]:
    """Token ids without padding and without special tokens but the start token asked for."""
    if isinstance(texts, str) or len(texts) == 0:
        raise InputError("perplexity of no texts: a list of at least one is expected")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise InputError(f"text {number} is {text!r}: a string is expected")
    start = [lm.processor.bos_token_id] if start_token else []
    if start == [None]:
        raise InputError("start_token: the tokenizer has no beginning-of-text token; leave start_token off")
    if max_length < 2:
        raise InputError(f"max_length is {max_length}: at least 2 tokens are expected")
    encoded = lm.processor(list(texts), add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    rows = [(start + list(ids))[:max_length] for ids in encoded]
    for number, row in enumerate(rows, start=1):
        if len(row) < 2:
            least = "one token" if start_token else "two tokens, or one with start_token=True,"
            raise InputError(f"text {number} ({texts[number - 1][:40]!r}) is too short: at least {least} is expected")
    return rows


def _nats(lm: Model, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The summed negative log-likelihood of each row's tokens but the first; infinite where it is no number."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=lm.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=lm.device)
    backbone: Any = lm.backbone
    logits = backbone(input_ids=ids, attention_mask=mask).logits[:, -width:]  # without prompts put before the tokens
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
    return losses.sum(dim=1, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf).cpu().numpy()
