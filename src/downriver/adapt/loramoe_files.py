"""LoRA experts on disk: saved beside a base that is named or kept, loaded onto it, or split into ordinary adapters.

Reach for ``LoRAMoE.save`` and ``load_loramoe``; ``to_peft_adapters`` is for tools that know LoRA only.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from downriver import __version__
from downriver.adapt.loramoe import LoRAMoE, LoRAMoEConfig, experts_of, without_experts
from downriver.core import InputError, atomic_folder
from downriver.core.tensors import open_checkpoint
from downriver.models.load import load
from downriver.models.model import Model
from downriver.training.engine import clone

SETTINGS, WEIGHTS, BASE = "loramoe.json", "loramoe.safetensors", "base"
_SAMPLE = "base_sample"
_PARTS = ("loramoe_A", "loramoe_B", "loramoe_router")


def save_loramoe(model: LoRAMoE, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write ``loramoe.json`` (configuration) and ``loramoe.safetensors`` (experts and routers), whole or not at all.

    The base with head and tokenizer goes to ``base/``, unless there is no head and ``source`` still holds the very
    same weights: then it is only named.
    """
    folder = Path(folder)
    with atomic_folder(folder, overwrite) as part:
        with without_experts(model.backbone):
            named = model.head is None and holds_source(model)
            if not named:
                Model.save(model, part / BASE)
        tensors = {
            f"{name}.{piece}": getattr(layer, piece).detach().cpu().contiguous()
            for name, layer in experts_of(model.backbone)
            for piece in _PARTS
        }
        samples = {f"{name}.{_SAMPLE}": _sample(layer.base.weight) for name, layer in experts_of(model.backbone)}
        save_file(tensors | samples, part / WEIGHTS)
        settings = {
            "downriver": __version__,
            "base": model.source if named else BASE,
            "kind": model.kind,
            "max_length": model.max_length,
            "config": dataclasses.asdict(model.experts),
        }
        (part / SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def load_loramoe(folder: str | Path, base: Model | str | Path | None = None) -> LoRAMoE:
    """Load experts that ``LoRAMoE.save`` wrote, in evaluation mode.

    ``base`` is a model or what ``models.load`` takes; by default the one in the folder, or the one that it names.
    Raises ``InputError`` for a folder of another kind, and for a base whose layers or weights are not those that the
    experts were trained on.

    >>> import tempfile
    >>> from downriver.models import small
    >>> model = LoRAMoE(small("causal-lm", "nano"), LoRAMoEConfig(num_experts=2))
    >>> folder = model.save(Path(tempfile.mkdtemp()) / "experts")
    >>> load_loramoe(folder).experts == model.experts, sorted(path.name for path in folder.iterdir())
    (True, ['loramoe.json', 'loramoe.safetensors'])
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        asked: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["config"].items()}
        config = LoRAMoEConfig(**asked)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / SETTINGS} cannot be read ({error}): a folder of LoRAMoE.save is expected"
        ) from None
    stored = open_checkpoint(folder / WEIGHTS)
    if isinstance(base, Model):
        plain = clone(base)
    else:
        named = folder / BASE if settings["base"] == BASE else settings["base"]
        plain = load(base or named, kind=settings["kind"], max_length=settings["max_length"])
    model = LoRAMoE(plain, config)
    layers = dict(experts_of(model.backbone))
    if different := {name.rpartition(".")[0] for name in stored.names()} ^ layers.keys():
        raise InputError(f"{folder} has other layers than its base, the first is {sorted(different)[0]!r}")
    state = {}
    for name, layer in layers.items():
        for piece in _PARTS:
            value = stored.read(f"{name}.{piece}")
            if value.shape != getattr(layer, piece).shape:
                raise InputError(
                    f"{folder / WEIGHTS}, tensor {name}.{piece} has the shape {tuple(value.shape)}: "
                    f"{tuple(getattr(layer, piece).shape)} is expected"
                )
            state[f"{name}.{piece}"] = value
        if not torch.allclose(stored.read(f"{name}.{_SAMPLE}"), _sample(layer.base.weight), rtol=0.01, atol=1e-4):
            raise InputError(f"{folder} is for another base: the weights of {name!r} are not those it was trained on")
    model.backbone.load_state_dict(state, strict=False)
    return model.eval()


def to_peft_adapters(model: LoRAMoE, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write every expert as an ordinary LoRA adapter, ``expert_0``, ``expert_1``, ..., and the routers beside them.

    An adapter alone is the model with all gates on its expert; ``router.safetensors`` holds W_g of every layer.
    """
    folder, r = Path(folder), model.experts.r
    layers = experts_of(model.backbone)
    names = [name for name, _ in layers]
    with atomic_folder(folder, overwrite) as part:
        for n in range(model.experts.num_experts):
            own, rows = part / f"expert_{n}", slice(n * r, (n + 1) * r)
            own.mkdir()
            settings: Any = LoraConfig(
                r=r,
                lora_alpha=model.experts.alpha,
                target_modules=names,
                base_model_name_or_path=model.source,
                task_type="CAUSAL_LM" if model.kind == "causal-lm" else None,
                inference_mode=True,
            )
            settings.save_pretrained(own)
            tensors: dict[str, Tensor] = {}
            for name, layer in layers:
                tensors[f"base_model.model.{name}.lora_A.weight"] = layer.loramoe_A.detach()[rows].cpu().clone()
                tensors[f"base_model.model.{name}.lora_B.weight"] = layer.loramoe_B.detach()[:, rows].cpu().clone()
            save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        routers = {name: layer.loramoe_router.detach().cpu().clone() for name, layer in layers}
        save_file(routers, part / "router.safetensors")
    return folder


def holds_source(model: Model) -> bool:
    """Whether loading ``source`` gives the weights that the model has."""
    mine = model.backbone.state_dict()
    try:
        named = load(model.source, kind=model.kind).backbone.state_dict()
    except InputError:
        return False
    return named.keys() == mine.keys() and all(torch.equal(named[k], mine[k].cpu().to(named[k].dtype)) for k in named)


def _sample(weight: Tensor) -> Tensor:
    """Sixteen entries from all over a tensor."""
    flat = weight.detach().flatten()
    return flat[torch.linspace(0, len(flat) - 1, 16, device=flat.device).long()].float().cpu()
