"""Recover a model's alignment after fine-tuning: put a small, gradient-chosen part of its weights back.

Reach for it when fine-tuning, even on harmless data, made a chat model answer what it had refused. Needs the aligned
model, harmful prompts (no answers) and prompts of the task. "Alleviating the Fear of Losing Alignment in LLM
Fine-tuning" (2025), as its code does it: gradients accumulate over recovery steps. The result is also a patch that is
taken back bit by bit.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from downriver.core.errors import InputError
from downriver.models.model import Model
from downriver.models.surgery import layer_stack, lower_part
from downriver.nn.sparse_patch import SparseMask, SparsePatch

M = TypeVar("M", bound=nn.Module)
Prompts = Sequence[str] | Sequence[Sequence[int]]
EVERY = 5  # steps between checkpoints, and warm-up steps


@dataclass(frozen=True)
class RecoveryResult:
    """``model``: a copy with the weights put back; ``mask`` and ``patch`` of what differs from the fine-tuned model;
    ``history``, a row a step; ``chosen_step``, the checkpoint that was taken (0: the fine-tuned model itself)."""

    model: Any
    mask: SparseMask
    patch: SparsePatch
    history: Sequence[Mapping[str, float]]
    chosen_step: int
    rollback: bool

    @property
    def restored_fraction(self) -> float:
        """Entries put back over all parameters."""
        return self.mask.share


def recover_alignment(
    finetuned: M,
    aligned: nn.Module,
    harmful_prompts: Prompts,
    task_prompts: Prompts,
    *,
    tokenizer: Any = None,
    layer_end: float | int = 2 / 3,
    rate: float = 0.002,
    steps: int = 20,
    rollback: bool | Literal["auto"] = "auto",
    rollback_rate: float = 0.2,
    task_metric: Callable[[M], float] | None = None,
    max_drop: float = 0.05,
    skip: Sequence[str] = ("norm", "embed"),
    accumulate: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> RecoveryResult:
    """Set weights of the fine-tuned model back to the aligned one's until harmful prompts look to it as they used to.

    Parameters
    ----------
    finetuned, aligned
        Causal language models of one architecture, ``Model`` or transformers ones; neither is changed. Merge adapters
        first.
    harmful_prompts, task_prompts
        Texts, put into the tokenizer's chat template where it has one, or token ids. The paper takes 256 of each.
    tokenizer
        For texts; a ``Model`` brings its own.
    layer_end
        Only layers before this one are touched, a share of the depth (2/3, the released default) or a number: the
        direction is read off there, and a backward pass costs that share.
    rate
        Of all parameters, at most this share is put back in a step (0.002, the paper's; 0.001 for 13B). Small models
        need more.
    steps
        20, the paper's, with a checkpoint each 5.
    rollback
        After every recovery step, take back a part of it that the task needs. ``auto``: as the paper, if the first 5
        steps cost the task more than ``max_drop``; this needs ``task_metric``.
    rollback_rate
        0.2, the paper's: the share of a step's entries that is taken back.
    task_metric
        Of a model, higher is better. The last checkpoint within ``max_drop`` is the result; without it, the last step.
    max_drop
        0.05, the paper's: the metric may fall to 95 % of the fine-tuned model's.
    skip
        Parameters with these words in their name stay (norms and embeddings, as in the paper).
    accumulate
        Gradients of recovery steps add up, as in the released code; otherwise each step starts anew.
    batch_size
        Prompts a batch: the direction is that of their mean.

    Raises
    ------
    InputError
        Parameters that differ in name or shape; a model with adapters; no prompts; texts without a tokenizer;
        ``rollback="auto"`` without a metric; a rate or layer out of range.

    Example
    -------
    >>> from downriver.models import small
    >>> aligned, tuned = small("causal-lm", "nano", seed=0), small("causal-lm", "nano", seed=1)
    >>> found = recover_alignment(tuned, aligned, ["Do harm."], ["Sort."], rate=0.01, steps=2, rollback=False)
    >>> 0 < found.restored_fraction < 0.021
    True
    """
    old, new = _states(aligned, finetuned)
    backbone = getattr(finetuned, "backbone", finetuned)
    depth = len(layer_stack(backbone)[1])
    end = layer_end if isinstance(layer_end, int) else int(layer_end * depth)
    if not 1 <= end <= depth:
        raise InputError(f"layer_end is {layer_end}, layer {end} of {depth}: 1 to {depth} is expected")
    for name, value in (("rate", rate), ("rollback_rate", rollback_rate)):
        if not 0 < value <= 1:
            raise InputError(f"{name} is {value}: a share above 0 and up to 1 is expected")
    if rollback == "auto" and task_metric is None:
        raise InputError("rollback='auto' needs task_metric: give one, or rollback=True or False")
    tokenizer = tokenizer or getattr(finetuned, "processor", None)
    harm = _batches(harmful_prompts, tokenizer, batch_size, "harmful_prompts")
    task = _batches(task_prompts, tokenizer, batch_size, "task_prompts")
    directions = (_direction(aligned, harm, end), _direction(finetuned, task, end))
    names = _touched(finetuned, end, skip)
    size = sum(p.numel() for p in finetuned.parameters())
    floor = None if task_metric is None else (1 - max_drop) * task_metric(finetuned)
    run = _Run(finetuned, old, new, names, harm, task, directions, end, math.ceil(size * rate), rollback_rate)

    mode = rollback is True
    kept, history, chosen = dict(new), [], 0
    bar = tqdm(total=steps, desc="recover", disable=not progress, delay=2)
    step = 0
    while step < steps:
        step += 1
        row = run.step(accumulate, mode)
        row["step"], row["restored"] = float(step), run.restored() / size
        history.append(row)
        bar.update()
        if step % EVERY and step != steps:
            continue
        if task_metric is not None and floor is not None:
            row["metric"] = task_metric(run.model)
            if row["metric"] < floor:
                if rollback == "auto" and not mode and step == EVERY:
                    run, step, mode = run.again(), 0, True
                    bar.reset()
                    continue
                break
        kept, chosen = run.state(), step
    bar.close()
    model = copy.deepcopy(finetuned)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    mask = SparseMask.of({name: kept[name] != new[name] for name in names}, size)
    about = {"method": "alignment_recovery", "rate": rate, "steps": chosen, "rollback": mode, "layer_end": end}
    return RecoveryResult(model, mask, SparsePatch.between(new, kept, mask, about), history, chosen, mode)


class _Run:
    """A copy of the fine-tuned model on its way back."""

    def __init__(
        self,
        finetuned: Any,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        names: Sequence[str],
        harm: Sequence[Mapping[str, Tensor]],
        task: Sequence[Mapping[str, Tensor]],
        directions: tuple[Tensor, Tensor],
        end: int,
        budget: int,
        rollback_rate: float,
    ) -> None:
        self._arguments = (finetuned, old, new, names, harm, task, directions, end, budget, rollback_rate)
        self.model = copy.deepcopy(finetuned).eval()
        self.old, self.new, self.names = old, new, names
        self.harm, self.task, self.end, self.budget, self.rate = harm, task, end, budget, rollback_rate
        self.to_harm, self.to_task = directions
        self.parameters = dict(self.model.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)

    def again(self) -> "_Run":
        """From the fine-tuned model once more."""
        return _Run(*self._arguments)

    def state(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restored(self) -> int:
        """Entries that differ from the fine-tuned model."""
        return sum(int((self.parameters[name] != self.new[name]).sum()) for name in self.names)

    def step(self, accumulate: bool, rollback: bool) -> dict[str, float]:
        """Recover; then, in rollback mode, take a part of it back."""
        if not accumulate:
            self.model.zero_grad(set_to_none=True)
        row = {"cosine_harm": self._gradients(self.harm, self.to_harm)}
        moved = self._push(self.old, self.budget, None)
        if rollback:
            self.model.zero_grad(set_to_none=True)
            row["cosine_task"] = self._gradients(self.task, self.to_task)
            self._push(self.new, None, moved)
            self.model.zero_grad(set_to_none=True)
        return row

    def _gradients(self, batches: Sequence[Mapping[str, Tensor]], direction: Tensor) -> float:
        """Add ∂(−cos(mean hidden, d))/∂W of every batch; gives the mean cosine."""
        total = 0.0
        with lower_part(getattr(self.model, "backbone", self.model), self.end) as run:
            for batch in batches:
                hidden = run(**batch, use_cache=False)[:, -1].mean(0)
                cosine = torch.cosine_similarity(hidden.float(), direction, dim=0)
                (-cosine).backward()
                total += float(cosine.detach())
        return total / len(batches)

    def _push(
        self, target: Mapping[str, Tensor], budget: int | None, inside: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Set the entries with the largest gradients, whose way to the target the gradient approves of, to it.

        With ``inside`` only entries there can be set, and as many as the rollback rate of those that could.
        """
        approved = {}
        for name in self.names:
            parameter = self.parameters[name]
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            way = (parameter.detach().float() - target[name].float()) * grad.float() > 0  # a step of −g goes there
            approved[name] = grad.float().abs() * (way if inside is None else way & inside[name])
        count = sum(int(value.count_nonzero()) for value in approved.values())
        if inside is not None:
            budget = math.ceil(self.rate * count)
        if not count or not budget:
            return {name: torch.zeros_like(value, dtype=torch.bool) for name, value in approved.items()}
        mask = SparseMask.top(approved, min(budget, count))
        chosen = {n: mask.dense(n, v.shape).to(v.device) for n, v in approved.items()}
        with torch.no_grad():
            for name, where in chosen.items():
                self.parameters[name][where] = target[name][where]
        return chosen


def _states(aligned: nn.Module, finetuned: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for what, model in (("aligned", aligned), ("finetuned", finetuned)):
        if any(hasattr(m, "merge_and_unload") for m in model.modules()):
            raise InputError(f"the {what} model has adapters: merge them first (merge_adapter, or merge_and_unload)")
        if isinstance(model, Model) and model.kind != "causal-lm":
            raise InputError(f"the {what} model is a {model.kind} model: a causal-lm is expected")
    old, new = ({name: p.detach() for name, p in m.named_parameters()} for m in (aligned, finetuned))
    odd = [n for n in {**old, **new} if n not in old or n not in new or old[n].shape != new[n].shape]
    if odd:
        names = ", ".join(map(repr, odd))
        raise InputError(f"aligned and finetuned model differ in {names}: one architecture is expected")
    return old, new


def _touched(model: nn.Module, end: int, skip: Sequence[str]) -> list[str]:
    """The parameters of the layers before ``end`` whose names have none of the words."""
    stack, _ = layer_stack(model)
    inside = [f"{stack}.{layer}." for layer in range(end)]
    names = [name for name, _ in model.named_parameters() if any(name.startswith(part) for part in inside)]
    names = [name for name in names if not any(word in name for word in skip)]
    if not names:
        raise InputError(f"skip {list(skip)} leaves no parameter of the first {end} layers")
    return names


def _batches(prompts: Prompts, tokenizer: Any, size: int, what: str) -> list[dict[str, Tensor]]:
    """Left-padded batches, so that position −1 is every prompt's last token."""
    if isinstance(prompts, str) or len(prompts) == 0:
        raise InputError(f"{what}: a list of at least one prompt is expected")
    ids: list[list[int]] = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            ids.append(list(prompt))
            continue
        if tokenizer is None:
            raise InputError(f"{what} are texts and there is no tokenizer: give one, or token ids")
        if getattr(tokenizer, "chat_template", None):
            said = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            ids.append(tokenizer(prompt)["input_ids"])
    found = []
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        width = max(len(row) for row in part)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part])
        padded = torch.tensor([[0] * (width - len(row)) + row for row in part])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found.append({"input_ids": padded, "attention_mask": mask, "position_ids": positions})
    return found


@torch.no_grad()
def _direction(model: nn.Module, batches: Sequence[dict[str, Tensor]], end: int) -> Tensor:
    """The mean hidden state of the last prompt token before layer ``end``, float32; batches move to the model."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = torch.zeros(()), 0
    with lower_part(getattr(model, "backbone", model), end) as run:
        for batch in batches:
            batch.update({name: value.to(device) for name, value in batch.items()})
            hidden = run(**batch, use_cache=False)[:, -1].float()
            total, count = total.to(device) + hidden.sum(0), count + len(hidden)
    model.train(training)
    return total / count
