"""Sample continuations of token ids in batches: what every conditional prompt comes down to.

Reach for ``generate`` (a source before the prompt) and ``sample_aligned`` (a tag after it); for chat there is
``models.chat``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from downriver.core import InputError, seeded
from downriver.models.model import Model


def continue_ids(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    forbidden: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 128,
) -> list[list[int]]:
    """What the model puts after each prompt, without the prompt and without what follows the end token.

    ``temperature`` 0 takes the likeliest token. ``forbidden`` ids are never drawn. The draws depend on ``seed``, the
    prompts and ``batch_size``. Raises ``InputError`` for an empty prompt, settings out of range, a prompt that leaves
    no room, and a model that does not generate.

    >>> from downriver.models import small
    >>> lm = small("causal-lm", "nano")
    >>> [len(ids) <= 4 for ids in continue_ids(lm, [[1, 70], [1]], max_new_tokens=4, forbidden=[0, 1, 3])]
    [True, True]
    """
    backbone: Any = model.backbone
    if model.kind != "causal-lm" or not hasattr(backbone, "generate"):
        raise InputError(f"{model.source or type(backbone).__name__} is a {model.kind}: a causal-lm is expected")
    if not (temperature >= 0 and 0 < top_p <= 1 and max_new_tokens >= 1 and batch_size >= 1):
        raise InputError(
            f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}, batch_size {batch_size}: "
            "0 or more, from above 0 to 1, and 1 or more are expected"
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} has no token: a start token at least is expected")
        if len(prompt) + max_new_tokens > model.max_length:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, which leaves no room for {max_new_tokens} new ones in "
                f"the {model.max_length} that the model reads"
            )
    end, pad = model.processor.eos_token_id, model.processor.pad_token_id
    pad = end if pad is None else pad
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if temperature else None,
        top_k=None,
        eos_token_id=end,
        pad_token_id=pad,
        suppress_tokens=list(forbidden) or None,
    )
    training = model.training
    model.eval()
    try:
        with seeded("continue", seed), torch.no_grad():
            return [
                _until(ids, end)
                for first in range(0, len(prompts), batch_size)
                for ids in _batch(backbone, prompts[first : first + batch_size], pad or 0, config, model.device)
            ]
    finally:
        model.train(training)


def _batch(
    backbone: Any, prompts: Sequence[Sequence[int]], pad: int, config: GenerationConfig, device: torch.device
) -> Iterator[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    out = backbone.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    yield from out[:, longest:].tolist()


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
