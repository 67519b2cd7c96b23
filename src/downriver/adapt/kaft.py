"""Knowledge-aware fine-tuning: teach a model to follow a relevant context and to ignore an irrelevant one.

Reach for it before retrieval is put in front of a model: what it finds may contradict what the model remembers, or be
beside the point. Li et al., «Large Language Models with Controllable Working Memory» (November 2022). The data are
those of ``data.synth.context.ContextMixer``; the training is ordinary supervised tuning with the loss on the answer.
"""

from pathlib import Path
from typing import Any

import datasets
from torch import nn

from downriver.adapt.lora import add_adapter, merge_adapter
from downriver.core import Budget, InputError
from downriver.data.condition.encode import encode_all
from downriver.models.language import language_model
from downriver.models.model import Model
from downriver.training import TokenRows, fine_tune
from downriver.training.engine import Precision, clone


def kaft(
    model: Model | nn.Module,
    rows: datasets.Dataset,
    budget: Budget | str,
    *,
    tokenizer: Any = None,
    lora: int | None = None,
    learning_rate: float = 5e-5,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Tune a copy of a causal language model on ``input`` and ``target``; the model given stays as it is.

    Parameters
    ----------
    model, tokenizer
        The ``Model`` whose closed-book answers are in the rows, or a transformers one with its tokenizer.
    rows
        What ``ContextMixer.build`` gives. A longer input than the model reads loses its beginning.
    budget
        As in ``fine_tune``: ``"2000 examples"``, steps, tokens, FLOPs, seconds.
    lora
        Rank of an adapter to train instead of all weights (every linear layer, alpha twice the rank); the backbone of
        the returned model is then a ``PeftModel``. Take a learning rate of 1e-4 or more with it.
    learning_rate, batch_size, warmup
        Those usual for supervised tuning; the paper's are not stated on its card.

    Raises ``InputError`` for other columns, an empty target and a model of another kind.

    >>> from downriver.models import small
    >>> rows = datasets.Dataset.from_list([{"input": "Context: a\\nQuestion: b\\nAnswer:", "target": "a"}] * 4)
    >>> kaft(small("causal-lm", "nano"), rows, "2 steps", batch_size=2).kind
    'causal-lm'
    """
    model = clone(language_model(model, tokenizer))
    if missing := {"input", "target"} - set(rows.column_names):
        raise InputError(f"rows lack the column {sorted(missing)[0]!r}: what ContextMixer.build gives is expected")
    if hasattr(model.backbone, "merge_and_unload"):
        model = merge_adapter(model)
    parts = [[(row["input"], False), (f" {row['target']}", True)] for row in rows]
    encoded = encode_all(parts, model.processor, max_length=model.max_length)
    tokens = datasets.Dataset.from_list([one._asdict() for one in encoded])
    if lora is not None:
        add_adapter(model, rank=lora, alpha=2 * lora, seed=seed)
    return fine_tune(
        model,
        TokenRows("contexts", {"train": tokens}, pad=model.processor.pad_token_id or 0),
        budget,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        seed=seed,
        trainable=(lambda name: "lora_" in name) if lora is not None else (lambda name: True),
        checkpoints=checkpoints,
        precision=precision,
        in_place=True,
    )
