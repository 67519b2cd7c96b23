"""Go on pretraining on task texts that stand in the prompt template with a pseudo-label's word, before prompt-tuning.

Reach for it with a few labels a class, a few hundred unlabelled texts, and a prompt-based classifier that is right more
often than not: bad pseudo-labels teach nothing. Shi and Lipani, «Don't Stop Pretraining? Make Prompt-based Fine-tuning
Powerful Learner» (May 2023). Departures: Adam's epsilon is torch's 1e-8 (theirs: 1e-6); ``always`` hides the label word
wherever the template has it (their collator knows templates that begin with it only).
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from downriver.core import Budget, InputError, unknown
from downriver.data.condition.prompt_template import SPECIAL, Part, PromptTemplate, encode_parts
from downriver.models.model import Model, Row, hide_tokens
from downriver.nn.selected_logits import logits_at
from downriver.training import TokenRows, fine_tune

MaskLabel = Literal["random", "always", "never"]
Rows: TypeAlias = datasets.Dataset | Iterable[Row]


class Classifier(Protocol):
    """What PCP asks of a prompt-based classifier; ``adapt.PromptClassifier`` has it."""

    @property
    def model(self) -> Model: ...
    @property
    def fit(self) -> Callable[..., Any]: ...
    def predict_proba(self, rows: Any, /) -> np.ndarray: ...
    def score(self, rows: Any, /) -> float: ...


def pcp_corpus(
    rows: Rows,
    labels: Sequence[int] | np.ndarray | Classifier,
    template: PromptTemplate,
    *,
    confidence: float = 0.0,
) -> datasets.Dataset:
    """A line a row: the template filled with the text and the word of its (pseudo-)label.

    Parameters
    ----------
    rows
        With the template's columns; never those that will be the test.
    labels
        Classes, probabilities (n, classes), or the classifier that gives them.
    confidence
        Rows whose likeliest class has a lower probability are left out (0 by default, as in the paper: none).

    Gives the columns ``line``, ``parts`` and ``roles`` (what the line consists of) and ``label``. Raises ``InputError``
    for another number of labels than rows, a class without a word, a confidence without probabilities, and when nothing
    is left.

    >>> template = PromptTemplate("{text} It was {label}.", ("bad", "good"))
    >>> rows, sure = [{"text": "Rain."}, {"text": "Sun."}], np.array([[0.9, 0.1], [0.4, 0.6]])
    >>> pcp_corpus(rows, sure, template, confidence=0.7)["line"][:]
    ['Rain. It was bad.']
    """
    listed: list[Any] = list(rows)
    found = np.asarray(labels.predict_proba(listed) if hasattr(labels, "predict_proba") else labels)
    if len(found) != len(listed):
        raise InputError(f"{len(found)} labels for {len(listed)} rows: one each is expected")
    if found.ndim == 1 and confidence > 0:
        raise InputError(f"confidence is {confidence} and labels are classes: probabilities are expected")
    classes = found.argmax(axis=1) if found.ndim == 2 else found
    keep = found.max(axis=1) >= confidence if found.ndim == 2 else np.ones(len(found), bool)
    lines = []
    for row, number in itertools.compress(zip(listed, classes, strict=True), keep):
        if not 0 <= number < len(template.words) or number != int(number):
            raise InputError(f"label {number}: a class from 0 to {len(template.words) - 1} is expected")
        lines.append(_line(template.parts(row, template.words[int(number)]), int(number)))
    if not lines:
        raise InputError(f"of {len(listed)} rows none has a confidence of {confidence} or more: nothing to learn from")
    return datasets.Dataset.from_list(lines)


def tapt_corpus(rows: Rows, template: PromptTemplate) -> datasets.Dataset:
    """The same lines without template and label word: the texts alone (task-adaptive pretraining).

    >>> template = PromptTemplate("{a}? {label}, {b}", ("Yes", "No"))
    >>> tapt_corpus([{"a": "Is it so", "b": "It is."}], template)["line"][:]
    ['Is it so It is.']
    """
    lines = []
    for row in rows:
        texts = [part for part in template.parts(row, "-") if part.role == "text"]
        blanks = [Part(" ", "template")] * len(texts)
        lines.append(_line([part for pair in zip(texts, blanks, strict=True) for part in pair][:-1], -1))
    if not lines:
        raise InputError("there is no row: one at least is expected")
    return datasets.Dataset.from_list(lines)


def continued_pretrain(
    model: Model,
    corpus: datasets.Dataset,
    budget: Budget | str = "100 epochs",
    *,
    mask_label: MaskLabel = "random",
    dev: datasets.Dataset | None = None,
    validations: int = 10,
    learning_rate: float = 1e-4,
    batch_size: int = 128,
    accumulate: int = 8,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    betas: tuple[float, float] = (0.9, 0.98),
    seed: int = 0,
    checkpoints: str | Path | None = None,
) -> Model:
    """Pretrain a copy of the model on the lines; a masked model by masking, a causal one by the next token.

    Parameters
    ----------
    corpus
        Of ``pcp_corpus`` or ``tapt_corpus``. A line longer than the model reads loses the end of its text, never
        template or label word.
    budget
        ``"100 epochs"`` of the corpus (the paper's), or any of ``fine_tune``.
    mask_label
        For a masked model: the label word is hidden like any other (``random``; the paper's), ``always`` (and then by
        the mask itself), or ``never``. Of all others 15 % are, and one of a line at least.
    dev, validations
        Another corpus: the weights with the lowest loss on it are kept. A hundred epochs of a few lines overfit.
    learning_rate, batch_size, weight_decay, warmup, betas
        The paper's: 1e-4 (smaller for small data), 8 × 16 lines in parts (``accumulate``), AdamW.

    Raises ``InputError`` for other columns, a model of another kind, and ``mask_label`` for a causal model.

    >>> from downriver.models import small
    >>> template = PromptTemplate("{text} It was {label}.", ("bad", "good"))
    >>> corpus = pcp_corpus([{"text": "Rain."}, {"text": "Sun."}] * 4, [0, 1] * 4, template)
    >>> lm = small("masked-lm", "nano")
    >>> continued_pretrain(lm, corpus, "2 epochs", batch_size=8, accumulate=1).kind
    'masked-lm'
    """
    if mask_label not in get_args(MaskLabel):
        raise unknown("value of mask_label", mask_label, get_args(MaskLabel))
    if model.kind not in ("masked-lm", "causal-lm"):
        raise InputError(f"{model.source or 'the model'} is a {model.kind} model: a masked-lm or causal-lm is expected")
    if model.kind == "causal-lm" and mask_label != "random":
        raise InputError(f"mask_label is {mask_label!r}: a causal model masks nothing")
    splits = {"train": _encoded(corpus, model, "corpus")}
    if dev is not None:
        splits["validation"] = _encoded(dev, model, "dev")
    masked = model.kind == "masked-lm"
    if not masked:
        splits = {name: rows.remove_columns("role") for name, rows in splits.items()}
    pad = model.processor.pad_token_id or 0
    return fine_tune(
        model,
        _Lines("lines", splits, pad, mask_label=mask_label) if masked else TokenRows("lines", splits, pad),
        _budget(budget, len(corpus)),
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        weight_decay=weight_decay,
        warmup=warmup,
        betas=betas,
        validation=validations if dev is not None else 0,
        seed=seed,
        checkpoints=checkpoints,
        objective=masked_loss if masked else None,
    )


def masked_loss(model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean cross-entropy of the predicted tokens; the output layer sees those alone."""
    chosen = batch["labels"] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = logits_at(model.backbone, chosen, **inputs).float()
    return {"loss": F.cross_entropy(logits, batch["labels"][chosen]), "logits": logits}


@dataclass(frozen=True)
class PCPResult:
    """Accuracies by way (``ft``, ``tapt+ft``, ``pcp+ft``) and split, the classifiers, and the corpus of the last
    round."""

    scores: Mapping[str, Mapping[str, float]]
    classifiers: Mapping[str, Classifier]
    corpus: datasets.Dataset


@dataclass(frozen=True)
class PCP:
    """The whole recipe: tune, pseudo-label, go on pretraining, tune again; and the two ways that it is held against.

    ``classifier`` makes a prompt-based classifier of a model: ``lambda m: PromptClassifier(m, template)``. ``fit`` are
    settings of its ``fit``, ``pretrain`` those of ``continued_pretrain``.

    >>> from downriver.adapt import PromptClassifier
    >>> from downriver.models import small_language_model, word_tokenizer
    >>> words = word_tokenizer(["sun rain wind light it was good bad ."])
    >>> template = PromptTemplate("{text} it was {label} .", ("bad", "good"))
    >>> lm = small_language_model("masked-lm", words, width=16, heads=2)
    >>> few = [{"text": "sun light", "label": 1}, {"text": "rain wind", "label": 0}]
    >>> fast = {"steps": 10, "learning_rate": 1e-2, "batch_size": 2}
    >>> more = {"budget": "5 steps", "batch_size": 2, "accumulate": 1}
    >>> pcp = PCP(lm, template, lambda m: PromptClassifier(m, template), fit=fast, pretrain=more)
    >>> sorted(pcp.run(few, [{"text": "sun"}, {"text": "wind"}], few).scores)
    ['ft', 'pcp+ft', 'tapt+ft']
    """

    model: Model
    template: PromptTemplate
    classifier: Callable[[Model], Classifier]
    fit: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self,
        labelled: Rows,
        unlabelled: Rows,
        dev: Rows,
        *,
        test: Rows | None = None,
        confidence: float = 0.0,
        rounds: int = 1,
    ) -> PCPResult:
        """Every way from the same model, the same labelled rows and the same settings.

        With several ``rounds`` the classifier of one labels for the next, which starts from the first model again.
        Raises ``InputError`` when a text of ``test`` stands among ``unlabelled``: it would be pretrained on.
        """
        if rounds < 1:
            raise InputError(f"rounds is {rounds}: at least one is expected")
        held: dict[str, list[Any]] = {"dev": list(dev)} | ({} if test is None else {"test": list(test)})
        labelled, unlabelled = list(labelled), list(unlabelled)
        refuse_leaks(unlabelled, held.get("test", []), self.template)

        def tuned(model: Model) -> Classifier:
            return self.classifier(model).fit(labelled, held["dev"], **self.fit)

        found = {"ft": tuned(self.model)}
        found["tapt+ft"] = tuned(
            continued_pretrain(self.model, tapt_corpus(unlabelled, self.template), **self.pretrain)
        )
        teacher = found["ft"]
        for _ in range(rounds):
            corpus = pcp_corpus(unlabelled, teacher, self.template, confidence=confidence)
            teacher = tuned(continued_pretrain(self.model, corpus, **self.pretrain))
        found["pcp+ft"] = teacher
        scores = {way: {s: one.score(rows) for s, rows in held.items()} for way, one in found.items()}
        return PCPResult(scores, found, corpus)


def refuse_leaks(unlabelled: Rows, test: Rows, template: PromptTemplate) -> None:
    """Raise ``InputError`` when the texts of a test row stand among the unlabelled rows, case and white space apart.

    >>> refuse_leaks([{"text": "a"}], [{"text": "b"}], PromptTemplate("{text} {label}", ("x", "y")))
    """

    def key(row: Row) -> tuple[str, ...]:
        return tuple(" ".join(p.text.lower().split()) for p in template.parts(row, "-") if p.role == "text")

    seen = {key(row) for row in unlabelled}
    leaked = [number for number, row in enumerate(test) if key(row) in seen]
    if leaked:
        raise InputError(f"{len(leaked)} test rows stand among the unlabelled ones (first: test row {leaked[0]})")


@dataclass(frozen=True, eq=False)
class _Lines(TokenRows):
    """Token rows that know the label word's tokens, for BERT's masking to treat them as ``mask_label`` says."""

    mask_label: MaskLabel = "random"

    def collate(self, model: Model) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        def batch_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            batch = padded([{"labels": row["input_ids"], **row} for row in rows])
            role, whole = batch.pop("role"), batch["input_ids"].clone()
            batch["special_tokens_mask"] = (role == 0) | ((role == 2) & (self.mask_label == "never"))
            hide_tokens(batch, model.processor, afresh=model.training)
            if self.mask_label == "always":
                batch["labels"] = torch.where(role == 2, whole, batch["labels"])
                batch["input_ids"] = batch["input_ids"].masked_fill(role == 2, model.processor.mask_token_id)
            return batch

        padded = super().collate(model)
        return batch_of


def _line(parts: Sequence[Part], label: int) -> dict[str, Any]:
    texts, roles = [part.text for part in parts], [part.role for part in parts]
    return {"line": "".join(texts), "parts": texts, "roles": roles, "label": label}


def _encoded(corpus: datasets.Dataset, model: Model, name: str) -> datasets.Dataset:
    """Ids, and of each token the role: 0 the tokenizer's own, 1 text and template, 2 the label word."""
    if missing := {"parts", "roles"} - set(corpus.column_names):
        raise InputError(f"{name} lacks the column {sorted(missing)[0]!r}: what pcp_corpus gives is expected")
    filled = [[Part(*pair) for pair in zip(row["parts"], row["roles"], strict=True)] for row in corpus]
    found = encode_parts(filled, model.processor, model.max_length)
    number = {SPECIAL: 0, "label": 2}
    roles = [[number.get(role, 1) for role in one.roles] for one in found]
    return datasets.Dataset.from_dict({"input_ids": [one.input_ids for one in found], "role": roles})


def _budget(budget: Budget | str, lines: int) -> Budget | str:
    number, _, unit = str(budget).strip().partition(" ")
    if isinstance(budget, str) and unit in ("epoch", "epochs"):
        try:
            return Budget(float(number) * lines, "examples")
        except ValueError:
            raise InputError(f"budget {budget!r}: a number of epochs is expected") from None
    return budget
