"""A classifier as a scorer: the expected class, or the probabilities of all of them.

Reach for it to rate a corpus with a small trained model, like the quality raters of Meta-rater (Zhuang et al. 2025:
classes 0 to 5) or the educational-value classifier of FineWeb-Edu (one output). The continuous score is Σ i·P(i): the
re-implementations of the raters have it so, the paper does not say.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from downriver.core.errors import DownriverError, InputError
from downriver.core.io import fingerprint
from downriver.data.score.reading import by_length, charged, weights_fingerprint
from downriver.data.score.scorer import Batch, texts_of
from downriver.models.load import load
from downriver.models.model import SETTINGS, Model, quiet


class ClassifierScorer:
    """Σ i·P(class i) of every document; with ``expected_value=False`` the K probabilities.

    Parameters
    ----------
    model
        A ``Model`` with a head (a folder that ``Model.save`` wrote), or a folder or hub id of a transformers sequence
        classifier. One output is a regression: it is the score itself.
    max_length
        Longer texts are cut there; by default the model's own length.
    batch_tokens
        Tokens of a batch, padding included.
    device
        Where to put the model; it stays where it is by default.

    Raises ``InputError`` for a model without a head, ``DownriverError`` naming a document with a score that is not
    finite.

    >>> import datasets
    >>> from downriver.models import small
    >>> from downriver.tasks import from_datasets
    >>> rows = datasets.Dataset.from_dict({"text": list("abcdefghij"), "label": [0, 1] * 5})
    >>> task = from_datasets(rows, text="text", label="label", name="toy")
    >>> scorer = ClassifierScorer(small("text-encoder", "nano").with_head(task))
    >>> bool(0 <= scorer.score(["a river"])[0] <= 1)
    True
    """

    executor = "serial"

    def __init__(
        self,
        model: Model | str | Path,
        *,
        expected_value: bool = True,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        device: str | torch.device | None = None,
        name: str = "classifier",
    ) -> None:
        self.name, self.batch_tokens, self.expected_value = name, batch_tokens, expected_value
        self.model, self.tokenizer, self.outputs, labels, length = _opened(model)
        self.max_length = length if max_length is None else max_length
        if self.max_length < 1 or batch_tokens < 1:
            raise InputError(f"max_length {max_length}, batch_tokens {batch_tokens}: at least 1 is expected")
        if device is not None:
            self.model.to(device)
        whole = self.outputs == 1 or expected_value
        self.columns = ("expected",) if whole else tuple(f"p_{label}" for label in labels)
        self.flops_per_token = 0.0

    @property
    def fingerprint(self) -> str:
        return fingerprint("classifier", weights_fingerprint(self.model), self.columns, self.max_length)

    def score(self, batch: Batch) -> np.ndarray:
        """(n,) expected classes, or (n, K) probabilities."""
        texts = texts_of(batch, self.name)
        with quiet():
            encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        logits = np.empty((len(texts), self.outputs))
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for rows in by_length(lengths, self.batch_tokens):
                    inputs = {key: [encoded[key][row] for row in rows] for key in encoded}
                    padded = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
                    logits[rows] = self._logits(dict(padded.to(self._device())))
        finally:
            self.model.train(training)
        if not np.isfinite(logits).all():
            place = int((~np.isfinite(logits).all(axis=1)).argmax())
            document = batch[place]
            called = place if isinstance(document, str) else document.get("id", place)
            raise DownriverError(f"scorer {self.name!r}, document {called!r}: the model's output is not finite")
        if self.outputs == 1:
            return logits[:, 0]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return shares @ np.arange(self.outputs) if self.expected_value else shares

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _logits(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        def forward() -> torch.Tensor:
            out: Any = self.model(**inputs)
            return out["logits"]

        logits, self.flops_per_token = charged(forward, inputs["input_ids"].numel(), self.flops_per_token)
        return logits.float().cpu().numpy()


def _opened(model: Model | str | Path) -> tuple[torch.nn.Module, Any, int, list[str], int]:
    """The module, its tokenizer, how many outputs it has, their names, and the longest text."""
    if isinstance(model, str | Path) and ((folder := Path(model)) / SETTINGS).is_file():
        model = load(folder)
    if isinstance(model, Model):
        head: Any = model.head
        if head is None or model.processor is None:
            raise InputError(
                f"{model.source or 'the model'} has no head or no tokenizer: a text classifier is expected"
            )
        labels = [str(label) for label in model.labels] or [str(i) for i in range(head.out_features)]
        return model, model.processor, head.out_features, labels, model.max_length
    import transformers

    with quiet():
        try:
            classifier, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                model, output_loading_info=True, use_safetensors=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise InputError(f"{model} is no text classifier: {str(error).splitlines()[0]}") from None
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{model} has no weights for {missing[0]}: a trained sequence classifier is expected")
    config = classifier.config
    length = min(getattr(config, "max_position_embeddings", None) or 2**20, tokenizer.model_max_length)
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    return classifier.eval(), tokenizer, config.num_labels, labels, int(length)
