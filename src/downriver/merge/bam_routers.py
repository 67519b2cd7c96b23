"""How the routers of a mixture start: at random, at zero, or from what the base model makes of some texts.

Reach for ``bam``, whose ``router_init`` this is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.core.seeds import generator
from downriver.models.features import Inputs, inference
from downriver.models.load import load
from downriver.models.mixture import MixtureConfig
from downriver.models.model import Model
from downriver.models.surgery import layer_stack

Router = Literal["normal", "zero", "prompts", "domain_centroids"]


def routers(
    config: MixtureConfig,
    base: Any,
    init: Router,
    std: float,
    texts: Sequence[Sequence[str]] | None,
    seed: int,
) -> Callable[[int, str], Tensor]:
    """A function that gives the rows (N, d) of the router of a layer's ``mlp`` or ``self_attn``."""
    shape = (config.num_experts, config.hidden_size)
    if texts is None:

        def drawn(layer: int, part: str) -> Tensor:
            rng = generator("bam router", layer, part, seed)
            return torch.zeros(shape) if init == "zero" else torch.from_numpy(rng.normal(0, std, shape))

        return drawn
    if isinstance(base, tuple):
        raise InputError("bam: texts are read by the base, and this one has an adapter: load and merge it first")
    reader = base if isinstance(base, Model) else load(base)
    if reader.processor is None:
        raise InputError("bam: texts need a tokenizer: give a Model or a folder as the base")
    rows = _router_inputs(reader, texts)

    def centroids(layer: int, part: str) -> Tensor:
        found = rows[layer, part]
        return nn.functional.normalize(found - found.mean(0) if init == "domain_centroids" else found, dim=-1)

    return centroids


def _router_inputs(lm: Model, texts: Sequence[Sequence[str]], batch_size: int = 16) -> dict[tuple[int, str], Tensor]:
    """What attention and FFN of every layer get on the texts of each expert, as means over their tokens, (N, d)."""
    collate, caught = lm.collate(Inputs()), {}

    def keep(key: tuple[int, str], module: nn.Module, arguments: Any, keywords: Any) -> None:
        caught[key] = arguments[0] if arguments else keywords["hidden_states"]

    hooks = [
        layer.get_submodule(part).register_forward_pre_hook(partial(keep, (i, part)), with_kwargs=True)
        for i, layer in enumerate(layer_stack(lm.backbone)[1])
        for part in ("self_attn", "mlp")
    ]
    means = []
    try:
        with inference(lm):
            for own in texts:
                total: dict[tuple[int, str], Tensor] = {}
                tokens = 0
                for start in range(0, len(own), batch_size):
                    batch = collate([{"text": text} for text in own[start : start + batch_size]])
                    batch = {name: value.to(lm.device) for name, value in batch.items()}
                    lm.backbone(**batch)
                    mask = batch["attention_mask"][..., None]
                    tokens += int(mask.sum())
                    for key, x in caught.items():
                        total[key] = total.get(key, 0) + (x.float() * mask).sum((0, 1)).cpu()
                means.append({key: value / tokens for key, value in total.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return {key: torch.stack([mean[key] for mean in means]) for key in means[0]}
