"""The HTML of a post as plain text that keeps its code: every character of code stays, and where it stands is known.

Reach for ``render`` before tokenising posts of a question-and-answer site; unclosed tags are no obstacle.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser

_BLOCKS = frozenset(
    {"p", "div", "pre", "li", "ul", "ol", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "tr", "table"}
)
_SILENT = frozenset({"script", "style"})


@dataclass(frozen=True)
class Rendered:
    """Text, and where code stands in it: half-open ranges of characters, in order."""

    text: str
    code: tuple[tuple[int, int], ...]


def render(html: str) -> Rendered:
    """Text and code of a post's HTML.

    Code, inline or in a block, is kept character by character (a block's last line break aside); elsewhere runs of
    white space become one space, and every paragraph, list item, heading or block of code begins a line. Tags that
    nobody closed end where the text ends; scripts and styles are left out.

    >>> found = render("<p>Use <code>a  &lt; b</code>,\\nthen:</p><pre><code>if a:\\n    b()\\n</code></pre>")
    >>> found.text
    'Use a  < b, then:\\nif a:\\n    b()'
    >>> [found.text[a:b] for a, b in found.code]
    ['a  < b', 'if a:\\n    b()']
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.rendered()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[tuple[str, bool]] = []  # text and whether it is code
        self.code = self.pre = self.silent = 0

    def handle_starttag(self, tag: str, attrs: Iterable[tuple[str, str | None]]) -> None:
        self._count(tag, 1)
        if tag in _BLOCKS or tag == "br":
            self.parts.append(("\n", False))

    def handle_endtag(self, tag: str) -> None:
        self._count(tag, -1)
        if tag in _BLOCKS:
            self.parts.append(("\n", False))

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append((data, bool(self.code or self.pre)))

    def _count(self, tag: str, by: int) -> None:
        if tag == "code":
            self.code = max(0, self.code + by)
        elif tag == "pre":
            self.pre = max(0, self.pre + by)
        elif tag in _SILENT:
            self.silent = max(0, self.silent + by)

    def rendered(self) -> Rendered:
        text, spans = "", []
        joined: list[tuple[str, bool]] = []
        for part, code in self.parts:  # a parser may cut one run in several
            if joined and joined[-1][1] == code and part != "\n" and joined[-1][0] != "\n":
                joined[-1] = joined[-1][0] + part, code
            else:
                joined.append((part, code))
        for part, code in joined:
            if code:
                kept = part.rstrip("\n") if "\n" in part else part
                if kept:
                    spans.append((len(text), len(text) + len(kept)))
                    text += kept
            elif part == "\n":
                text = text if text.endswith("\n") or not text else _trimmed(text, spans) + "\n"
            else:
                words = " ".join(part.split())
                before = " " if part[:1].isspace() and text and not text[-1].isspace() else ""
                after = " " if words and part[-1:].isspace() else ""
                text += before + words + after
        return Rendered(_trimmed(text, spans).rstrip("\n"), tuple(spans))


def _trimmed(text: str, spans: list[tuple[int, int]]) -> str:
    """Without the spaces at its end, unless they are code."""
    return text if spans and spans[-1][1] == len(text) else text.rstrip(" ")
