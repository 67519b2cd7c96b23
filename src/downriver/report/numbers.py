"""How numbers and verdicts are said: significant digits from the interval, percent points, k/M/G, durations, sentences.

Reach for it wherever a figure, a table or a terminal shows a number; nothing else in the room formats one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MINUS = "−"  # the minus sign proper, as wide as a plus
MISSING = "—"
NARROW = "\u202f"  # between a number and its unit, so that they are never torn apart
COSTS = {
    "flops": "FLOPs",
    "seconds": "time",
    "examples": "examples",
    "tokens": "tokens",
    "trained_parameters": "trained parameters",
    "parameters": "parameters",
    "peak_memory": "peak memory",
}


@dataclass(frozen=True)
class Format:
    """How the values of one metric are written; shares in percent, their differences in points.

    >>> share = Format.of([0.8123, 0.7951], "share", spread=0.004)
    >>> share.value(0.8123), share.difference(-0.0172), share.axis("accuracy")
    ('81.2\u202f%', '−1.7 points', 'accuracy (%)')
    >>> Format.of([3.14159], "nats", spread=0.02).value(3.14159)
    '3.142\u202fnats'
    """

    scale: float = 1.0
    unit: str = ""
    decimals: int = 3

    @classmethod
    def of(cls, values: Iterable[float], unit: str, spread: float) -> "Format":
        """Decimals such that ``spread`` (a typical half interval) keeps one or two digits;
        without one the largest value keeps three."""
        share = unit.split(" ")[0] == "share"  # also "share kept", "share of variance"
        scale = 100.0 if share else 1.0
        largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
        if not (spread > 0 and math.isfinite(spread)):
            spread = 9 * 10.0 ** (math.floor(math.log10(largest * scale)) - 2) / scale if largest else 0.0
        return cls(scale, "%" if share else unit, digits(spread * scale))

    def bare(self, value: float | None) -> str:
        """The number alone, for a table whose heading says the unit; a dash where there is none."""
        return MISSING if _absent(value) else number(value * self.scale, self.decimals)  # type: ignore[operator]

    def value(self, value: float | None) -> str:
        return self._with_unit(self.bare(value))

    def difference(self, value: float | None) -> str:
        """A signed difference; of shares it is in points, so that 2 % of something is not read."""
        if _absent(value):
            return MISSING
        text = number(value * self.scale, self.decimals, sign=True)  # type: ignore[operator]
        return self._as_difference(text)

    def span(self, low: float, high: float) -> str:
        """An interval; negative bounds are joined by a word, since a dash beside a minus cannot be read.

        >>> Format(decimals=1).span(1, 2), Format(decimals=1).span(-2, -1)
        ('1.0 – 2.0', '−2.0 to −1.0')
        """
        return f"{self.bare(low)} {'to' if low < 0 else '–'} {self.bare(high)}"

    def given(self, value: float) -> str:
        """A number that somebody chose (a margin), without more digits than were given.

        >>> Format(100, "%", 2).given(0.02), Format(1, "nats", 3).given(-0.5)
        ('2 points', '−0.5\u202fnats')
        """
        text = f"{value * self.scale:.6g}".replace("-", MINUS)
        return self._as_difference(text)

    def axis(self, name: str) -> str:
        return f"{name} ({self.unit})" if self.unit else name

    def ticks(self, ticks: Sequence[float], sign: bool = False) -> list[str]:
        """Labels of evenly spaced ticks, with the decimals that their step needs and no more.

        >>> Format(100, "%", 2).ticks([0.65, 0.7, 0.75])
        ['65', '70', '75']
        """
        steps = [abs(b - a) * self.scale for a, b in pairwise(ticks)]
        step = min(steps, default=0.0)
        decimals = next((d for d in range(7) if step and abs(round(step, d) - step) < 1e-6 * step), self.decimals)
        return [number(t * self.scale, decimals, sign) if t else "0" for t in ticks]

    def _as_difference(self, text: str) -> str:
        if self.unit != "%":
            return self._with_unit(text)
        return f"{text} point" if text.lstrip(f"+{MINUS}") == "1" else f"{text} points"

    def _with_unit(self, text: str) -> str:
        """One word follows the number (``nats``); longer units (``nats per token``) are left to headings."""
        return f"{text}{NARROW}{self.unit}" if self.unit and " " not in self.unit and text != MISSING else text


def digits(spread: float) -> int:
    """Decimals that leave two digits of ``spread`` when it starts below 3.55, else one; never more than six.

    >>> digits(0.0021), digits(0.0055), digits(0.3), digits(12.0), digits(0)
    (4, 3, 2, 0, 3)
    """
    if not (spread > 0 and math.isfinite(spread)):
        return 3
    exponent = math.floor(math.log10(spread))
    return min(max((1 if spread / 10**exponent < 3.55 else 0) - exponent, 0), 6)


def number(value: float, decimals: int, sign: bool = False) -> str:
    """A number with a fixed count of decimals and thousands separated; very large or small ones by significant digits.

    >>> number(12345.678, 1), number(-0.5, 2, sign=True), number(0.01, 1, sign=True), number(2.5e9, 0), number(3e-9, 3)
    ('12,345.7', '−0.50', '0.0', '2.5\u202fG', '3e−09')
    """
    if abs(value) >= 1e6:
        text = quantity(value)
    elif 0 < abs(value) < 1e-4 and decimals < 5:
        text = f"{value:.2g}"
    else:
        text = f"{round(value, decimals) + 0.0:,.{decimals}f}"
    return ("+" if sign and text.strip("-0.,") and value > 0 else "") + text.replace("-", MINUS)


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits and a prefix; counts below ten thousand in full, those beyond prefixes as powers of ten.

    >>> quantity(9284), quantity(22_713_216), quantity(1.5e15, "FLOPs"), quantity(5.7e21), quantity(0), quantity(0.25)
    ('9,284', '22.7\u202fM', '1.5\u202fPFLOPs', '5.7e21', '0', '0.25')
    """
    if abs(value) >= (1e27 if unit else 1e15):
        return f"{value:.3g}".replace("+", "").replace("-", MINUS) + (NARROW + unit if unit else "")
    prefix, scaled = "", float(value)
    if abs(value) >= 1e4 or (unit and abs(value) >= 1e3):
        for prefix in "kMGTPEZY":  # noqa: B007
            scaled /= 1000
            if abs(scaled) < 999.5:
                break
    text = f"{scaled:,.0f}" if abs(scaled) >= 1000 else f"{scaled:.3g}"
    return (text.replace("-", MINUS) + NARROW + prefix + unit).rstrip(NARROW)


def duration(seconds: float) -> str:
    """Wall time as people say it.

    >>> [duration(s).replace(NARROW, " ") for s in (0.034, 4.21, 61, 754, 7620, 200000)]
    ['34 ms', '4.2 s', '1 min 01 s', '12 min 34 s', '2 h 07 min', '2 d 7 h']
    """
    if _absent(seconds):
        return MISSING
    if seconds < 1:
        return f"{seconds * 1000:.3g}{NARROW}ms"
    if seconds < 59.5:
        return f"{seconds:.2g}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {rest:02}{NARROW}s" if rest else f"{minutes}{NARROW}min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}{NARROW}h {minutes:02}{NARROW}min"
    return f"{hours // 24}{NARROW}d {hours % 24}{NARROW}h"


def cost(name: str, value: float | None) -> str:
    """A cost in its own unit: ``name`` is a field of ``core.Cost``.

    >>> cost("seconds", 61.2), cost("flops", 3.2e13), cost("peak_memory", 1.25e9), cost("tokens", 0)
    ('1\u202fmin 01\u202fs', '32\u202fTFLOPs', '1.25\u202fGB', '0')
    """
    if _absent(value):
        return MISSING
    if name == "seconds":
        return duration(value)  # type: ignore[arg-type]
    unit = {"flops": "FLOPs", "peak_memory": "B"}.get(name, "")
    return quantity(value, unit if value else "")  # type: ignore[arg-type]


def percent(share: float) -> str:
    """A level such as 0.95 as percent.

    >>> percent(0.95), percent(0.995)
    ('95\u202f%', '99.5\u202f%')
    """
    return f"{share * 100:g}{NARROW}%"


def probability(p: float) -> str:
    """A p-value with its relation sign.

    >>> probability(0.03125), probability(0.00002), probability(1.0)
    ('=\u202f0.031', '<\u202f0.001', '=\u202f1')
    """
    return f"<{NARROW}0.001" if p < 0.001 else f"={NARROW}{p:.2g}"


def listed(words: Sequence[str], most: int = 6) -> str:
    """Words as a list in a sentence; of very many only the first are named.

    >>> listed(["a"]), listed(["a", "b", "c"]), listed("abcdefgh", most=3)
    ('a', 'a, b and c', 'a, b and 6 more')
    """
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "none"


def counted(count: int, one: str, many: str = "") -> str:
    """A count and its noun.

    >>> counted(1, "seed"), counted(5, "seed"), counted(0, "study", "studies")
    ('1 seed', '5 seeds', '0 studies')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
