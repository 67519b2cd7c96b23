"""Which methods a room offers, found by name without importing them, their parameters checked by signature.

A room names its methods once, in ``METHODS`` of its ``__init__``: ``{"ties": "downriver.merge.ties:ties"}``. Other
packages add theirs through entry points of the group ``downriver.<room>``.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pydantic

from downriver.core.errors import DownriverError, InputError, unknown

ARROWS = ("data", "pretrain", "adapt", "merge", "compress")


def methods(room: str) -> dict[str, str]:
    """The names of a room's methods and where each one lives, ``module:function``.

    >>> "ties" in methods("merge")
    True
    """
    try:
        own = dict(getattr(import_module(f"downriver.{room}"), "METHODS", {}))
    except ModuleNotFoundError as error:
        if error.name != f"downriver.{room}":
            raise
        own = {}
    for point in entry_points(group=f"downriver.{room}"):
        if point.name in own:
            raise DownriverError(f"entry point {point.value} offers {room} method {point.name!r}, which exists already")
        own[point.name] = point.value
    return own


def resolve(room: str, name: str) -> Callable[..., Any]:
    """Import one method by name; an unknown name is an ``InputError`` with the nearest known one."""
    known = methods(room)
    if name not in known:
        raise unknown(f"{room} method", name, known)
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def check_parameters(method: Callable[..., Any], parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Check keyword parameters against a method's keyword-only signature and annotations; give them back converted.

    >>> def f(model, *, rank: int = 8): ...
    >>> check_parameters(f, {"rank": 4}, "f")
    {'rank': 4}
    >>> check_parameters(f, {"rnk": 4}, "f")
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: unknown parameter of f 'rnk': did you mean 'rank'? (known: rank)
    """
    signature = inspect.signature(method, eval_str=True)
    allowed = {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    checked = {}
    for key, value in parameters.items():
        if key not in allowed:
            raise unknown(f"parameter of {name}", key, allowed)
        annotation = allowed[key].annotation
        if annotation is inspect.Parameter.empty:
            checked[key] = value
            continue
        try:
            adapter = pydantic.TypeAdapter(annotation, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
        except pydantic.PydanticUserError:  # the annotation brings its own configuration
            adapter = pydantic.TypeAdapter(annotation)
        try:
            checked[key] = adapter.validate_python(value)
        except pydantic.ValidationError as error:
            why = error.errors()[0]["msg"]
            raise InputError(f"parameter {key!r} of {name} is {value!r}: {why}") from None
    missing = [p.name for p in allowed.values() if p.default is p.empty and p.name not in checked]
    if missing:
        raise InputError(f"{name} needs the parameter {missing[0]!r}")
    return checked
