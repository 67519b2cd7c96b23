"""The loss of a language model on every document: of a causal or a masked one, of a prior and a conditional in one go.

Reach for it to select by loss: CoLoR-Filter (Brandfonbrener et al. 2024) takes the documents whose loss a model tuned
on the target lowers most; perplexity filters take one model. The score is the mean next-token cross-entropy over all
positions, in evaluation mode, as there. For masked models it is the pseudo-loss of Salazar et al. 2020, by default with
every seventh token hidden at once instead of one at a time. A model with a LoRA adapter is the prior while the adapter
is off and the conditional while it is on: two columns from one model in memory (the paper tunes all weights).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.core.errors import DownriverError, InputError
from downriver.core.io import fingerprint
from downriver.data.score.reading import by_length, charged, weights_fingerprint
from downriver.data.score.scorer import Batch, texts_of
from downriver.models.language import language_model
from downriver.models.load import load
from downriver.models.model import Model, quiet

ROWS = 4096  # token positions whose cross-entropy is taken at once: their logits are copied in float32


class LossScorer:
    """Loss of every document under a language model, in nats a token (``mean``) or a document (``sum``).

    A document longer than ``context`` tokens is read in windows that overlap by one token, so that every token but the
    first of the document is predicted once, with what stands before it in its window. Texts are encoded as the
    tokenizer does by default (with its special tokens). Documents of one token have no loss: NaN.

    Parameters
    ----------
    model
        A ``Model`` of kind ``causal-lm`` or ``masked-lm``, a folder or name for ``models.load``, or a causal language
        model of transformers together with its ``tokenizer``. With a peft adapter, the columns are ``prior`` (adapter
        off) and ``conditional`` (on); ``prior=False`` leaves the first away.
    reduction
        ``mean`` (the default, the paper's) or ``sum``, which selects by length.
    context
        Tokens of a window, 512 by default as in the paper; at most what the model takes.
    batch_tokens
        Tokens of a batch, padding included: 8192 by default (the paper's 65 536 need a GPU).
    stride
        For masked models: every ``stride``-th token is hidden at once; ``None`` hides one at a time (exact, and as many
        passes as tokens).
    dtype
        Run the forward pass in this type by autocast (``torch.bfloat16`` on a GPU); the loss is taken in float32.

    The scores do not depend on batches, padding and order (to about 1e-6 in float32).

    Raises ``InputError`` for a model of another kind, a tokenizer whose ids the model does not have, a context of less
    than two tokens; ``DownriverError`` naming the document whose loss is not finite.

    >>> from downriver.models import small
    >>> scorer = LossScorer(small("causal-lm", "nano"))
    >>> scorer.score([{"text": "a river", "id": "a"}]).round(1).tolist()
    [5.6]
    """

    executor = "serial"

    def __init__(
        self,
        model: Model | nn.Module | str | Path,
        tokenizer: Any = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        context: int = 512,
        batch_tokens: int = 8192,
        stride: int | None = 7,
        prior: bool = True,
        dtype: torch.dtype | None = None,
        name: str = "loss",
    ) -> None:
        if isinstance(model, str | Path):
            model = load(model)
        if not (isinstance(model, Model) and model.kind == "masked-lm" and tokenizer is None):
            model = language_model(model, tokenizer)
        if reduction not in ("mean", "sum"):
            raise InputError(f"reduction {reduction!r}: 'mean' or 'sum' is expected")
        if context < 2 or batch_tokens < 2 or (stride is not None and stride < 1):
            raise InputError(
                f"context {context}, batch_tokens {batch_tokens}, stride {stride}: at least 2, 2 and 1 are expected"
            )
        self.model, self.name, self.reduction = model, name, reduction
        self.masked = model.kind == "masked-lm"
        self.context = min(context, _longest(model))
        self.batch_tokens, self.stride, self.dtype = batch_tokens, stride if self.masked else 0, dtype
        self.both = prior and hasattr(model.backbone, "disable_adapter")
        self.columns = ("prior", "conditional") if self.both else ("loss",)
        self.flops_per_token = 0.0
        _check_tokenizer(model)

    @property
    def fingerprint(self) -> str:
        """Of the weights, the tokenizer and the settings that the numbers depend on."""
        return fingerprint("loss", weights_fingerprint(self.model), self.columns, str(self.dtype), self.reads)

    @property
    def reads(self) -> str:
        """Of what is read and how: losses can be subtracted only where this is the same."""
        tokenizer = self.model.processor
        whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        return fingerprint("loss reads", whole, self.context, self.reduction, self.stride, self.masked)

    def score(self, batch: Batch) -> np.ndarray:
        """(n,), or (n, 2) with a prior."""
        texts = texts_of(batch, self.name)
        windows, owner = self._windows(texts)
        sums = np.zeros((len(texts), len(self.columns)))
        counts = np.zeros(len(texts))
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for rows in by_length([len(window) for window in windows], self.batch_tokens):
                    losses, predicted = self._losses([windows[row] for row in rows])
                    np.add.at(sums, owner[rows], losses)
                    np.add.at(counts, owner[rows], predicted)
        finally:
            self.model.train(training)
        counts[counts == 0] = np.nan
        scores = sums / counts[:, None] if self.reduction == "mean" else np.where(counts[:, None] > 0, sums, np.nan)
        self._check_finite(scores, counts, batch)
        return scores if self.both else scores[:, 0]

    def _windows(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of every window, and the text that it is of."""
        windows: list[list[int]] = []
        owner: list[int] = []
        with quiet():
            if self.masked:  # each window gets the special tokens that the model knows texts with
                found = self.model.processor(
                    texts, truncation=True, max_length=self.context, return_overflowing_tokens=True
                )
                return found["input_ids"], np.array(found["overflow_to_sample_mapping"])
            encoded = self.model.processor(texts, verbose=False)["input_ids"]
        step = self.context - 1
        for number, ids in enumerate(encoded):
            parts = [ids[at : at + self.context] for at in range(0, max(len(ids) - 1, 1), step)]
            windows += parts
            owner += [number] * len(parts)
        return windows, np.array(owner)

    def _losses(self, windows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The summed loss of every window, (rows, columns), and the number of tokens that were predicted, (rows,)."""
        device, longest = self.model.device, max(map(len, windows))
        lengths = torch.tensor([len(window) for window in windows])
        ids = torch.full((len(windows), longest), self.model.processor.pad_token_id or 0)
        for row, window in zip(ids, windows, strict=True):
            row[: len(window)] = torch.tensor(window)
        ids, lengths = ids.to(device), lengths.to(device)
        real = torch.arange(longest, device=device) < lengths[:, None]
        columns = []
        for off in (True, False) if self.both else (False,):
            backbone: Any = self.model.backbone
            with backbone.disable_adapter() if off else contextlib.nullcontext():
                loss, predicted = self._masked(ids, real) if self.masked else self._causal(ids, real)
            columns.append(loss)
        return torch.stack(columns, dim=1).double().cpu().numpy(), predicted.cpu().numpy()

    def _causal(self, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:].masked_fill(~real[:, 1:], -100)  # no position sees what is padded behind it
        return _summed(self._logits(input_ids=ids), labels), (labels != -100).sum(dim=1)

    def _masked(self, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        tokenizer = self.model.processor
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
        ordinary = real & ~special
        order = ordinary.cumsum(dim=1) - 1  # the place of an ordinary token among those of its row
        most = int(ordinary.sum(dim=1).max())
        passes = min(self.stride or most, most)
        loss = torch.zeros(len(ids), device=ids.device)
        for turn in range(passes):
            hidden = ordinary & (order % passes == turn)
            labels = ids.masked_fill(~hidden, -100)
            seen = ids.masked_fill(hidden, tokenizer.mask_token_id)
            loss = loss + _summed(self._logits(input_ids=seen, attention_mask=real.long()), labels)
        return loss, ordinary.sum(dim=1)

    def _logits(self, **inputs: Tensor) -> Tensor:
        shape = inputs["input_ids"].shape

        def forward() -> Tensor:
            with self._precision():
                return self.model.backbone(**inputs, **self._options()).logits[:, -shape[1] :]

        logits, self.flops_per_token = charged(forward, shape.numel(), self.flops_per_token)
        return logits

    def _options(self) -> dict[str, Any]:
        return {} if self.masked else {"use_cache": False}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.dtype)

    def _check_finite(self, scores: np.ndarray, counts: np.ndarray, batch: Batch) -> None:
        bad = ~np.isfinite(scores).all(axis=1) & ~np.isnan(counts)
        if bad.any():
            place = int(bad.argmax())
            document = batch[place]
            name = place if isinstance(document, str) else document.get("id", place)
            raise DownriverError(
                f"scorer {self.name!r}, document {name!r}: the loss of {self.model.source or 'the model'} is"
                f" {scores[place].tolist()}: broken weights, or a number type with too small a range"
            )


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32, summed over every row, (rows,); labels of -100 do not count."""
    parts = zip(_rows(logits.flatten(0, 1)), _rows(labels.flatten()), strict=True)
    losses = [F.cross_entropy(part.float(), wanted, ignore_index=-100, reduction="none") for part, wanted in parts]
    return torch.cat(losses).view(labels.shape).sum(dim=1)


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.split(ROWS))


def _longest(model: Model) -> int:
    """The tokens that a model can read at once, whatever length its texts are cut at elsewhere."""
    limits = [
        getattr(model.backbone.config, "max_position_embeddings", None),
        getattr(model.processor, "model_max_length", None),
    ]
    return int(min(limit for limit in (*limits, 2**20) if limit))


def _check_tokenizer(model: Model) -> None:
    backbone: Any = model.backbone
    rows, highest = backbone.get_input_embeddings().weight.shape[0], max(model.processor.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"the tokenizer has ids up to {highest} and {model.source or 'the model'} knows {rows} tokens: they do not"
            " belong together"
        )
    if model.kind == "masked-lm" and model.processor.mask_token_id is None:
        raise InputError(f"the tokenizer of {model.source or 'the model'} has no mask token")
