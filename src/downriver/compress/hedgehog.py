"""Hedgehog: linear attention whose small feature maps are trained to give the weights that softmax gives.

Reach for it to make a loaded model's cost grow with the length of the text instead of its square, and its cache stay of
one size: BERT, RoBERTa, ViT, GPT-2, Llama, Mistral, Qwen and their like. Zhang et al., "The Hedgehog & the Porcupine:
Expressive Linear Attentions with Softmax Mimicry" (2024). Conversion loses something: fine-tune afterwards
(``adapt.full``, ``adapt.lora``), as the paper does. The mean squared error of the outputs and the softmax
window beside the linear part are LoLCATs' additions; the window's weights are not divided by their largest, as theirs
are, so that maps which match softmax's kernel give softmax. No kernels of our own: the path is torch's on every device.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from downriver.core import Budget, InputError, unknown
from downriver.core.seeds import generator
from downriver.models.linear_attention import PART, LinearAttention, Seen, convert, parts
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import clone, fine_tune

Loss = Literal["xent", "mse", "both"]
MSE_FACTOR = 1000.0
"""Of the outputs' error in ``loss="both"`` and ``"mse"``: LoLCATs' configuration."""


def hedgehog(
    model: Model,
    task: Task,
    budget: Budget | str | None = None,
    *,
    feature_map: str | None = None,
    layers: Literal["all"] | Sequence[int] = "all",
    learning_rate: float = 1e-2,
    batch_size: int = 8,
    loss: Loss = "xent",
    chunk: int = 64,
    keep_softmax_window: int = 0,
    seed: int = 0,
) -> Model:
    """A copy of the model with linear attention, its feature maps trained on the task's train split without labels.

    Every layer learns at once, from the inputs it has in the softmax model: of all its weights a over the keys j that
    a query i sees, L = −Σ_j a_ij log â_ij, mean over queries, heads and layers. Nothing else changes.

    Parameters
    ----------
    model
        Of any family that uses transformers' attention interface; no encoder–decoders, no sliding windows.
    budget
        Of the distillation, like ``"200 steps"``; default two visits of every row (the paper: one or two epochs of
        text, five of a task). Maps without parameters (``elu``, ``relu``, ``cosformer``, ``performer``, ``taylor``)
        are put in as they are, unless there is a window's factor to train.
    feature_map
        One of ``nn.linear_attention.FEATURE_MAPS``; default ``hedgehog``, and ``hedgehog_softmax`` for models in half
        precision.
    layers
        Numbers of the layers to convert; the others keep softmax.
    learning_rate, batch_size
        1e-2 without weight decay is LoLCATs' setting; the paper's own is not published.
    loss
        ``xent`` as above (the paper), ``mse`` of the heads' outputs, or ``both``.
    chunk
        Length of the pieces in which causal attention is computed.
    keep_softmax_window
        Keys, a query's own and those right before it, that keep softmax's weights in a causal model; the others are
        linear, and one trained factor a head weighs the two. 0 (default) is the paper's; LoLCATs takes 64.

    ``save`` keeps everything, ``models.load`` restores it. For a state of constant size in ``generate`` give it
    ``past_key_values=LinearCache(model.backbone)``; other caches work, too, and grow. Texts must not be packed: the
    mask is that of padding only. Training needs memory for the full matrix of weights, (length)² a head.

    Raises ``InputError`` for models that cannot be converted, unknown maps, layers and losses.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> text = Dataset.from_dict({"text": ["The river runs to the sea.", "Small boats go up and down."]})
    >>> task = Task("river", "language-modelling", {"train": text}, ("text",), None)
    >>> linear = hedgehog(small("causal-lm", "nano"), task, "20 steps", batch_size=2)
    >>> table = attention_fidelity(linear, task, split="train")
    >>> table["kl"].max() < 0.05
    True
    """
    if loss not in get_args(Loss):
        raise unknown("loss", loss, get_args(Loss))
    linear = clone(model)
    half = next(linear.backbone.parameters()).dtype in (torch.float16, torch.bfloat16)
    convert(
        linear.backbone,
        feature_map or ("hedgehog_softmax" if half else "hedgehog"),
        layers=layers,
        chunk=chunk,
        keep_softmax_window=keep_softmax_window,
    )
    if not any(True for _, part in parts(linear.backbone) for _ in part.parameters()):
        if budget is not None:
            raise InputError(f"feature_map {feature_map!r} has nothing to train: give no budget")
        return linear
    return fine_tune(
        linear,
        task,
        budget or f"{2 * len(task.rows('train'))} examples",
        learning_rate=learning_rate,
        batch_size=batch_size,
        schedule="constant",
        warmup=0.0,
        trainable=lambda name: f".{PART}." in name,
        objective=_Mimicry(loss),
        seed=seed,
        in_place=True,
    )


def attention_fidelity(
    model: Model,
    task: Task,
    *,
    split: str = "validation",
    rows: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> pl.DataFrame:
    """How near a converted model's attention is to softmax on its true inputs, one row a converted layer.

    ``layer``; ``entropy_softmax`` and ``entropy`` of the weights of a query (nats: low is spiky); ``kl`` of softmax to
    linear (nats); ``monotonicity``: Spearman's correlation of weights and qᵀk over the keys of each text's last query;
    ``output_mse`` of the heads' outputs. Means over queries and heads, of at most ``rows`` texts.
    """
    found = parts(model.backbone)
    if not found:
        raise InputError(f"{model.source or 'the model'} has no linear attention: what hedgehog gives is expected")
    data, collate = task.rows(split), model.collate(task)
    if not len(data):
        raise InputError(f"split {split!r} of {task.name} is empty: texts are expected")
    order = generator("attention_fidelity", seed).permutation(len(data))[:rows].tolist()
    columns: dict[str, list[dict[str, float]]] = {name: [] for name, _ in found}
    training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(order), desc="attention", disable=not progress, delay=2) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: x.to(model.device) for name, x in collate([data[row] for row in chosen]).items()}
            for (name, _), seen in zip(found, _watched(model, batch), strict=True):
                columns[name].append(_statistics(seen))
            bar.update(len(chosen))
    model.train(training)
    tables = []
    for name, batches in columns.items():
        queries, texts = (np.array([batch.pop(unit) for batch in batches]) for unit in ("queries", "texts"))
        means = {}
        for column in batches[0]:
            counts = texts if column == "monotonicity" else queries
            means[column] = float(np.average([batch[column] for batch in batches], weights=np.maximum(counts, 1e-9)))
        tables.append({"layer": name, **means})
    return pl.DataFrame(tables)


class _Mimicry:
    """The objective: a batch's distance between softmax and linear attention, mean over layers."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, model: Model, batch: Any) -> dict[str, Tensor]:
        model.eval()  # the teacher drops nothing
        losses = []
        for seen in _watched(model, batch):
            if self.loss != "mse":
                losses.append(_mean(-(seen.teacher * seen.student.clamp(min=1e-12).log()).sum(-1), seen))
            if self.loss != "xent":
                losses.append(MSE_FACTOR * _mean((seen.teacher_output - seen.student_output).square().mean(-1), seen))
        return {"loss": torch.stack(losses).sum() / len(parts(model.backbone))}


def _watched(model: Model, batch: Any) -> list[Seen]:
    """Run a batch with softmax in charge; what every converted layer would have done."""
    caught: list[Seen] = []
    converted: list[LinearAttention] = [part for _, part in parts(model.backbone)]
    try:
        for part in converted:
            part.watch = caught.append
        model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for part in converted:
            part.watch = None
    return caught


def _mean(values: Tensor, seen: Seen) -> Tensor:
    """Over heads and the queries that are no padding, of (batch, heads, queries)."""
    real = seen.real[:, None].expand_as(values)
    return values[real].mean()


def _statistics(seen: Seen) -> dict[str, float]:
    teacher, student = seen.teacher.clamp(min=1e-12), seen.student.clamp(min=1e-12)
    real = seen.real.expand(len(seen.teacher), -1)
    ranks = []
    for text in range(len(real)):
        last = int(real[text].nonzero().max())
        keys = seen.seen.expand(len(real), -1, -1, -1)[text, 0, last]
        if keys.sum() > 2:
            ranks.append(_spearman(seen.products[text, :, last, keys], seen.student[text, :, last, keys]).mean())
    return {
        "entropy_softmax": float(_mean(-(seen.teacher * teacher.log()).sum(-1), seen)),
        "entropy": float(_mean(-(seen.student * student.log()).sum(-1), seen)),
        "kl": float(_mean((seen.teacher * (teacher.log() - student.log())).sum(-1), seen)),
        "output_mse": float(_mean((seen.teacher_output - seen.student_output).square().mean(-1), seen)),
        "monotonicity": float(torch.stack(ranks).mean()) if ranks else 0.0,
        "queries": float(real.sum()),
        "texts": float(len(ranks)),
    }


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last axis."""
    ranks = torch.stack([a, b]).argsort(-1).argsort(-1).float()
    first, second = ranks - ranks.mean(-1, keepdim=True)
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
