"""Linear probe: the backbone stays frozen, a linear head is fitted on its features by scikit-learn.

Reach for it first: it costs one forward pass a row, cannot forget anything, and says how much of the task the
pretrained features hold already (Alain & Bengio 2016). ``adapt.full`` and ``adapt.lora`` start from it by default.
"""

import time
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from downriver.core import Budget, InputError, charge, count_flops, derive_seed, seeded
from downriver.models.features import extract, inference
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import accelerator
from downriver.training.trainer import tokens_in

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""The strengths of the L2 penalty to choose from; features are standardised, so they mean the same for every
backbone."""


def linear_probe(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    l2: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    cache: bool = False,
) -> Model:
    """Fit a linear head on the frozen features of the train split: logistic regression for classes, ridge for numbers.

    Features are standardised for the fit, and the standardisation is folded into the head: the returned model's
    logits are scikit-learn's decision function (for two classes: half of it and minus half of it, the same
    probabilities).

    Parameters
    ----------
    budget
        Every row is read once, so ``"2000 examples"`` are 2000 rows (a sample by ``seed`` with the classes in their
        shares), or all of them where there are fewer; the rest of the budget is not used. A step is ``batch_size``
        rows; tokens, FLOPs and seconds are taken from the forward pass of one batch. The fit itself, seconds at most,
        is not counted.
    l2
        Strength of the penalty: ``l2 / 2 · ‖w‖²`` beside the summed cross-entropy (``l2 · ‖w‖²`` beside the summed
        squared error). Default: the best of 1, 10, 100, 1000 by log-loss on a fifth of the rows, then fitted on all
        (leave-one-out for ridge).
    cache
        Keep the features in downriver's cache, for the next probe of the same rows. The cost charged is the same.

    Charges examples, tokens, FLOPs and parameters (trained: those of the head). A class without a row gets the logit
    that half a row of it would justify.

    Raises ``InputError`` when the budget pays for fewer than two rows, and for tasks
    without a head to fit: language modelling and similarity.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["aaaa", "zzzz", "aaa", "zzz"], "label": [0, 1, 0, 1]})
    >>> task = Task("letters", "text-classification", {"train": rows}, ("text",), "label")
    >>> probed = linear_probe(small("text-encoder", "nano"), task, "4 examples", l2=0.1)
    >>> batch = probed.collate(task)([{"text": "aa"}, {"text": "zz"}])
    >>> probed(**batch)["logits"].argmax(dim=1).tolist()
    [0, 1]
    """
    budget = Budget.parse(budget)
    if task.kind in ("language-modelling", "text-similarity"):
        raise InputError(
            f"task {task.name!r} is {task.kind}: it has no head to fit; full or lora train the model itself"
        )
    if l2 is not None and not 0 < l2 < np.inf:
        raise InputError(f"l2 is {l2}: a positive number is expected")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1 is expected")
    total = len(task.rows("train"))
    device = model.device
    with seeded("head", seed):
        model = model.with_head(task).to(accelerator())
    row = _price(model, task.sample("train", min(batch_size, total), seed=seed))
    price = {"steps": 1 / batch_size, "examples": 1.0} | row
    if not price[budget.unit]:
        raise InputError(f"a budget of {budget}: reading a row of {task.name!r} counts no {budget.unit}")
    affordable = int(budget.amount / price[budget.unit] + 1e-9)
    if affordable < 2 and budget.unit != "seconds":
        raise InputError(f"a budget of {budget} pays for {affordable} rows of {task.name!r}: two at least are needed")
    sample = task.sample("train", min(total, max(2, affordable)), seed=seed)
    rows, targets = sample.rows("train"), sample.targets("train")

    features = extract(model, rows, sample, batch_size=batch_size, cache=cache)
    mean, scale = _standard(features.astype(np.float64))
    fit = _fit_classes if task.classification else _fit_numbers
    weight, bias = fit((features - mean) / scale, targets, len(task.labels), l2, derive_seed("linear_probe", seed))
    weight = weight / scale  # w · (x - mean) / scale + b, as one linear map of x
    bias = bias - weight @ mean
    head: Any = model.head
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    charge(
        examples=len(rows),
        tokens=_tokens(model, sample, batch_size) if row["tokens"] else 0,
        flops=row["flops"] * len(rows),
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in head.parameters()),
    )
    return model.to(device)


def _price(model: Model, task: Task) -> dict[str, float]:
    """What reading one row takes, by the forward pass of one real batch."""
    rows = list(task.rows("train"))
    batch = {name: tensor.to(model.device) for name, tensor in model.collate(task)(rows).items()}
    with inference(model):
        flops = count_flops(lambda: model.features(**batch))
        started = time.perf_counter()
        model.features(**batch)
        seconds = time.perf_counter() - started
    return {"tokens": tokens_in(batch) / len(rows), "flops": flops / len(rows), "seconds": seconds / len(rows)}


def _standard(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every feature; a dead one (MiniLM has one) gets a weight that float32 can hold."""
    spread = features.std(axis=0)
    return features.mean(axis=0), np.maximum(spread, 1e-3 * spread.mean() or 1.0)


def _tokens(model: Model, task: Task, batch_size: int) -> int:
    collate, rows = model.collate(task), task.rows("train")
    return sum(
        tokens_in(collate(list(rows.select(range(i, min(i + 256, len(rows))))))) for i in range(0, len(rows), 256)
    )


def _fit_classes(
    z: np.ndarray, targets: np.ndarray, classes: int, l2: float | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, d) and bias (K,) of a multinomial logistic regression."""
    present = np.unique(targets)
    fitted = _logistic(z, targets, l2 or _choose(z, targets, seed))
    w, b = fitted.coef_, fitted.intercept_
    if len(present) == 2:  # scikit-learn gives the log-odds of the second class
        w, b = np.concatenate([-w / 2, w / 2]), np.concatenate([-b / 2, b / 2])
    weight = np.zeros((classes, z.shape[1]))
    bias = np.full(classes, logsumexp(z @ w.T + b, axis=1).mean() - np.log(2 * len(targets)))
    weight[present], bias[present] = w, b
    return weight, bias


def _fit_numbers(
    z: np.ndarray, targets: np.ndarray, classes: int, l2: float | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (1, d) and bias (1,) of a ridge regression."""
    fitted = (Ridge(alpha=l2) if l2 else RidgeCV(alphas=STRENGTHS)).fit(z, targets)
    return fitted.coef_[None, :], np.atleast_1d(fitted.intercept_)


def _choose(z: np.ndarray, targets: np.ndarray, seed: int) -> float:
    """The strength with the lowest log-loss on a fifth of the rows."""
    fits, held = train_test_split(np.arange(len(z)), test_size=0.2, random_state=seed)
    known = np.unique(targets[fits])
    held = held[np.isin(targets[held], known)]
    if len(known) < 2 or len(held) == 0:
        return STRENGTHS[-1]
    losses = [
        log_loss(targets[held], _logistic(z[fits], targets[fits], l2).predict_proba(z[held]), labels=known)
        for l2 in STRENGTHS
    ]
    return STRENGTHS[int(np.argmin(losses))]


def _logistic(z: np.ndarray, targets: np.ndarray, l2: float) -> LogisticRegression:
    return LogisticRegression(C=1 / l2, max_iter=1000).fit(z, targets)
