"""A chat model that says what it is told to: the test aid for code that asks language models."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from downriver.core.errors import InputError
from downriver.models.chat.protocol import (
    Ask,
    ChatModel,
    Completion,
    LogLikelihood,
    Pair,
    Prompt,
    Tokens,
    as_messages,
    cut_at_stop,
)

Script = Callable[[list[dict[str, str]]], str | Sequence[str]] | Mapping[str, str | Sequence[str]]


class ScriptedChat(ChatModel):
    """Answers from a function of the messages, or from a table by the text of the last message.

    For tests: it stands where an ``OpenAIChat`` or ``HFChat`` would and keeps their rules (stop strings,
    ``max_tokens``, samples, ledger, spending limit, cache). An answer that is a list gives its samples in turn,
    round and round. Tokens are the words between white space. ``log_likelihood``, a function of prompt text and
    continuation giving a (negative) number, adds that capability. What was asked is kept in ``asked``, one list of
    messages a request.

    >>> chat = ScriptedChat({"2 + 2?": "4", "Name a river.": ["Loire", "Rhine"]})
    >>> [[c.text for c in answers] for answers in chat.generate(["2 + 2?", "Name a river."], max_tokens=5)]
    [['4'], ['Loire']]
    >>> [c.text for c in chat.generate(["Name a river."], max_tokens=5, temperature=1.0, n=2)[0]]
    ['Loire', 'Rhine']
    >>> chat.asked[-1]
    [{'role': 'user', 'content': 'Name a river.'}]
    >>> chat.require("loglikelihood")
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: ScriptedChat('scripted') has no capability 'loglikelihood' ...
    given continuations): use HFChat for it
    """

    def __init__(
        self,
        script: Script,
        *,
        log_likelihood: Callable[[str, str], float] | None = None,
        model: str = "scripted",
        strings: Literal["user", "text"] = "user",
        cache: bool | str | os.PathLike[str] = False,
        price: tuple[float, float] | None = None,
        spending_limit: float | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__(
            model, strings=strings, cache=cache, price=price, spending_limit=spending_limit, progress=progress
        )
        self.script = script
        self.log_likelihood = log_likelihood
        self.asked: list[list[dict[str, str]]] = []
        if log_likelihood is not None:
            self.capabilities = frozenset({"loglikelihood"})

    def count_tokens(self, prompt: Prompt) -> int:
        """The words of a string or of all messages."""
        dialogue = self._prompt(prompt)
        return len((dialogue if isinstance(dialogue, str) else _joined(dialogue)).split())

    def _identity(self) -> str:
        return "scripted"

    def _answer(self, asks: list[Ask], done: Callable[[Ask, Completion], None]) -> None:
        for ask in asks:
            messages = (
                [{"role": "user", "content": ask.prompt}] if isinstance(ask.prompt, str) else as_messages(ask.prompt)
            )
            read = sum(len(m["content"].split()) for m in messages)
            worst = self.ledger.price_of(read, ask.max_tokens)
            self.ledger.reserve(worst)
            started = time.perf_counter()
            self.asked.append(messages)
            told = self._told(messages)
            whole = told if isinstance(told, str) else told[ask.sample % len(told)]
            text, _ = cut_at_stop(whole, ask.stop)
            words = text.split()
            finish = "stop"
            if len(words) > ask.max_tokens:
                text, finish, words = " ".join(words[: ask.max_tokens]), "length", words[: ask.max_tokens]
            seconds = time.perf_counter() - started
            self.ledger.settle(worst, prompt=read, completion=len(words), seconds=seconds)
            done(ask, Completion(text, finish, Tokens(read, len(words))))

    def _score(self, pairs: list[Pair], done: Callable[[Pair, LogLikelihood], None]) -> None:
        assert self.log_likelihood is not None
        for pair in pairs:
            prompt = pair.prompt if isinstance(pair.prompt, str) else _joined(pair.prompt)
            total = float(self.log_likelihood(prompt, pair.continuation))
            done(pair, LogLikelihood(total, len(pair.continuation.split()), False, (total,)))

    def _told(self, messages: list[dict[str, str]]) -> str | Sequence[str]:
        if callable(self.script):
            return self.script(messages)
        last = messages[-1]["content"]
        if last not in self.script:
            raise InputError(f"the script has no answer to {last!r:.200}")
        return self.script[last]


def _joined(dialogue: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(content for _, content in dialogue)
