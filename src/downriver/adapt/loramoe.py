"""LoRAMoE: beside every frozen feed-forward layer several LoRA experts and a router, some kept for world knowledge.

Reach for it when much instruction data is to be learnt and what the model knows must stay: rows of the instruction mix
that ask for knowledge are marked, and a loss on the routing gives them experts of their own. The experts cannot be
merged into the weights, since their mix depends on the token; ``merge_static`` is an approximation. Dou et al.,
«LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model Alignment» (December
2023). Departures: padding does not count in the balance (it does in the public code); the coefficients of the
balance are the other way round by default, since minimising the loss with those of the paper gives matched experts
*less* weight, in the ratio (1 - δ) : (1 + δ) (``match="1+delta"`` is the paper's).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.adapt.heads import HeadStart, ready
from downriver.core import Budget, InputError, seeded, unknown
from downriver.models.model import Model
from downriver.nn.moe import Routing, RoutingTally, report, route, routing_context
from downriver.tasks.task import Task
from downriver.training.engine import Precision, Schedule, clone, fine_tune
from downriver.training.rows import TokenRows
from downriver.training.trainer import Term

Norm = Literal["var_mean", "cv2"]
Match = Literal["1-delta", "1+delta"]
TYPES = "data_types"
"""The column of token rows, and the entry of a batch, that says of what type a row is."""


@dataclass(frozen=True, kw_only=True)
class LoRAMoEConfig:
    """What the experts are; meaning and defaults as in ``loramoe``."""

    r: int = 4
    alpha: int = 32
    dropout: float = 0.05
    num_experts: int = 8
    expert_types: Sequence[int] | None = None
    targets: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
    top_k: int | None = None
    balance: float = 0.1
    delta: float = 0.1
    norm: Norm = "var_mean"
    match: Match = "1-delta"

    def __post_init__(self) -> None:
        for name, right, expected in [
            ("r", self.r >= 1, "at least 1"),
            ("alpha", self.alpha > 0, "a positive number"),
            ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
            ("num_experts", self.num_experts >= 1, "at least 1"),
            ("top_k", self.top_k is None or 1 <= self.top_k <= self.num_experts, f"1 to {self.num_experts} or None"),
            ("balance", self.balance >= 0, "0 or more"),
            ("delta", 0 <= self.delta < 1, "from 0 to below 1"),
        ]:
            if not right:
                raise InputError(f"{name} is {getattr(self, name)}: {expected} is expected")
        if self.norm not in get_args(Norm):
            raise unknown("norm", self.norm, get_args(Norm))
        if self.match not in get_args(Match):
            raise unknown("match", self.match, get_args(Match))
        if self.expert_types is None and self.num_experts % 2 and self.num_experts > 1:
            raise InputError(
                f"num_experts is {self.num_experts}: halves need an even number, or say every expert's type "
                "in expert_types"
            )
        if self.expert_types is not None and (
            len(self.expert_types) != self.num_experts or any(t < 0 for t in self.expert_types)
        ):
            raise InputError(
                f"expert_types {list(self.expert_types)}: {self.num_experts} numbers from 0 on are expected"
            )

    @property
    def types(self) -> tuple[int, ...]:
        """The type of every expert: without ``expert_types``, 1 (knowledge) in the first half and 0 in the second."""
        if self.expert_types is not None:
            return tuple(self.expert_types)
        half = self.num_experts // 2
        return (1,) * half + (0,) * (self.num_experts - half)


class ExpertLinear(nn.Module):
    """y = W0 x + (α / r) Σ_i G(x)_i · B_i A_i dropout(x), with G(x) = softmax(W_g x), for every token.

    All experts are one pair of products: A is (N·r, in), B (out, N·r), and the N·r features between them are scaled by
    the gates. A and W_g start random (Kaiming), B at zero.
    """

    def __init__(self, base: nn.Linear, config: LoRAMoEConfig, name: str) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.name = name
        like: Any = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        wide = config.num_experts * config.r
        self.loramoe_A = nn.Parameter(torch.empty(wide, base.in_features, **like))
        self.loramoe_B = nn.Parameter(torch.zeros(base.out_features, wide, **like))
        self.loramoe_router = nn.Parameter(torch.empty(config.num_experts, base.in_features, **like))
        for weight in (self.loramoe_A, self.loramoe_router):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        h = x.to(self.loramoe_A.dtype)
        routed = route(F.linear(h, self.loramoe_router), self.config.top_k)
        report(self.name, routed)
        z = F.linear(self.dropout(h), self.loramoe_A)
        z = z * routed.dense().repeat_interleave(self.config.r, -1).to(z.dtype)
        return y + (self.config.alpha / self.config.r * F.linear(z, self.loramoe_B)).to(y.dtype)

    @torch.no_grad()
    def delta(self, weights: Tensor) -> Tensor:
        """(α / r) Σ_i w_i B_i A_i, as large as W0."""
        scaled = self.loramoe_B * weights.to(self.loramoe_B).repeat_interleave(self.config.r)
        return self.config.alpha / self.config.r * scaled @ self.loramoe_A


def add_loramoe(model: nn.Module, config: LoRAMoEConfig, *, seed: int = 0) -> nn.Module:
    """Put experts beside every linear layer whose name ends in one of ``config.targets``, in place; all else freezes.

    The model's outputs stay what they were, bit by bit, and so does its ``forward``: what a batch's types are goes
    through ``routing_context``. For a model that is trained by other means than ``loramoe``.

    Raises ``InputError`` for targets that the model lacks, naming those it has, and for targets that are no linear
    layer or have experts already.

    >>> from downriver.models import small
    >>> lm = add_loramoe(small("causal-lm", "nano").backbone, LoRAMoEConfig(num_experts=4))
    >>> with routing_context(types=torch.tensor([1, 0])) as routing:
    ...     logits = lm(torch.tensor([[5, 6], [7, 8]])).logits
    >>> balance_loss(routing, lm.model.layers[0].mlp.up_proj.config).item() > 0
    True
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in config.targets)
    ]
    if not found:
        known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear})
        raise InputError(
            f"targets {', '.join(config.targets)}: a {type(model).__name__} has no such layer "
            f"(linear layers there are: {', '.join(known) or 'none'})"
        )
    for name, module in found:
        if type(module) is not nn.Linear:
            raise InputError(f"target {name!r} is a {type(module).__name__}: a plain nn.Linear is expected")
    model.requires_grad_(False)
    with seeded("loramoe", seed):
        for name, module in found:
            _put(model, name, ExpertLinear(module, config, name))
    return model


def balance_loss(routing: Routing, config: LoRAMoEConfig) -> Tensor:
    """The localized balancing constraint Σ_layers σ²(Z) / μ(Z), without its weight β.

    Z[m, n] = I[m, n] · Σ_tokens G(x)_n for sample m and expert n. I has one of 1 ± δ where the expert's type is the
    sample's, the other elsewhere; to make Z even is to give weight in inverse proportion to I. ``norm="cv2"`` divides
    by μ(Z)² as the public code does.

    Raises ``InputError`` when the context has no types, or one that no expert has.
    """
    if routing.types is None:
        raise InputError(
            "the balancing constraint needs the type of every sample: rows with a column data_types, or balance=0"
        )
    expert = torch.tensor(config.types, device=routing.types.device)
    if not torch.isin(routing.types, expert).all():
        strange = routing.types[~torch.isin(routing.types, expert)][0].item()
        raise InputError(f"data type {strange} has no expert: one of {sorted(set(config.types))} is expected")
    matched, other = 1 - config.delta, 1 + config.delta
    if config.match == "1+delta":
        matched, other = other, matched
    coefficient = torch.where(routing.types[:, None] == expert, matched, other)  # I, (B, N)

    def one_layer(routed: Any) -> Tensor:
        gates = routed.dense()  # (B, T, N)
        if routing.mask is not None:
            gates = gates * routing.mask[..., None].to(gates.dtype)
        z = coefficient.to(gates.dtype) * gates.sum(1)
        scale = z.mean() if config.norm == "var_mean" else z.mean().square() + 1e-10
        return z.var() / scale

    return routing.total(one_layer)


class LoRAMoE(Model):
    """A ``Model`` whose backbone has experts; a batch may carry ``data_types`` (rows). Made by ``loramoe``."""

    def __init__(self, model: Model, config: LoRAMoEConfig, *, seed: int = 0) -> None:
        super().__init__(
            add_loramoe(model.backbone, config, seed=seed),
            kind=model.kind,
            head=model.head,
            processor=model.processor,
            pooling=model.pooling,
            source=model.source,
            max_length=model.max_length,
            labels=model.labels,
        )
        self.experts = config  # not config: that of a model is transformers' own
        self.routing: Routing | None = None

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        types = batch.pop(TYPES, None)
        with routing_context(types, batch.get("attention_mask")) as self.routing:
            return super().forward(**batch)

    def features(self, **batch: Tensor) -> Tensor:
        batch.pop(TYPES, None)
        return super().features(**batch)

    def aux_loss(self) -> Tensor:
        """The balancing constraint of the last forward pass, without its weight β."""
        if self.routing is None:
            raise InputError("the model has not been called yet: a loss on its routing needs a forward pass")
        return balance_loss(self.routing, self.experts)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the experts, the head and what they stand on; ``load_loramoe(folder)`` gives back the same numbers."""
        from downriver.adapt.loramoe_files import save_loramoe

        return save_loramoe(self, folder, overwrite=overwrite)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"routing": None}  # it belongs to a batch, not to the model


def loramoe(
    model: Model,
    task: Task | TokenRows,
    budget: Budget | str,
    *,
    r: int = 4,
    alpha: int = 32,
    dropout: float = 0.05,
    num_experts: int = 8,
    expert_types: Sequence[int] | None = None,
    targets: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    top_k: int | None = None,
    balance: float = 0.1,
    delta: float = 0.1,
    norm: Norm = "var_mean",
    match: Match = "1-delta",
    types: Mapping[str, int] | None = None,
    head: HeadStart = "probe",
    learning_rate: float = 2e-4,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    warmup: float = 0.03,
    schedule: Schedule = "cosine",
    seed: int = 0,
    terms: Sequence[Term] = (),
    validation: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> LoRAMoE:
    """Train LoRA experts and their routers; the model given stays as it is, and the weights of the result are frozen.

    Parameters
    ----------
    task
        Token rows with a column ``data_types`` (1 for questions of knowledge, 0 for other tasks, unless
        ``expert_types`` says otherwise), or a language-modelling task whose groups ``types`` maps to such numbers. Any
        other task that a model can do with ``balance=0``.
    r, alpha, dropout, num_experts, learning_rate, warmup, schedule
        Rank of an expert, α, and the rest; those of the authors' public script, as are the ``targets``: the
        feed-forward layers, by the ends of their names.
    expert_types
        The type of every expert. Default: the first half is for type 1, the second for type 0.
    top_k
        Let every token use its k best experts only. Default: all of them, as in the paper.
    balance, delta
        β, the weight of the balancing constraint, and δ, how uneven it wants the experts of different types; both 0.1,
        the paper's. The share of a matched expert goes to (1 + δ) / (1 - δ) times that of another one.
    norm
        ``var_mean`` is the paper's σ² / μ, ``cv2`` the public code's σ² / μ².
    match
        The coefficient of matched experts: with ``1+delta``, the paper's, they get less.
    types
        Type of each group of a language-modelling task, by its name; groups left out have type 0.
    head
        Where a head starts, as in ``full``.
    budget, batch_size, weight_decay, seed, terms, validation, checkpoints, precision
        As in ``fine_tune``.

    Charges what ``fine_tune`` charges (trained parameters: those of experts, routers and head). The constraint is
    logged as ``balance``.

    Raises ``InputError`` for parameters out of range, targets that are no linear layers, missing types where the
    constraint has a weight, and a type that no expert has.

    >>> from downriver.models import small
    >>> ids, types = [[1, 7, 8, 2], [1, 9, 2], [1, 5, 2], [1, 6, 2]], [1, 0, 0, 0]
    >>> rows = TokenRows("mix", {"train": datasets.Dataset.from_dict({"input_ids": ids, "data_types": types})})
    >>> tuned = loramoe(small("causal-lm", "nano"), rows, "2 steps", batch_size=4, num_experts=4)
    >>> routing_report(tuned, rows).filter(pl.col("layer").str.ends_with("0.mlp.up_proj")).height
    8
    """
    config = LoRAMoEConfig(
        r=r,
        alpha=alpha,
        dropout=dropout,
        num_experts=num_experts,
        expert_types=expert_types,
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        top_k=top_k,
        balance=balance,
        delta=delta,
        norm=norm,
        match=match,
    )
    left = Budget.parse(budget)
    if hasattr(model.backbone, "merge_and_unload"):
        raise InputError("the model carries an adapter: merge it first (merge_adapter)")
    if isinstance(task, TokenRows):
        rows: Task | TokenRows = task
        model = clone(model)
    else:
        model, left = ready(model, task, left, head=head, batch_size=batch_size, seed=seed)
        rows = task if types is None else typed_rows(model, task, types)
    if balance:
        _check_types(rows, config)
        terms = [balance_term(balance), *terms]
    learner = LoRAMoE(model, config, seed=seed)
    tuned = fine_tune(
        learner,
        rows,
        left,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        seed=seed,
        trainable=lambda name: name.startswith("head.") or "loramoe_" in name,
        terms=terms,
        validation=validation,
        checkpoints=checkpoints,
        precision=precision,
        in_place=True,
    )
    assert isinstance(tuned, LoRAMoE)
    tuned.routing = None
    return tuned


def balance_term(weight: float = 0.1) -> Term:
    """The balancing constraint of a ``LoRAMoE`` with its weight β, for a trainer of one's own (``WithTerms``).

    Batches need ``data_types``, as ``TokenRows.collate`` makes them; a transformers ``Trainer`` keeps the column with
    ``remove_unused_columns=False``.

    >>> balance_term().name, balance_term().weight
    ('balance', 0.1)
    """
    return Term("balance", weight, _aux_loss)


def typed_rows(model: Model, task: Task, types: Mapping[str, int]) -> TokenRows:
    """A language-modelling task as token rows with the type of each row's group."""
    if task.kind != "language-modelling" or task.group is None:
        raise InputError(f"types are for a language-modelling task with groups: {task.name!r} is none")
    splits = {}
    for split, rows in task.splits.items():
        groups = rows[task.group][:]
        if unseen := set(types) - set(groups):
            raise unknown(f"group of {task.name!r}, split {split!r},", sorted(unseen)[0], set(groups))
        ids = model.processor(rows[task.inputs[0]][:], truncation=True, max_length=model.max_length)["input_ids"]
        splits[split] = datasets.Dataset.from_dict({"input_ids": ids, TYPES: [types.get(g, 0) for g in groups]})
    return TokenRows(task.name, splits, pad=model.processor.pad_token_id or 0)


@torch.no_grad()
def routing_report(model: LoRAMoE, rows: TokenRows, *, split: str = "train", batch_size: int = 64) -> pl.DataFrame:
    """Mean gate of every expert for tokens of every data type: columns layer, data_type, expert, expert_type, gate,
    entropy (of the router, in nats).

    What the reserved experts get of the questions of knowledge, layer by layer, is the sum of ``gate`` where
    ``data_type`` and ``expert_type`` are 1. Rows without types count as type 0.
    """
    data = rows.rows(split)
    highest = max([*model.experts.types, *(data[TYPES][:] if TYPES in data.column_names else ())])
    tally = RoutingTally([str(t) for t in range(highest + 1)])
    collate, training = rows.collate(model), model.training
    model.eval()
    for start in range(0, len(data), batch_size):
        batch = collate(list(data.select(range(start, min(len(data), start + batch_size)))))
        model(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"})
        assert model.routing is not None
        tally.add(model.routing)
    model.routing = None
    model.train(training)
    shares, entropy = tally.shares(), tally.entropy()
    return pl.DataFrame(
        [
            {
                "layer": layer,
                "data_type": t,
                "expert": n,
                "expert_type": model.experts.types[n],
                "gate": float(shares[i, t, n]),
                "entropy": float(entropy[i, t]),
            }
            for i, layer in enumerate(tally.layers)
            for t in range(len(tally.groups))
            for n in range(model.experts.num_experts)
        ]
    ).filter(pl.col("gate").is_not_nan())


def merge_static(model: LoRAMoE, weights: Sequence[float] | None = None) -> Model:
    """A plain copy with W0 + (α / r) Σ_i w_i B_i A_i: every token gets the same mix, so outputs are not the same.

    ``weights``: one number an expert; default equal shares. The mean gates of ``routing_report`` are another choice.
    """
    experts = model.experts.num_experts
    chosen = [1 / experts] * experts if weights is None else list(weights)
    if len(chosen) != experts:
        raise InputError(f"{len(chosen)} weights for {experts} experts: one an expert is expected")
    merged = clone(model)
    for name, layer in experts_of(merged.backbone):
        with torch.no_grad():
            layer.base.weight += layer.delta(torch.tensor(chosen)).to(layer.base.weight)
        _put(merged.backbone, name, layer.base)
    plain = Model(
        merged.backbone,
        kind=merged.kind,
        head=merged.head,
        processor=merged.processor,
        pooling=merged.pooling,
        source=merged.source,
        max_length=merged.max_length,
        labels=merged.labels,
    )
    return plain.requires_grad_(True)


def experts_of(model: nn.Module) -> list[tuple[str, ExpertLinear]]:
    """The layers with experts, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertLinear)]


@contextmanager
def without_experts(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the plain one that it was made from."""
    layers = experts_of(model)
    for name, layer in layers:
        _put(model, name, layer.base)
    try:
        yield
    finally:
        for name, layer in layers:
            _put(model, name, layer)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _aux_loss(model: Any, batch: Any, outputs: Any) -> Tensor:
    return model.aux_loss()


def _check_types(rows: Task | TokenRows, config: LoRAMoEConfig) -> None:
    columns = rows.rows("train").column_names
    if isinstance(rows, Task) or TYPES not in columns:
        raise InputError(
            f"{rows.name!r} has no types, which balance={config.balance} needs: give token rows a column {TYPES}, a "
            "task with groups types=, or balance=0"
        )
    strange = set(rows.rows("train")[TYPES][:]) - set(config.types)
    if strange:
        raise InputError(
            f"{rows.name!r}, column {TYPES!r}: type {sorted(strange)[0]} has no expert, one of "
            f"{sorted(set(config.types))} is expected"
        )
