"""Six objectives for pretraining on text that was scored for what is not wanted.

Reach for ``conditional_pretraining``, which prepares the rows for them, or give one to ``training.fine_tune`` as
``objective`` with rows that have ``token_scores``. Korbak et al. (2023), «Pretraining Language Models with Human
Preferences». A score is misalignment, so the reward of a token is R = -score, that of the token predicted.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.data.condition.annotate import Threshold, keep_aligned
from downriver.data.condition.control_tokens import ControlTokens
from downriver.data.condition.pack import IGNORED, document_mask
from downriver.models.model import Model

MOST = 1000.0  # the largest weight of a token
LEAST = 1e-20  # the least probability of not saying a token


class Objective(nn.Module):
    """What the six share. ``loss`` is the formula on tensors; calling the objective runs the model first, as
    ``fine_tune`` does; ``select`` and ``control`` say what becomes of the rows before.
    """

    control: ControlTokens | None = None
    values_needed = False
    explicit_mask = False  # for models that do not take the documents of a block from position_ids

    def select(self, annotated: Dataset) -> Dataset:
        """The documents to train on: all of them, except when filtering."""
        return annotated

    def loss(self, logits: Tensor, labels: Tensor, token_scores: Tensor, values: Tensor | None = None) -> Tensor:
        """A scalar from logits (n, tokens, vocabulary), and labels, scores and values of the tokens, (n, tokens).

        Logits and values at a place are about the next token, labels and scores about the token itself: the shift by
        one is made here. Raises ``InputError`` for shapes that do not fit and for scores that are no numbers.
        """
        if logits.ndim != 3 or labels.shape != logits.shape[:2] or token_scores.shape != labels.shape:
            raise InputError(
                f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and token_scores "
                f"{tuple(token_scores.shape)}: (n, tokens, vocabulary) and twice (n, tokens) are expected"
            )
        targets = labels[:, 1:].flatten()
        kept = targets != IGNORED
        scores = token_scores[:, 1:].flatten()[kept].float()
        if not torch.isfinite(scores).all():
            raise InputError("token_scores hold a value that is not finite")
        cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1)[kept].float(), targets[kept], reduction="none")
        return self._of(cross_entropy, scores, None if values is None else values[:, :-1].flatten()[kept])

    def forward(self, model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch and take the loss; ``token_scores`` may be left out where they are not used."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        if self.explicit_mask:
            inputs["attention_mask"] = document_mask(batch["position_ids"], dtype=next(model.parameters()).dtype)
        scores = batch.get("token_scores")
        if scores is None and type(self)._of is not MLE._of:
            raise InputError(f"the rows have no token_scores, which {type(self).__name__} needs: see segment_rows")
        scores = torch.zeros_like(batch["labels"], dtype=torch.float32) if scores is None else scores
        if not self.values_needed:
            logits = model(**inputs)["logits"]
            return {"loss": self.loss(logits, batch["labels"], scores), "logits": logits}
        backbone: Any = model.backbone
        out = backbone(**inputs, output_hidden_states=True, use_cache=False)
        values = self.values(out.hidden_states[-1])
        return {"loss": self.loss(out.logits, batch["labels"], scores, values), "logits": out.logits}

    def values(self, hidden: Tensor) -> Tensor:
        """The value V of every place, (n, tokens), from hidden states (n, tokens, width)."""
        raise NotImplementedError

    def _of(self, cross_entropy: Tensor, scores: Tensor, values: Tensor | None) -> Tensor:
        """The loss from the cross-entropy, score and value of each token that is learnt, (tokens,)."""
        raise NotImplementedError


class MLE(Objective):
    """Plain language modelling: the mean cross-entropy, whatever the scores.

    >>> logits, labels = torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])
    >>> round(MLE().loss(logits, labels, torch.zeros(1, 3)).item(), 3)  # log 8
    2.079
    """

    def _of(self, cross_entropy: Tensor, scores: Tensor, values: Tensor | None) -> Tensor:
        return cross_entropy.mean()


class Filtered(MLE):
    """Plain language modelling on the documents whose mean score is not above ``threshold`` (the median: the paper's
    thresholds are). What is left is repeated until the budget is spent."""

    def __init__(self, threshold: Threshold = "median") -> None:
        super().__init__()
        self.threshold = threshold

    def select(self, annotated: Dataset) -> Dataset:
        """The documents at or below the threshold."""
        return keep_aligned(annotated, self.threshold)


class Conditional(MLE):
    """Plain language modelling on segments behind tags that say whether they are wanted; tags are learnt too."""

    def __init__(self, control: ControlTokens | None = None) -> None:
        super().__init__()
        self.control = control or ControlTokens()


class Unlikelihood(Objective):
    """Tokens with a score up to ``threshold`` are made likelier, the others less likely, with weight ``alpha``.

    ``alpha`` is 1 in the paper, 0.01 for code. ``threshold=None``: score s in [0, 1] weighs the two,
    (1 - s) · likelihood + s · alpha · unlikelihood.

    >>> logits, labels = torch.zeros(1, 2, 2), torch.tensor([[0, 1]])
    >>> good, bad = (Unlikelihood(threshold=0.5).loss(logits, labels, torch.full((1, 2), s)) for s in (0.0, 1.0))
    >>> round(good.item(), 3), round(bad.item(), 3)  # -log 1/2 and -log(1 - 1/2)
    (0.693, 0.693)
    """

    def __init__(self, alpha: float = 1.0, threshold: float | None = 0.0) -> None:
        super().__init__()
        if alpha < 0:
            raise InputError(f"alpha is {alpha}: 0 or more is expected")
        self.alpha, self.threshold = alpha, threshold

    def _of(self, cross_entropy: Tensor, scores: Tensor, values: Tensor | None) -> Tensor:
        # p = exp(-cross entropy), and 1 - p without cancellation where p is small
        unlikelihood = -torch.log((-torch.expm1(-cross_entropy)).clamp(min=LEAST))
        if self.threshold is None:
            if ((scores < 0) | (scores > 1)).any():
                raise InputError("without a threshold token_scores must lie in [0, 1]")
            return ((1 - scores) * cross_entropy + scores * self.alpha * unlikelihood).mean()
        return torch.where(scores <= self.threshold, cross_entropy, self.alpha * unlikelihood).mean()


class RWR(Objective):
    """Reward-weighted regression: each token's cross-entropy times min(exp(R / beta), 1000); ``beta`` 10."""

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__()
        if not beta > 0:
            raise InputError(f"beta is {beta}: a positive number is expected")
        self.beta = beta

    def _of(self, cross_entropy: Tensor, scores: Tensor, values: Tensor | None) -> Tensor:
        return (torch.exp(-scores / self.beta).clamp(max=MOST) * cross_entropy).mean()


class AWR(Objective):
    """Advantage-weighted regression: of policy and value, with weights alpha and 1 - alpha.

    The policy's part is the mean of min(exp(A / beta), 1000) · cross-entropy, the value's that of (R - V)². A = R - V
    is the advantage of the token predicted, a constant for the gradient. V = -sigmoid(h · w) lies in [-1, 0], where
    rewards are expected; w has no bias and starts at zero. The value's error is learnt by the whole model.

    ``width`` is that of the model's hidden states (``AWR.of(model)`` takes it from there); ``alpha``/``beta`` are
    0.5/10 for toxicity in the paper, 0.5/0.1 for personal data, 0.05/1 for code.

    >>> from downriver.models import small
    >>> AWR.of(small("causal-lm", "nano")).head.weight.shape
    torch.Size([1, 32])
    """

    values_needed = True

    def __init__(self, width: int, alpha: float = 0.5, beta: float = 10.0) -> None:
        super().__init__()
        if not (beta > 0 and 0 <= alpha <= 1):
            raise InputError(f"alpha {alpha}, beta {beta}: a share from 0 to 1 and a positive number are expected")
        self.alpha, self.beta = alpha, beta
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def of(cls, model: Model, alpha: float = 0.5, beta: float = 10.0) -> "AWR":
        """With a value head of this model's width."""
        backbone: Any = model.backbone
        return cls(backbone.config.hidden_size, alpha, beta)

    def values(self, hidden: Tensor) -> Tensor:
        """V of every place."""
        return -torch.sigmoid(self.head(hidden.to(self.head.weight.dtype)).squeeze(-1))

    def _of(self, cross_entropy: Tensor, scores: Tensor, values: Tensor | None) -> Tensor:
        if values is None:
            raise InputError("AWR needs values: values(hidden states) gives them")
        reward = -scores
        weight = torch.exp((reward - values.detach()) / self.beta).clamp(max=MOST)
        return self.alpha * (weight * cross_entropy).mean() + (1 - self.alpha) * F.mse_loss(values.float(), reward)


OBJECTIVES: dict[str, type[Objective]] = {
    "mle": MLE,
    "filtered": Filtered,
    "conditional": Conditional,
    "unlikelihood": Unlikelihood,
    "rwr": RWR,
    "awr": AWR,
}
"""By name."""
