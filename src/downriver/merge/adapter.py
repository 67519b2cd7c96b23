"""Write the difference between two models as a LoRA adapter of a chosen rank, which peft loads.

Reach for it to keep a merge or a full fine-tuning small, or to hand it on to tools that take adapters. Each matrix' ΔW
is cut to its largest singular values, the best approximation of that rank (Eckart and Young 1936), and halved between
B = U·√Σ and A = √Σ·Vᵀ. Matrices are held one at a time.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from downriver.core.errors import InputError
from downriver.core.io import atomic_folder
from downriver.merge.average import Average
from downriver.merge.plan import Pattern, plan
from downriver.merge.stores import Source


@dataclass(frozen=True)
class Extraction:
    """``out``, the adapter's folder; ``kept``, of each matrix ‖its part in the adapter‖² / ‖ΔW‖²; ``left_out``, changed
    tensors that no LoRA can hold (vectors, and what ``include`` and ``exclude`` leave out)."""

    out: Path
    kept: dict[str, float]
    left_out: tuple[str, ...]


def extract_adapter(
    model: Source,
    base: Source,
    out: str | os.PathLike[str],
    *,
    rank: int = 16,
    include: Pattern = None,
    exclude: Pattern = ("embed", "wte", "wpe", "lm_head", "norm"),
    base_name: str | None = None,
    fan_in_fan_out: bool = False,
    overwrite: bool = False,
) -> Extraction:
    """Write ΔW = W − W0 of every matrix as a LoRA adapter for the base.

    Parameters
    ----------
    model, base
        Of any kind that ``merge`` reads.
    out
        The folder to be written: ``adapter_config.json`` and ``adapter_model.safetensors``.
    rank
        r of every matrix, at most its smaller side; 16 by default. α = r, so that nothing is scaled.
    include, exclude
        Regular expressions searched in tensor names; embeddings, output layers and norms are excluded by default.
    base_name
        What the adapter names as its base; by default the base's own label.
    fan_in_fan_out
        Whether weights are stored as (in, out), as GPT-2's are.
    overwrite
        Replace an existing folder.

    Raises ``InputError`` when nothing is to be written, for a rank below 1, and for what ``merge`` refuses.

    >>> import tempfile
    >>> base = {"layer.q.weight": torch.zeros(4, 3)}
    >>> found = extract_adapter({"layer.q.weight": torch.ones(4, 3)}, base, Path(tempfile.mkdtemp()) / "a", rank=1)
    >>> round(found.kept["layer.q.weight"], 6)
    1.0
    """
    if rank < 1:
        raise InputError(f"rank is {rank}: at least 1 is expected")
    job = plan([model], base, Average(), include=include, exclude=exclude, device="cpu")
    tensors: dict[str, Tensor] = {}
    kept: dict[str, float] = {}
    left: list[str] = []
    for entry in tqdm(job.entries, desc="extract", leave=False, delay=2):
        name, source = entry.name, entry.sources[0] if entry.sources else entry.name
        if not entry.dtype.is_floating_point or source not in job.models[0].names():
            continue
        old, new = job.base.read(name, 0, entry.size), job.models[0].read(source, 0, entry.size)
        if torch.equal(old, new):
            continue
        if not entry.merged or len(entry.shape) != 2 or not name.endswith(".weight"):
            left.append(name)
            continue
        delta = (new.float() - old.float()).view(entry.shape)
        delta = delta.T if fan_in_fan_out else delta
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        r = min(rank, len(s))
        root = s[:r].sqrt()
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = _padded((root[:, None] * v[:r]), rank, 0)
        tensors[f"{module}.lora_B.weight"] = _padded((u[:, :r] * root), rank, 1)
        kept[name] = float(s[:r].double().square().sum() / s.double().square().sum())
    if not tensors:
        raise InputError("no matrix differs among those included: there is no adapter to write")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name or job.base.label,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": sorted(name.removesuffix(".weight") for name in kept),
        "inference_mode": True,
    }
    with atomic_folder(Path(out), overwrite) as part:
        save_file({name: value.contiguous() for name, value in tensors.items()}, part / "adapter_model.safetensors")
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Extraction(Path(out), kept, tuple(left))


def _padded(factor: Tensor, rank: int, side: int) -> Tensor:
    """Zeros behind the factor of a matrix whose smaller side is below the rank: peft expects one rank everywhere."""
    missing = rank - factor.shape[side]
    if missing == 0:
        return factor
    shape = list(factor.shape)
    shape[side] = missing
    return torch.cat([factor, torch.zeros(shape)], dim=side)
