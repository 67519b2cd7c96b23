"""The errors a user meets: one clear sentence each, naming what was wrong and what was expected."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class DownriverError(Exception):
    """Base of every error that downriver raises on purpose."""


class InputError(DownriverError, ValueError):
    """Something the user gave (a file, a column, a tensor, a parameter) is not what was expected."""


class MissingExtra(DownriverError, ImportError):
    """An optional dependency is not installed; the message is the one command that installs it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra installs it.

    >>> require("json", "serve").__name__
    'json'
    >>> require("no_such_module_here", "serve")
    Traceback (most recent call last):
    ...
    downriver.core.errors.MissingExtra: no_such_module_here is not installed: pip install 'downriver[serve]'
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is not installed: pip install 'downriver[{extra}]'") from error


def unknown(what: str, name: object, known: Iterable[object]) -> InputError:
    """The error for a name that is not among the known ones, with the nearest of them.

    >>> raise unknown("method", "tie", ["ties", "average"])
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: unknown method 'tie': did you mean 'ties'? (known: average, ties)
    """
    names = sorted(str(k) for k in known)
    folded = {n.casefold(): n for n in names}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]!r}? " if near else ""
    listed = ", ".join(names[:50]) + (f" and {len(names) - 50} more" if len(names) > 50 else "")
    return InputError(f"unknown {what} {str(name)!r}: {hint}(known: {listed or 'none'})")
