"""One interface to language models, whether behind an API or in this process, with a cache, a ledger and a limit
around.

Reach for it wherever a method asks a language model something: judges, synthetic data, retrieval-augmented answers.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import derive_seed
from downriver.models.chat.cache import AnswerCache
from downriver.models.chat.ledger import Ledger

Prompt = str | Sequence[Mapping[str, str]]
Dialogue = tuple[tuple[str, str], ...]  # (role, content) pairs

CAPABILITIES = {
    "loglikelihood": "log-likelihoods of given continuations",
    "logprobs": "log-probabilities of generated tokens",
}
BAR_FROM = 20  # fewer answers than this show no progress bar


class Tokens(NamedTuple):
    """How many tokens a request read and wrote."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Completion:
    """One answer. ``finish_reason`` is ``"stop"`` (the model ended, or a stop string came), ``"length"``
    (``max_tokens`` reached), or what a server says beyond that. ``logprobs`` are natural logarithms, one for every
    token of ``tokens.completion``, where the backend knows them."""

    text: str
    finish_reason: str
    tokens: Tokens
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LogLikelihood:
    """The natural logarithm of a continuation's probability given its prompt: ``total``, the number of ``tokens``
    it is the sum over, whether ``greedy`` decoding would have written just this, and the ``logprobs`` of the single
    tokens."""

    total: float
    tokens: int
    greedy: bool
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted; equal asks have equal answers where they are ``repeatable``."""

    prompt: str | Dialogue
    max_tokens: int
    temperature: float
    stop: tuple[str, ...]
    seed: int | None
    sample: int
    top_p: float = 1.0
    draw: int = 0  # tells apart the asks of one call whose answers are drawn without a seed

    @property
    def repeatable(self) -> bool:
        return self.temperature == 0 or self.seed is not None


@dataclass(frozen=True)
class Pair:
    """A prompt and a continuation to be scored."""

    prompt: str | Dialogue
    continuation: str
    repeatable: ClassVar[bool] = True


A = TypeVar("A", Ask, Pair)
R = TypeVar("R", Completion, LogLikelihood)


class ChatModel(ABC):
    """A language model that completes prompts: see ``OpenAIChat``, ``HFChat`` and ``ScriptedChat``.

    A backend of your own implements ``_identity``, ``_answer`` and ``count_tokens`` (and ``_score`` if it lists the
    capability ``"loglikelihood"``); the cache on disk, equal questions asked once, the order of the answers, checks
    of the input and the progress bar come from here.

    **Strings.** A prompt is a list of messages (``{"role": ..., "content": ...}``) or a string. With
    ``strings="user"`` a string is short for one message of the user; with ``"text"`` it is a text to continue,
    without any template.

    **Cache.** The key is the sha256 of the backend's identity, the model, the messages and all parameters. Answers at
    temperature 0, and sampled ones with a seed, are kept; sampled answers without a seed are new on every call. A
    call that fails half-way has kept what was answered, so that the next one asks for the rest only.

    **Seeds.** With a seed, an answer depends on its own prompt, parameters, seed and place among the ``n`` samples,
    never on the other prompts of the call; equal prompts therefore get equal answers: ask for ``n`` samples to have
    several.

    Parameters
    ----------
    model : the model's name.
    cache : a folder; ``True`` for ``$DOWNRIVER_CACHE/chat`` (``~/.cache/downriver/chat``); ``False`` for none.
    price, spending_limit : see ``Ledger``.
    progress : show a bar on a terminal when at least 20 answers are waited for.
    """

    capabilities: frozenset[str] = frozenset()

    def __init__(
        self,
        model: str,
        *,
        strings: Literal["user", "text"] = "user",
        cache: bool | str | os.PathLike[str] = False,
        price: tuple[float, float] | None = None,
        spending_limit: float | None = None,
        progress: bool = True,
    ) -> None:
        if strings not in ("user", "text"):
            raise unknown("value of strings", strings, ("user", "text"))
        self.model = model
        self.strings = strings
        self.progress = progress
        self.ledger = Ledger(price, spending_limit)
        self._cache = AnswerCache(None if cache is True else cache) if cache is not False else None

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        n: int = 1,
    ) -> list[list[Completion]]:
        """Complete each prompt: one list of ``n`` completions a prompt, in the order of the prompts.

        ``temperature`` 0 (the default) takes the likeliest token each time, so that all ``n`` answers are one and the
        same, asked once; above 0 tokens are drawn from the softmax of the logits divided by it: from the whole
        vocabulary, or with ``top_p`` below 1 from the fewest likeliest tokens that together reach that probability.
        The text ends before the first of the ``stop`` strings.

        Raises ``InputError`` for a malformed prompt or parameter before anything is asked, ``SpendingLimit`` before a
        request that could cross the limit.
        """
        asked = self._prompts(prompts, "prompts")
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        _check(isinstance(max_tokens, Integral) and max_tokens >= 1, "max_tokens", max_tokens, "a positive integer")
        _check(isinstance(n, Integral) and n >= 1, "n", n, "a positive integer")
        _check(
            isinstance(temperature, Real) and 0 <= temperature < math.inf, "temperature", temperature, "a number >= 0"
        )
        _check(isinstance(top_p, Real) and 0 < top_p <= 1, "top_p", top_p, "a number above 0 and at most 1")
        _check(
            seed is None or (isinstance(seed, Integral) and 0 <= seed < 2**63), "seed", seed, "an integer in [0, 2**63)"
        )
        _check(all(isinstance(s, str) and s for s in stop), "stop", stop, "non-empty strings")
        samples = 1 if temperature == 0 else n
        nucleus = 1.0 if temperature == 0 else float(top_p)  # the likeliest token is in every nucleus
        asks: list[Ask] = []
        for prompt in asked:
            for i in range(samples):
                own = None if seed is None or temperature == 0 else _sample_seed(int(seed), i)
                draw = len(asks) if seed is None and temperature > 0 else 0
                asks.append(Ask(prompt, int(max_tokens), float(temperature), stop, own, i, nucleus, draw))
        answers = self._around(asks, Completion, self._answer)
        return [answers[i : i + samples] * (n // samples) for i in range(0, len(answers), samples)]

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """The log-likelihood of each continuation given its prompt; a capability, see ``require``.

        Prompts are read as ``generate`` reads them: in a dialogue the continuation is the beginning of the next
        answer.
        """
        self.require("loglikelihood")
        for i, pair in enumerate(pairs):
            if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[1], str) or not pair[1]:
                raise InputError(f"pair {i}: a prompt and a non-empty continuation are expected, not {pair!r}")
            _text(pair[1], f"continuation of pair {i}")
        prompts = self._prompts([prompt for prompt, _ in pairs], "prompts of the pairs")
        asks = [Pair(prompt, continuation) for prompt, (_, continuation) in zip(prompts, pairs, strict=True)]
        return self._around(asks, LogLikelihood, self._score)

    def require(self, *capabilities: str) -> None:
        """Fail now, naming this backend, if it lacks a capability needed later: ``"loglikelihood"``, ``"logprobs"``."""
        for name in capabilities:
            if name not in CAPABILITIES:
                raise unknown("capability", name, CAPABILITIES)
            if name not in self.capabilities:
                raise InputError(f"{self!r} has no capability {name!r} ({CAPABILITIES[name]}): use HFChat for it")

    @abstractmethod
    def count_tokens(self, prompt: Prompt) -> int:
        """How many tokens a prompt takes."""

    def close(self) -> None:  # noqa: B027  (most backends hold nothing)
        """Let go of connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"

    @abstractmethod
    def _identity(self) -> Any:
        """What beside the model's name and the question decides an answer, as plain data; part of every cache key."""

    @abstractmethod
    def _answer(self, asks: list[Ask], done: Callable[[Ask, Completion], None]) -> None:
        """Answer all, in any order, handing over each answer as soon as it is there."""

    def _score(self, pairs: list[Pair], done: Callable[[Pair, LogLikelihood], None]) -> None:
        raise NotImplementedError

    def _around(self, asks: list[A], kind: type[R], run: Callable[[list[A], Callable[[A, R], None]], None]) -> list[R]:
        found: dict[A, R] = {}
        unique = list(dict.fromkeys(asks))
        keys: dict[A, str] = {}
        if self._cache is not None:
            who = [type(self).__name__, self.model, self._identity()]
            for ask in unique:
                if ask.repeatable:
                    keys[ask] = self._cache.key(who, kind.__name__, asdict(ask))
                    if (known := self._cache.get(keys[ask], kind)) is not None:
                        found[ask] = known
            self.ledger.cached += len(found)
        waiting = [ask for ask in unique if ask not in found]
        with self._bar(len(waiting)) as advance:

            def done(ask: A, answer: R) -> None:
                found[ask] = answer
                if self._cache is not None and ask in keys:
                    self._cache.put(keys[ask], answer)
                advance()

            if waiting:
                run(waiting, done)
        return [found[ask] for ask in asks]

    @contextlib.contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        if not (self.progress and total >= BAR_FROM and console.is_terminal):
            yield lambda: None
            return
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(self.model, total=total)
            yield lambda: bar.advance(task)

    def _prompts(self, prompts: Sequence[Prompt], what: str) -> list[str | Dialogue]:
        if isinstance(prompts, str | Mapping):
            raise InputError(f"{what}: a list of prompts is expected, not one {type(prompts).__name__}")
        return [self._prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]

    def _prompt(self, prompt: Prompt, where: str = "prompt") -> str | Dialogue:
        if isinstance(prompt, str):
            _text(prompt, where)
            return prompt if self.strings == "text" else (("user", prompt),)
        if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence) or not prompt:
            raise InputError(f"{where}: a string or a non-empty list of messages is expected, not {prompt!r:.80}")
        messages: Sequence[Any] = prompt
        for message in messages:
            texts = isinstance(message, Mapping) and all(isinstance(value, str) for value in message.values())
            if not texts or set(message) != {"role", "content"}:
                raise InputError(
                    f"{where}: a message {{'role': text, 'content': text}} is expected, not {message!r:.80}"
                )
            _text(message["content"], where)
        return tuple((message["role"], message["content"]) for message in messages)


def _sample_seed(seed: int, sample: int) -> int:
    """The first sample has the caller's seed, the others seeds of their own (31 bits, which every server takes)."""
    return seed if sample == 0 else derive_seed("chat sample", seed, sample) >> 1


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the earliest stop string, and whether there was one.

    >>> cut_at_stop("one. two; three", [";", "."])
    ('one', True)
    """
    places = [place for s in stop if (place := text.find(s)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def as_messages(dialogue: Dialogue) -> list[dict[str, str]]:
    """Messages as servers and chat templates take them."""
    return [{"role": role, "content": content} for role, content in dialogue]


def _check(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise InputError(f"{name} is {value!r}: {expected} is expected")


def _text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is a lone surrogate, which is no text") from None
