"""Adapters of peft that work in its wrapper and not in the layers: what a ``Model`` must do to run them.

Prompts are put before the text by the wrapper, mixtures of adapters set their weights there. Such a backbone is called
whole, where another one's layers may be called without the LM head.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROUTER = "xlora_router.safetensors"
WRAPPED = ("POLY", "SHADOW", "XLORA")
OF_TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")


def in_wrapper(backbone: nn.Module) -> bool:
    """Whether a backbone's adapter works only when peft's wrapper is called."""
    config = _config(backbone)
    return config is not None and (config.is_prompt_learning or config.peft_type in WRAPPED)


def task_numbers(backbone: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter for several tasks asks for beside the batch: task 0 for every row, unless the batch says."""
    config = _config(backbone)
    if config is None or config.peft_type not in OF_TASKS or "task_ids" in batch:
        return {}
    first = batch["input_ids"]
    return {"task_ids": torch.zeros(len(first), dtype=torch.long, device=first.device)}


def _config(backbone: Any) -> Any:
    return backbone.active_peft_config if hasattr(backbone, "get_base_model") else None


def save_router(backbone: Any, folder: Path) -> None:
    """Write an X-LoRA's adapters and its router over what peft wrote, which mistakes the numbers in their names."""
    if _config(backbone).peft_type != "XLORA":
        return
    state = backbone.get_base_model().state_dict()
    for name in _config(backbone).adapters:
        tensors = {
            f"base_model.model.{key.replace(f'.{name}.weight', '.weight')}": value.cpu().contiguous()
            for key, value in state.items()
            if ".lora_" in key and key.endswith(f".{name}.weight")
        }
        save_file(tensors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
    router = backbone.base_model.internal_xlora_classifier.state_dict()
    save_file({key: value.cpu().contiguous() for key, value in router.items()}, folder / ROUTER)


def load_router(backbone: Any, folder: Path) -> None:
    """Read the router that ``save_router`` wrote, where there is one."""
    if (folder / ROUTER).is_file():
        backbone.base_model.internal_xlora_classifier.load_state_dict(load_file(folder / ROUTER))
