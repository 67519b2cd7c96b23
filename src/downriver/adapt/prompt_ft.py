"""Prompt-based fine-tuning: a class is the word that the language model puts where a template has its mask.

Reach for it with a handful of labels a class: nothing is trained from nothing, because the classes have words. As in
Shi and Lipani, «Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner» (May 2023), after Gao et al.
(2021); soft templates after DART (Zhang et al. 2022). Departures: the best of ``validations`` checkpoints is the one
with the lowest loss on the development rows, not the highest accuracy; DART's second objective, which predicts words
of the text, is left out.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from downriver.core.errors import InputError
from downriver.data.condition.prompt_template import Prompted, PromptTemplate, encode_parts
from downriver.models.model import Model, Row
from downriver.nn.selected_logits import logits_at
from downriver.training import TokenRows, fine_tune

Rows: TypeAlias = datasets.Dataset | Iterable[Row]


class PromptClassifier:
    """A masked (or causal) language model that classifies by label words.

    Parameters
    ----------
    model
        Of kind ``masked-lm``: the words' logits at the mask. Of kind ``causal-lm``: those of the next token, and every
        field must stand before the label.
    template
        Pattern and one label word a class. Words of several tokens are refused, or give the mean of their tokens'
        logits at the one mask (``pieces="mean"``).
    soft
        Words of the template and label words become tokens of their own, which start as the words' embeddings (a word
        of several tokens as their mean) and are learnt with everything else.
    target
        The column with the class, 0, 1, 2, ...

    Before ``fit`` it classifies as the model does now (zero-shot).

    >>> from downriver.models import small_language_model, word_tokenizer
    >>> words = word_tokenizer(["sun rain it was good bad ."])
    >>> lm = small_language_model("masked-lm", words, width=16, heads=2)
    >>> rows = [{"text": "sun", "label": 1}, {"text": "rain", "label": 0}] * 4
    >>> classifier = PromptClassifier(lm, PromptTemplate("{text} it was {label} .", ("bad", "good")))
    >>> classifier.fit(rows, steps=20, learning_rate=1e-2).predict([{"text": "sun"}, {"text": "rain"}]).tolist()
    [1, 0]
    """

    def __init__(self, model: Model, template: PromptTemplate, *, soft: bool = False, target: str = "label") -> None:
        if model.kind not in ("masked-lm", "causal-lm"):
            raise InputError(
                f"{model.source or 'the model'} is a {model.kind} model: a masked-lm or causal-lm is expected"
            )
        if len(template.words) < 2:
            raise InputError(f"the template has {len(template.words)} label words: two at least are expected")
        tokenizer: Any = model.processor
        self.masked = model.kind == "masked-lm"
        if self.masked and tokenizer.mask_token is None:
            raise InputError("a masked language model needs a tokenizer with a mask token")
        if not self.masked and template.pattern.index("{label}") < max(
            template.pattern.index(f"{{{name}}}") for name in template.fields
        ):
            raise InputError(f"pattern {template.pattern!r}: a causal model reads only what stands before the label")
        self.template, self.target, self.soft = template, target, soft
        self.own: dict[int, int] = {}  # token of the template → its learnable twin
        if soft:
            model, self.own, self.word_ids = _softened(model, template)
        else:
            self.word_ids = template.label_ids(tokenizer)
        self.model = model

    def fit(
        self,
        train: Rows,
        dev: Rows | None = None,
        *,
        steps: int = 1000,
        learning_rate: float = 1e-5,
        batch_size: int = 8,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        validations: int = 10,
        seed: int = 13,
        checkpoints: str | Path | None = None,
    ) -> Self:
        """Fine-tune all weights on the rows; ``self.model`` becomes the tuned copy, the one given stays as it is.

        Defaults are the paper's (learning rates of 1e-5, 2e-5 and 5e-5 were tried; evaluation every 100 steps). With
        ``dev`` the weights with the lowest loss of ``validations`` are kept, else the last. Raises ``InputError`` for a
        row without a text or with a class out of range.
        """
        splits = {"train": self._rows(train, labelled=True)}
        if dev is not None:
            splits["validation"] = self._rows(dev, labelled=True)
        self.model = fine_tune(
            self.model,
            TokenRows("prompts", splits, pad=self.model.processor.pad_token_id or 0),
            f"{steps} steps",
            learning_rate=learning_rate,
            batch_size=batch_size,
            weight_decay=weight_decay,
            warmup=warmup,
            validation=validations if dev is not None else 0,
            seed=seed,
            checkpoints=checkpoints,
            objective=self._loss,
        )
        return self

    @torch.no_grad()
    def logits(self, rows: Rows, batch_size: int = 64) -> np.ndarray:
        """The label words' logits, float32 (n, classes)."""
        tokens = TokenRows("prompts", {"test": self._rows(rows)}, pad=self.model.processor.pad_token_id or 0)
        collate, listed = tokens.collate(self.model), tokens.rows("test")
        found = []
        self.model.eval()
        for start in range(0, len(listed), batch_size):
            batch = collate(list(listed.select(range(start, min(start + batch_size, len(listed))))))
            found.append(self._word_logits(self.model, {k: v.to(self.model.device) for k, v in batch.items()}).cpu())
        return torch.cat(found).numpy()

    def predict_proba(self, rows: Rows, batch_size: int = 64) -> np.ndarray:
        """The classes' probabilities, (n, classes): the softmax over the label words alone."""
        return torch.from_numpy(self.logits(rows, batch_size)).softmax(dim=1).numpy()

    def predict(self, rows: Rows, batch_size: int = 64) -> np.ndarray:
        """The likeliest class of every row."""
        return self.logits(rows, batch_size).argmax(axis=1)

    def score(self, rows: Rows, batch_size: int = 64) -> float:
        """Accuracy on labelled rows."""
        listed: list[Any] = list(rows)
        return float((self.predict(listed, batch_size) == self._targets(listed)).mean())

    def _loss(self, model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = self._word_logits(model, batch)
        return {"loss": F.cross_entropy(logits, batch["class"]), "logits": logits}

    def _word_logits(self, model: Model, batch: Mapping[str, Tensor]) -> Tensor:
        """(n, classes); a word of several tokens has the mean of their logits."""
        ids = batch["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device) == batch["position"][:, None]
        logits = logits_at(model.backbone, positions, input_ids=ids, attention_mask=batch["attention_mask"]).float()
        return torch.stack([logits[:, word].mean(dim=1) for word in self.word_ids], dim=1)

    def _rows(self, rows: Rows, labelled: bool = False) -> datasets.Dataset:
        listed: list[Any] = list(rows)
        if not listed:
            raise InputError("there is no row: one at least is expected")
        classes = self._targets(listed) if labelled else [0] * len(listed)
        # a causal model is given a word in the label's place too, to find where its first token begins
        word = self.model.processor.mask_token if self.masked else self.template.words[0]
        encoded = encode_parts(
            [self.template.parts(row, word) for row in listed], self.model.processor, self.model.max_length
        )
        return datasets.Dataset.from_list(
            [self._row(found, int(number)) for found, number in zip(encoded, classes, strict=True)]
        )

    def _row(self, found: Prompted, number: int) -> dict[str, Any]:
        ids = [self.own.get(i, i) if role == "template" else i for i, role in zip(*found, strict=True)]
        position = found.roles.index("label")
        if not self.masked:  # the token before the label's first one predicts it
            ids, position = ids[:position], position - 1
            if position < 0:
                raise InputError("nothing stands before the label: a causal model needs a token to go on from")
        return {"input_ids": ids, "labels": [-100] * len(ids), "position": position, "class": number}

    def _targets(self, rows: list[Row]) -> np.ndarray:
        found = []
        for number, row in enumerate(rows):
            value = row.get(self.target)
            if not isinstance(value, int | np.integer) or not 0 <= value < len(self.template.words):
                raise InputError(
                    f"row {number}, column {self.target!r}: {value!r} is not one of the classes 0 to "
                    f"{len(self.template.words) - 1}"
                )
            found.append(int(value))
        return np.array(found)


def _softened(model: Model, template: PromptTemplate) -> tuple[Model, dict[int, int], list[list[int]]]:
    """A copy of the model with a token of its own for every word of template and labels; where the template's went, and
    the labels' ids."""
    model = copy.deepcopy(model, {id(model.processor): model.processor})
    backbone: Any = model.backbone
    row = dict.fromkeys(template.fields, "x")
    encoded = encode_parts([template.parts(row, word) for word in template.words], model.processor)
    words = [[i for i, role in zip(*one, strict=True) if role == "label"] for one in encoded]
    if not all(words):
        raise InputError(f"label words {template.words}: one of them has no token")
    theirs = list(dict.fromkeys(i for i, role in zip(*encoded[0], strict=True) if role == "template"))
    sources = [[i] for i in theirs] + words
    size = backbone.get_input_embeddings().weight.shape[0]
    backbone.resize_token_embeddings(size + len(sources), mean_resizing=False)
    inputs, outputs = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    tables = [inputs.weight] if outputs.weight is inputs.weight else [inputs.weight, outputs.weight]
    if getattr(outputs, "bias", None) is not None:
        tables.append(outputs.bias)
    with torch.no_grad():
        for table in tables:
            for number, source in enumerate(sources):
                table[size + number] = table[source].mean(dim=0)
    own = {token: size + number for number, token in enumerate(theirs)}
    return model, own, [[size + len(theirs) + number] for number in range(len(words))]
