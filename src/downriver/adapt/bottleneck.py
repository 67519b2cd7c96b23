"""Bottleneck adapters: small networks with a skip connection behind, or beside, the sublayers of a frozen transformer.

Reach for it where an adapter may cost a little time at inference for more freedom than a low-rank change of weights:
the network between has a nonlinearity, and so cannot be merged. Houlsby et al. 2019 (behind attention and
feed-forward block), Pfeiffer et al. 2021 (behind the feed-forward block), He et al. 2022 (beside it). The projection up
starts at zero instead of small normal values, so that a fresh adapter changes no output. Adapters come before the
residual sum, in Pfeiffer's as well, where he puts them behind it. Norm layers stay frozen; Houlsby et al. train them
too.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from downriver import __version__
from downriver.adapt.loramoe_files import holds_source
from downriver.adapt.peft_entries import Layer
from downriver.core import InputError, atomic_folder, seeded, unknown
from downriver.core.tensors import open_checkpoint
from downriver.models.load import load
from downriver.models.model import Model
from downriver.models.surgery import layer_stack
from downriver.training.engine import clone

Placement = Literal["houlsby", "pfeiffer", "parallel"]
SETTINGS, WEIGHTS, BASE = "bottleneck.json", "bottleneck.safetensors", "base"
PART = "bottleneck"


@dataclass(frozen=True)
class BottleneckConfig:
    """``width`` m of the networks; where they are (``houlsby``, ``pfeiffer``, ``parallel``); the nonlinearity by its
    name in transformers; the factor on their output (He et al. take 4 beside a feed-forward block, the others 1)."""

    width: int = 64
    placement: Placement = "houlsby"
    activation: str = "gelu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise unknown("placement", self.placement, get_args(Placement))
        if self.width < 1:
            raise InputError(f"width is {self.width}: at least 1 is expected")
        if self.activation not in ACT2FN:
            raise unknown("activation", self.activation, ACT2FN)
        if not 0 < self.scale < math.inf:
            raise InputError(f"scale is {self.scale}: a positive number is expected")


class Bottleneck(nn.Module):
    """s (U f(D x + b) + c): what is added to a sublayer's output h, x being h itself or the sublayer's input.

    >>> adapter = Bottleneck(8, 2)
    >>> adapter(torch.ones(3, 8)).abs().sum().item(), sum(p.numel() for p in adapter.parameters())
    (0.0, 42)
    """

    def __init__(self, features: int, width: int, activation: str = "gelu", scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(width, features)
        self.scale = scale
        self.beside: Tensor | None = None  # the input of the sublayer, for a parallel adapter
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of tensors (..., features)."""
        return self.scale * self.up(self.activation(self.down(x)))

    def after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Hook: behind the output projection of a sublayer."""
        return output + self(output)

    def take(self, module: nn.Module, inputs: Any) -> None:
        """Hook: keep what the sublayer gets."""
        self.beside = inputs[0]

    def join(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Hook: add what was made of it to the sublayer's output."""
        x, self.beside = self.beside, None
        return output + self(x)


class Bottlenecked(Model):
    """A copy of a model with fresh adapters; they and the head require gradients, nothing else does.

    ``bottleneck`` is the configuration. Raises ``InputError`` for a model without a stack of transformer layers, and
    for one that has adapters.

    >>> from downriver.models import small
    >>> model = Bottlenecked(small("text-encoder", "nano"), BottleneckConfig(width=4, placement="pfeiffer"))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    584
    """

    def __init__(self, model: Model, config: BottleneckConfig, *, seed: int = 0) -> None:
        if isinstance(model, Bottlenecked) or hasattr(model.backbone, "merge_and_unload"):
            raise InputError(f"the model {model.source} has adapters: the plain model is expected")
        copied = clone(model)
        super().__init__(
            copied.backbone,
            kind=model.kind,
            head=copied.head,
            processor=model.processor,
            pooling=model.pooling,
            source=model.source,
            max_length=model.max_length,
            labels=model.labels,
        )
        self.bottleneck = config
        self.backbone.requires_grad_(False)
        attentions, feed_forwards = sites(self.backbone)
        behind = attentions if config.placement == "houlsby" else []
        with seeded("bottleneck", seed):
            for site in [*behind, *feed_forwards]:
                projection = self.backbone.get_submodule(site.output.name)
                adapter = Bottleneck(site.output.outputs, config.width, config.activation, config.scale)
                like = next(projection.parameters())
                dtype = like.dtype if like.is_floating_point() else torch.float32  # weights in few bits are integers
                projection.add_module(PART, adapter.to(device=like.device, dtype=dtype))
                if config.placement == "parallel":
                    self.backbone.get_submodule(site.entrance).register_forward_pre_hook(adapter.take)
                    projection.register_forward_hook(adapter.join)
                else:
                    projection.register_forward_hook(adapter.after)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``bottleneck.json`` and ``bottleneck.safetensors`` (adapters and head), whole or not at all.

        The base with its tokenizer goes to ``base/``, unless ``source`` still holds the very same weights: then it is
        only named. ``load_bottleneck`` reads the folder.
        """
        folder = Path(folder)
        if self.head is not None and not isinstance(self.head, nn.Linear):
            raise InputError(f"a head of type {type(self.head).__name__} cannot be saved: an nn.Linear is expected")
        outputs = None if self.head is None else self.head.out_features
        tensors = {name: value.detach().cpu().contiguous() for name, value in _trained(self).items()}
        with atomic_folder(folder, overwrite) as part, _without_adapters(self):
            named = holds_source(self)
            if not named:
                Model.save(self, part / BASE)
            save_file(tensors, part / WEIGHTS)
            settings = {
                "downriver": __version__,
                "base": self.source if named else BASE,
                "kind": self.kind,
                "pooling": self.pooling,
                "max_length": self.max_length,
                "labels": list(self.labels),
                "outputs": outputs,
                "config": dataclasses.asdict(self.bottleneck),
            }
            (part / SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder


def load_bottleneck(folder: str | Path, base: Model | str | Path | None = None) -> Bottlenecked:
    """Load what ``Bottlenecked.save`` wrote, in evaluation mode.

    ``base`` is a model or what ``models.load`` takes; by default the one in the folder, or the one that it names.
    Raises ``InputError`` for a folder of another kind, and for tensors that do not fit the base.

    >>> import tempfile
    >>> from downriver.models import small
    >>> model = Bottlenecked(small("text-encoder", "nano"), BottleneckConfig(width=4))
    >>> folder = model.save(Path(tempfile.mkdtemp()) / "adapters")
    >>> load_bottleneck(folder).bottleneck == model.bottleneck
    True
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        config = BottleneckConfig(**settings["config"])
        outputs, labels, pooling = settings["outputs"], settings["labels"], settings["pooling"]
        named = folder / BASE if settings["base"] == BASE else settings["base"]
        options = {"kind": settings["kind"], "max_length": settings["max_length"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / SETTINGS} cannot be read ({error}): a folder of Bottlenecked.save is expected"
        ) from None
    plain = base if isinstance(base, Model) else load(base or named, **options)
    stored = open_checkpoint(folder / WEIGHTS)
    model = Bottlenecked(plain, config)
    model.labels, model.pooling, model.head = tuple(labels), pooling, None
    if outputs is not None:
        model.head = nn.Linear(stored.shape("head.weight")[1], outputs)
    expected = _trained(model)
    if different := set(stored.names()) ^ set(expected):
        raise InputError(f"{folder / WEIGHTS} does not fit the base: the first tensor in question is {min(different)}")
    with torch.no_grad():
        for name, value in expected.items():
            if stored.shape(name) != tuple(value.shape):
                raise InputError(
                    f"{folder / WEIGHTS}, tensor {name} has the shape {tuple(stored.shape(name))}: "
                    f"{tuple(value.shape)} is expected by the base"
                )
            value.copy_(stored.read(name))
    return model.eval()


@dataclass(frozen=True)
class Site:
    """A sublayer: its output projection, and the name of the layer that its input enters first."""

    output: Layer
    entrance: str


def sites(backbone: nn.Module) -> tuple[list[Site], list[Site]]:
    """The attention blocks and the feed-forward blocks of a transformer, in order, by their linear layers.

    The output projection of a block is its last linear layer that gives hidden states; what stands below a module with
    «attn» or «attention» in its name belongs to the attention.

    >>> from downriver.models import small
    >>> attentions, feed_forwards = sites(small("causal-lm", "nano").backbone)
    >>> attentions[0].output.name, feed_forwards[1].output.name
    ('model.layers.0.self_attn.o_proj', 'model.layers.1.mlp.down_proj')
    """
    stack_name, stack = layer_stack(backbone)
    found: tuple[list[Site], list[Site]] = ([], [])
    for number, block in enumerate(stack):
        parts: tuple[list[Layer], list[Layer]] = ([], [])
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and PART not in name.split("."):
                attention = "attn" in name.lower() or "attention" in name.lower()
                parts[not attention].append(linear(f"{stack_name}.{number}.{name}", module))
        if not parts[1]:
            raise InputError(f"layer {number} of {type(backbone).__name__} has no feed-forward block of linear layers")
        width = parts[1][-1].outputs
        for own, layers in zip(found, parts, strict=True):
            outputs = [layer for layer in layers if layer.outputs == width]
            if outputs:
                own.append(Site(outputs[-1], layers[0].name))
    return found


def linear(name: str, module: nn.Linear | Conv1D) -> Layer:
    """The shape of a linear layer, in either of transformers' two forms."""
    if isinstance(module, nn.Linear):
        return Layer(name, module.in_features, module.out_features, module.bias is not None)
    inputs, outputs = module.weight.shape
    return Layer(name, inputs, outputs, True)


def _trained(model: Model) -> dict[str, Tensor]:
    """The adapters' parameters by the names that they have in the backbone, and the head's."""
    kept: dict[str, Tensor] = {name: p for name, p in model.backbone.named_parameters() if f".{PART}." in name}
    if model.head is not None:
        kept |= {f"head.{name}": p for name, p in model.head.named_parameters()}
    return kept


@contextlib.contextmanager
def _without_adapters(model: Model) -> Iterator[None]:
    """Within the block the backbone has the tensors of the plain one; it is for saving, not for calling."""
    holders = [module for module in model.backbone.modules() if PART in module._modules]
    adapters = [module._modules.pop(PART) for module in holders]
    head, model.head = model.head, None
    try:
        yield
    finally:
        model.head = head
        for module, adapter in zip(holders, adapters, strict=True):
            module.add_module(PART, adapter)
