"""AlignGuard-LoRA: LoRA whose update stays out of the directions that a model's alignment depends on.

Reach for it when fine-tuning on harmless data must not change what a chat model refuses. "AlignGuard-LoRA:
Alignment-Preserving Fine-Tuning via Fisher-Guided Decomposition and Riemannian-Geodesic Collision Regularization"
(2025). Of its two collision terms the geodesic one is identically zero when one update is projected, since the parts
are orthogonal; it acts only on two adapters trained side by side (``split="dual"``). Both public repositories train
something else; the terms here are the paper's. On small models a plain penalty on ‖ΔW‖² (``update_norm``) does as well:
try it first, and compare by ``lambda_sweep``.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from downriver.adapt.fisher import Approximation, FisherSubspace
from downriver.adapt.heads import HeadStart, ready
from downriver.adapt.lora import add_adapter, merge_adapter
from downriver.core import Budget, InputError, unknown
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import Precision, Schedule, clone, fine_tune
from downriver.training.rows import TokenRows
from downriver.training.trainer import Batch, Term

Split = Literal["project", "dual"]
ALIGNMENT, TASK, DEFAULT = "alignment", "task", "default"
PREFIX = "base_model.model."
FACTORS = ("boft", "hira", "hra", "miss", "oft")  # of peft's tuners, those whose get_delta_weight is no ΔW
TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts of LoRA that take a part of W into B A


@dataclass
class AlignGuard:
    """The penalty on an update ΔW = ΔW_A + ΔW_T, ΔW_A = Σ_i ⟨u_i, ΔW⟩ u_i its part in the Fisher subspace:

        λ_A Σ_i λ_i ⟨u_i, ΔW⟩² + λ_T ‖H^{1/2} ΔW_T‖² + λ_NC [α E_RM + (1 − α) E_geo]

        E_RM = mean_j (1 + β σ(|W_j + ΔW_j| − τ)) |ΔW_A,j ΔW_T,j|,   E_geo = ⟨ΔW_A, ΔW_T⟩² / (‖ΔW_A‖² ‖ΔW_T‖²)

    The first two sums go over matrices, the collision terms are means over them.

    Parameters
    ----------
    subspace
        Of the aligned model, on samples of its alignment.
    lam_a, lam_t, lam_nc, alpha, beta, tau
        0.25, 0.5, 0.1, 0.5, 4 and 0.01: the values of the reimplementation that maps them to the paper.
    h
        H: ``identity``, or for every matrix, by the name of its layer or of its weight, a tensor of its shape, such as
        the task's own diagonal Fisher (``merge.diagonal_fisher``).
    split
        ``project``: one adapter, split by the projector, E_geo ≡ 0. ``dual``: the adapters ``alignment`` and ``task``
        are ΔW_A and ΔW_T; collisions are between the two.
    normalize
        Divide the eigenvalues of every matrix by their mean (between layers they differ by 10⁶).

    Works on every peft tuner that adds a ΔW and gives it (``get_delta_weight``), DoRA's lengths included, also over
    quantised weights. In a loop of one's own: ``loss + guard(model)["total"]``; in ``fine_tune``, ``lora`` and
    ``peft``, and in the trainers of transformers and trl by ``WithTerms``: ``terms=guard.terms()``.

    Raises ``InputError`` for negative λ, α outside [0, 1], and, when called, for adapters whose matrices the subspace
    or H lacks or has in another shape, and for tuners that add no ΔW to the weights as they were (rotations;
    PiSSA and its like) or give none that gradients go through.
    """

    subspace: FisherSubspace
    lam_a: float = 0.25
    lam_t: float = 0.5
    lam_nc: float = 0.1
    alpha: float = 0.5
    beta: float = 4.0
    tau: float = 0.01
    h: Literal["identity"] | Mapping[str, Tensor] = "identity"
    split: Split = "project"
    normalize: bool = True

    def __post_init__(self) -> None:
        for name in ("lam_a", "lam_t", "lam_nc", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: 0 or more is expected")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is {self.alpha}: from 0 to 1 is expected")
        if self.split not in get_args(Split):
            raise unknown("split", self.split, get_args(Split))
        if isinstance(self.h, str) and self.h != "identity":
            raise unknown("h", self.h, ("identity", "a tensor for every matrix"))
        self._last: tuple[Any, dict[str, Tensor]] | None = None

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        """``fisher``, ``stability``, ``overlap`` and ``geodesic`` without their weights, and the weighted ``total``."""
        found: dict[str, list[Tensor]] = {name: [] for name in ("fisher", "stability", "overlap", "geodesic")}
        names = (ALIGNMENT, TASK) if self.split == "dual" else (DEFAULT,)
        for name, weight, deltas in _updates(model, names):
            directions = self._directions(name, deltas[0])
            c = directions.coefficients(deltas[0])
            if self.split == "dual":
                part_a, part_t = deltas
            else:
                part_a = directions.combine(c)
                part_t = deltas[0] - part_a
            values = directions.eigenvalues.to(c)
            values = values / values.mean() if self.normalize else values
            found["fisher"].append((values * c.square()).sum())
            found["stability"].append((self._h(name, part_t) * part_t.square()).sum())
            found["overlap"].append(overlap(part_a, part_t, weight + sum(deltas), beta=self.beta, tau=self.tau))
            found["geodesic"].append(geodesic(part_a, part_t) if self.split == "dual" else c.new_zeros(()))
        terms = {
            "fisher": torch.stack(found["fisher"]).sum(),
            "stability": torch.stack(found["stability"]).sum(),
            "overlap": torch.stack(found["overlap"]).mean(),
            "geodesic": torch.stack(found["geodesic"]).mean(),
        }
        return terms | {"total": sum((self._weights[name] * value for name, value in terms.items()), torch.zeros(()))}

    def terms(self) -> list[Term]:
        """As regularisers, logged one by one; those of weight 0 are left out."""
        return [
            Term(f"alignguard {name}", weight, partial(self._term, name))
            for name, weight in self._weights.items()
            if weight > 0 and (name != "geodesic" or self.split == "dual")
        ]

    @property
    def _weights(self) -> dict[str, float]:
        collision = {"overlap": self.alpha * self.lam_nc, "geodesic": (1 - self.alpha) * self.lam_nc}
        return {"fisher": self.lam_a, "stability": self.lam_t, **collision}

    def _term(self, name: str, model: nn.Module, batch: Batch, outputs: Batch) -> Tensor:
        if self._last is None or self._last[0] is not outputs:  # once a step for all terms
            self._last = (outputs, self(model))
        return self._last[1][name]

    def _directions(self, name: str, delta: Tensor) -> Any:
        if name not in self.subspace:
            raise InputError(
                f"the Fisher subspace lacks {name!r}, which an adapter changes: estimate it for that layer"
            )
        directions = self.subspace[name]
        if tuple(directions.shape) != tuple(delta.shape):
            found = tuple(directions.shape)
            raise InputError(f"{name!r}: the Fisher subspace is of shape {found}, the update {tuple(delta.shape)}")
        return directions

    def _h(self, name: str, part: Tensor) -> Tensor:
        if isinstance(self.h, str):
            return torch.ones((), device=part.device)
        given = self.h.get(name, self.h.get(f"{name}.weight"))
        if given is None or given.shape != part.shape:
            raise InputError(f"h: a tensor of shape {tuple(part.shape)} is expected for {name!r}")
        return given.to(part)


def overlap(part_a: Tensor, part_t: Tensor, weight: Tensor, *, beta: float = 4.0, tau: float = 0.01) -> Tensor:
    """E_RM: how much two updates change the same entries, large weights counting up to 1 + β times.

    >>> overlap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.ones(2)).item()
    0.0
    """
    eta = 1 + beta * torch.sigmoid(weight.abs() - tau)
    return (eta * (part_a * part_t).abs()).mean()


def geodesic(part_a: Tensor, part_t: Tensor) -> Tensor:
    """E_geo: the squared cosine of two updates, from 0 to 1; 0 where one of them is zero.

    >>> geodesic(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])).item()
    1.0
    """
    norms = part_a.square().sum() * part_t.square().sum()
    return (part_a * part_t).sum().square() / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def update_norm(model: nn.Module, batch: Batch | None = None, outputs: Batch | None = None) -> Tensor:
    """Σ ‖ΔW‖² of an adapted model, the simplest rival: ``Term("norm", 0.01, update_norm)``."""
    return torch.stack([delta.square().sum() for _, _, deltas in _updates(model, None) for delta in deltas]).sum()


def alignguard_lora(
    model: Model,
    task: Task | TokenRows,
    budget: Budget | str,
    *,
    alignment: Task | TokenRows | FisherSubspace,
    fisher_rank: int | float = 64,
    fisher: Approximation = "exact",
    samples: int = 256,
    lam_a: float = 0.25,
    lam_t: float = 0.5,
    lam_nc: float = 0.1,
    h: Literal["identity", "task_fisher"] | Mapping[str, Tensor] = "identity",
    split: Split = "project",
    rank: int = 8,
    alpha: int = 16,
    target_modules: list[str] | None = None,
    head: HeadStart = "probe",
    learning_rate: float = 4e-4,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    schedule: Schedule = "linear",
    seed: int = 0,
    terms: Sequence[Term] = (),
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Train a LoRA adapter that leaves alone what ``alignment`` needs; the result is what ``lora`` gives.

    Parameters
    ----------
    alignment
        Samples of what must stay (prompts with the model's own safe answers), or their Fisher subspace.
    fisher_rank, fisher, samples
        As ``rank``, ``method`` and ``samples`` of ``FisherSubspace.estimate``: 64 directions a matrix of 256 samples.
    lam_a, lam_t, lam_nc, split
        As in ``AlignGuard``. With ``dual`` two adapters of rank r are trained, and folded into one of rank 2r.
    h
        As in ``AlignGuard``, or ``task_fisher``: the diagonal Fisher of the task at the start, each matrix's over its
        mean, so that λ_T keeps its meaning.
    rank, alpha, target_modules, head, learning_rate, batch_size, warmup, schedule, terms, checkpoints, precision
        As in ``lora``; ``weight_decay`` is 0 here: the penalty on the update is in the terms.

    Raises ``InputError`` as ``lora``, ``FisherSubspace.estimate`` and ``AlignGuard``.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> def texts(*rows):
    ...     return Task("texts", "language-modelling", {"train": Dataset.from_dict({"text": rows})}, ("text",), None)
    >>> kept, new = texts("I refuse to do that.", "That I cannot."), texts("Rivers run to the sea.")
    >>> tuned = alignguard_lora(small("causal-lm", "nano"), new, "4 steps", alignment=kept, batch_size=1)
    >>> type(tuned.backbone).__name__
    'PeftModelForCausalLM'
    """
    if isinstance(h, str) and h not in ("identity", "task_fisher"):
        raise unknown("h", h, ("identity", "task_fisher", "a tensor for every matrix"))
    model = merge_adapter(model) if hasattr(model.backbone, "merge_and_unload") else model
    left = Budget.parse(budget)
    if isinstance(task, TokenRows):
        model = clone(model)
    else:
        model, left = ready(model, task, left, head=head, batch_size=batch_size, seed=seed)
    if isinstance(alignment, FisherSubspace):
        subspace = alignment
    else:
        settings: Any = {"rank": fisher_rank, "method": fisher, "samples": samples, "targets": target_modules}
        subspace = FisherSubspace.estimate(model, alignment, seed=seed, **settings)
    if isinstance(h, str) and h == "task_fisher":
        h = task_fisher(model, task, targets=list(subspace), samples=samples, seed=seed)
    guard = AlignGuard(subspace, lam_a=lam_a, lam_t=lam_t, lam_nc=lam_nc, h=h, split=split)
    add_adapter(model, rank=rank, alpha=alpha, target_modules=target_modules or list(subspace), seed=seed)
    if split == "dual":
        _side_by_side(model, seed)
    tuned = fine_tune(
        model,
        task,
        left,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        seed=seed,
        trainable=lambda name: name.startswith("head.") or "lora_" in name,
        terms=[*guard.terms(), *terms],
        checkpoints=checkpoints,
        precision=precision,
        in_place=True,
    )
    if split == "dual":
        _fold(tuned)
    return tuned


def task_fisher(
    model: Model, task: Task | TokenRows, *, targets: Sequence[str] | None = None, samples: int = 256, seed: int = 0
) -> dict[str, Tensor]:
    """H by the layer's name: the diagonal Fisher of a task for every matrix, over its mean; as ``h`` of ``AlignGuard``.

    >>> from datasets import Dataset
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["Rivers run to the sea.", "Fish swim."]})
    >>> task = Task("texts", "language-modelling", {"train": rows}, ("text",), None)
    >>> found = task_fisher(small("causal-lm", "nano"), task, targets=["model.layers.0.self_attn.q_proj"])
    >>> [(h.shape, round(h.mean().item(), 3)) for h in found.values()]
    [(torch.Size([32, 32]), 1.0)]
    """
    every: Any = {"rank": sys.maxsize, "method": "diag", "targets": targets, "samples": samples, "seed": seed}
    diagonals = FisherSubspace.estimate(model, task, **every).matrices
    whole = {name: diagonal.combine(diagonal.eigenvalues) for name, diagonal in diagonals.items()}
    return {name: h / h.mean().clamp(min=torch.finfo(h.dtype).tiny) for name, h in whole.items()}


@dataclass(frozen=True)
class DriftReport:
    """Shares of prompts that a model refuses before and after a change: unsafe ones (more is better), and safe ones
    (over-refusal: less is better)."""

    unsafe_before: float
    unsafe_after: float
    safe_before: float
    safe_after: float

    @property
    def drift(self) -> float:
        """Refusals of unsafe prompts that were lost."""
        return self.unsafe_before - self.unsafe_after


def alignment_drift(
    before: Callable[[Sequence[str]], Sequence[str]],
    after: Callable[[Sequence[str]], Sequence[str]],
    unsafe: Sequence[str],
    safe: Sequence[str],
    refuses: Callable[[str, str], bool],
) -> DriftReport:
    """Ask two models, each a function from prompts to answers, and let ``refuses(prompt, answer)`` judge.

    Do not judge by one list of refusing phrases alone: a classifier, or a model as a judge, sees what a list misses.

    >>> polite, rude = lambda prompts: ["I cannot."] * len(prompts), lambda prompts: ["Sure!"] * len(prompts)
    >>> alignment_drift(polite, rude, ["Do harm."], ["Say hi."], lambda prompt, answer: "cannot" in answer).drift
    1.0
    """
    if not unsafe or not safe:
        raise InputError(f"{len(unsafe)} unsafe and {len(safe)} safe prompts: one of each at least is expected")

    def share(answer: Callable[[Sequence[str]], Sequence[str]], prompts: Sequence[str]) -> float:
        answers = answer(prompts)
        if len(answers) != len(prompts):
            raise InputError(f"{len(prompts)} prompts got {len(answers)} answers: one each is expected")
        return sum(refuses(*pair) for pair in zip(prompts, answers, strict=True)) / len(prompts)

    return DriftReport(share(before, unsafe), share(after, unsafe), share(before, safe), share(after, safe))


def _updates(model: nn.Module, names: Sequence[str] | None) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Every adapted layer: its name in the bare backbone, its frozen weight, and the ΔW of the adapters ``names`` (all
    active ones where None)."""
    backbone = getattr(model, "backbone", model)
    for config in getattr(backbone, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(TAKEN_OUT):
            raise InputError(f"init_lora_weights={start!r} changes the weights themselves: B A is no update of them")
    found = False
    for name, module in backbone.named_modules():
        if not hasattr(module, "get_delta_weight") or not hasattr(module, "get_base_layer"):
            continue
        wanted = list(names or module.active_adapters)
        parts: Any = module
        there = [adapter for adapter in wanted if any(adapter in getattr(parts, x) for x in parts.adapter_layer_names)]
        if len(there) < len(wanted):
            raise InputError(f"{name!r} has no adapters named {', '.join(map(repr, wanted))}")
        weight = dequantize_module_weight(parts.get_base_layer()).detach()
        found = True
        yield name.removeprefix(PREFIX), weight, [_update(name, parts, adapter, weight) for adapter in wanted]
    if not found:
        raise InputError(f"a {type(backbone).__name__} without adapters: a peft model that gives its ΔW is expected")


def _update(name: str, layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """ΔW of one adapter. In DoRA the sum of weight and product is scaled to learnt lengths, one an output."""
    tuner = type(layer).__module__.split(".")[-2]
    if tuner in FACTORS:
        raise InputError(f"{name!r}: {tuner} multiplies the weight, a tuner that adds a ΔW to it is expected")
    try:
        delta = layer.get_delta_weight(adapter).to_dense()
    except NotImplementedError:
        raise InputError(f"{name!r}: {tuner} gives no ΔW") from None
    learns = any(p.requires_grad and adapter in n.split(".") for n, p in layer.named_parameters())
    if learns and torch.is_grad_enabled() and not delta.requires_grad:
        raise InputError(f"{name!r}: {tuner} gives its ΔW without gradients, so that a penalty on it would do nothing")
    lengths = getattr(layer, "lora_magnitude_vector", {})
    if adapter not in lengths:
        return delta
    moved = weight + delta
    now = moved.norm(dim=0 if layer.fan_in_fan_out else 1, keepdim=True)
    return lengths[adapter].weight.view(now.shape) / now * moved - weight


def _side_by_side(model: Model, seed: int) -> None:
    """In place of the adapter ``default`` two of its shape, both active: ``alignment`` and ``task``."""
    adapted: Any = model.backbone
    config = adapted.peft_config[DEFAULT]
    for number, name in enumerate((ALIGNMENT, TASK)):
        with torch.random.fork_rng():
            torch.manual_seed(2 * seed + number)
            adapted.add_adapter(name, config)
    adapted.set_adapter(ALIGNMENT)  # what the wrapper calls active is one
    adapted.base_model.set_adapter([ALIGNMENT, TASK])
    adapted.delete_adapter(DEFAULT)


def _fold(model: Model) -> None:
    """The two adapters as one, ``default``, whose ΔW is their sum."""
    adapted: Any = model.backbone
    adapted.add_weighted_adapter([ALIGNMENT, TASK], [1.0, 1.0], DEFAULT, combination_type="cat")
    adapted.set_adapter(DEFAULT)
    for name in (ALIGNMENT, TASK):
        adapted.delete_adapter(name)
