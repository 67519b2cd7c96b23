"""Masked language modelling, from nothing or onwards from a checkpoint, in batches of an exact number of tokens.

Reach for it to pretrain an encoder on one's own domain before fine-tuning. BERT's objective without the next-sentence
task (Devlin et al. 2019; Liu et al. 2019), in long blocks and large batches as in Mukherjee and Hellendoorn 2023,
arXiv:2306.03268.
"""

from collections.abc import Iterable
from pathlib import Path

import datasets

from downriver.core import Budget, InputError
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training import TokenRows, fine_tune
from downriver.training.rows import in_blocks


def masked_lm(
    model: Model,
    task: Task | Iterable[str],
    budget: Budget | str,
    *,
    batch_tokens: int = 524_288,
    part_tokens: int = 32_768,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    betas: tuple[float, float] = (0.9, 0.98),
    seed: int = 0,
    checkpoints: str | Path | None = None,
) -> Model:
    """Pretrain a masked language model on texts; the model given stays as it is.

    Texts are encoded one after the other between the tokenizer's special tokens and cut into blocks of exactly
    ``model.max_length`` tokens, so that no batch holds padding; what is left at the end is dropped. 15 % of the
    ordinary tokens are predicted, 80/10/10 hidden, replaced and kept, afresh at every visit. Attention crosses the
    border of two texts in a block, as is usual for encoders trained so.

    Parameters
    ----------
    task
        A language-modelling task (its train split), or texts.
    budget
        ``"27e9 tokens"`` is the paper's; also steps, examples (blocks), FLOPs, seconds.
    batch_tokens
        Tokens of an optimiser step, 0.5 M in the paper: whole blocks, and exactly so many tokens where the block's
        length divides it. ``part_tokens`` of them are in memory at a time, the gradients of the parts added up.
    learning_rate, weight_decay, warmup, betas
        RoBERTa's for continued training; the schedule is linear, as in the paper. From nothing take 5e-4 or more.
    checkpoints
        A folder: a killed run continues from there.

    Charges tokens, FLOPs and parameters. Raises ``InputError`` for another kind of model, texts that fill no block,
    and a batch below one block.

    >>> from downriver.models import small
    >>> lm = small("masked-lm", "nano")
    >>> trained = masked_lm(lm, ["the river " * 40] * 8, "2 steps", batch_tokens=512)
    >>> trained.kind
    'masked-lm'
    """
    if model.kind != "masked-lm":
        raise InputError(f"{model.source or 'the model'} is a {model.kind} model: a masked-lm is expected")
    size = model.max_length
    blocks, part = batch_tokens // size, max(1, part_tokens // size)
    if blocks < 1:
        raise InputError(f"batch_tokens is {batch_tokens}: one block of {size} tokens at least is expected")
    accumulate = next(k for k in range(-(-blocks // part), blocks + 1) if blocks % k == 0)
    texts = task.texts("train") if isinstance(task, Task) else task
    rows = datasets.Dataset.from_dict({"input_ids": list(in_blocks(texts, model.processor, size))})
    if len(rows) == 0:
        raise InputError(f"the texts fill no block of {size} tokens: more text, or a model with a shorter max_length")
    name = task.name if isinstance(task, Task) else "texts"
    return fine_tune(
        model,
        TokenRows(name, {"train": rows}, pad=model.processor.pad_token_id),
        budget,
        learning_rate=learning_rate,
        batch_size=blocks,
        accumulate=accumulate,
        weight_decay=weight_decay,
        warmup=warmup,
        betas=betas,
        seed=seed,
        checkpoints=checkpoints,
    )
