"""The second projection of every MLP in a language model, found by name: where the editing methods write.

Its input is the key and its output the value of Meng et al., "Locating and Editing Factual Associations in GPT" (2022).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from downriver.core.errors import InputError, unknown

_NAME = re.compile(r"(?P<block>(?:.*\.)?(?P<number>\d+))\.(?:mlp\.(?:c_proj|fc_out|dense_4h_to_h|down_proj|fc2)|fc2)")


@dataclass(frozen=True, eq=False)
class Projection:
    """One MLP projection: its module's ``name`` in the backbone, the module, and the transformer block round it."""

    name: str
    number: int
    module: nn.Module
    block: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight in its own layout: (out, in), for GPT-2's ``Conv1D`` (in, out)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def width(self) -> int:
        """How long a key is."""
        return self.weight.shape[0 if isinstance(self.module, Conv1D) else 1]

    def add(self, change: Tensor) -> None:
        """Add a change of shape (out, in) to the weight, in the weight's own type and layout."""
        change = change.T if isinstance(self.module, Conv1D) else change
        with torch.no_grad():
            self.weight.copy_((self.weight.double() + change.to(self.weight.device)).to(self.weight.dtype))


def projections(backbone: nn.Module) -> list[Projection]:
    """The MLP projections of GPT-2, GPT-J, GPT-NeoX, Llama, OPT and everything that names them alike, in order.

    >>> from downriver.models import small
    >>> [projection.name for projection in projections(small("causal-lm", "nano").backbone)]
    ['model.layers.0.mlp.down_proj', 'model.layers.1.mlp.down_proj']
    """
    found = []
    for name, module in backbone.named_modules():
        match = _NAME.fullmatch(name)
        if match and isinstance(module, nn.Linear | Conv1D):
            block = backbone.get_submodule(match["block"])
            found.append(Projection(name, int(match["number"]), module, block))
    return found


def projection(backbone: nn.Module, layer: int | str) -> Projection:
    """The projection of a block's number, or of a module's name; another is an ``InputError`` that lists them."""
    known = projections(backbone)
    for candidate in known:
        if layer in (candidate.name, candidate.number):
            if not candidate.weight.is_floating_point():
                raise InputError(f"{candidate.name} is quantised ({candidate.weight.dtype}): load it unquantised")
            return candidate
    if isinstance(layer, int):
        raise InputError(
            f"layer {layer} has no MLP projection: one of "
            f"{', '.join(f'{p.number} ({p.name})' for p in known) or 'none (merge an adapter first)'} is expected"
        )
    raise unknown("MLP projection", layer, [p.name for p in known])
