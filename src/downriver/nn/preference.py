"""Learning from pairs: how probable a model finds whole answers, the DPO loss, and the anchor that keeps it upright.

Reach for them in any objective that prefers one answer to another. Rafailov et al. (2023), «Direct Preference
Optimization»; the anchor is the token-level negative log-likelihood of the preferred answers.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from downriver.core.errors import InputError

IGNORED = -100


def sequence_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed log-probability of each row's labelled tokens, (n,), and how many tokens that are, (n,).

    ``logits`` (n, tokens, vocabulary) stand at the position before the token they predict; ``labels`` (n, tokens) are
    token ids, -100 where nothing is to be counted (prompt, padding).

    Raises ``InputError`` when the shapes do not fit.

    >>> import torch
    >>> logits = torch.zeros(1, 4, 8)  # every token is as likely as any: 1/8
    >>> total, tokens = sequence_logprobs(logits, torch.tensor([[-100, -100, 5, 2]]))
    >>> round(total.item(), 4), tokens.item()  # 2 log(1/8)
    (-4.1589, 2)
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise InputError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: (n, tokens, vocabulary) and (n, tokens)"
            " are expected"
        )
    targets = labels[:, 1:]
    counted = targets != IGNORED
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -each.view(targets.shape).sum(dim=1), counted.sum(dim=1)


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """The DPO loss of each pair, (n,): -log σ(β [(log π(y⁺) - log π_ref(y⁺)) - (log π(y⁻) - log π_ref(y⁻))]).

    All four are summed log-probabilities of whole answers, (n,), as ``sequence_logprobs`` gives them. ``beta`` (0.1,
    the paper's) says how much leaving the reference costs. Where policy and reference agree the loss is log 2.

    Raises ``InputError`` for a negative or infinite beta and for tensors of different shapes.

    >>> import torch
    >>> x = torch.tensor([-3.0])
    >>> round(dpo_loss(x, x, x, x).item(), 4), round(dpo_loss(x + 5, x - 5, x, x).item(), 4)
    (0.6931, 0.3133)
    """
    if not (math.isfinite(beta) and beta >= 0):
        raise InputError(f"beta is {beta}: a finite number of at least 0 is expected")
    shapes = [tuple(t.shape) for t in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    if len(set(shapes)) > 1:
        raise InputError(f"log-probabilities of shapes {shapes}: four of one shape are expected")
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def nll_anchor(policy_chosen: Tensor, tokens: Tensor) -> Tensor:
    """Minus the mean log-probability of a preferred token: added to DPO it keeps the preferred answers probable.

    ``policy_chosen`` and ``tokens`` (n,) are what ``sequence_logprobs`` gives; the mean runs over all tokens of the
    batch. DPO alone only widens the gap between two answers, and may do so by making both improbable.

    >>> import torch
    >>> round(nll_anchor(torch.tensor([-4.0, -2.0]), torch.tensor([4, 2])).item(), 4)
    1.0
    """
    return -policy_chosen.sum() / tokens.sum().clamp(min=1)
