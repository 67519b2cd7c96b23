"""Skill localisation: the few fine-tuned entries that carry a task, found by learning a mask, as a patch.

Reach for it to ship a fine-tuning as a small file, to see where a skill lies, or to combine skills of several
fine-tunings that hardly overlap. Panigrahi et al., "Task-Specific Skill Localization in Fine-tuned Language Models"
(2023). θ(γ) = γ⊙θ_ft + (1 − γ)⊙θ_pre, with γ learnt by plain SGD on a relaxed mask. Departures: the step size is chosen
so that the first step moves the largest score by the bias (the authors' 1e7 fits their models only); entries that did
not change are never in a mask.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import seeded
from downriver.merge.plan import Pattern, matching
from downriver.nn.sparse_patch import SparseMask, SparsePatch

Start = Literal["movement", "gradient", "movement*gradient"]
Loss = Callable[[Any, Any], Tensor]
MOST_BATCHES = 128


@dataclass(frozen=True)
class Graft:
    """The region of a skill: its ``mask``, the ``patch`` that puts it onto the pretrained model, and the ``history`` of
    the search, a row a step with ``loss``, ``entries`` and ``score`` of the rounded mask."""

    mask: SparseMask
    patch: SparsePatch
    history: Sequence[Mapping[str, float]]

    @property
    def sparsity(self) -> float:
        """Entries of the region over all of the model's parameters."""
        return self.mask.share

    def apply(self, model: nn.Module) -> Any:
        """A copy of the pretrained model with the fine-tuned values in the region."""
        grafted = copy.deepcopy(model)
        with torch.no_grad():
            state = self.patch.apply(_parameters(model))
            for name, parameter in grafted.named_parameters():
                parameter.copy_(state[name])
        return grafted

    def by_module(self, depth: int | None = None) -> dict[str, int]:
        """Entries of the region by module, or by the first ``depth`` parts of its name."""
        counts: Counter[str] = Counter()
        for name, places in self.mask.indices.items():
            module = name.rpartition(".")[0] or name
            counts[".".join(module.split(".")[:depth])] += len(places)
        return dict(counts)


def localize_skill(
    pretrained: nn.Module,
    finetuned: nn.Module,
    loss_fn: Loss,
    data: Iterable[Any],
    *,
    base: Start | SparseMask = "movement",
    sparsity: float = 1e-4,
    steps: int = 50,
    lr: float | Literal["auto"] = "auto",
    bias: float = 10.0,
    score: Callable[[Any], float] | None = None,
    frozen: Pattern = None,
    seed: int = 0,
    progress: bool = True,
) -> Graft:
    """Learn which fine-tuned entries carry the task, starting from those that moved most.

    Parameters
    ----------
    pretrained, finetuned
        Modules of one architecture, such as two ``Model`` with the same head; neither is changed. Both are used in
        evaluation mode, as the authors do.
    loss_fn
        ``loss_fn(model, batch)``, the task's loss.
    data
        Batches of the training data; of more than 128 the first are used.
    base
        γ0: the entries with the largest ``movement`` |θ_ft − θ_pre| (the paper's), ``gradient`` at θ_pre, or product of
        both, or a mask.
    sparsity
        Entries of γ0 over all parameters; the paper's are 1e-7 to 1e-5 of large models, small ones need more. The size
        of the result follows from the search.
    steps
        Of SGD, each over all batches; the authors take 10 to 100.
    lr, bias
        Step size, and b in γ = γ0 + (1 − 2γ0)·σ(S − b) (10, the authors'), which keeps the start close to γ0.
    score
        Of a model with the rounded mask, higher is better; the best mask is kept. By default minus the mean loss on the
        data. The paper adds training and validation accuracy.
    frozen
        Regular expressions of parameters that stay out, such as the head. They must be equal in both models.
    seed
        Of the random start of S in (0, 1).

    Raises
    ------
    InputError
        Models of different parameters; a frozen tensor that differs; nothing that differs; a sparsity that gives no
        entry; no batch.

    Example
    -------
    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> old, new = nn.Linear(8, 1), nn.Linear(8, 1)
    >>> _ = new.load_state_dict({"weight": old.weight + torch.eye(1, 8), "bias": old.bias})
    >>> x = torch.randn(64, 8)
    >>> graft = localize_skill(old, new, lambda m, x: (m(x) - new(x)).square().mean(), [x], sparsity=0.12, steps=2)
    >>> graft.mask.indices["weight"].tolist()
    [0]
    """
    if not isinstance(base, SparseMask) and base not in get_args(Start):
        raise unknown("base", base, get_args(Start))
    before, delta, total = _moved(pretrained, finetuned, frozen)
    batches = [batch for batch, _ in zip(data, range(MOST_BATCHES), strict=False)]
    if not batches:
        raise InputError("data is empty: at least one batch is expected")
    model = copy.deepcopy(pretrained).eval()
    parameters = {name: p for name, p in model.named_parameters() if name in delta}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in delta)

    def put(gamma: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():  # γ ∈ {0, 1} gives either model's values bit by bit
                mixed = before[name] + gamma[name] * delta[name]
                parameter.copy_(torch.where(gamma[name] == 1, before[name] + delta[name], mixed))

    def gradients() -> tuple[float, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for batch in batches:
            part = loss_fn(model, batch) / len(batches)
            part.backward()
            loss += float(part.detach())
        none = {name: torch.zeros_like(p) for name, p in parameters.items() if p.grad is None}
        return loss, {name: p.grad if p.grad is not None else none[name] for name, p in parameters.items()}

    def judged() -> float:
        with torch.no_grad():
            if score is not None:
                return float(score(model))
            return -sum(float(loss_fn(model, batch)) for batch in batches) / len(batches)

    start = base if isinstance(base, SparseMask) else _start(base, delta, gradients, sparsity, total)
    gamma0 = {name: start.dense(name, d.shape).to(d.device) & (d != 0) for name, d in delta.items()}
    with seeded("localize_skill", seed):
        scores = {name: torch.rand(d.shape).to(d) for name, d in delta.items()}
    hard = gamma0
    put({name: mask.to(delta[name].dtype) for name, mask in hard.items()})
    best, best_score = hard, judged()
    history = [{"step": 0.0, "loss": math.nan, "entries": float(_count(hard)), "score": best_score}]
    for step in tqdm(range(1, steps + 1), desc="mask", disable=not progress, delay=2):
        soft = {name: torch.sigmoid(s - bias) for name, s in scores.items()}
        sign = {name: 1 - 2 * mask.to(delta[name].dtype) for name, mask in gamma0.items()}
        put({name: gamma0[name].to(delta[name].dtype) + sign[name] * soft[name] for name in soft})
        loss, grads = gradients()
        # ∂L/∂S = ∂L/∂θ ⊙ (θ_ft − θ_pre) ⊙ (1 − 2γ0) ⊙ σ'(S − b)
        moves = {n: grads[n] * delta[n] * sign[n] * soft[n] * (1 - soft[n]) for n in soft}
        if lr == "auto":
            largest = max(float(move.abs().max()) for move in moves.values())
            lr = bias / largest if largest > 0 else 0.0
        for name, move in moves.items():
            scores[name] -= lr * move
        hard = {name: (gamma0[name] ^ (s > bias)) & (delta[name] != 0) for name, s in scores.items()}
        put({name: mask.to(delta[name].dtype) for name, mask in hard.items()})
        history.append({"step": float(step), "loss": loss, "entries": float(_count(hard)), "score": judged()})
        if history[-1]["score"] > best_score:
            best, best_score = hard, history[-1]["score"]
    mask = SparseMask.of(best, total)
    about = {"method": "skill_grafting", "entries": mask.count, "score": best_score}
    return Graft(mask, _patch(pretrained, finetuned, mask, about), history)


def graft(pretrained: nn.Module, finetuned: nn.Module, mask: SparseMask) -> Any:
    """A copy of the pretrained model with the fine-tuned values at the entries of the mask.

    >>> old, new = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> grafted = graft(old, new, SparseMask({"weight": torch.tensor([1])}, 2))
    >>> torch.equal(grafted.weight[0], torch.stack([old.weight[0, 0], new.weight[0, 1]]))
    True
    """
    return Graft(mask, _patch(pretrained, finetuned, mask, {"method": "skill_grafting"}), []).apply(pretrained)


def overlap(grafts: Sequence[Graft | SparseMask]) -> np.ndarray:
    """|γa ∩ γb| / |γa| for every pair, (n, n): how much of region a (row) lies in region b (column)."""
    masks = [one.mask if isinstance(one, Graft) else one for one in grafts]
    return np.array([[a.overlap(b).of_first for b in masks] for a in masks])


def union(grafts: Sequence[Graft | SparseMask]) -> SparseMask:
    """The entries of any of the regions, for ``graft`` with one multi-task model."""
    masks = [one.mask if isinstance(one, Graft) else one for one in grafts]
    if not masks:
        raise InputError("grafts is empty: at least one region is expected")
    found = masks[0]
    for mask in masks[1:]:
        found = found.union(mask)
    return found


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _patch(pretrained: nn.Module, finetuned: nn.Module, mask: SparseMask, about: Mapping[str, Any]) -> SparsePatch:
    return SparsePatch.between(_parameters(pretrained), _parameters(finetuned), mask, about)


def _moved(
    pretrained: nn.Module, finetuned: nn.Module, frozen: Pattern
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """θ_pre and θ_ft − θ_pre of what may be grafted, and how many parameters there are in all."""
    old, new = _parameters(pretrained), _parameters(finetuned)
    odd = [n for n in {**old, **new} if n not in old or n not in new or old[n].shape != new[n].shape]
    if odd:
        raise InputError(
            f"the models differ in the parameters {', '.join(map(repr, odd))}: one architecture is expected"
        )
    stays = matching(frozen, None) if frozen else lambda name: False
    if changed := [name for name in old if stays(name) and not torch.equal(old[name], new[name])]:
        raise InputError(f"frozen parameter {changed[0]!r} differs between the models: it must be equal in both")
    inside = [name for name in old if not stays(name) and old[name].dtype.is_floating_point]
    delta = {name: new[name] - old[name] for name in inside}
    if not any(bool(d.any()) for d in delta.values()):
        raise InputError("the models are equal wherever nothing is frozen: there is no skill to localise")
    return {n: old[n].clone() for n in inside}, delta, sum(p.numel() for p in old.values())


def _start(
    base: Start,
    delta: Mapping[str, Tensor],
    gradients: Callable[[], tuple[float, dict[str, Tensor]]],
    sparsity: float,
    total: int,
) -> SparseMask:
    """γ0: the s·d entries with the largest |Δ|, |g| or |Δ·g|."""
    k = int(sparsity * total)
    changed = sum(int(d.count_nonzero()) for d in delta.values())
    if not k > 0:
        raise InputError(f"sparsity {sparsity} of {total} parameters is no entry: at least {1 / total:.2g} is expected")
    if base == "movement":
        ranked = dict(delta)
    else:
        grads = gradients()[1]
        ranked = {n: grads[n] * (delta[n] if base == "movement*gradient" else (delta[n] != 0)) for n in delta}
    return SparseMask.top(ranked, min(k, changed), total)


def _count(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())
