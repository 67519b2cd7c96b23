"""Train a model to prefer: pairs of a better and a worse continuation of a prompt, by DPO with an anchor.

Reach for it where a judge or a rule sorts a model's own continuations. Rafailov et al. (2023); the log-probabilities of
the reference (the model as it comes in) are taken once beforehand, so that it is not kept in memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from downriver.core import Budget, InputError, generator
from downriver.models.model import Model
from downriver.nn.preference import IGNORED, dpo_loss, nll_anchor, sequence_logprobs
from downriver.training import TokenRows, fine_tune

Pair = tuple[str, str, str]
Messages = Sequence[Mapping[str, str]]


def dpo(
    model: Model,
    pairs: Sequence[Pair],
    budget: Budget | str = "1 epoch",
    *,
    beta: float = 0.1,
    nll_weight: float = 0.0,
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    seed: int = 0,
) -> Model:
    """A copy of the causal language model that prefers the second text of each triple to the third, after the first.

    Parameters
    ----------
    pairs
        ``(prompt, preferred, rejected)``. The end-of-text token is part of both continuations where there is one.
    budget
        As for ``fine_tune``, an example being a pair; or ``"1 epoch"``.
    beta, learning_rate, batch_size
        0.1, 5e-5 and 8 pairs, ReverseGen's.
    nll_weight
        Weight of the preferred continuations' mean negative log-likelihood a token. 0 is plain DPO, which collapses
        with a large learning rate and few pairs.

    Raises ``InputError`` for no pairs, a negative weight and a pair that is longer than the model takes.

    >>> from downriver.models import small
    >>> model = small("causal-lm", "nano")
    >>> tuned = dpo(model, [("a", "b", "c")] * 4, "8 examples", learning_rate=1e-2, batch_size=4)
    >>> before, after = (logprobs(m, [("a", "b"), ("a", "c")]) for m in (model, tuned))
    >>> bool(after[0] - after[1] > before[0] - before[1])
    True
    """
    rows, settings = prepared(model, pairs, beta=beta, nll_weight=nll_weight, seed=seed)
    return fine_tune(
        model,
        rows,
        _doubled(budget, len(pairs)),
        learning_rate=learning_rate,
        batch_size=2 * batch_size,
        seed=seed,
        **settings,
    )


def prepared(
    model: Model, pairs: Sequence[Pair], *, beta: float = 0.1, nll_weight: float = 0.0, seed: int = 0
) -> tuple[TokenRows, dict[str, Any]]:
    """What ``dpo`` trains on, for another trainer: its rows, two a pair, and ``objective`` and ``order`` for
    ``fine_tune`` or ``train_subnetwork``, whose batches must be even. The model is the reference."""
    if not pairs:
        raise InputError("pairs are empty: at least one (prompt, preferred, rejected) is expected")
    if nll_weight < 0:
        raise InputError(f"nll_weight is {nll_weight}: a number of at least 0 is expected")
    rows = encode(model, [(prompt, text) for prompt, *texts in pairs for text in texts])
    reference = _logprobs(model, rows)
    table = datasets.Dataset.from_list(
        [row | {"reference": ref} for row, ref in zip(rows, reference.tolist(), strict=True)]
    )

    def objective(model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "reference")}
        logits = model(**inputs)["logits"]
        policy, tokens = sequence_logprobs(logits, batch["labels"])
        ref = batch["reference"].to(policy)
        loss = dpo_loss(policy[::2], policy[1::2], ref[::2], ref[1::2], beta).mean()
        return {"loss": loss + nll_weight * nll_anchor(policy[::2], tokens[::2]), "logits": logits}

    settings: dict[str, Any] = {"objective": objective, "order": _pairwise(len(pairs), seed)}
    return TokenRows("pairs", {"train": table}, pad=_pad(model)), settings


def sft(
    model: Model,
    examples: Sequence[tuple[str | Messages, str]],
    budget: Budget | str = "1 epoch",
    *,
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    seed: int = 0,
    name: str = "examples",
) -> Model:
    """A copy of the causal language model that continues each first text by the second; no loss on the first.

    ``budget`` is ``fine_tune``'s, or ``"1 epoch"``. Raises ``InputError`` for no examples.

    >>> from downriver.models import small
    >>> model = small("causal-lm", "nano")
    >>> tuned = sft(model, [("1+1=", "2")] * 4, "16 examples", learning_rate=1e-2, batch_size=4)
    >>> bool(logprobs(tuned, [("1+1=", "2")]) > logprobs(model, [("1+1=", "2")]))
    True
    """
    if not examples:
        raise InputError(f"{name} are empty: at least one (text, continuation) is expected")
    rows = datasets.Dataset.from_list(encode(model, examples))
    return fine_tune(
        model,
        TokenRows(name, {"train": rows}, pad=_pad(model)),
        Budget(max(len(examples), batch_size), "examples") if budget == "1 epoch" else budget,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )


def encode(model: Model, examples: Sequence[tuple[str | Messages, str]]) -> list[dict[str, list[int]]]:
    """Token ids of prompt and continuation, encoded apart, and labels that count the continuation and its end only.

    A prompt of messages is written by the tokenizer's chat template, ready for the answer.

    >>> from downriver.models import small
    >>> encode(small("causal-lm", "nano"), [("a", "b")])
    [{'input_ids': [1, 68, 69, 2], 'labels': [-100, -100, 69, 2]}]
    """
    tokenizer: Any = model.processor
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        for prompt, _ in examples
    ]
    ids = tokenizer([*prompts, *(text for _, text in examples)], add_special_tokens=False)["input_ids"]
    rows = []
    for (prompt, text), before, after in zip(examples, ids[: len(prompts)], ids[len(prompts) :], strict=True):
        before = start + before if isinstance(prompt, str) else before  # a template writes its own special tokens
        after = after + end
        if len(before) + len(after) > model.max_length:
            raise InputError(
                f"{prompt!r:.60} and {text!r:.60} have {len(before) + len(after)} tokens and the model takes"
                f" {model.max_length}"
            )
        rows.append({"input_ids": before + after, "labels": [IGNORED] * len(before) + after})
    return rows


def logprobs(model: Model, examples: Sequence[tuple[str | Messages, str]], batch_size: int = 64) -> Tensor:
    """The log-probability, (n,), of each continuation and its end given its prompt."""
    return _logprobs(model, encode(model, examples), batch_size)


@torch.no_grad()
def _logprobs(model: Model, rows: Sequence[dict[str, list[int]]], batch_size: int = 64) -> Tensor:
    training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    found = torch.empty(len(rows))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        table = TokenRows(
            "rows", {"train": datasets.Dataset.from_list([dict(rows[i]) for i in chosen])}, pad=_pad(model)
        )
        batch = {k: v.to(model.device) for k, v in table.collate(model)(list(table.rows("train"))).items()}
        labels = batch.pop("labels")
        found[chosen] = sequence_logprobs(model(**batch)["logits"], labels)[0].cpu()
    model.train(training)
    return found


def _pairwise(pairs: int, seed: int) -> Any:
    """Visits 2i and 2i + 1 go to both rows of a pair; the pairs come in a new random order every epoch."""

    def row(visit: int) -> int:
        epoch, place = divmod(visit, 2 * pairs)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = generator("pairs", seed, epoch).permutation(pairs)
        return 2 * int(orders[epoch][place // 2]) + place % 2

    orders: dict[int, Any] = {}
    return row


def _doubled(budget: Budget | str, pairs: int) -> Budget:
    """A pair is two rows to ``fine_tune``."""
    if budget == "1 epoch":
        return Budget(2 * pairs, "examples")
    budget = Budget.parse(budget)
    return budget.share(2) if budget.unit == "examples" else budget


def _pad(model: Model) -> int:
    return model.processor.pad_token_id or 0
