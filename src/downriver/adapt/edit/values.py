"""Keys, and the value that makes a model say the target: what ROME and MEMIT share.

Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 3.1 and appendix E.5.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downriver.adapt.edit.requests import Encoded, Fact, encode, start_ids
from downriver.core.errors import InputError
from downriver.core.seeds import seeded
from downriver.models.model import Model

STARTS = ("The", "Therefore", "Because", "I", "You")
"""The words from which context prefixes are generated."""


class ValueSettings(Protocol):
    """What the search for a value is given."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def clamp(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Value:
    """v0 of the unprefixed prompt and the δ found, float32 (d,), with the loss that was reached."""

    v0: Tensor
    delta: Tensor
    loss: float


def optimise(lm: Model, fact: Fact, at: nn.Module, contexts: Sequence[str], settings: ValueSettings) -> Value:
    """The δ that, added to the output of ``at`` at the last subject token, makes the target follow in every context.

    Adam on NLL(target), averaged over contexts, + kl · KL(δ ‖ 0) of what follows the bare subject + decay · ‖δ‖/‖v0‖²,
    with ‖δ‖ ≤ clamp · ‖v0‖; ends when the loss is below 0.05.
    """
    # The authors' last row is "{subject} is a"; read at the subject's last token, where what follows is not seen yet.
    rows = [*(fact.within(context) for context in contexts), Fact("", fact.subject, "", "")]
    batch, n = _stacked(encode(lm, rows[:-1]), encode(lm, rows[-1:], with_target=False)), len(rows)
    every, backbone = torch.arange(n, device=lm.device), lm.backbone
    seen: list[Tensor] = []
    delta: Tensor | None = None

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal delta
        hidden = output[0] if isinstance(output, tuple) else output
        if delta is None:
            seen.append(hidden[0, batch.subject[0]].detach().float())
            delta = torch.zeros_like(seen[0], requires_grad=True)
        hidden = hidden.index_put((every, batch.subject), delta.to(hidden.dtype), accumulate=True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    labels, said = batch.ids[:-1, 1:], batch.target[:-1, 1:]
    optimiser: torch.optim.Adam | None = None
    first: Tensor | None = None
    handle = at.register_forward_hook(add)
    try:
        with torch.enable_grad():
            for step in range(settings.steps):
                logits = backbone(**batch.inputs).logits.float()
                assert delta is not None
                nll = F.cross_entropy(logits[:-1, :-1].transpose(1, 2), labels, reduction="none")
                essence = logits[-1, batch.subject[-1]].log_softmax(dim=0)
                first = essence.detach() if first is None else first
                loss = (
                    ((nll * said).sum(dim=1) / said.sum(dim=1)).mean()
                    + settings.kl * F.kl_div(first, essence, log_target=True, reduction="sum")
                    + settings.decay * delta.norm() / seen[0].norm() ** 2
                )
                if loss.item() < 0.05 or step == settings.steps - 1:
                    break
                if optimiser is None:
                    optimiser = torch.optim.Adam([delta], lr=settings.learning_rate)
                (delta.grad,) = torch.autograd.grad(loss, [delta])
                optimiser.step()
                with torch.no_grad():
                    delta *= (settings.clamp * seen[0].norm() / delta.norm().clamp(min=1e-30)).clamp(max=1)
    finally:
        handle.remove()
    assert delta is not None
    return Value(seen[0], delta.detach(), loss.item())


def read(lm: Model, batch: Encoded, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Input and output of a module at the last subject token of every row, float64 (n, in) and (n, out)."""
    rows = torch.arange(len(batch.ids), device=lm.device)
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.extend(t[rows, batch.subject].detach().double() for t in (inputs[0], hidden))

    handle = module.register_forward_hook(keep)
    try:
        with torch.no_grad():
            lm.backbone(**batch.inputs)
    finally:
        handle.remove()
    return found[0], found[1]


def templates(lm: Model, contexts: Sequence[str] | None, lengths: Sequence[tuple[int, int]], seed: int) -> list[str]:
    """``{}`` alone, then the contexts given, or for each (tokens, number) so many prefixes that the model wrote itself.

    Prefixes begin with ``STARTS``, each token is drawn from the five most probable, and ``. {}`` ends them.
    """
    if contexts is not None:
        for context in contexts:
            if context.count("{}") != 1:
                raise InputError(f"context {context!r}: a text with one {{}}, where the prompt goes, is expected")
        return ["{}", *contexts]
    found = ["{}"]
    backbone: Any = lm.backbone
    with seeded("edit contexts", seed), torch.no_grad():
        for tokens, number in lengths:
            for word in STARTS:
                start = start_ids(lm.processor)
                ids = [*start, *lm.processor(word, add_special_tokens=False)["input_ids"]]
                written = backbone.generate(
                    torch.tensor([ids], device=lm.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=lm.device),
                    do_sample=True,
                    top_k=5,
                    temperature=1.0,
                    top_p=1.0,
                    min_new_tokens=max(1, len(start) + tokens - len(ids)),
                    max_new_tokens=max(1, len(start) + tokens - len(ids)),
                    num_return_sequences=number // len(STARTS),
                    pad_token_id=lm.processor.pad_token_id,
                )
                texts = lm.processor.batch_decode(written, skip_special_tokens=True)
                found += [text.replace("{", " ").replace("}", " ") + ". {}" for text in texts]
    return found


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient while the block runs."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _stacked(first: Encoded, second: Encoded) -> Encoded:
    """Two batches as one, padded to the longer."""
    width = max(first.ids.shape[1], second.ids.shape[1])

    def joined(name: str) -> Tensor:
        parts = [getattr(batch, name) for batch in (first, second)]
        return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])

    subject = torch.cat([first.subject, second.subject])
    return Encoded(joined("ids"), joined("mask"), subject, joined("target"))
