"""A longer context without training: the base of rotary positions multiplied as the scaling law of extrapolation says.

Reach for it when a model is to read texts longer than it was pretrained on; ``evaluate.needle_grid`` and
``evaluate.ppl_curve`` show what it can then do. Liu et al., "LongLLaDA: Unlocking Long Context Capabilities in
Diffusion LLMs" (2025), after "Scaling Laws of RoPE-based Extrapolation" (2023). ``bidirectional`` is the variant of
UltraLLaDA.
"""

import math
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

from downriver.core.errors import InputError
from downriver.models.model import Model

RECORD = "downriver_context"
"""The entry of a configuration that keeps what ``extend_context`` changed."""


def critical_dim(rope_theta: float, head_dim: int, train_len: int, *, bidirectional: bool = False) -> int:
    """How many dimensions of a head went through a whole period within the trained length: d_c.

    Parameters
    ----------
    rope_theta, head_dim
        b and d: the base of the rotary positions and the dimensions of a head that are rotated.
    train_len
        T_train, the length of the pretraining texts in tokens.
    bidirectional
        Attention that looks both ways sees the relative positions -T..T: take 2 T_train. Off by default, as in the
        paper.

    Raises ``InputError`` for an odd or missing number of dimensions, a base of 1 or less and a length within one
    period of the fastest dimension.

    >>> critical_dim(500_000, 128, 4096), critical_dim(500_000, 128, 8192)  # LLaDA and Llama 3
    (64, 70)
    """
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"head_dim is {head_dim}: an even number of rotated dimensions is expected")
    if not rope_theta > 1:
        raise InputError(f"rope_theta is {rope_theta}: a base above 1 is expected")
    span = _span(train_len, bidirectional)
    if span <= 1:
        raise InputError(f"train_len is {train_len}: more than one period of the fastest dimension (2π) is expected")
    # d_c = 2 ⌈ (d/2) log_b( T_train / 2π ) ⌉
    return 2 * math.ceil(head_dim / 2 * math.log(span) / math.log(rope_theta))


def ntk_scale(
    rope_theta: float,
    head_dim: int,
    train_len: int,
    target_len: int,
    *,
    bidirectional: bool = False,
    round: bool = True,
) -> float:
    """λ, by which the base is multiplied so that a model trained at ``train_len`` reads ``target_len`` tokens.

    With the new base λb the critical dimension covers the target length T. No target beyond the trained length needs
    a change: 1.

    Parameters
    ----------
    rope_theta, head_dim, train_len, bidirectional
        As in ``critical_dim``; ``bidirectional`` doubles T, too.
    target_len
        T, the tokens to be read.
    round
        Up to a whole number (default, as published).

    Raises ``InputError`` where every dimension saw a whole period (d_c ≥ d): then there is nothing to extend; and for a
    target below one token.

    >>> [ntk_scale(500_000, 128, 4096, 1024 * k) for k in (4, 8, 16, 24, 32)]  # LLaDA-8B
    [1.0, 4.0, 14.0, 31.0, 55.0]
    """
    if target_len < 1:
        raise InputError(f"target_len is {target_len}: at least one token is expected")
    d_c = critical_dim(rope_theta, head_dim, train_len, bidirectional=bidirectional)
    if target_len <= train_len:
        return 1.0
    if d_c >= head_dim:
        raise InputError(
            f"rope_theta {rope_theta}, head_dim {head_dim}, train_len {train_len}: all dimensions went through a whole "
            f"period in training (critical dimension {d_c}), so there is nothing to extend"
        )
    # λ = ( T / 2π )^(d / d_c) / b
    scale = max(1.0, _span(target_len, bidirectional) ** (head_dim / d_c) / rope_theta)
    return float(math.ceil(scale)) if round else scale


def extend_context(
    model_or_config: Any,
    target_len: int,
    *,
    train_len: int | None = None,
    bidirectional: bool = False,
    round: bool = True,
    override: bool = False,
) -> float:
    """Let a model with rotary positions read ``target_len`` tokens, in place, and return the scale λ.

    The base is multiplied by ``ntk_scale``, in the configuration and in every rotary module that was built from it;
    ``max_position_embeddings`` becomes the target, and so does ``max_length`` of a ``Model``. No weight changes. What
    was changed is kept in the configuration (``downriver_context``), so it lasts through ``save_pretrained``, and a
    second call starts again from the original base.

    Parameters
    ----------
    model_or_config
        A ``Model``, a transformers or peft model, or a configuration that a model is still to be loaded with.
    target_len
        Tokens to be read. Up to the trained length nothing is changed.
    train_len
        The length of pretraining; by default what the configuration says (``max_position_embeddings``), which is too
        large for some models.
    bidirectional, round
        As in ``ntk_scale``.
    override
        Models with another scaling of their positions (yarn, longrope, linear, llama3, ...) are refused. With
        ``override`` that scaling is dropped and the base multiplied instead; ``train_len`` is then by default the
        length before that scaling.

    Layers with a sliding window never look farther than it, and keep their positions.

    Raises ``InputError``, before anything is changed, for a model without rotary positions or with a scaling of its
    own, and where ``ntk_scale`` does.

    >>> from downriver.models import small
    >>> lm = small("causal-lm", "tiny")
    >>> extend_context(lm, 1024), lm.backbone.config.rope_parameters["rope_theta"], lm.max_length
    (12.0, 120000.0, 1024)
    """
    module, config = _parts(model_or_config)
    record = getattr(config, RECORD, None) or {}
    entries = _entries(config)
    for name, entry in entries.items():
        kind = entry.get("rope_type", "default")
        if kind != "default" and not override:
            where = f"{kind} in {name}" if name else kind
            raise InputError(
                f"the positions of {config.model_type} are scaled already ({where}): override=True drops that scaling"
            )
    trained = record.get("train_len") or _trained(config, entries) if train_len is None else train_len
    modules = _rotary_modules(module, config) if module is not None else []
    scales, bases = {}, {}
    for name, entry in entries.items():
        base = record.get("rope_theta", {}).get(name, entry["rope_theta"])
        dimensions = _dimensions(modules, name) or _configured_dimensions(config, entry)
        bases[name] = base
        scales[name] = ntk_scale(base, dimensions, trained, target_len, bidirectional=bidirectional, round=round)
    if target_len <= trained and not record:
        return 1.0

    new = {name: _rescaled(entry, bases[name] * scales[name]) for name, entry in entries.items()}
    config.rope_parameters = new[""] if "" in new else config.rope_parameters | new
    config.max_position_embeddings = max(target_len, trained)
    scale = max(scales.values())
    setattr(config, RECORD, {"rope_theta": bases, "train_len": trained, "target_len": target_len, "scale": scale})
    for rotary in modules:
        _rebuild(rotary, config)
    if isinstance(model_or_config, Model):
        model_or_config.max_length = config.max_position_embeddings
    return scale


def _span(length: int, bidirectional: bool) -> float:
    """T / 2π, or 2T / 2π where attention looks both ways."""
    return length * (2 if bidirectional else 1) / (2 * math.pi)


def _parts(given: Any) -> tuple[nn.Module | None, Any]:
    """The transformers model, if there is one, and the configuration of its text part."""
    module: Any = given.backbone if isinstance(given, Model) else given
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    config = module if isinstance(module, transformers.PreTrainedConfig) else getattr(module, "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        raise InputError(f"a {type(given).__name__} was given: a transformers model or its configuration is expected")
    return (None if config is module else module), config.get_text_config()


def _entries(config: Any) -> dict[str, dict[str, Any]]:
    """The rotary settings by kind of layer, '' where there is one for all; those of sliding windows are left out."""
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, Mapping) or not settings:
        raise InputError(f"a {config.model_type} model has no rotary positions: rope_parameters is expected")
    if "rope_theta" in settings:
        return {"": settings}  # type: ignore[dict-item]
    nested = {name: entry for name, entry in settings.items() if isinstance(entry, dict) and "rope_theta" in entry}
    used = set(getattr(config, "layer_types", None) or nested)
    entries = {name: entry for name, entry in nested.items() if "sliding" not in name and name in used}
    if not entries:
        raise InputError(
            f"a {config.model_type} model has no rotary positions beyond sliding windows: nothing to extend"
        )
    return entries


def _rescaled(entry: Mapping[str, Any], base: float) -> dict[str, Any]:
    """The settings with another base; those of a scaling of its own are left out."""
    plain = entry.get("rope_type", "default") == "default"
    kept = {name: value for name, value in entry.items() if plain or name == "partial_rotary_factor"}
    return kept | {"rope_type": "default", "rope_theta": base}


def _trained(config: Any, entries: Mapping[str, Mapping[str, Any]]) -> int:
    """The trained length that the configuration tells: before a scaling of its own, if it has one."""
    before = [
        e["original_max_position_embeddings"] for e in entries.values() if "original_max_position_embeddings" in e
    ]
    found = before[0] if before else getattr(config, "max_position_embeddings", None)
    if not found:
        raise InputError(
            f"the configuration of {config.model_type} does not say how long it was trained: give train_len"
        )
    return int(found)


def _configured_dimensions(config: Any, entry: Mapping[str, Any]) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * entry.get("partial_rotary_factor", 1.0))


def _rotary_modules(model: nn.Module, config: Any) -> list[nn.Module]:
    """The modules that turn positions into angles by this configuration."""
    found = [m for m in model.modules() if hasattr(m, "rope_type") and getattr(m, "config", None) is config]
    if not found:
        raise InputError(f"a {type(model).__name__} has no module of rotary positions that could be built anew")
    return found


def _dimensions(modules: list[nn.Module], name: str) -> int | None:
    """Twice the frequencies that a module holds, or None without modules."""
    return 2 * len(getattr(modules[0], f"{name}_inv_freq" if name else "inv_freq")) if modules else None


def _rebuild(rotary: nn.Module, config: Any) -> None:
    """Give a rotary module what a new one would have, on the same device."""
    device = next(rotary.buffers()).device
    fresh = type(rotary)(config)
    for name, buffer in fresh.named_buffers():
        setattr(rotary, name, buffer.to(device))
    vars(rotary).update({k: v for k, v in vars(fresh).items() if not k.startswith("_") and k != "training"})
