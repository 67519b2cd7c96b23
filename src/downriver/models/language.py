"""Any causal language model as a ``Model``: for code that takes downriver's models and plain transformers ones alike.

Reach for it where a method needs nothing but logits and a tokenizer.
"""

from typing import Any

from torch import nn

from downriver.core.errors import InputError
from downriver.models.model import Model


def language_model(model: nn.Module, tokenizer: Any = None) -> Model:
    """The model itself when it is a ``Model``, else a ``Model`` round the module; weights are never copied.

    A tokenizer given counts before the model's own. The mode (training or evaluation) stays as it was. Raises
    ``InputError`` when the model is of another kind than ``causal-lm``, or has no tokenizer.

    >>> from downriver.models import small
    >>> lm = small("causal-lm", "nano")
    >>> language_model(lm) is lm, language_model(lm.backbone, lm.processor).backbone is lm.backbone
    (True, True)
    """
    if isinstance(model, Model):
        if model.kind != "causal-lm":
            raise InputError(f"{model.source or 'the model'} is a {model.kind} model: a causal-lm is expected")
        if tokenizer is None and model.processor is not None:
            return model
        module, tokenizer = model.backbone, tokenizer or model.processor
    else:
        module = model
    if tokenizer is None:
        raise InputError(f"a {type(module).__name__} comes without a tokenizer: give it one as tokenizer=")
    if not hasattr(module, "config") or not hasattr(module.config, "vocab_size"):
        raise InputError(f"a {type(module).__name__} is no language model: one of transformers' is expected")
    training = module.training
    limits = [getattr(module.config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    wrapped = Model(
        module,
        kind="causal-lm",
        processor=tokenizer,
        pooling="last",
        source=type(module).__name__,
        max_length=int(min(limit for limit in [*limits, 2**20] if limit)),
    )
    wrapped.train(training)
    return wrapped
