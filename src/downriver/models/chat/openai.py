"""Language models behind an OpenAI-compatible endpoint: OpenAI itself, vLLM, ``transformers serve``, llama.cpp and
others.

Reach for it when the model is not yours or does not fit here. Bounded concurrency, retries, a total time limit for
each attempt, and (from ``ChatModel``) a cache on disk and a spending limit.
"""

import asyncio
import email.utils
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from downriver.core.errors import DownriverError, InputError, require
from downriver.models.chat.protocol import Ask, ChatModel, Completion, Prompt, Tokens, as_messages, cut_at_stop

OFFICIAL = "https://api.openai.com/v1"
LONGEST_WAIT = 60.0  # seconds, of our own back-off
LONGEST_ASKED_WAIT = 600.0  # seconds that a server may ask for by Retry-After
TEMPLATE_TOKENS, MESSAGE_TOKENS = 64, 16  # what a server's chat template may add to a dialogue and to each message

T = TypeVar("T")


class ServiceError(DownriverError):
    """The endpoint did not give an answer, however often it was asked."""


class _Garbled(Exception):
    """What came back with status 200 is not a completion."""


class OpenAIChat(ChatModel):
    """Ask a model behind an OpenAI-compatible endpoint.

    Works in plain code and inside a running event loop (a notebook): requests run on a thread of their own. Samples
    are separate requests, each with its own seed, so that every one is cached and resumed by itself. A server that
    leaves the stop string in the text has it cut off here.

    Retried, with exponential back-off, jitter and the server's ``Retry-After``: status 408, 429 and 5xx, time-outs,
    cut connections, and answers that are not a completion. Everything else is an ``InputError`` with the server's
    status and words. On the first failure no further request is started; those under way may finish and are cached.

    The key is read from the environment when the first request is sent. It is never stored in this object, the
    cache, a log or an error.

    >>> chat = OpenAIChat("my-model", base_url="http://127.0.0.1:8000/v1", price=(0.15, 0.60), spending_limit=2.0)
    >>> chat
    OpenAIChat('my-model' at http://127.0.0.1:8000/v1)
    >>> chat.require("loglikelihood")
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: OpenAIChat('my-model' at http://127.0.0.1:8000/v1) has no capability
    'loglikelihood' (log-likelihoods of given continuations): use HFChat for it

    Parameters
    ----------
    model : the model's name at the endpoint.
    base_url : the endpoint; default ``$OPENAI_BASE_URL``, else OpenAI's own.
    api_key_env : the environment variable that holds the key. An endpoint other than OpenAI's own may need none.
    concurrency : how many requests may be under way at once, over all threads that use this object.
    timeout : seconds for one attempt, from sending to the last byte.
    retries : how often a failed request is repeated.
    backoff : seconds before the first repetition (times 0.5 to 1, at random); doubled each time, at most 60.
    strings : what a string prompt is: one message of the user (default), or ``"text"`` to continue through the legacy
        ``/completions`` route.
    logprobs : ask for the log-probabilities of the generated tokens (some servers ignore or refuse it).
    extra_body : further fields of the request that this endpoint understands, like ``{"top_p": 0.9}``.
    tokenizer : a function from text to tokens (``tokenizer.encode``); without one tokens are bounded by UTF-8 bytes.
    cache, price, spending_limit, progress : see ``ChatModel``. The largest possible cost of a request is that of
        its prompt (with an allowance for the server's template) and of ``max_tokens``. Where it does not fit beside
        the requests under way it waits for them; where it does not fit at all ``SpendingLimit`` is raised.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
        strings: Literal["user", "text"] = "user",
        logprobs: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        tokenizer: Callable[[str], Sequence[Any]] | None = None,
        cache: bool | str | os.PathLike[str] = True,
        price: tuple[float, float] | None = None,
        spending_limit: float | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(
            model, strings=strings, cache=cache, price=price, spending_limit=spending_limit, progress=progress
        )
        require("openai", "serve")
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
            if value < least:
                raise InputError(f"{name} is {value!r}: at least {least} is expected")
        if not timeout > 0:
            raise InputError(f"timeout is {timeout!r}: a positive number of seconds is expected")
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.extra_body = dict(extra_body or {})
        self.tokenizer = tokenizer
        self.logprobs = logprobs
        self.capabilities = frozenset({"logprobs"} if logprobs else ())
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise InputError(
                f"base_url {self._endpoint()!r}: an address that begins with http:// or https:// is expected"
            )
        if self.base_url == OFFICIAL and not os.environ.get(api_key_env):
            raise InputError(f"the environment variable {api_key_env} holds no key, which {OFFICIAL} needs")
        self._length_field = "max_tokens"
        self._lock = threading.Lock()
        self._connection: _Connection | None = None

    def count_tokens(self, prompt: Prompt) -> int:
        """The tokens of the prompt's texts, without the server's template; their bytes if there is no ``tokenizer``."""
        asked = self._prompt(prompt)
        return sum(self._count(text) for text in ([asked] if isinstance(asked, str) else [c for _, c in asked]))

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def __repr__(self) -> str:
        return f"OpenAIChat({self.model!r} at {self._endpoint()})"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_connection", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _connection=None, _lock=threading.Lock())

    def _identity(self) -> Any:
        return [self._endpoint(), self.strings, self.logprobs, self.extra_body]

    def _endpoint(self) -> str:
        """The address without what may be secret in it: user, password and query."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text)) if self.tokenizer else len(text.encode())

    def _bound(self, ask: Ask) -> int:
        """At most this many prompt tokens, the server's template included."""
        if isinstance(ask.prompt, str):
            return self._count(ask.prompt) + 1
        return TEMPLATE_TOKENS + sum(MESSAGE_TOKENS + self._count(content) for _, content in ask.prompt)

    def _answer(self, asks: list[Ask], done: Callable[[Ask, Completion], None]) -> None:
        with self._lock:
            if self._connection is None or self._connection.pid != os.getpid():  # a fork leaves the thread behind
                self._connection = _Connection(self)
                weakref.finalize(self, self._connection.close)
            link = self._connection
        link.run(self._answer_all(link, asks, done))

    async def _answer_all(self, link: "_Connection", asks: list[Ask], done: Callable[[Ask, Completion], None]) -> None:
        queue, failures = iter(asks), list[Exception]()

        async def worker() -> None:
            for ask in queue:
                try:
                    async with link.slots:
                        if failures:
                            return
                        done(ask, await self._ask(link, ask, failures))
                except Exception as error:
                    failures.append(error)

        await asyncio.gather(*(worker() for _ in range(min(self.concurrency, len(asks)))))
        if failures:
            raise failures[0]

    async def _ask(self, link: "_Connection", ask: Ask, failures: list[Exception]) -> Completion:
        worst = self.ledger.price_of(self._bound(ask), ask.max_tokens)
        attempt = 0
        while True:
            async with link.freed:
                await link.freed.wait_for(lambda: self.ledger.fits(worst) or not self.ledger.in_flight)
                self.ledger.reserve(worst)
            started = time.perf_counter()
            try:
                answer = await asyncio.wait_for(self._post(link, ask), self.timeout)
            except BaseException as error:
                self.ledger.abandon(worst, billed=_may_be_billed(error))
                pause = self._pause(error, attempt)
                if failures:
                    raise
            else:
                used = answer.tokens
                seconds = time.perf_counter() - started
                self.ledger.settle(worst, prompt=used.prompt, completion=used.completion, seconds=seconds)
                return answer
            finally:
                async with link.freed:
                    link.freed.notify_all()
            attempt += 1
            self.ledger.retries += 1
            await asyncio.sleep(pause)

    async def _post(self, link: "_Connection", ask: Ask) -> Completion:
        import openai

        fields: dict[str, Any] = {"model": self.model, "temperature": ask.temperature, "extra_body": self.extra_body}
        if ask.stop:
            fields["stop"] = list(ask.stop)
        if ask.seed is not None:
            fields["seed"] = ask.seed
        if ask.top_p < 1:
            fields["top_p"] = ask.top_p
        if isinstance(ask.prompt, str):
            if self.logprobs:
                fields["logprobs"] = 1
            reply = await link.client.completions.create(prompt=ask.prompt, max_tokens=ask.max_tokens, **fields)
            return self._completion(ask, reply)
        if self.logprobs:
            fields["logprobs"] = True
        fields |= {"messages": as_messages(ask.prompt), self._length_field: ask.max_tokens}
        try:
            reply = await link.client.chat.completions.create(**fields)
        except openai.BadRequestError as error:
            if "max_tokens" in fields and "max_completion_tokens" in str(error):  # what OpenAI's reasoning models take
                self._length_field = "max_completion_tokens"
                return await self._post(link, ask)
            raise
        return self._completion(ask, reply)

    def _completion(self, ask: Ask, reply: Any) -> Completion:
        try:
            choice = reply.choices[0]
            whole = choice.text if isinstance(ask.prompt, str) else choice.message.content or ""
            text, stopped = cut_at_stop(whole, ask.stop)
            usage = reply.usage
            tokens = Tokens(usage.prompt_tokens, usage.completion_tokens) if usage else None
            tokens = tokens or Tokens(self._bound(ask), self._count(whole))
            logprobs = None
            if self.logprobs and choice.logprobs:
                found = choice.logprobs
                each = found.token_logprobs if isinstance(ask.prompt, str) else [t.logprob for t in found.content]
                logprobs = tuple(float(x) for x in each)
            return Completion(text, "stop" if stopped else str(choice.finish_reason or "stop"), tokens, logprobs)
        except (AttributeError, IndexError, TypeError) as error:
            raise _Garbled from error

    def _pause(self, error: BaseException, attempt: int) -> float:
        """Seconds until the next attempt; raises what cannot be helped by one."""
        import openai

        wait = min(LONGEST_WAIT, self.backoff * 2**attempt) * _jitter.uniform(0.5, 1.0)
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            body = error.body if isinstance(error.body, Mapping) else {}
            words = f"status {status}: {self._safe(body.get('message') or error.body or error.response.text)}"
            if not (status in (408, 429) or status >= 500) or body.get("code") == "insufficient_quota":
                hint = f" (the key is read from ${self.api_key_env})" if status in (401, 403) else ""
                raise InputError(f"{self!r} refused the request with {words}{hint}") from None
            asked = _retry_after(error.response.headers)
            if asked > LONGEST_ASKED_WAIT:
                raise ServiceError(f"{self!r} asks to come back in {asked:.0f} s; the answer was {words}") from None
            wait = asked + wait if asked else wait
        elif isinstance(error, TimeoutError):
            words = f"no answer within {self.timeout:g} s"
        elif isinstance(error, openai.APIConnectionError):
            words = f"connection failed ({self._safe(error.__cause__ or error)})"
        elif isinstance(error, json.JSONDecodeError | _Garbled):
            words = "the answer is not a completion"
        else:
            raise error
        if attempt >= self.retries:
            raise ServiceError(f"{self!r} gave no answer in {attempt + 1} attempts; the last one: {words}") from None
        return wait

    def _safe(self, words: object) -> str:
        """At most 300 characters of somebody else's words, without our key should they repeat it."""
        key = os.environ.get(self.api_key_env)
        text = str(words).replace(key, "[key]") if key else str(words)
        return text if len(text) <= 300 else text[:300] + "..."


_jitter = random.Random()  # its own generator: retries must not move the streams that experiments draw from


class _Connection:
    """An event loop on a thread of its own, with the client and the bounds that live on it."""

    def __init__(self, chat: OpenAIChat) -> None:
        import openai

        self.pid = os.getpid()
        self.closed = False
        self.client = openai.AsyncOpenAI(
            api_key=os.environ.get(chat.api_key_env) or "none", base_url=chat.base_url, max_retries=0, timeout=None
        )
        self.slots = asyncio.Semaphore(chat.concurrency)
        self.freed = asyncio.Condition()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._live, name="downriver-chat", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()  # where this thread was interrupted; no effect on work that has ended

    def close(self) -> None:
        if self.closed or self.pid != os.getpid():
            return
        self.closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        if threading.current_thread() is not self.thread:  # which may be where the last user is forgotten
            self.thread.join()

    def _live(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    async def _end(self) -> None:
        await self.client.close()
        self.loop.stop()


def _may_be_billed(error: BaseException) -> bool:
    """Whether the provider may charge a request that brought no answer: not if it refused it or was not reached."""
    import openai

    if isinstance(error, openai.APIConnectionError):
        return type(error.__cause__).__name__ != "ConnectError"
    return not isinstance(error, openai.APIStatusError)


def _retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a server asks to wait, as a number or a date; 0 where it does not say.

    >>> [_retry_after(h) for h in ({"retry-after": "2.5"}, {"retry-after-ms": "300"}, {"retry-after": "soon"})]
    [2.5, 0.3, 0.0]
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return 0.0
