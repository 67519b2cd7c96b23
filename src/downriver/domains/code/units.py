"""The lexical units of a program with their places: identifiers, keywords, literals, operators, and what lies between.

Reach for ``SubtokenGrouper``, which maps a tokenizer's subtokens to these units. Python is read by the standard
library, other languages by pygments or tree-sitter where they are installed; regular expressions read everything,
programs that do not parse included.
"""

import importlib
import io
import itertools
import keyword
import re
import token
import tokenize
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple, get_args

from downriver.core.errors import InputError, MissingExtra, require, unknown

Kind = Literal["identifier", "keyword", "literal", "operator", "other"]
Lexer = Literal["stdlib", "tree-sitter", "pygments", "regex"]
_GRAMMARS = {"csharp": "c_sharp"}
"""Languages whose tree-sitter package has another name."""

_C = """auto break case char const continue default do double else enum extern float for goto if inline int long
register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while"""
_JAVA = """abstract assert boolean break byte case catch char class const continue default do double else enum extends
final finally float for goto if implements import instanceof int interface long native new package private protected
public return short static strictfp super switch synchronized this throw throws transient try void volatile while true
false null"""
_WORDS = {
    "python": " ".join(keyword.kwlist),
    "c": _C,
    "cpp": f"""{_C} bool catch class constexpr delete explicit export false final friend mutable namespace new noexcept
        nullptr operator override private protected public template this throw true try typename using virtual""",
    "java": _JAVA,
    "csharp": f"""{_JAVA} as base bool checked decimal delegate event explicit extern fixed foreach implicit in internal
        is lock namespace object operator out override params readonly ref sbyte sealed sizeof string struct typeof uint
        ulong unchecked unsafe ushort using virtual""",
    "javascript": """async await break case catch class const continue debugger default delete do else export extends
        false finally for function if import in instanceof let new null return static super switch this throw true try
        typeof var void while with yield""",
    "go": """break case chan const continue default defer else fallthrough for func go goto if import interface map
        package range return select struct switch type var""",
    "php": """abstract and array as break case catch class clone const continue declare default do echo else elseif
        empty extends final finally fn for foreach function global if implements include instanceof interface isset list
        match namespace new or print private protected public require return static switch throw trait try unset use var
        while xor yield true false null""",
    "ruby": """alias and begin break case class def defined do else elsif end ensure false for if in module next nil not
        or redo rescue retry return self super then true undef unless until when while yield""",
}
_KEYWORDS = {language: frozenset(words.split()) for language, words in _WORDS.items()}

_WORD = r"(?:[^\W\d]|\$)[\w$]*"
_OPERATOR = (
    r">>>=|<<=|>>=|\*\*=|//=|\.\.\.|===|!==|->|=>|::|:=|[-+*/%&|^<>=!@]=|\+\+|--|&&|\|\||<<|>>|\*\*|//|\?\?|[^\w\s]"
)
_COMMENT = {
    "python": r"#[^\n]*",
    "ruby": r"#[^\n]*",
    "php": r"#[^\n]*|//[^\n]*|/\*.*?(?:\*/|\Z)",
    "": r"//[^\n]*|/\*.*?(?:\*/|\Z)",
}
_TEXT = r'"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'"
_STRING = {
    "python": r'(?i:\b[rbuf]{1,2})?(?:"""(?:\\.|[^\\])*?"""|' + r"'''(?:\\.|[^\\])*?'''|" + _TEXT + ")",
    "javascript": _TEXT + r"|`(?:\\.|[^`\\])*`",
    "go": _TEXT + r"|`[^`]*`",
    "": _TEXT,
}


class Unit(NamedTuple):
    """A piece ``text[start:end]`` of a program, in characters; ``other`` is space, line ends and comments."""

    start: int
    end: int
    kind: Kind


class Units(NamedTuple):
    """The units of a program from its first to its last character, and whether the lexer asked for could read it."""

    units: tuple[Unit, ...]
    parse_ok: bool


class _Unreadable(Exception):
    """The lexer does not make sense of the program."""


@lru_cache(maxsize=256)
def split(text: str, language: str = "python", lexer: Lexer | None = None) -> Units:
    """Cut a program into its units, which tile it; never fails on a bad program.

    Parameters
    ----------
    language
        ``python``, ``java``, ``c``, ... as pygments or tree-sitter call it. Without keywords known here, ``regex``
        takes every word for an identifier.
    lexer
        ``stdlib`` (Python only, its default), ``regex`` (the default otherwise), ``pygments``, or ``tree-sitter`` with
        the language's package. When it cannot read the program, ``regex`` does, and ``parse_ok`` is False.

    An f-string is one literal, whatever is in its braces (pygments alone finds the names there).

    Raises ``InputError`` for an unknown lexer or language, and ``MissingExtra`` when a package is missing.

    >>> [(unit.kind, "x = 12"[unit.start : unit.end]) for unit in split("x = 12").units if unit.kind != "other"]
    [('identifier', 'x'), ('operator', '='), ('literal', '12')]
    >>> split("def f(:\\n  '").parse_ok
    False
    """
    chosen = lexer or default_lexer(language)
    check(language, chosen)
    read: Any = {"stdlib": _stdlib, "tree-sitter": _tree_sitter, "pygments": _pygments, "regex": _regex}[chosen]
    try:
        return Units(tuple(_tiled(text, read(text, language))), True)
    except _Unreadable:
        return Units(tuple(_tiled(text, _regex(text, language))), False)


def default_lexer(language: str) -> Lexer:
    """The lexer that needs nothing installed."""
    return "stdlib" if language == "python" else "regex"


def check(language: str, lexer: str) -> None:
    """Raise when a lexer cannot be had for a language."""
    if lexer not in get_args(Lexer):
        raise unknown("lexer", lexer, get_args(Lexer))
    if lexer == "stdlib" and language != "python":
        raise InputError(f"lexer 'stdlib' reads Python and language is {language!r}: regex, pygments or tree-sitter do")
    if lexer == "pygments":
        _pygments_lexer(language)
    elif lexer == "tree-sitter":
        _parser(language)


def _tiled(text: str, units: Iterator[Unit]) -> Iterator[Unit]:
    """The units, and what lies between them as ``other``."""
    at = 0
    for unit in units:
        if unit.start > at:
            yield Unit(at, unit.start, "other")
        yield unit
        at = unit.end
    if at < len(text):
        yield Unit(at, len(text), "other")


def _stdlib(text: str, language: str) -> list[Unit]:
    starts = [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]
    found: list[Unit] = []
    opened: list[int] = []  # f-strings, which the tokenizer cuts into pieces since Python 3.12
    kinds: dict[int, Kind] = {token.NUMBER: "literal", token.STRING: "literal", token.OP: "operator"}
    try:
        for piece in tokenize.generate_tokens(io.StringIO(text).readline):
            start, end = (starts[row - 1] + column for row, column in (piece.start, piece.end))
            name = token.tok_name[piece.type]
            if name.endswith("STRING_START"):
                opened.append(start)
            elif name.endswith("STRING_END"):
                first = opened.pop()
                if not opened:
                    found.append(Unit(first, end, "literal"))
            elif opened:
                continue
            elif piece.type == token.ERRORTOKEN or piece.string in ("$", "?", "`", "!"):
                raise _Unreadable
            elif piece.type == token.NAME:
                found.append(Unit(start, end, "keyword" if keyword.iskeyword(piece.string) else "identifier"))
            elif piece.type in kinds:
                found.append(Unit(start, end, kinds[piece.type]))
    except (tokenize.TokenError, SyntaxError, ValueError, IndexError):
        raise _Unreadable from None
    return found


@cache
def _pattern(language: str) -> re.Pattern[str]:
    comment, string = (table.get(language, table[""]) for table in (_COMMENT, _STRING))
    return re.compile(
        rf"(?P<other>{comment})|(?P<literal>{string}|\.?\d(?:[eEpP][+-]|[\w.])*)|(?P<word>{_WORD})|(?P<operator>{_OPERATOR})",
        re.DOTALL,
    )


def _regex(text: str, language: str) -> Iterator[Unit]:
    keywords = _KEYWORDS.get(language, frozenset())
    for match in _pattern(language).finditer(text):
        kind: Any = match.lastgroup
        if kind == "word":
            kind = "keyword" if match.group() in keywords else "identifier"
        yield Unit(match.start(), match.end(), kind)


@cache
def _pygments_lexer(language: str) -> Any:
    lexers = require("pygments.lexers", "code")
    try:
        return lexers.get_lexer_by_name(language, startinline=True)  # PHP without <?php
    except importlib.import_module("pygments.util").ClassNotFound:
        raise InputError(f"language is {language!r}, which pygments does not know") from None


def _pygments(text: str, language: str) -> list[Unit]:
    found: list[Unit] = []
    for start, kind, value in _pygments_lexer(language).get_tokens_unprocessed(text):
        sort = str(kind).removeprefix("Token.")
        if sort.startswith("Error"):
            raise _Unreadable
        if sort.startswith(("Keyword", "Operator.Word")):
            found.append(Unit(start, start + len(value), "keyword"))
        elif sort.startswith("Literal"):
            text_before = found and found[-1].kind == "literal" and found[-1].end == start and "String" in sort
            first = found.pop().start if text_before else start
            found.append(Unit(first, start + len(value), "literal"))
        elif sort.startswith(("Name", "Operator", "Punctuation")):  # os.path and )) come as one
            for match in re.finditer(rf"(?P<identifier>{_WORD})|(?P<operator>{_OPERATOR})", value):
                piece: Any = match.lastgroup
                found.append(Unit(start + match.start(), start + match.end(), piece))
    return found


@cache
def _parser(language: str) -> Any:
    tree_sitter = require("tree_sitter", "code")
    package = f"tree_sitter_{_GRAMMARS.get(language, language)}"
    try:
        grammar = importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(f"{package} is not installed: pip install {package.replace('_', '-')}") from error
    made = getattr(grammar, "language", None) or getattr(grammar, f"language_{language}")
    return tree_sitter.Parser(tree_sitter.Language(made()))


def _tree_sitter(text: str, language: str) -> list[Unit]:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise _Unreadable from None
    tree = _parser(language).parse(data)
    if tree.root_node.has_error:
        raise _Unreadable
    places = [place for place, char in enumerate(text) for _ in char.encode()] + [len(text)]
    keywords = _KEYWORDS.get(language, frozenset())
    found: list[Unit] = []
    waiting = [tree.root_node]
    while waiting:
        node = waiting.pop()
        whole = node.is_named and re.search("(?<!concatenated_)string|char|regex", node.type) is not None
        if node.children and not whole:
            waiting.extend(reversed(node.children))
        elif node.end_byte > node.start_byte and "comment" not in node.type and not node.text.isspace():
            start, end = places[node.start_byte], places[node.end_byte]
            piece = text[start:end]
            kind: Kind = "literal"
            if not node.is_named:
                kind = "keyword" if piece[0].isalpha() else "operator"
            elif not whole and re.fullmatch(rf"@{{,2}}{_WORD}", piece):
                kind = "keyword" if piece in keywords else "identifier"
            found.append(Unit(start, end, kind))
    return found
