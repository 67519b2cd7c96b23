"""Instruction tuning: one causal language model learns many tasks, told in words, from a capped mixture of them.

Reach for it to make a base model follow instructions, or to teach one model several tasks at once. Iyer et al. 2022,
«OPT-IML: Scaling Language Model Instruction Meta Learning through the Lens of Generalization», arXiv:2212.12017: loss
on the answers only, several examples a block that do not see one another, Adam with β (0.9, 0.95), 5e-5 falling to 0
after 60 steps, dropout 0.1 on embeddings too, gradients clipped to 1. Departures: a block takes the examples that fill
it best, so that none is cut in two; 16 blocks a step by default (the paper's 256 need many machines); LoRA beside the
full tuning. Demonstrations in the prompt were studied by the authors and not used in their models; so here.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import torch
import torch.nn.functional as F
from torch import nn

from downriver.adapt.lora import add_adapter, merge_adapter
from downriver.core import Budget, InputError, generator, unknown
from downriver.data.condition.encode import encode_all
from downriver.data.condition.pack import Packer, isolated, isolates
from downriver.data.mix.tasks import TaskMixture
from downriver.models.language import language_model
from downriver.models.model import Model
from downriver.training.engine import Precision, clone, fine_tune
from downriver.training.rows import TokenRows

Loss = Literal["label", "full"]
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
CHUNK = 200  # examples rendered and encoded at a time


@dataclass(frozen=True)
class InstructionPacker:
    """Draws from a mixture, renders, encodes and packs: blocks of ``block`` tokens to train on.

    Args:
        tokenizer: of transformers, a fast one: source and target are encoded as one text, so that the seam lies where
            it will lie when the model is asked.
        block: tokens a block (2048). A longer example loses the beginning of its source, never any of its target.
        loss: ``label``, on the target and the end token; ``full``, on every token.
        isolate: keep the examples of a block apart in attention.
        demos: solved examples of the same task before each example: so many, or a number drawn from (least, most).
        seed: of templates and demonstrations.
    """

    tokenizer: Any
    block: int = 2048
    loss: Loss = "label"
    isolate: bool = True
    demos: int | tuple[int, int] = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise unknown("loss", self.loss, get_args(Loss))
        least, most = self._range
        if not 0 <= least <= most:
            raise InputError(f"demos is {self.demos}: a number of at least 0, or (least, most), is expected")

    def pack(self, mixture: TaskMixture, blocks: int) -> datasets.Dataset:
        """The first ``blocks`` blocks of the mixture, as rows of ``TokenRows``: a function of the seeds alone.

        Blocks are made in memory, 24 bytes a token. Raises ``InputError`` for a template's variable that an example
        lacks, an empty target, and a target that alone is longer than a block.

        >>> from downriver.models.tokenizers import byte_tokenizer
        >>> from downriver.tasks import InstructionTask, Template
        >>> letters = InstructionTask("next", "c", "b", [{"x": "a", "y": "b"}], (Template("{x}:", "{y}"),))
        >>> rows = InstructionPacker(byte_tokenizer(16), block=12).pack(TaskMixture([letters]), 1)
        >>> rows[0]["labels"]
        [-100, -100, -100, 224, 69, 2, -100, -100, -100, 224, 69, 2]
        """
        if blocks < 1:
            raise InputError(f"blocks is {blocks}: at least 1 is expected")
        rows: list[dict[str, list[int]]] = []
        tokens = 0
        for visit in itertools.count(step=CHUNK):
            for encoded in self._encoded(mixture, range(visit, visit + CHUNK)):
                if tokens >= blocks * self.block:  # so many fill as many blocks at least
                    return Packer(self.block, "bfd", self.isolate).pack(rows).select(range(blocks))
                rows.append(encoded)
                tokens += len(encoded["input_ids"])
        raise AssertionError("visits do not end")

    def prompt(self, mixture: TaskMixture, visit: int) -> tuple[str, str]:
        """Source and target of a visit: template and demonstrations are drawn by its number."""
        task, number = mixture.example(visit)
        rng = generator("instruction", self.seed, visit)
        template = task.templates[int(rng.integers(len(task.templates)))]
        least, most = self._range
        count = min(int(rng.integers(least, most + 1)), len(task) - 1)
        others = rng.choice(len(task) - 1, size=count, replace=False)
        demos = [task.examples[int(i) + (int(i) >= number)] for i in others]
        try:
            return template.render(task.examples[number], demos)
        except InputError as error:
            raise InputError(f"task {task.name!r}, example {number}: {error}") from None

    @property
    def _range(self) -> tuple[int, int]:
        return (self.demos, self.demos) if isinstance(self.demos, int) else self.demos

    def _encoded(self, mixture: TaskMixture, visits: range) -> Iterator[dict[str, list[int]]]:
        prompts = [self.prompt(mixture, visit) for visit in visits]
        parts = [parts_of(source, target, self.loss == "full") for source, target in prompts]
        for encoded in encode_all(parts, self.tokenizer, max_length=self.block):
            yield {"input_ids": encoded.input_ids, "labels": encoded.labels}


def parts_of(source: str, target: str, learn_source: bool = False) -> list[tuple[str, bool]]:
    """Source and target as parts to encode: one blank between them, which belongs to the target.

    >>> parts_of("2 + 2 = ", "4")
    [('2 + 2 =', False), (' 4', True)]
    """
    return [(source.rstrip(" "), learn_source), (f" {target}", True)] if source else [(target, True)]


def opt_iml(
    model: Model | nn.Module,
    mixture: TaskMixture,
    budget: Budget | str = "4000 steps",
    *,
    tokenizer: Any = None,
    block: int = 2048,
    loss: Loss = "label",
    isolate: bool = True,
    demos: int | tuple[int, int] = 0,
    lora: int | None = None,
    learning_rate: float = 5e-5,
    batch_size: int = 16,
    warmup: int = 60,
    dropout: float = 0.1,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Tune a copy of a causal language model on the mixture; the model given stays as it is.

    Parameters
    ----------
    model, tokenizer
        A ``Model``, or a transformers one with its tokenizer.
    budget
        Steps, examples (blocks) or tokens (of full blocks).
    block, loss, isolate, demos
        As of ``InstructionPacker``; a block is at most as long as the model can read.
    lora
        Rank of an adapter to train instead of all weights (every linear layer, alpha twice the rank); the backbone of
        the returned model is then a ``PeftModel``.
    learning_rate, warmup, dropout
        The authors' (of 1e-5, 3e-5, 5e-5 and 6e-5): up to 5e-5 in 60 steps, then linearly to 0. ``dropout`` is put on
        embeddings and wherever the architecture has one, for the training only.
    batch_size, seed, checkpoints, precision
        As in ``fine_tune``.

    Raises ``InputError`` for a model of another kind, a budget in FLOPs or seconds (how many examples are drawn must be
    known before), and one that ends within the warm-up.

    >>> from downriver.models import small
    >>> from downriver.tasks import InstructionTask, Template
    >>> twice = [{"x": str(i), "y": str(2 * i)} for i in range(9)]
    >>> task = InstructionTask("double", "numbers", "toy", twice, (Template("Twice {x}:", "{y}"),))
    >>> base = small("causal-lm", "nano")
    >>> tuned = opt_iml(base, TaskMixture([task]), "3 steps", block=64, batch_size=2, warmup=1)
    >>> torch.equal(base.backbone.lm_head.weight, tuned.backbone.lm_head.weight)
    False
    """
    model = clone(language_model(model, tokenizer))
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}: from 0 to below 1 is expected")
    if hasattr(model.backbone, "merge_and_unload"):
        model = merge_adapter(model)
    block = min(block, model.max_length)
    steps = _steps(Budget.parse(budget), batch_size, block)
    if not 0 <= warmup < steps:
        raise InputError(f"warmup is {warmup} steps of {steps}: fewer than the budget pays for are expected")
    packer = InstructionPacker(model.processor, block, loss, isolate, demos, seed)
    name = f"instructions ({len(mixture.tasks)} tasks)"
    pad = model.processor.pad_token_id or 0
    rows = TokenRows(name, {"train": packer.pack(mixture, steps * batch_size)}, pad=pad)
    objective = isolated if isolate and not isolates(model) else None
    if lora is not None:
        add_adapter(model, rank=lora, alpha=2 * lora, seed=seed)
    learns: Callable[[str], bool] = (lambda name: "lora_" in name) if lora is not None else (lambda name: True)
    with _dropout(model, dropout):
        return fine_tune(
            model,
            rows,
            Budget(steps, "steps"),
            learning_rate=learning_rate,
            batch_size=batch_size,
            warmup=warmup / steps,
            seed=seed,
            trainable=learns,
            checkpoints=checkpoints,
            precision=precision,
            in_place=True,
            objective=objective,
            betas=(0.9, 0.95),
            clip=1.0,
        )


def _steps(budget: Budget, batch_size: int, block: int) -> int:
    price = {"steps": 1, "examples": batch_size, "tokens": batch_size * block}
    if budget.unit not in price:
        raise InputError(f"a budget of {budget.amount:g} {budget.unit}: steps, examples or tokens are expected")
    steps = int(budget.amount / price[budget.unit] + 1e-9)
    if steps < 1:
        raise InputError(
            f"a budget of {budget.amount:g} {budget.unit} does not pay for one step of {batch_size} blocks"
        )
    return steps


@contextmanager
def _dropout(model: Model, p: float) -> Iterator[None]:
    """Dropout with probability p on the embeddings and in every place that the architecture has for it."""
    backbone: Any = model.backbone
    before = []
    for module in backbone.modules():
        names = ("p",) if isinstance(module, nn.Dropout) else DROPOUTS
        for name in names:
            if isinstance(value := getattr(module, name, None), float):
                before.append((module, name, value))
                setattr(module, name, p)

    def drop(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, p, training=module.training)

    hook = backbone.get_input_embeddings().register_forward_hook(drop)
    try:
        yield
    finally:
        hook.remove()
        for module, name, value in before:
            setattr(module, name, value)
