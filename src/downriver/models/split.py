"""A model in two parts: its states at two layers, and its upper part run from a state that somebody else wrote.

Reach for it when one model is to go on from what another one says (``merge.talking_models``), or when a state is to be
exchanged and looked at; ``surgery.lower_part`` runs the lower part alone. No list of architectures: an upper part is
run by the model's own forward pass, with the layers below the split left out, so that masks and positions are right.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.models.model import Model
from downriver.models.surgery import layer_stack

Inputs = Mapping[str, Tensor] | Tensor
Lower = Callable[[Inputs], Tensor]
Upper = Callable[[Tensor, Inputs], Tensor]
Instead = Callable[[nn.Module, Tensor], Tensor]
"""What stands in for a layer's state, of the layer and of what it reads."""


class _Reached(Exception):
    """Ends a forward pass at the layer that was wanted."""


class SplitModel:
    """A model split after the layer ``at``: ``lo`` gives its state there, ``hi`` goes on from a state up to ``to``.

    Parameters
    ----------
    model
        A ``Model`` (layers are named within its backbone, and its output is its features) or any ``nn.Module``, which
        is called with a tensor, or with a mapping's entries by name.
    at, to
        Names of layers, as in ``model.named_modules()``: whole entries of a stack or of an ``nn.Sequential``. Without
        ``to`` the upper part ends with the model's output. For a model that cannot be continued that way give two
        functions instead: ``at(inputs)`` gives the state, ``to(state, inputs)`` what the upper part makes of it.

    ``hi`` needs the inputs beside the state, because masks and positions come from them. What lies below the split is
    left out where the shapes allow it, and otherwise computed for nothing. Before its first run the split is tried on
    those inputs: if the upper part does not give what the whole model gives, an ``InputError`` says so, as for a layer
    inside a residual block.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> x, split = torch.ones(4, 2), SplitModel(net, "1")
    >>> torch.equal(split.hi(split.lo(x), x), net(x))
    True
    """

    def __init__(self, model: nn.Module, at: str | Lower, to: str | Upper | None = None) -> None:
        self.model = model
        self._lower = at if callable(at) else None
        self._upper = to if callable(to) else None
        if (self._lower is None) != (self._upper is None):
            raise InputError("a split by functions takes two of them, at(inputs) and to(state, inputs)")
        self.at = "" if callable(at) else at
        self.to = None if callable(to) else to
        if self._lower is None:
            tree = _tree(model)
            self._at, self._to = _layer(tree, self.at), None if self.to is None else _layer(tree, self.to)
            self._below, self._entry = _below(tree, self.at)
            self._made: dict[nn.Module, Any] = {}
            self._skips: bool | None = None

    def lo(self, inputs: Inputs) -> Tensor:
        """The state at the split, of the form that the layer gives (n, ..., d)."""
        if self._lower is not None:
            return self._lower(inputs)
        found: list[Tensor] = []

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            found.append(first(output))
            raise _Reached

        handle = self._at.register_forward_hook(stop)
        try:
            _call(self.model, inputs)
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        raise InputError(f"the layer {self.at} is not run by the model")

    def hi(self, state: Tensor, inputs: Inputs) -> Any:
        """What the upper part makes of a state: the state at ``to``, or the model's output; gradients reach it."""
        if self._upper is not None:
            return self._upper(state, inputs)
        if self._skips is None:
            self._try(inputs)
        return self._run(state, inputs, _zeros if self._skips else None)

    def read(self, inputs: Inputs) -> tuple[Tensor, Any]:
        """The state at the split, and what lies at ``to``, of one forward pass of the whole model."""
        if self._lower is not None and self._upper is not None:
            state = self._lower(inputs)
            return state, self._upper(state, inputs)
        with captured([self._at, *([self._to] if self._to is not None else [])]) as states:
            output = _call(self.model, inputs)
        return first(states[0]), output if self._to is None else first(states[1])

    def _run(self, state: Tensor, inputs: Inputs, instead: Instead | None) -> Any:
        """The model's own forward pass, with ``state`` at the split and what ``instead`` gives in the layers below."""
        with ExitStack() as stack:
            if instead is not None:
                for layer in self._below:
                    stack.enter_context(_forward(layer, functools.partial(self._stand_in, layer, instead)))
            stack.enter_context(_forward(self._at, lambda *a, **k: self._form(self._at, state)))
            if self._to is None:
                return _call(self.model, inputs)
            with captured([self._to]) as states:
                _call(self.model, inputs)
            return first(states[0])

    def _stand_in(self, layer: nn.Module, instead: Instead, *arguments: Any, **named: Any) -> Any:
        return self._form(layer, instead(layer, arguments[0] if arguments else named["hidden_states"]))

    def _form(self, layer: nn.Module, state: Tensor) -> Any:
        """A state in the form that a layer gives it: alone, or the first of several values."""
        made = self._made[layer]
        return (state, *made[1:]) if isinstance(made, tuple) else state

    @torch.no_grad()
    def _try(self, inputs: Inputs) -> None:
        """Look whether the upper part can be run from the state alone, without what lies below."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            watched = list(dict.fromkeys([self._at, *self._below]))
            with captured(watched) as made:
                state, whole = self.read(inputs)
            shapes = {layer: torch.zeros_like(first(output)) for layer, output in zip(watched, made, strict=True)}
            self._made = {layer: _extras(output) for layer, output in zip(watched, made, strict=True)}
            with _emptied(self._entry if self._entry is not self._at else None):
                part = self._run(state, inputs, lambda layer, _: shapes[layer])
            try:
                skips = bool(self._below) and self._run(state, inputs, _zeros) is not None
            except (RuntimeError, ValueError):  # the shapes change on the way
                skips = False
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not torch.allclose(first(part), first(whole), rtol=1e-4, atol=1e-5):
            raise InputError(
                f"the model cannot be continued from the state at {self.at} alone: the layer lies inside a block, or "
                "later layers need more than its state. Split after a whole layer, or give two functions"
            )
        self._skips = skips


def split_layers(model: nn.Module) -> tuple[str, str]:
    """The names of the middle and the last layer of a model's stack: where to split it if nothing else is known.

    >>> from downriver.models import small
    >>> split_layers(small("text-encoder", "tiny"))
    ('encoder.layer.1', 'encoder.layer.3')
    """
    name, stack = layer_stack(_tree(model))
    if len(stack) < 2:
        raise InputError(f"the stack {name} has one layer only: name the two layers to split at")
    return f"{name}.{len(stack) // 2 - 1}", f"{name}.{len(stack) - 1}"


@contextmanager
def captured(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Within the block, a list of what these modules give, in their order, whenever the model is run.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with captured([net[0]]) as states:
    ...     _ = net(torch.ones(1, 2))
    >>> states[0].shape
    torch.Size([1, 3])
    """
    found: list[Any] = [None] * len(layers)

    def keep(place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found[place] = output

        return hook

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """The tensor that a layer or a model gives: itself, or the first of several values."""
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise InputError(f"a layer gives {type(found).__name__}: a tensor, alone or as the first value, is expected")
    return found


def named_layers(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of these names within a model (a ``Model``'s backbone)."""
    return [_layer(_tree(model), name) for name in names]


def _tree(model: nn.Module) -> nn.Module:
    return model.backbone if isinstance(model, Model) else model


def _call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(model, Model):
        return model.features(**(inputs if isinstance(inputs, Mapping) else {"inputs": inputs}))
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _layer(tree: nn.Module, name: str) -> nn.Module:
    try:
        if name:
            return tree.get_submodule(name)
    except AttributeError:
        pass
    known = [n for n, m in tree.named_modules() if n and not isinstance(m, nn.ModuleList)]
    some = ", ".join(known[:6] + (["..."] if len(known) > 12 else []) + known[6:][-6:])
    raise InputError(f"the {type(tree).__name__} has no layer {name!r} (there are: {some})")


def _below(tree: nn.Module, name: str) -> tuple[list[nn.Module], nn.Module | None]:
    """What comes before a layer in the list that it is an entry of and before the lists that it lies in; and the entry
    of the outermost list that it is or lies in.

    Raises ``InputError`` for a layer that is a part of an entry, where a residual connection goes round it.
    """
    parts, found, entries = name.split("."), [], []
    for depth, part in enumerate(parts):
        parent = tree.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            found += list(parent)[: list(dict(parent.named_children())).index(part)]
            entries.append(".".join(parts[: depth + 1]))
    if entries and entries[-1] != name:
        raise InputError(f"{name} lies inside the block {entries[-1]}: split after the block")
    return found, tree.get_submodule(entries[0]) if entries else None


def _zeros(layer: nn.Module, state: Tensor) -> Tensor:
    """In the place of what a layer below the split gives."""
    return torch.zeros_like(state)


@contextmanager
def _emptied(entry: nn.Module | None) -> Iterator[None]:
    """A block that reads zeros for a while: what goes round the split inside it is found out."""

    def empty(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (torch.zeros_like(arguments[0]), *arguments[1:]) if arguments else None

    handle = entry.register_forward_pre_hook(empty) if entry is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _extras(output: Any) -> Any:
    """What a layer gives beside its state; tensors among it are of one batch and go."""
    if not isinstance(output, tuple):
        return None
    return tuple(None if isinstance(value, Tensor) else value for value in output)


@contextmanager
def _forward(layer: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass for a layer, for a while."""
    own = vars(layer).get("forward")
    layer.forward = function
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
