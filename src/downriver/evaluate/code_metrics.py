"""Scores of generated code: exact match among k, pass@k of tests, and likeness of tokens, syntax and data flow.

Reach for it after generating several programs an item. pass@k: Chen et al. (2021). Likeness is CodeBLEU (Ren et al.
2020) for Python, on Python's own parser: the packaged one is tied to an old tree-sitter. Constants and attributes are
no variables here, and loops are followed once.
"""

import ast
import io
import keyword
import math
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from downriver.core import InputError, unknown

Normalize = Literal["strip", "ast"]
KEYWORD_WEIGHT = 5.0
"""Of a keyword over another token, CodeBLEU's."""


def exact_match_at_k(
    predictions: Sequence[Sequence[str]],
    references: Sequence[str],
    ks: Sequence[int] = (1, 2, 5, 10),
    *,
    normalize: Normalize = "strip",
) -> dict[int, float]:
    """The share of items whose reference is among their first k predictions.

    ``strip``: equal strings but for white space around them, the usual one. ``ast``: equal syntax trees, so that
    layout, quotes and comments do not count; text that does not parse is compared as with ``strip``. Where an item has
    fewer than k predictions, all of them count, and a warning says so.

    Raises ``InputError`` for lists of different lengths, none at all, and k below 1.

    >>> exact_match_at_k([["x+1", "x + 2"], ["y"]], ["x + 2", "z"], ks=[1, 2])
    {1: 0.0, 2: 0.5}
    """
    if normalize not in get_args(Normalize):
        raise unknown("normalize", normalize, get_args(Normalize))
    if len(predictions) != len(references) or not references:
        raise InputError(f"{len(predictions)} lists of predictions, {len(references)} references: one each is expected")
    if not ks or min(ks) < 1:
        raise InputError(f"ks are {list(ks)}: numbers of at least 1 are expected")
    fewest = min(map(len, predictions))
    if fewest < max(ks):
        warnings.warn(f"an item has {fewest} predictions: k = {max(ks)} counts those there are", stacklevel=2)
    form = _tree if normalize == "ast" else str.strip
    hits = [
        [form(text) == form(reference) for text in texts]
        for texts, reference in zip(predictions, references, strict=True)
    ]
    return {k: sum(any(hit[:k]) for hit in hits) / len(hits) for k in ks}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k programs drawn from n, of which c pass, passes: 1 − C(n−c, k)/C(n, k).

    >>> pass_at_k(10, 5, 1), round(pass_at_k(10, 3, 5), 4)
    (0.5, 0.9167)
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise InputError(f"n {n}, c {c}, k {k}: 0 ≤ c ≤ n and 1 ≤ k ≤ n are expected")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True)
class Likeness:
    """Each from 0 to 1. Means over items: ``tokens`` (BLEU-4), ``keywords`` (the same, keywords counting five times as
    much among single tokens), ``syntax`` (share of the reference's subtrees that are in the prediction). Over all items
    together: ``flow``, the share of steps from value to value in the references that are in the predictions; None
    where the references have none (single expressions)."""

    tokens: float
    keywords: float
    syntax: float
    flow: float | None = None

    @property
    def mean(self) -> float:
        """CodeBLEU: the mean of the four, or of three where there is no flow."""
        parts = [self.tokens, self.keywords, self.syntax, *([] if self.flow is None else [self.flow])]
        return sum(parts) / len(parts)


def likeness(predictions: Sequence[str], references: Sequence[str]) -> Likeness:
    """Compare each program with its reference; for syntax and flow, names do not count, and of constants only their
    kinds.

    >>> likeness(["return a + b"], ["return a + b"]).mean
    1.0
    """
    if len(predictions) != len(references) or not references:
        raise InputError(f"{len(predictions)} predictions, {len(references)} references: one each is expected")
    scores = []
    kept = steps = 0
    for text, reference in zip(predictions, references, strict=True):
        have, want = _steps(text), _steps(reference)
        kept, steps = kept + (have & want).total(), steps + want.total()
        said, wanted = list(_tokens(text)), list(_tokens(reference))
        scores.append((_bleu(said, wanted, False), _bleu(said, wanted, True), _syntax(text, reference)))
    tokens, keywords, syntax = (sum(column) / len(scores) for column in zip(*scores, strict=True))
    return Likeness(tokens, keywords, syntax, kept / steps if steps else None)


def _tree(text: str) -> str:
    try:
        return ast.dump(ast.parse(_indented(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text.strip()


def _indented(text: str) -> str:
    """A body as a function, so that ``return`` parses."""
    return "def f():\n" + "\n".join(f"    {line}" for line in text.strip("\n").splitlines() or ["pass"])


def _tokens(text: str) -> Iterator[str]:
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.string.strip() and token.type != tokenize.COMMENT:
                yield token.string
    except (tokenize.TokenError, SyntaxError):
        yield from text.split()  # what is left does not read as Python


def _bleu(said: Sequence[str], wanted: Sequence[str], keywords: bool) -> float:
    """Sentence BLEU-4 with one added from bigrams on; no longer n-grams than the reference has."""
    if not said or not wanted:
        return float(not said and not wanted)
    logs = []
    for n in range(1, min(4, len(wanted)) + 1):
        have, want = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (said, wanted))
        weight = {gram: KEYWORD_WEIGHT if keywords and n == 1 and keyword.iskeyword(gram[0]) else 1.0 for gram in have}
        hits = sum(min(count, want[gram]) * weight[gram] for gram, count in have.items())
        total = sum(count * weight[gram] for gram, count in have.items())
        add = float(n > 1)
        if hits + add == 0:
            return 0.0
        logs.append(math.log((hits + add) / (total + add)))
    brevity = min(0.0, 1 - len(wanted) / len(said))
    return math.exp(brevity + sum(logs) / len(logs))


def _syntax(text: str, reference: str) -> float:
    try:
        wanted = Counter(_subtrees(ast.parse(_indented(reference))))
    except (SyntaxError, ValueError, RecursionError):
        return float(text.strip() == reference.strip())
    try:
        have = Counter(_subtrees(ast.parse(_indented(text))))
    except (SyntaxError, ValueError, RecursionError):
        return 0.0
    return sum((wanted & have).values()) / wanted.total()


def _subtrees(tree: ast.AST) -> Iterator[str]:
    """The shape of every node that has nodes below it: kinds, without names."""

    def shape(node: ast.AST) -> str:
        below = [shape(child) for child in ast.iter_child_nodes(node)]
        kind = type(node.value).__name__ if isinstance(node, ast.Constant) else type(node).__name__
        return f"{kind}({','.join(below)})"

    for node in ast.walk(tree):
        if any(ast.iter_child_nodes(node)):
            yield shape(node)


def _steps(text: str) -> Counter:
    """How values go from name to name, with the names numbered as they come."""
    try:
        found = list(_flow(ast.parse(_indented(text)), set()))
    except (SyntaxError, ValueError, RecursionError):
        return Counter()
    number: dict[str, int] = {}
    for name, sources in found:
        for each in (*sources, name):
            number.setdefault(each, len(number))
    return Counter((number[name], tuple(number[each] for each in sources)) for name, sources in found)


def _flow(node: ast.AST, known: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A step for every parameter (from nothing), every assigned name (from the names in its value) and every use of a
    name that has a value (from itself)."""
    first: list[ast.AST] = []  # what is evaluated before the rest
    targets: list[ast.AST] = []
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
        first = [node.value] if node.value else []
        targets = [*node.targets] if isinstance(node, ast.Assign) else [node.target]
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        first, targets = [node.iter], [node.target]
    elif isinstance(node, ast.withitem):
        first, targets = [node.context_expr], [node.optional_vars] if node.optional_vars else []
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        first = list(node.generators)
    elif isinstance(node, ast.arg):
        known.add(node.arg)
        yield node.arg, ()
    elif isinstance(node, ast.Name) and node.id in known:
        yield node.id, (node.id,)
    for each in first:
        yield from _flow(each, known)
    sources = [name for each in first for name in _names(each)]
    for target in targets:
        for name in _names(target):
            yield name, (*([name] if isinstance(node, ast.AugAssign) else []), *sources)
            known.add(name)
    for child in ast.iter_child_nodes(node):
        if child not in first and child not in targets:
            yield from _flow(child, known)


def _names(node: ast.AST) -> list[str]:
    """Names in the order of the text."""
    found = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    return [each.id for each in sorted(found, key=lambda each: (each.lineno, each.col_offset))]
