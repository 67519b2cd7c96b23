"""Find the parts of a loaded transformer: its stack of layers, whatever family it is of.

Reach for it when a method works on layers, so that it needs no list of architectures: a stack is the longest list of
modules of one class, as transformers builds Llama, Mistral, Qwen, Gemma, GPT-NeoX, GPT-2, BERT, ViT and their like.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from downriver.core.errors import InputError


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name of a model's stack of layers, and the stack.

    Raises ``InputError`` for a model without one, and for one with several of the same length (encoder and decoder).

    >>> from downriver.models import small
    >>> name, layers = layer_stack(small("causal-lm", "nano").backbone)
    >>> name, len(layers)
    ('model.layers', 2)
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    ]
    if not found:
        raise InputError(f"a {type(model).__name__} has no stack of layers: a list of equal modules is expected")
    longest = max(len(stack) for _, stack in found)
    stacks = [(name, stack) for name, stack in found if len(stack) == longest and not _inside(name, found)]
    if len(stacks) > 1:
        names = ", ".join(name for name, _ in stacks)
        raise InputError(f"a {type(model).__name__} has several stacks of layers ({names}): one is expected")
    return stacks[0]


@contextmanager
def lower_part(model: nn.Module, layers: int) -> Iterator[Callable[..., Tensor]]:
    """Within the block, a function that runs a model up to, not including, layer number ``layers``, and no further.

    It takes the arguments of the model's ``forward`` and gives the hidden states (batch, length, width) that this layer
    would get, with their gradients. The model itself is cut meanwhile, and whole again afterwards.

    >>> import torch
    >>> from downriver.models import small
    >>> lm = small("causal-lm", "nano").backbone.eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> with lower_part(lm, 1) as run:
    ...     hidden = run(input_ids=ids)
    >>> torch.equal(hidden, lm(ids, output_hidden_states=True).hidden_states[1])
    True
    """
    name, stack = layer_stack(model)
    if not 1 <= layers <= len(stack):
        raise InputError(f"layers is {layers}: 1 to {len(stack)} is expected")
    parent, _, last = name.rpartition(".")
    holder = model.get_submodule(parent)
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: Any, output: Any) -> None:
        caught[:] = [output[0] if isinstance(output, tuple) else output]

    hook = stack[layers - 1].register_forward_hook(catch)
    setattr(holder, last, stack[:layers])
    encoder = getattr(model, "base_model", model)  # without the output layer

    def run(**arguments: Any) -> Tensor:
        encoder(**arguments)
        return caught.pop()

    try:
        yield run
    finally:
        setattr(holder, last, stack)
        hook.remove()


def _inside(name: str, found: list[tuple[str, nn.ModuleList]]) -> bool:
    """Whether a list lies within a layer of another one."""
    return any(name.startswith(f"{other}.") for other, _ in found if other != name)
