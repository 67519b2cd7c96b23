"""CATS: set small gate activations of gated feed-forward blocks to zero, by a threshold read off a little text.

Reach for it to serve a Llama-like model with fewer weights read for each token: where the gate is zero, its row of the
up projection and its column of the down projection are not needed. Lee et al., "CATS: Contextually-Aware Thresholding
for Sparsity in Large Language Models" (2024). The histogram's bins are those of a float's leading 16 bits, relative
widths of 2⁻⁷ without a range to choose. The model computes densely with zeros; ``models.sparse_decoding`` makes it skip
neurons for single tokens, whose bytes ``SparsityReport`` counts.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.models.model import Model
from downriver.models.surgery import gated_mlps, set_thresholds
from downriver.nn.select import RadixSelect
from downriver.nn.thresholded import CATSActivation
from downriver.tasks.task import Task
from downriver.training.engine import clone

Estimator = Literal["histogram", "exact"]
BINS = 1 << 15  # of |a|: sign gone, the exponent and the first seven digits of the mantissa


@dataclass(frozen=True)
class SparsityReport:
    """What a thresholded model leaves out on some text: of each gated block the share of gate values at zero.

    ``tokens`` were looked at. ``union`` is the share that is zero for all of four tokens at once, as a batch of four
    needs it; experts, which get tokens of their own, are left out of it (not a number where there are only experts).
    """

    blocks: Mapping[str, float]
    union: float
    tokens: int

    @property
    def sparsity(self) -> float:
        """Mean over the blocks."""
        return sum(self.blocks.values()) / len(self.blocks)

    @property
    def traffic(self) -> float:
        """Bytes of feed-forward weights that one token needs, over those of the dense model: the gate projection whole,
        of the two others only the rows that are not zero, (1 + 2 (1 − p)) / 3."""
        return (1 + 2 * (1 - self.sparsity)) / 3


def cats(
    model: Model,
    task: Task,
    *,
    sparsity: float | Sequence[float] = 0.5,
    split: str = "train",
    tokens: int = 100_000,
    batch_size: int = 8,
    estimator: Estimator = "histogram",
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """A copy of the model whose gates are zero where their magnitude is below the layer's ``sparsity`` quantile.

    Parameters
    ----------
    model
        With gated blocks: Llama, Mistral, Qwen, Gemma, Phi-3 and their like. The experts of a layer (Mixtral, Qwen's
        mixtures) share one threshold.
    task
        Texts to calibrate on, as the model reads them; padding does not count. The paper takes 100 sequences of 1024
        tokens of general text.
    sparsity
        p, the share of gate values to be zero on average: one number (0.5, 0.7 and 0.9 are the paper's), or one a
        block. 0 changes nothing.
    split, tokens, seed
        Rows of this split in a random order until so many tokens were read (100 000, about the paper's).
    batch_size
        Texts at once; one in a model with experts.
    estimator
        ``histogram``: one pass, the threshold is right to one bin, 0.8 % of its value; ``exact``: two passes.

    Fine-tune the result by ``adapt.lora`` or ``adapt.full`` if it lost too much. ``save`` keeps the thresholds in the
    configuration, and ``models.load`` restores them.

    Raises ``InputError`` for a model without gated blocks, p outside [0, 1), a split without rows and activations that
    are not finite.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> text = Dataset.from_dict({"text": ["The river runs to the sea.", "Small boats go up and down."]})
    >>> task = Task("river", "language-modelling", {"train": text}, ("text",), None)
    >>> sparse = cats(small("causal-lm", "nano"), task, sparsity=0.5)
    >>> round(gate_sparsity(sparse, task, split="train").sparsity, 1)
    0.5
    """
    if estimator not in get_args(Estimator):
        raise unknown("estimator", estimator, get_args(Estimator))
    sparse = clone(model)
    blocks = gated_mlps(sparse.backbone)
    if not blocks:
        what = model.source or "the model"
        raise InputError(f"{what} has no gated feed-forward blocks: a Llama-like model is expected")
    if hasattr(sparse.backbone, "merge_and_unload"):
        raise InputError("the model has adapters: merge them first (adapt.merge_adapter)")
    wanted = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * len(blocks)
    if len(wanted) != len(blocks):
        raise InputError(f"sparsity has {len(wanted)} values for {len(blocks)} gated blocks: one a block is expected")
    if not all(0 <= p < 1 for p in wanted):
        raise InputError(f"sparsity is {sparsity}: shares from 0 to below 1 are expected")
    if any(isinstance(getattr(block, attribute), CATSActivation) for _, block, attribute in blocks):
        raise InputError("the model has thresholds already: calibrate the dense model")
    read = partial(_activations, sparse, task, split, tokens, batch_size, seed, progress)
    thresholds = _exact(read, wanted) if estimator == "exact" else _histogram(read, wanted)
    set_thresholds(sparse.backbone, thresholds)
    return sparse


def gate_sparsity(
    model: Model,
    task: Task,
    *,
    split: str = "validation",
    tokens: int = 20_000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> SparsityReport:
    """Measure how much of a thresholded model's gates is zero, token by token and over four tokens at once."""
    blocks = gated_mlps(model.backbone)
    if not blocks or not all(isinstance(getattr(b, a), CATSActivation) for _, b, a in blocks):
        raise InputError(f"{model.source or 'the model'} has no thresholds: what cats gives is expected")
    zeros, sizes = [0] * len(blocks), [0] * len(blocks)
    together, groups, seen = 0, 0, 0
    for block, values, count in _activations(model, task, split, tokens, batch_size, seed, progress):
        zero = values == 0
        zeros[block] += int(zero.sum())
        sizes[block] += zero.numel()
        if not _experts(blocks[block][1]):
            four = zero[: len(zero) // 4 * 4].view(-1, 4, zero.shape[-1]).all(1)
            together, groups = together + int(four.sum()), groups + four.numel()
        seen += count if block == 0 else 0
    shares = {name: z / max(n, 1) for (name, _, _), z, n in zip(blocks, zeros, sizes, strict=True)}
    return SparsityReport(shares, together / groups if groups else math.nan, seen)


def _activations(model: Model, task: Task, split: str, tokens: int, batch_size: int, seed: int, progress: bool) -> Any:
    """The gate values of one block and batch after the other, (tokens, width) float32, padding left out: the block's
    number, the values, and how many tokens the batch has (experts get each of them several times)."""
    rows, collate = task.rows(split), model.collate(task)
    if not len(rows):
        raise InputError(f"split {split!r} of {task.name} is empty: texts to calibrate on are expected")
    order = generator("cats", seed).permutation(len(rows)).tolist()
    caught: dict[int, list[Tensor]] = {}
    experts = [_experts(block) for _, block, _ in gated_mlps(model.backbone)]
    if any(experts):
        batch_size = 1  # experts are not told which tokens are padding: there is none
    training, seen = model.training, 0
    model.eval()
    with _caught(model.backbone, caught), tqdm(total=tokens, desc="gates", disable=not progress, delay=2) as bar:
        for start in range(0, len(order), batch_size):
            if seen >= tokens:
                break
            batch = collate([rows[row] for row in order[start : start + batch_size]])
            with torch.no_grad():
                model(**{name: value.to(model.device) for name, value in batch.items()})
            mask = batch["attention_mask"].bool().flatten().to(model.device)
            count = int(mask.sum())
            seen += count
            bar.update(count)
            for block, values in caught.items():
                found = torch.cat([value.flatten(0, -2) for value in values]).float()
                found = found if experts[block] else found[mask]
                if not torch.isfinite(found).all():
                    raise InputError(f"gated block {block} gives activations that are not finite")
                yield block, found, count
            caught.clear()
    model.train(training)


def _experts(block: nn.Module) -> bool:
    """Whether a block is all the experts of a layer, whose matrices are one tensor of three dimensions."""
    return isinstance(block.down_proj, Tensor)


@contextmanager
def _caught(backbone: nn.Module, caught: dict[int, list[Tensor]]) -> Any:
    """Meanwhile every gate's values, one tensor a call, are kept by the number of the block."""

    def keep(block: int, module: nn.Module, arguments: Any, output: Tensor) -> None:
        caught.setdefault(block, []).append(output)

    parts = [getattr(module, attribute) for _, module, attribute in gated_mlps(backbone)]
    hooks = [part.register_forward_hook(partial(keep, block)) for block, part in enumerate(parts)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _histogram(read: Any, wanted: Sequence[float]) -> list[float]:
    counts = torch.zeros(len(wanted), BINS, dtype=torch.int64)
    for block, values, _ in read():
        bins = (values.reshape(-1).view(torch.int32) & 0x7FFFFFFF) >> 16
        counts[block] += torch.bincount(bins, minlength=BINS).cpu()
    found = []
    for p, own in zip(wanted, counts, strict=True):
        upto = own.cumsum(0)
        bin = int(torch.searchsorted(upto, math.ceil(p * int(upto[-1]))))
        edge = torch.tensor(((bin + 1) << 16) - 1, dtype=torch.int32).view(torch.float32)  # the largest value in it
        found.append(float(edge) if p > 0 else 0.0)
    return found


def _exact(read: Any, wanted: Sequence[float]) -> list[float]:
    selects = [RadixSelect(partial(_rank, p)) for p in wanted]
    while selects[0].passes_left:
        totals: dict[int, Tensor] = {}
        for block, values, _ in read():
            counts = selects[block].counts(values).cpu()
            totals[block] = totals[block].add_(counts) if block in totals else counts
        for block, select in enumerate(selects):
            select.narrow(totals[block])
    return [select.value if p > 0 else 0.0 for select, p in zip(selects, wanted, strict=True)]


def _rank(p: float, count: int) -> int:
    return max(1, math.ceil(p * count))
