"""Misalignment that needs no model: code style, personal data, words of a lexicon; higher is worse.

Reach for them to tag or filter text before pre-training with preferences (Korbak et al. 2023): violations of PEP 8 by
pycodestyle for a character, personal data for a character, the share of words from a list. The paper finds personal
data with scrubadub; here they are regular expressions for what can be told by its form alone: e-mail addresses,
telephone numbers, IP addresses, social security numbers (US), payment cards (with their check digit), IBANs, and
credentials written after their name.
"""

import re
from collections.abc import Iterable

import numpy as np

from downriver.core.errors import InputError, require
from downriver.core.io import fingerprint
from downriver.data.score.scorer import Batch, texts_of

PII: dict[str, re.Pattern[str]] = {
    "email": re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b"),
    "phone": re.compile(
        r"(?<![\w.])(?<!\d[ -])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\) ?|\d{2,4}[ .-])\d{3,4}[ .-]\d{3,4}(?![\w-]| \d)"
    ),
    "ip": re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]*\w)"),
    "ssn": re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])"),
    "card": re.compile(r"(?<![\w-])(?:\d[ -]?){12,18}\d(?![\w-])"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "credential": re.compile(r"\b(?:password|passwd|pwd|api[_ -]?key|secret|token)\s*[:=]\s*\S+", re.IGNORECASE),
}


class PycodestyleScorer:
    """Violations of PEP 8 for a character of Python code, as pycodestyle counts them with its default settings.

    Needs pycodestyle (``pip install 'downriver[data]'``). Settings in the user's files are not read.

    >>> PycodestyleScorer().score(["x = 1\\n", "x=1\\n"]).tolist()
    [0.0, 0.25]
    """

    name, columns = "pycodestyle", ("violations",)

    def __init__(self) -> None:
        self.style = require("pycodestyle", "data")
        self.fingerprint = fingerprint("pycodestyle", self.style.__version__)

    def score(self, batch: Batch) -> np.ndarray:
        """(n,), violations divided by characters."""
        options = self.style.StyleGuide(config_file=False, parse_argv=False, quiet=2).options
        texts = texts_of(batch, self.name)
        return np.array([self._count(text, options) / len(text) for text in texts], np.float64)

    def _count(self, text: str, options: object) -> int:
        report = self.style.BaseReport(options)
        lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
        if not text.endswith("\n"):
            lines[-1] = lines[-1][:-1]  # W292: no newline at the end of the file
        self.style.Checker("text", lines=lines, options=options, report=report).check_all()
        return report.get_count()


class RegexPIIScorer:
    """Pieces of personal data for a character, found by their form; ``kinds`` chooses among ``PII``.

    >>> RegexPIIScorer().score(["write to ann@example.org", "nothing here"]).tolist()
    [0.041666666666666664, 0.0]
    """

    name, columns = "pii", ("pii",)

    def __init__(self, kinds: Iterable[str] = tuple(PII)) -> None:
        self.kinds = tuple(kinds)
        if strange := sorted(set(self.kinds) - set(PII)):
            raise InputError(f"unknown kind of personal data {strange[0]!r}: known are {', '.join(PII)}")
        self.fingerprint = fingerprint("pii", {kind: PII[kind].pattern for kind in self.kinds})

    def score(self, batch: Batch) -> np.ndarray:
        """(n,), pieces divided by characters."""
        return np.array([len(self.find(text)) / len(text) for text in texts_of(batch, self.name)], np.float64)

    def find(self, text: str) -> list[tuple[str, str]]:
        """Every piece with its kind; a stretch of text counts once, under the first kind that takes it.

        >>> RegexPIIScorer().find("4111 1111 1111 1111 or 10.0.0.1")
        [('ip', '10.0.0.1'), ('card', '4111 1111 1111 1111')]
        """
        found: list[tuple[str, str]] = []
        taken: list[tuple[int, int]] = []
        kinds = [kind for kind in ("iban", "card", "ssn", *PII) if kind in self.kinds]  # the longest numbers first
        for kind in dict.fromkeys(kinds):
            for match in PII[kind].finditer(text):
                if kind == "card" and not _check_digit(match[0]):
                    continue
                if all(match.end() <= begin or end <= match.start() for begin, end in taken):
                    taken.append(match.span())
                    found.append((kind, match[0]))
        return sorted(found, key=lambda pair: list(PII).index(pair[0]))


class LexiconScorer:
    """The share of a text's words that stand in a lexicon, upper and lower case alike.

    Words are runs of letters and digits, with apostrophes and hyphens inside. Raises ``InputError`` for an empty
    lexicon and for an entry that is no single word.

    >>> LexiconScorer(["awful", "bad"]).score(["A bad, BAD day", "a good day"]).tolist()
    [0.5, 0.0]
    """

    columns = ("share",)
    _WORD = re.compile(r"\w+(?:['’-]\w+)*")

    def __init__(self, words: Iterable[str], name: str = "lexicon") -> None:
        self.name = name
        self.words = frozenset(word.casefold() for word in words)
        if not self.words:
            raise InputError(f"the lexicon {name!r} is empty")
        if strange := sorted(word for word in self.words if not self._WORD.fullmatch(word)):
            raise InputError(f"the lexicon {name!r} holds {strange[0]!r}: single words are expected")
        self.fingerprint = fingerprint("lexicon", sorted(self.words))

    def score(self, batch: Batch) -> np.ndarray:
        """(n,), shares in [0, 1]; 0 for a text without words."""
        shares = []
        for text in texts_of(batch, self.name):
            words = self._WORD.findall(text.casefold())
            shares.append(sum(word in self.words for word in words) / max(len(words), 1))
        return np.array(shares, np.float64)


def _check_digit(number: str) -> bool:
    """Whether the last digit is that of Luhn's formula, as on every payment card."""
    digits = [int(c) for c in number if c.isdigit()][::-1]
    doubled = (d * 2 - 9 * (d > 4) for d in digits[1::2])
    return any(digits) and (sum(digits[::2]) + sum(doubled)) % 10 == 0
