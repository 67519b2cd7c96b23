"""One way to ask a causal and a diffusion language model: continue these tokens, and what do those tokens take.

Reach for it to give ``needle_grid`` or ``ppl_curve`` settings of its own, or a model of another kind: any object with
the two methods of ``Reader``, and a tokenizer, will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from downriver.core.errors import InputError
from downriver.models.language import language_model
from downriver.models.masked_diffusion import Estimator, MaskedDiffusionLM, Remasking
from downriver.models.model import Model

Spans = Sequence[tuple[int, int]]


class Reader(Protocol):
    """What long-context evaluations ask of a model."""

    @property
    def tokenizer(self) -> Any:
        """As transformers has them."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """The ``tokens`` tokens (or fewer) that follow each of several prompts of one length."""
        ...

    def score(self, ids: Sequence[int], spans: Spans) -> np.ndarray:
        """For each span (first, one after the last) of a text the nats a token, given all that comes before it."""
        ...


@dataclass(frozen=True)
class CausalReader:
    """A causal model of transformers: greedy, with a cache; a text is scored in one pass, ``piece`` tokens at once."""

    model: Any
    tokenizer: Any
    piece: int = 1024

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.model.device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return out[:, ids.shape[1] :].tolist()

    @torch.no_grad()
    def score(self, ids: Sequence[int], spans: Spans) -> np.ndarray:
        if any(first < 1 for first, _ in spans):
            raise InputError("a span begins with the text: a causal model needs a token to predict from")
        end = max(after for _, after in spans)
        row = torch.tensor([ids[:end]], device=self.model.device)
        cache, nats = DynamicCache(config=self.model.config), []
        for start in range(0, end - 1, self.piece):
            stop = min(start + self.piece, end - 1)
            logits = self.model(row[:, start:stop], past_key_values=cache, use_cache=True).logits[0]
            nats.append(F.cross_entropy(logits.float(), row[0, start + 1 : stop + 1], reduction="none"))
        values = torch.cat(nats).double().cpu().numpy()  # of tokens 1, 2, ...
        return np.array([values[first - 1 : after - 1].mean() for first, after in spans])


@dataclass(frozen=True)
class DiffusionReader:
    """A masked diffusion model; the settings are those of its ``generate`` and ``nll``, with the paper's defaults.

    A length to be generated that the blocks do not divide is generated up to the next whole block, and cut.
    """

    model: MaskedDiffusionLM
    tokenizer: Any
    block_length: int = 32
    steps_per_block: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    cfg_scale: float = 0.0
    remasking: Remasking = "low_confidence"
    n_mc: int = 8
    estimator: Estimator = "mean"
    batch_size: int = 8
    seed: int = 0

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        block = min(self.block_length, tokens)
        blocks = -(-tokens // block)
        out = self.model.generate(
            ids,
            blocks * block,
            block_length=block,
            steps=blocks * min(self.steps_per_block, block),
            temperature=self.temperature,
            top_p=self.top_p,
            cfg_scale=self.cfg_scale,
            remasking=self.remasking,
            seed=self.seed,
        )
        return out[:, ids.shape[1] :][:, :tokens].tolist()

    def score(self, ids: Sequence[int], spans: Spans) -> np.ndarray:
        settings: Any = {"n_mc": self.n_mc, "estimator": self.estimator, "batch_size": self.batch_size}
        return np.array([self.model.nll(ids[:a], ids[a:b], seed=self.seed + a, **settings) for a, b in spans])


def reader(model: Any, tokenizer: Any = None) -> Reader:
    """The model as a ``Reader``: itself when it is one, else by what kind of language model it is.

    Takes a ``Model`` or a transformers model with its tokenizer. Raises ``InputError`` without a tokenizer, and for a
    model that neither continues texts nor fills in masks.

    >>> from downriver.models import small
    >>> type(reader(small("causal-lm", "nano"))).__name__
    'CausalReader'
    """
    if not isinstance(model, nn.Module):
        if not all(hasattr(model, name) for name in ("generate", "score", "tokenizer")):
            raise InputError(f"a {type(model).__name__} was given: a language model or a Reader is expected")
        return model
    backbone, processor = (model.backbone, model.processor) if isinstance(model, Model) else (model, None)
    trunk: Any = backbone
    if hasattr(backbone, "get_base_model"):
        trunk = trunk.get_base_model()
    if isinstance(trunk, MaskedDiffusionLM):
        if tokenizer is None and processor is None:
            raise InputError("a MaskedDiffusionLM comes without a tokenizer: give it one as tokenizer=")
        return DiffusionReader(trunk, tokenizer or processor)
    lm = language_model(model, tokenizer)
    return CausalReader(lm.backbone, lm.processor)
