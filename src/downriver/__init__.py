"""downriver: predict, choose, improve and prove the downstream task performance of pretrained models.

Rooms are imported on first use, so ``import downriver`` costs milliseconds and loads no deep-learning library:

>>> import downriver
>>> downriver.__version__
'0.1.0'
>>> sorted(downriver.ROOMS)[:3]
['adapt', 'core', 'evaluate']
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

ROOMS = (
    "core",
    "nn",
    "models",
    "tasks",
    "adapt",
    "merge",
    "forecast",
    "evaluate",
    "study",
    "reproductions",
    "report",
)


def __getattr__(name: str) -> ModuleType:
    if name in ROOMS:
        return import_module(f"downriver.{name}")
    raise AttributeError(f"module 'downriver' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*ROOMS, "ROOMS", "__version__"]
