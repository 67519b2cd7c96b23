"""One call for every editing method: check, edit in place, say what was changed and whether it took, undo."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from downriver.adapt.edit.ft import Ft, ft
from downriver.adapt.edit.memit import Memit, memit
from downriver.adapt.edit.projections import projection, projections
from downriver.adapt.edit.requests import parse, recalls
from downriver.adapt.edit.rome import Rome, rome
from downriver.adapt.edit.values import frozen
from downriver.core import charge
from downriver.core.errors import DownriverError, InputError, unknown
from downriver.core.registry import check_parameters
from downriver.models.language import language_model

Method = Literal["rome", "c_rome", "memit", "ft"]
SETTINGS: dict[str, type[Rome] | type[Memit] | type[Ft]] = {"rome": Rome, "c_rome": Rome, "memit": Memit, "ft": Ft}


@dataclasses.dataclass(eq=False)
class EditResult:
    """What an edit did. ``deltas`` are the changes (new less old, float32) by the weight's name in the backbone;
    ``denominators`` k·u, one a request (ROME only); ``loss`` the final losses, one a request (one in all for ft);
    ``efficacy`` the share of requests that the model completes by their target afterwards."""

    deltas: dict[str, Tensor]
    denominators: tuple[float, ...]
    loss: tuple[float, ...]
    efficacy: float
    _weights: dict[str, nn.Parameter] = dataclasses.field(repr=False)
    _before: dict[str, Tensor] = dataclasses.field(repr=False)
    _after: dict[str, bytes] = dataclasses.field(repr=False)

    def undo(self) -> None:
        """Put the old weights back, bit for bit. Of several edits the last goes first: ``DownriverError`` when the
        weights are not those that this edit left."""
        for name, weight in self._weights.items():
            if _digest(weight) != self._after[name]:
                raise DownriverError(f"{name} was changed after this edit, or the edit undone: undo what came later")
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._before[name])


def apply_edit(
    model: nn.Module,
    requests: Sequence[Mapping[str, str]],
    method: Method = "rome",
    hparams: Rome | Memit | Ft | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
) -> EditResult:
    """Write facts into a language model's weights, in place; when anything goes wrong, nothing is written.

    Parameters
    ----------
    model, tokenizer
        A ``Model`` of kind ``causal-lm``, or a transformers model (GPT-2, GPT-J, GPT-NeoX, Llama and what is built
        alike) with its fast tokenizer.
    requests
        ``{"prompt": "{} lies in the city of", "subject": "The Louvre", "target_new": "Rome"}``, one or several.
    method
        ``c_rome``: rank one, consistent keys. ``rome``: as first published. ``memit``: all facts at once over several
        layers. ``ft``: fine-tuning of one projection within ±ε.
    hparams
        ``Rome(layer=17)``, ``Memit(layers=..., covariance=...)``, ``Ft(layer=0)``, or a dictionary of the same.

    Raises
    ------
    InputError
        A subject that is not in its prompt, a target without tokens, a layer that does not exist (the others are
        listed), an unknown method or parameter.
    UnstableEdit
        ROME's denominator nearly vanishes, or an update is not finite.

    Example
    -------
    >>> from downriver.models import small
    >>> model = small("causal-lm", "nano")
    >>> request = {"prompt": "{} runs to the", "subject": "a river", "target_new": "sea"}
    >>> result = apply_edit(model, [request], "ft", {"layer": 1, "steps": 3})
    >>> list(result.deltas), bool(result.deltas["model.layers.1.mlp.down_proj.weight"].abs().max() < 5.1e-4)
    (['model.layers.1.mlp.down_proj.weight'], True)
    >>> result.undo()
    """
    if method not in SETTINGS:
        raise unknown("editing method", method, SETTINGS)
    lm = language_model(model, tokenizer)
    settings = _settings(method, hparams, [p.name for p in projections(lm.backbone)])
    facts = parse(requests)
    weights = {
        f"{place.name}.{part}": parameter
        for place in (projection(lm.backbone, layer) for layer in settings.layers)
        for part, parameter in place.module.named_parameters()
        if part == "weight" or method == "ft"
    }
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    denominators: list[float] = []
    training = lm.training
    lm.eval()
    try:
        with frozen(lm.backbone):
            if isinstance(settings, Rome):
                denominators, loss = rome(lm, facts, settings, consistent=method == "c_rome")
            else:
                loss = memit(lm, facts, settings) if isinstance(settings, Memit) else ft(lm, facts, settings)
            if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
                raise DownriverError(f"{method}: the edited weights are not finite; nothing was written")
    except BaseException:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
        raise
    finally:
        lm.train(training)
    charge(
        examples=len(facts),
        parameters=sum(p.numel() for p in lm.backbone.parameters()),
        trained_parameters=sum(weight.numel() for weight in weights.values()),
    )
    return EditResult(
        {name: weight.detach().float() - before[name].float() for name, weight in weights.items()},
        tuple(denominators),
        tuple(loss),
        float(recalls(lm, requests).mean()),
        weights,
        before,
        {name: _digest(weight) for name, weight in weights.items()},
    )


def _settings(
    method: str, hparams: Rome | Memit | Ft | Mapping[str, Any] | None, names: Sequence[str]
) -> Rome | Memit | Ft:
    kind = SETTINGS[method]
    if isinstance(hparams, kind):
        return hparams
    if isinstance(hparams, Mapping):
        return kind(**check_parameters(kind, hparams, f"editing method {method!r}"))
    if hparams is None:
        raise InputError(f"{method} needs hparams with a layer, by number or name: {', '.join(names)}")
    raise InputError(f"{method} takes hparams of type {kind.__name__} or a dictionary, not {type(hparams).__name__}")


def _digest(weight: Tensor) -> bytes:
    data = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=16).digest()
