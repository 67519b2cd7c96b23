"""Cut text into words by a fixed rule, without a learned vocabulary; the pieces joined always give the text back.

Reach for it before a model that reads words as bytes (``models.hat``), or to count words a byte. The default rule is
that of "Hierarchical Autoregressive Transformers" (2025): Unicode's word bounds (UAX 29), cuts after punctuation and
inside camelCase, single spaces before what follows. It is one compiled pattern; where it stands on format characters
and combining marks at the start of a piece, another implementation of UAX 29 may cut elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import regex

from downriver.core.errors import InputError, unknown

Rule = Literal["hat", "whitespace", "uax29"]
TooLong = Literal["split", "raise"]

_PATTERNS = {
    # [space] word or punctuation, then all punctuation that follows it; else a stretch of whitespace.
    # \b is a bound of UAX 29 (flag w); a word ends there, after punctuation, or where camelCase rises.
    "hat": r"""(?wsx)
        (?: [ ] \b )?+
        (?: \p{P} | (?! \s+? \b ) . .*? (?: \b | (?<= \p{P} ) | (?<= \p{Ll} ) (?= \p{Lu} ) ) )
        \p{P}*+
        | .+? \b""",
    "whitespace": r"\s*+ \S++ | \s++",
    "uax29": r"(?wsx) .+? \b",
}


class WordSplitter:
    """Text → words, as UTF-8 bytes.

    Parameters
    ----------
    rule
        ``hat``, the paper's; ``whitespace``: every word with the whitespace before it, as in the paper's first version;
        ``uax29``: Unicode's bounds alone; or your own function from a text to its pieces.
    max_bytes
        Words beyond so many bytes (64) are too long.
    too_long
        What to do with them: ``split`` them, between two characters where the limit allows it, or ``raise``.

    Raises ``InputError`` for an unknown rule and a limit below 1; when splitting, for a word too long where that is to
    raise, and for a function whose pieces are not the text.

    >>> WordSplitter().split("Hello, world! howAreYou")
    [b'Hello,', b' world!', b' how', b'Are', b'You']
    >>> WordSplitter("whitespace").split("Hello, world!")
    [b'Hello,', b' world!']
    >>> WordSplitter("uax29", max_bytes=4).split("Hello, you")
    [b'Hell', b'o', b',', b' ', b'you']
    """

    def __init__(
        self,
        rule: Rule | Callable[[str], Sequence[str]] = "hat",
        max_bytes: int = 64,
        *,
        too_long: TooLong = "split",
    ) -> None:
        if not callable(rule) and rule not in _PATTERNS:
            raise unknown("rule of words", rule, _PATTERNS)
        if max_bytes < 1:
            raise InputError(f"max_bytes is {max_bytes}: at least 1 is expected")
        if too_long not in get_args(TooLong):
            raise unknown("too_long", too_long, get_args(TooLong))
        self.rule, self.max_bytes, self.too_long = rule, max_bytes, too_long
        self._pieces: Callable[[str], Sequence[str]] = (
            rule if callable(rule) else regex.compile(_PATTERNS[rule], regex.VERBOSE).findall
        )

    def split(self, text: str | bytes) -> list[bytes]:
        """The words in order; ``b"".join`` of them is the text, bytes that are not UTF-8 included. Nothing for ``""``.

        >>> WordSplitter().split(b"caf\\xc3\\xa9 \\xff!")
        [b'caf\\xc3\\xa9', b' \\xff!']
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        pieces = self._pieces(text)
        if callable(self.rule) and "".join(pieces) != text:
            raise InputError("the pieces that the rule gives are not the text when they are joined")
        try:
            words = [piece.encode("utf-8", "surrogateescape") for piece in pieces if piece]
        except UnicodeEncodeError as error:
            raise InputError(f"character {error.start} of a word is half a surrogate pair: text is expected") from None
        if all(len(word) <= self.max_bytes for word in words):
            return words
        return [part for word in words for part in self._limited(word)]

    def _limited(self, word: bytes) -> Iterator[bytes]:
        if len(word) > self.max_bytes and self.too_long == "raise":
            raise InputError(f"the word {word[:40]!r}... has {len(word)} bytes: at most {self.max_bytes} are expected")
        start = 0
        while len(word) - start > self.max_bytes:
            end = start + self.max_bytes
            while end > start and word[end] & 0xC0 == 0x80:  # the next byte would continue a character
                end -= 1
            end = end if end > start else start + self.max_bytes
            yield word[start:end]
            start = end
        yield word[start:]
