"""Compiled loops where numba is installed (the extra ``fast``), for the few that tensor operations are slow at."""

import functools
import importlib
from types import ModuleType

WORTHWHILE = 1 << 16
"""Values of a block from which on a compiled loop is taken: the first call ever compiles, for seconds."""

MEMORY = 160 << 20
"""Bytes that numba and what it compiled take at most, as other imports do."""


@functools.cache
def compiled(module: str) -> ModuleType | None:
    """The module of that name, whose functions numba compiles; None without a numba that runs with this numpy.

    >>> compiled("downriver.nn.select_kernel").__name__
    'downriver.nn.select_kernel'
    """
    try:
        importlib.import_module("numba")
    except ImportError:
        return None
    return importlib.import_module(module)
