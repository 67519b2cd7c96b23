"""Rooms whose names are imported on first use, so that no room costs anything until it is entered."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def attach(room: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` of a room whose public names live at ``module:attribute``.

    A function may carry the name of its own module (``merge.ties`` is the function of ``merge/ties.py``):
    whatever is imported first, ``from downriver.merge import ties`` is the function.

    >>> get, listed, public = attach("json_room", {"dumps": "json:dumps"})
    >>> get("dumps")([1]), public
    ('[1]', ['dumps'])
    """

    class Room(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in names and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

        def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
            return import_module, (self.__name__,)  # pickled by name, as plain modules are by cloudpickle

    if room in sys.modules:
        sys.modules[room].__class__ = Room

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        module, _, attribute = names[name].partition(":")
        value = getattr(import_module(module), attribute)
        if room in sys.modules:
            setattr(sys.modules[room], name, value)
        return value

    return find, lambda: sorted(names), sorted(names)
