"""A small SVG canvas in the page's own colours: scales with good ticks, marks with tooltips, text that stays text.

Reach for it when a figure must follow light and dark mode and be read by a screen reader; marks carry CSS classes,
never colours. Ticks come from matplotlib's locators.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

CHARACTER = 6.5  # mean width of a character of the figures' 11.5 px text


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map from ``[low, high]`` to the pixels ``[start, stop]``.

    >>> Axis(0, 10, 100, 200)(5), Axis(1, 100, 0, 50, log=True)(10)
    (150.0, 25.0)
    >>> Axis(0, 10, 100, 200).ticks(5)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    round: tuple[float, ...] = ()  # numbers that count as round here, where those of the decimal system do not

    @classmethod
    def around(
        cls,
        values: Iterable[float],
        start: float,
        stop: float,
        log: bool = False,
        pad: float = 0.07,
        round: tuple[float, ...] = (),
    ) -> "Axis":
        """The axis that shows all finite values with some room on either side."""
        finite = [v for v in values if math.isfinite(v) and not (log and v <= 0)] or [1.0]
        low, high = min(finite), max(finite)
        if log:
            room = max(pad * math.log(high / low), 0.12)
            return cls(low * math.exp(-room), high * math.exp(room), start, stop, log, round)
        room = pad * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, start, stop, log, round)

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """At most about ``count`` round numbers inside the axis."""
        from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

        locators: list[Any] = [MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])]
        if self.log:
            subs = ([1.0], [1.0, 3.0], [1.0, 2.0, 5.0])
            locators = [LogLocator(10, subs=s, numticks=count + 1) for s in subs] + locators
        if self.round:
            locators.insert(0, FixedLocator(self.round))
        for locator in locators:
            inside = [float(t) for t in locator.tick_values(self.low, self.high) if self.low <= t <= self.high]
            if len(inside) >= 3 or locator is locators[-1]:
                break
        return inside[:: math.ceil(len(inside) / (count + 2)) or 1]


class Canvas:
    """Collects marks and gives one ``<svg>`` that scales with its column.

    >>> canvas = Canvas(100, 50, "one dot")
    >>> canvas.dot(10, 20, 3, "seed", tip="seed <0>")
    >>> canvas.svg().partition('aria-label="one dot">')[2]
    Markup('<circle cx="10" cy="20" r="3" class="seed"><title>seed &lt;0&gt;</title></circle></svg>')
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[Markup] = []

    def add(self, tag: str, css: str = "", tip: str = "", content: str = "", **attributes: float | str) -> None:
        """One element; text and attributes are escaped, numbers rounded to a tenth of a pixel."""
        given = {k.replace("_", "-"): _short(v) for k, v in attributes.items()} | ({"class": css} if css else {})
        inner = (Markup("<title>{}</title>").format(tip) if tip else Markup()) + content
        written = Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in given.items())
        self.parts.append(Markup("<{}{}>{}</{}>").format(Markup(tag), written, inner, Markup(tag)))

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str, tip: str = "") -> None:
        self.add("line", css, tip, x1=x1, y1=y1, x2=x2, y2=y2)

    def dot(self, x: float, y: float, radius: float, css: str, tip: str = "") -> None:
        self.add("circle", css, tip, cx=x, cy=y, r=radius)

    def diamond(self, x: float, y: float, radius: float, css: str, tip: str = "") -> None:
        corners = ((x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y))
        self.add("polygon", css, tip, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners))

    def rectangle(self, x: float, y: float, width: float, height: float, css: str) -> None:
        self.add("rect", css, x=x, y=y, width=max(width, 0.0), height=height)

    def path(self, points: Sequence[tuple[float, float]], css: str, close: bool = False, tip: str = "") -> None:
        drawn = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if close else "")
        self.add("path", css, tip, d=drawn)

    def text(self, x: float, y: float, words: str, css: str = "", anchor: str = "start", tip: str = "") -> None:
        self.add("text", css, tip, words, x=x, y=y, text_anchor=anchor)

    def svg(self) -> Markup:
        return Markup(
            '<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}">{body}</svg>'
        ).format(w=_short(self.width), h=_short(self.height), label=self.label, body=Markup("").join(self.parts))


def shorten(words: str, width: float) -> str:
    """Cut words that would be wider than ``width`` pixels, with an ellipsis in the middle of what is left.

    >>> shorten("a_rather_long_name_of_an_arm", 80)
    'a_rathe…an_arm'
    """
    room = max(int(width / CHARACTER), 4)
    return words if len(words) <= room + 1 else f"{words[: room // 2 + 1]}…{words[-(room // 2) :]}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
