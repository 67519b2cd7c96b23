"""Find the parts of a loaded transformer, whatever family it is of, and exchange some of them so that it can be saved.

Reach for it when a method works on layers, so that it needs no list of architectures: a stack is the longest list of
modules of one class, as transformers builds Llama, Mistral, Qwen, Gemma, GPT-NeoX, GPT-2, BERT, ViT and their like.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.nn.thresholded import CATSActivation

THRESHOLDS = "downriver_cats"
"""The entry of a configuration that keeps the thresholds of gated blocks."""
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


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


def gated_mlps(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The gated feed-forward blocks y = W_down(act(W_gate x) ⊙ W_up x) of a model: name, block, name of its activation.

    Llama, Mistral, Qwen, Gemma and their like, Phi-3 with its fused gate and up projection, and the experts of Mixtral
    and its like, all of one layer as one block.

    >>> from downriver.models import small
    >>> [(name, attribute) for name, _, attribute in gated_mlps(small("causal-lm", "nano").backbone)]
    [('model.layers.0.mlp', 'act_fn'), ('model.layers.1.mlp', 'act_fn')]
    """
    found = []
    for name, module in model.named_modules():
        gated = (hasattr(module, "gate_proj") and hasattr(module, "up_proj")) or hasattr(module, "gate_up_proj")
        if gated and hasattr(module, "down_proj"):
            attribute = next((a for a in _ACTIVATIONS if isinstance(getattr(module, a, None), nn.Module)), None)
            if attribute is not None:
                found.append((name, module, attribute))
    return found


def attention_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attention blocks that use transformers' common attention interface: the name of each, and the block.

    Llama, Mistral, Qwen, Gemma, GPT-NeoX, GPT-2, OPT, BERT, RoBERTa, ViT and their like.

    >>> from downriver.models import small
    >>> [name for name, _ in attention_blocks(small("causal-lm", "nano").backbone)]
    ['model.layers.0.self_attn', 'model.layers.1.self_attn']
    """
    expected = ("is_causal", "scaling", "config")
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    return [(name, module) for name, module in found if all(hasattr(module, part) for part in expected)]


def set_thresholds(model: nn.Module, thresholds: Sequence[float]) -> None:
    """Put a threshold on the gate of every gated block, in place, and write them into the configuration.

    ``models.load`` restores them from there; plain transformers ignores the entry and loads the dense model.
    """
    blocks = gated_mlps(model)
    if len(blocks) != len(thresholds):
        raise InputError(f"{len(thresholds)} thresholds for {len(blocks)} gated blocks: one a block is expected")
    for (_, block, attribute), threshold in zip(blocks, thresholds, strict=True):
        activation = getattr(block, attribute)
        plain = activation.activation if isinstance(activation, CATSActivation) else activation
        device = next(block.parameters()).device
        setattr(block, attribute, CATSActivation(plain, threshold).to(device))
    if hasattr(model, "config"):
        setattr(model.config, THRESHOLDS, [float(threshold) for threshold in thresholds])


def restore(model: nn.Module) -> None:
    """Do again, in place, what the configuration of a loaded model says was done to it."""
    if thresholds := getattr(getattr(model, "config", None), THRESHOLDS, None):
        set_thresholds(model, thresholds)
