"""A measurement: one tidy row, the only thing that crosses from a run to a report or a law."""

import functools
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from downriver.core.errors import InputError

Direction = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class Cost:
    """What a value cost: all counts are totals over everything the arm used, shared work included.

    ``parameters`` and ``trained_parameters`` are counts of scalars, ``examples`` and ``tokens`` were seen in training,
    ``flops`` are floating-point operations (multiply and add counted as two), ``seconds`` wall time,
    ``peak_memory`` bytes.
    """

    parameters: int = 0
    trained_parameters: int = 0
    examples: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            parameters=max(self.parameters, other.parameters),
            trained_parameters=max(self.trained_parameters, other.trained_parameters),
            examples=self.examples + other.examples,
            tokens=self.tokens + other.tokens,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
            peak_memory=max(self.peak_memory, other.peak_memory),
        )


@functools.cache
def current_versions() -> Mapping[str, str]:
    """Versions of what makes a number: downriver, torch, transformers, python and the device."""
    found = {name: _version(name) for name in ("downriver", "torch", "transformers")}
    return found | {"python": platform.python_version(), "device": _device()}


@dataclass(frozen=True)
class Measurement:
    """One value of one metric of one arm under one seed.

    >>> m = Measurement(task="20newsgroups", metric="accuracy", value=0.8, direction="higher")
    >>> m.to_row()["metric"], m.to_row()["value"]
    ('accuracy', 0.8)
    """

    metric: str
    value: float
    task: str = ""
    unit: str = ""
    direction: Direction = "higher"
    study: str = ""
    arm: str = ""
    seed: int = 0
    cost: Cost = field(default_factory=Cost)
    versions: Mapping[str, str] = field(default_factory=current_versions)

    def __post_init__(self) -> None:
        if self.direction not in ("higher", "lower", "none"):
            raise InputError(f"metric {self.metric!r}: direction {self.direction!r} is not higher, lower or none")
        try:
            object.__setattr__(self, "value", float(self.value))
        except (TypeError, ValueError):
            raise InputError(f"metric {self.metric!r}: value {self.value!r} is not a number") from None
        if math.isinf(self.value):
            raise InputError(f"metric {self.metric!r}: value is infinite")

    def to_row(self) -> dict[str, Any]:
        """The flat dictionary that the ledger stores: cost and versions become columns of their own."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("cost", "versions")}
        return row | asdict(self.cost) | {f"{k}_version" if k != "device" else k: v for k, v in self.versions.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _device() -> str:
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu-{platform.machine()}"
