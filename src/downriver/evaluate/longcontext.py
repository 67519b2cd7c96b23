"""What a language model does with long contexts: a needle found at every length and depth, perplexity as texts grow.

Reach for ``needle_grid`` and ``ppl_curve`` before and after ``models.extend_context``, or to compare a causal model
with a diffusion model. Liu et al., "LongLLaDA: Unlocking Long Context Capabilities in Diffusion LLMs" (2025).
Departures: a needle counts as found or not (the paper's benchmark gives up to a fifth for an answer that looks alike);
both kinds of model are scored on the same chunks, of which the first, without a context, is left out.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from downriver.core.errors import InputError
from downriver.core.io import atomic_write
from downriver.core.measurement import Measurement
from downriver.core.seeds import generator
from downriver.evaluate.readers import Reader, reader

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, the question that is asked for it, and what the answer must contain."""

    text: str
    question: str
    answer: str


def gate_code(rng: np.random.Generator) -> Needle:
    """A needle of drawn numbers, whose question a base model can go on from.

    >>> gate_code(np.random.default_rng(0))
    Needle(text='The code of gate 8655 is 67326.', question='The code of gate 8655 is', answer='67326')
    """
    gate, code = rng.integers(1000, 10_000), rng.integers(10_000, 100_000)
    return Needle(f"The code of gate {gate} is {code}.", f"The code of gate {gate} is", str(code))


def contains(output: str, needle: Needle) -> float:
    """1 when the answer is in the output, whatever the case; else 0."""
    return float(needle.answer.casefold() in output.casefold())


@dataclass(frozen=True, eq=False)
class NeedleGrid:
    """What ``needle_grid`` found: ``matrix`` (depths, lengths), each entry the mean score of ``repeats`` needles.

    ``cases`` has a row a needle: length, depth, repeat, score, answer, output.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    matrix: np.ndarray
    cases: pl.DataFrame

    def mean(self, length: int | None = None, depths: tuple[float, float] = (0.0, 1.0)) -> float:
        """The mean score at a length, or at all, over the depths from one to another: (0.75, 1) is the last quarter."""
        columns = [n for n, own in enumerate(self.lengths) if length in (None, own)]
        rows = [n for n, own in enumerate(self.depths) if depths[0] <= own <= depths[1]]
        if not columns or not rows:
            raise InputError(f"length {length}, depths {depths}: some of {self.lengths} and {self.depths} are expected")
        return float(self.matrix[np.ix_(rows, columns)].mean())

    def measurements(self) -> list[Measurement]:
        """A measurement a cell, for a study; the task names length and depth."""
        return [
            Measurement("needle score", self.matrix[d, n], task=f"{length} tokens, depth {depth:.0%}", unit="share")
            for n, length in enumerate(self.lengths)
            for d, depth in enumerate(self.depths)
        ]

    def table(self) -> str:
        """The matrix as text: a column a length, a row a depth, in percent."""
        lines = ["depth" + "".join(f"{length:>8}" for length in self.lengths)]
        for depth, row in zip(self.depths, self.matrix, strict=True):
            lines.append(f"{depth:>5.0%}" + "".join(f"{value:>8.0%}" for value in row))
        return "\n".join(lines)

    def figure(self, path: Path_, *, trained: int | None = None, title: str = "") -> None:
        """Draw the heat map, with a line after the ``trained`` length; png, svg or pdf by the path."""
        size = (2.5 + 0.7 * len(self.lengths), 1.6 + 0.35 * len(self.depths))
        with _picture(path, size) as axes:
            shown = axes.imshow(self.matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(self.lengths)), [f"{length:,}" for length in self.lengths])
            axes.set_yticks(range(len(self.depths)), [f"{depth:.0%}" for depth in self.depths])
            for (d, n), value in np.ndenumerate(self.matrix):
                axes.text(n, d, f"{value:.0%}", ha="center", va="center", fontsize=8, color="wk"[int(value > 0.5)])
            if trained is not None:
                axes.axvline(sum(length <= trained for length in self.lengths) - 0.5, color="red", linewidth=1.5)
            axes.set(xlabel="context in tokens", ylabel="depth of the needle", title=title)
            axes.figure.colorbar(shown, label="found")


def needle_grid(
    model: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    haystack: str | Sequence[str],
    tokenizer: Any = None,
    *,
    needles: Callable[[np.random.Generator], Needle] | Sequence[Needle] = gate_code,
    repeats: int = 10,
    new_tokens: int = 32,
    template: str = "{context}\n\n{question}",
    score: Callable[[str, Needle], float] = contains,
    start_token: bool = True,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> NeedleGrid:
    """Hide a needle in a context of every length at every depth, and see whether the model finds it.

    Parameters
    ----------
    model, tokenizer
        A causal language model or a ``MaskedDiffusionLM``, as a ``Model`` or with its tokenizer, or a ``Reader``.
    lengths
        Tokens of the prompt, template, needle and question included. The answer comes on top.
    depths
        Where the needle lies: shares of the haystack that come before it, 0 first, 1 right before the question.
    haystack
        A text, or several documents, which every repetition takes in another order. Together at least as long as the
        longest prompt.
    needles
        A function that draws one, or a list to take them from by turns. Every cell has the same ones.
    repeats
        Needles a cell (10, the benchmark's).
    new_tokens
        Length of the answer (32, the paper's).
    template
        The prompt. For a chat model: ``tokenizer.apply_chat_template([{"role": "user", "content":
        "{context}\\n\\n{question}"}], tokenize=False, add_generation_prompt=True)``.
    score
        What an output is worth, from 0 to 1.
    start_token
        Begin with the tokenizer's beginning-of-text token, if it has one and the template does not.
    batch_size
        Prompts at once.
    seed
        Of needles and haystacks.

    Raises ``InputError``, before anything is run, for parameters out of range, a template without its two places, a
    length that the needle does not fit in and a haystack that is too short.

    >>> from downriver.models import small
    >>> grid = needle_grid(small("causal-lm", "nano"), [96], [0, 1], "by the sea " * 20, repeats=1, new_tokens=6)
    >>> print(grid.table())
    depth      96
       0%      0%
     100%      0%
    """
    lengths, depths, asked = tuple(lengths), tuple(map(float, depths)), reader(model, tokenizer)
    for name, count in (("repeats", repeats), ("new_tokens", new_tokens), ("batch_size", batch_size)):
        if count < 1:
            raise InputError(f"{name} is {count}: at least 1 is expected")
    if not lengths or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"lengths {lengths}, depths {depths}: lengths in tokens and shares from 0 to 1 are expected")
    if not 0 <= template.find("{context}") < template.find("{question}"):
        raise InputError(f"template {template!r}: the places {{context}} and, after it, {{question}} are expected")
    documents = [haystack] if isinstance(haystack, str) else list(haystack)
    hay = [_encode(asked.tokenizer, f"{document}\n") for document in documents]
    tests = [_Test(asked.tokenizer, hay, needles, template, start_token, seed, number) for number in range(repeats)]
    for length in lengths:
        for test in tests:
            test.prompt(length, 0.0)  # raises where it does not fit

    rows = []
    cells = [(length, depth) for length in lengths for depth in depths]
    with _evaluating(asked), tqdm(total=len(cells) * repeats, desc="needles", disable=not progress, delay=2) as bar:
        for length, depth in cells:
            for start in range(0, repeats, batch_size):
                several = tests[start : start + batch_size]
                outputs = asked.generate([test.prompt(length, depth) for test in several], new_tokens)
                for test, tokens in zip(several, outputs, strict=True):
                    output = _decoded(asked.tokenizer, tokens)
                    value = float(score(output, test.needle))
                    rows.append((length, depth, test.number, value, test.needle.answer, output))
                bar.update(len(several))
    cases = pl.DataFrame(rows, ["length", "depth", "repeat", "score", "answer", "output"], orient="row")
    matrix = cases["score"].to_numpy().reshape(len(lengths), len(depths), repeats).mean(2).T
    return NeedleGrid(lengths, depths, matrix, cases)


@dataclass(frozen=True, eq=False)
class PerplexityCurve:
    """What ``ppl_curve`` found: ``nats`` a token of each scored chunk, and ``context``, the tokens before it."""

    context: np.ndarray
    nats: np.ndarray

    @property
    def local(self) -> np.ndarray:
        """The perplexity of each chunk."""
        return _exp(self.nats)

    @property
    def perplexity(self) -> np.ndarray:
        """The running geometric mean of the chunks' perplexities, as the paper draws it."""
        return _exp(self.nats.cumsum() / np.arange(1, len(self.nats) + 1))


def ppl_curve(
    model: Any,
    texts: str | Sequence[str],
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    chunk: int = 64,
    every: int = 1,
    progress: bool = True,
) -> PerplexityCurve:
    """The perplexity of consecutive chunks of a text, each given all that comes before it.

    Parameters
    ----------
    model, tokenizer
        As in ``needle_grid``. A causal model's chunks are scored by its likelihood, a diffusion model's by a
        Monte-Carlo bound (``DiffusionReader``: its settings): compare how two curves run, not how high they lie.
    texts
        A text, or several, over which the nats are averaged; each at least ``max_length`` tokens long.
    max_length
        Where to end, by default at the end of the shortest text.
    chunk
        Tokens of a chunk (64, the paper's).
    every
        Score only every so many-th chunk: a diffusion model reads the whole context anew for each draw.

    Raises ``InputError`` for texts of less than two chunks, or less than ``max_length``.

    >>> from downriver.models import small
    >>> curve = ppl_curve(small("causal-lm", "nano"), "down the river to the sea", chunk=8)
    >>> curve.context.tolist(), 200 < float(curve.perplexity[-1]) < 320  # 260 tokens, nothing learnt
    ([8, 16], True)
    """
    asked = reader(model, tokenizer)
    if chunk < 1 or every < 1:
        raise InputError(f"chunk {chunk}, every {every}: at least 1 is expected")
    rows = [_encode(asked.tokenizer, text) for text in ([texts] if isinstance(texts, str) else texts)]
    if not rows:
        raise InputError("no texts were given: at least one is expected")
    shortest = min(map(len, rows))
    end = shortest if max_length is None else max_length
    if end > shortest or end < 2 * chunk:
        number = [len(row) for row in rows].index(shortest) + 1
        raise InputError(f"text {number} has {shortest} tokens: at least {max(end, 2 * chunk)} are expected")
    starts = range(chunk, end - chunk + 1, chunk)[::every]
    nats = np.zeros(len(starts))
    with _evaluating(asked):
        for row in tqdm(rows, desc="perplexity", disable=not progress, delay=2):
            nats += asked.score(row, [(start, start + chunk) for start in starts]) / len(rows)
    return PerplexityCurve(np.array(starts), nats)


def draw_curves(curves: Mapping[str, PerplexityCurve], path: Path_, *, trained: int | None = None) -> None:
    """Draw running perplexities over the length of the context, with a line at the ``trained`` length."""
    with _picture(path, (7, 4.2)) as axes:
        for name, curve in curves.items():
            axes.plot(curve.context, curve.perplexity, label=name)
        if trained is not None:
            axes.axvline(trained, color="red", linewidth=1.5, label="trained")
        axes.set(xlabel="context in tokens", ylabel="running perplexity", yscale="log")
        axes.legend(frameon=False)


class _Test:
    """One repetition: its needle, and prompts of any length and depth from its haystack."""

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[list[int]],
        needles: Callable[[np.random.Generator], Needle] | Sequence[Needle],
        template: str,
        start_token: bool,
        seed: int,
        number: int,
    ) -> None:
        rng = generator("needle", seed, number)
        self.number = number
        self.needle = needles(rng) if callable(needles) else needles[number % len(needles)]
        before, rest = template.split("{context}", 1)
        bos = tokenizer.bos_token if start_token else None
        opening = [tokenizer.bos_token_id] if bos and not before.startswith(bos) else []
        self.before = opening + _encode(tokenizer, before)
        self.after = _encode(tokenizer, rest.replace("{question}", self.needle.question))
        self.text = _encode(tokenizer, f"\n{self.needle.text}\n")
        self.hay = [token for n in rng.permutation(len(documents)) for token in documents[n]]
        self.place = float(rng.random())

    def prompt(self, length: int, depth: float) -> list[int]:
        """Exactly ``length`` tokens, the needle after the share ``depth`` of the haystack."""
        fixed = len(self.before) + len(self.text) + len(self.after)
        room = length - fixed
        if room < 0:
            raise InputError(f"length {length}: template, needle and question alone take {fixed} tokens")
        if room > len(self.hay):
            raise InputError(f"the haystack has {len(self.hay)} tokens: {room} are needed for a length of {length}")
        start = int(self.place * (len(self.hay) - room + 1))
        hay, split = self.hay[start : start + room], int(room * depth)
        return [*self.before, *hay[:split], *self.text, *hay[split:], *self.after]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]) if text else []


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    """The text up to the end-of-text token."""
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return tokenizer.decode(tokens[:end], skip_special_tokens=True)


def _exp(nats: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(nats)


@contextmanager
def _evaluating(asked: Reader) -> Iterator[None]:
    """The reader's model, if it has one, in evaluation mode meanwhile."""
    model = getattr(asked, "model", None)
    training = getattr(model, "training", False)
    if training:
        model.eval()  # type: ignore[union-attr]
    try:
        yield
    finally:
        if training:
            model.train()  # type: ignore[union-attr]


@contextmanager
def _picture(path: Path_, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on; saved where the block ends without an error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.add_subplot()
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix.removeprefix(".") or "png")
