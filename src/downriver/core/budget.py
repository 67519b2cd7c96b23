"""Budgets: every arm of a study gets the same one, in the unit that the question is about."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from downriver.core.errors import InputError

Unit = Literal["steps", "examples", "tokens", "flops", "seconds"]
UNITS: tuple[Unit, ...] = ("steps", "examples", "tokens", "flops", "seconds")


@dataclass(frozen=True)
class Budget:
    """How much training an arm may use: ``Budget(2000, "examples")`` or ``Budget.parse("1e15 flops")``.

    >>> Budget.parse("2k examples").steps(batch_size=16)
    125
    >>> Budget(1e12, "flops").steps(batch_size=8, flops_per_step=2.5e11)
    4
    """

    amount: float
    unit: Unit = "examples"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InputError(f"budget unit {self.unit!r} is not one of {', '.join(UNITS)}")
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise InputError(f"budget of {self.amount} {self.unit}: a positive finite amount is expected")

    @classmethod
    def parse(cls, text: "str | Budget | dict[str, float]") -> "Budget":
        """Read ``"2000 examples"``, ``"1e15 flops"``, ``"30 s"``, ``{"tokens": 1e6}``."""
        if isinstance(text, Budget):
            return text
        if isinstance(text, dict) and len(text) == 1:
            ((unit, amount),) = text.items()
            return cls(float(amount), unit)  # type: ignore[arg-type]
        found = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([kMGT]?)\s*([a-zA-Z]+)\s*", str(text))
        if not found:
            raise InputError(
                f"budget {text!r}: an amount and a unit are expected, like '2000 examples' or '1e15 flops'"
            )
        amount = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[2]]
        unit = {"s": "seconds", "second": "seconds", "step": "steps", "example": "examples", "token": "tokens"}.get(
            found[3], found[3].lower()
        )
        return cls(amount, unit)  # type: ignore[arg-type]

    def steps(
        self, batch_size: int, tokens_per_step: float | None = None, flops_per_step: float | None = None
    ) -> int | None:
        """The optimiser steps this budget pays for, at least one; ``None`` when only the clock can tell (seconds)."""
        per_step: dict[str, float | None] = {
            "steps": 1,
            "examples": batch_size,
            "tokens": tokens_per_step,
            "flops": flops_per_step,
        }
        if self.unit == "seconds":
            return None
        price = per_step[self.unit]
        if not price:
            raise InputError(f"a budget in {self.unit} needs the {self.unit} of one step")
        return max(1, int(self.amount / price + 1e-9))

    def share(self, fraction: float) -> "Budget":
        """A part of this budget: ``Budget(10, "steps").share(1 / 2)`` is five steps."""
        return Budget(self.amount * fraction, self.unit)

    def __str__(self) -> str:
        amount = f"{self.amount:,.0f}" if 1 <= self.amount < 1e9 else f"{self.amount:g}"
        return f"{amount} {self.unit}"
