"""A Hugging Face causal language model in this process: answers, true log-likelihoods, nothing sent anywhere.

Reach for it when the weights are at hand, when continuations must be scored, or to check an endpoint against its
weights.
"""

import hashlib
import inspect
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from downriver.core.errors import InputError
from downriver.core.io import fingerprint
from downriver.core.seeds import derive_seed
from downriver.models.chat.protocol import (
    Ask,
    ChatModel,
    Completion,
    Dialogue,
    LogLikelihood,
    Pair,
    Prompt,
    Tokens,
    as_messages,
    cut_at_stop,
)
from downriver.models.model import Model

LOGITS_AT_ONCE = 2**26  # numbers: a quarter of a gigabyte in float32


class HFChat(ChatModel):
    """Ask a causal language model that runs here.

    ``model`` is a folder, a hub id or a built-in name (read by ``models.load``), a ``Model``, or a pair of a
    transformers causal LM and its tokenizer. Neither is changed.

    Prompts are batched by length and padded on the left. At temperature 0 the likeliest token is taken; above, one
    is drawn from softmax(logits / temperature) by the Gumbel-max trick with a generator of each answer's own, so
    that an answer does not depend on what else is in its batch (up to floating-point noise where two tokens are as
    good as equal, as can happen in half precision). Decoding is the model's own distribution: of the model's
    ``generation_config`` only the end-of-text tokens count, no penalties, no top-k and no top-p but the caller's.

    Log-likelihoods are of the joint encoding of prompt and continuation: a continuation's tokens are those of the
    whole text that reach beyond the prompt's last character, so a token that straddles the boundary is scored with
    the continuation.

    ``strings`` (default: ``"user"`` where the tokenizer has a chat template, else ``"text"``) says what a string
    prompt is. With a ``cache`` the weights are hashed once a call (about a second for 500 MB), so that a model
    which was trained on, or has other adapters on, never meets its old answers. ``batch_size`` is the number of
    rows a forward pass takes.

    >>> from downriver.models import small
    >>> chat = HFChat(small("causal-lm", seed=0), strings="text")
    >>> [[answer]] = chat.generate(["once upon"], max_tokens=4)
    >>> answer.tokens.completion <= 4 and len(answer.logprobs) == answer.tokens.completion
    True
    >>> [score] = chat.loglikelihood([("once upon", " a time")])
    >>> score.total < 0 and round(sum(score.logprobs) - score.total, 6)
    0.0
    """

    capabilities = frozenset({"loglikelihood", "logprobs"})

    def __init__(
        self,
        model: str | os.PathLike[str] | Model | tuple[torch.nn.Module, Any],
        *,
        batch_size: int = 16,
        strings: Literal["user", "text"] | None = None,
        cache: bool | str | os.PathLike[str] = False,
        progress: bool = True,
    ) -> None:
        if isinstance(model, str | os.PathLike):
            from downriver.models.load import load

            model = load(os.fspath(model), kind="causal-lm")
        if isinstance(model, Model):
            if model.kind != "causal-lm":
                raise InputError(f"{model.source}: a causal language model is expected, not kind {model.kind!r}")
            name, pair = model.source, (model.backbone, model.processor)
        elif isinstance(model, tuple) and len(model) == 2:
            name = getattr(getattr(model[0], "config", None), "name_or_path", "") or type(model[0]).__name__
            pair = model
        else:
            raise InputError(f"model is a {type(model).__name__}: a pair of a causal LM and its tokenizer is expected")
        self.module: Any
        self.module, self.tokenizer = pair
        if not hasattr(self.module, "generate") or not hasattr(self.tokenizer, "decode"):
            raise InputError(f"{name}: a transformers causal language model and its tokenizer are expected")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}: at least 1 is expected")
        templated = bool(getattr(self.tokenizer, "chat_template", None))
        super().__init__(name, strings=strings or ("user" if templated else "text"), cache=cache, progress=progress)
        self.batch_size = batch_size
        self._inner = self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module
        self._takes = frozenset(inspect.signature(self._inner.forward).parameters)
        config = self._inner.config.get_text_config()
        self._max_length: int | None = getattr(config, "max_position_embeddings", None)
        ends = self._inner.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._pad = next((i for i in (self.tokenizer.pad_token_id, *self._ends) if i is not None), 0)

    def count_tokens(self, prompt: Prompt) -> int:
        """How many tokens the model reads for this prompt, its chat template included."""
        return len(self._encode(self._prompt(prompt)))

    def _identity(self) -> Any:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        words = fingerprint(self.tokenizer.get_vocab(), getattr(self.tokenizer, "chat_template", None), self._ends)
        settings = [self._inner.config.to_json_string()]
        if hasattr(self.module, "peft_config"):
            adapters = {name: config.to_dict() for name, config in self.module.peft_config.items()}
            status = self.module.get_model_status()  # which adapters are switched on or merged
            settings += [json.dumps(adapters, default=_plain, sort_keys=True), str(status)]
        return [digest.hexdigest(), words, settings, self.strings]

    def _render(self, prompt: str | Dialogue) -> str:
        if isinstance(prompt, str):
            return prompt
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"{self!r} has no chat template for messages: give strings, with strings='text'")
        return self.tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True)

    def _encode(self, prompt: str | Dialogue) -> list[int]:
        """The ids of a prompt. A template writes its own special tokens; a plain text gets those that the tokenizer
        puts before it, but none behind it, where the answer goes on."""
        text = self._render(prompt)
        bare = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not bare:
            return self._start(prompt)
        if not isinstance(prompt, str):
            return bare
        ids = self.tokenizer(text)["input_ids"]
        ends = (len(bare) + i for i in range(len(ids) - len(bare) + 1))
        return ids[: next((end for end in ends if ids[end - len(bare) : end] == bare), len(ids))]

    def _start(self, prompt: str | Dialogue) -> list[int]:
        """What stands before a text that begins from nothing."""
        first = self.tokenizer.bos_token_id
        first = self._ends[0] if first is None and self._ends else first
        if first is None:
            raise InputError(f"{self!r} has no token to begin with, and the prompt {prompt!r} is empty")
        return [first]

    def _encode_pair(self, pair: Pair) -> tuple[list[int], int]:
        """The ids of prompt and continuation together, and where the continuation's tokens begin."""
        if not self.tokenizer.is_fast:
            raise InputError(f"{self!r}: log-likelihoods need a fast tokenizer, which tells where its tokens stand")
        text = self._render(pair.prompt)
        both = self.tokenizer(
            text + pair.continuation, add_special_tokens=isinstance(pair.prompt, str), return_offsets_mapping=True
        )
        ids, ends = both["input_ids"], [end for _, end in both["offset_mapping"]]
        inside = [i for i, end in enumerate(ends) if end > len(text)]
        inside = inside or [max(range(len(ends)), key=lambda i: (ends[i], i))]  # offsets may leave white space out
        begin, last = inside[0], inside[-1] + 1  # without an end-of-text token that the tokenizer adds behind
        if begin == 0:
            before = self._start(pair.prompt)
            ids, begin, last = before + ids, len(before), last + len(before)
        return ids[:last], begin

    def _check_length(self, ids: Sequence[int], more: int, prompt: object) -> None:
        if self._max_length is not None and len(ids) + more > self._max_length:
            raise InputError(
                f"{self!r} takes {self._max_length} tokens: "
                f"prompt {prompt!r:.60} has {len(ids)} and {more} more are wanted"
            )

    def _batches(
        self, rows: list[Any], ids: Callable[[Any], list[int]], logits: Callable[[Any], int]
    ) -> Iterator[list]:
        """Rows of like length together, the longest first, as many as the batch size and memory for logits allow."""
        vocabulary = self.module.get_input_embeddings().weight.shape[0]
        rows = sorted(rows, key=lambda row: -len(ids(row)))
        while rows:
            most, size = 0, 0
            for row in rows[: self.batch_size]:
                most = max(most, logits(row))
                if size and most * vocabulary * (size + 1) > LOGITS_AT_ONCE:
                    break
                size += 1
            yield rows[:size]
            rows = rows[size:]

    def _pad_left(self, ids: list[list[int]]) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(row) for row in ids]
        inputs = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._pad, padding_side="left"),
            "attention_mask": pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left"),
        }
        return {name: tensor.to(self.module.device) for name, tensor in inputs.items()}

    def _answer(self, asks: list[Ask], done: Callable[[Ask, Completion], None]) -> None:
        prompts = {prompt: self._encode(prompt) for prompt in {ask.prompt for ask in asks}}
        for prompt, ids in prompts.items():
            self._check_length(ids, asks[0].max_tokens, prompt)
        seeds = {
            ask: derive_seed("token draws", ask.prompt, ask.seed) if ask.repeatable else random.getrandbits(32)
            for ask in asks
        }
        for batch in self._batches(asks, lambda ask: prompts[ask.prompt], lambda ask: 1):
            started = time.perf_counter()
            answers = self._generate(batch, [prompts[ask.prompt] for ask in batch], [seeds[ask] for ask in batch])
            seconds = (time.perf_counter() - started) / len(batch)
            for ask, answer in zip(batch, answers, strict=True):
                self.ledger.count(prompt=answer.tokens.prompt, completion=answer.tokens.completion, seconds=seconds)
                done(ask, answer)

    def _generate(self, asks: list[Ask], ids: list[list[int]], seeds: list[int]) -> list[Completion]:
        stop, temperature = asks[0].stop, asks[0].temperature  # the same for all asks of a call
        inputs = self._pad_left(ids)
        width = inputs["input_ids"].shape[1]
        draw = _Draw(temperature, seeds, asks[0].top_p)
        halt = _Halt(self.tokenizer, width, stop)
        # every value that is left out would be taken from the model's own generation_config
        neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
        settings = GenerationConfig(
            max_new_tokens=asks[0].max_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            use_cache=True,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
            **neutral,
        )
        with _evaluating(self.module):
            out = self.module.generate(
                **inputs, generation_config=settings, logits_processor=[draw], stopping_criteria=[halt]
            )
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        answers = []
        for row, new in enumerate(out[:, width:].tolist()):
            count = next((i + 1 for i, token in enumerate(new) if token in self._ends), len(new))
            count = min(count, halt.at.get(row, len(new)))
            ended = new[count - 1] in self._ends
            text, stopped = cut_at_stop(halt.text(new[:count]), stop)
            finish = "stop" if ended or stopped else "length"
            tokens = Tokens(len(ids[row]), count)
            answers.append(Completion(text, finish, tokens, tuple(logprobs[row][:count])))
        return answers

    def _score(self, pairs: list[Pair], done: Callable[[Pair, LogLikelihood], None]) -> None:
        rows = [(pair, *self._encode_pair(pair)) for pair in pairs]
        for pair, ids, _ in rows:
            self._check_length(ids, 0, pair.prompt)
        for batch in self._batches(rows, lambda row: row[1], lambda row: len(row[1]) - row[2] + 1):
            started = time.perf_counter()
            keep = max(len(ids) - begin for _, ids, begin in batch) + 1
            inputs = self._pad_left([ids for _, ids, _ in batch])
            places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            more = {
                name: value
                for name, value in (("position_ids", places), ("logits_to_keep", keep))
                if name in self._takes
            }
            with _evaluating(self.module), torch.no_grad():
                # the logits at a position are those of the next token: the last position predicts nothing here
                predicted = log_softmax(
                    self.module(**inputs, **more, use_cache=False).logits[:, -keep:-1].float(), dim=-1
                )
            tokens = inputs["input_ids"][:, 1 - keep :]
            each = predicted.gather(-1, tokens[..., None])[..., 0].cpu()
            likeliest = (predicted.argmax(-1) == tokens).cpu()
            seconds = (time.perf_counter() - started) / len(batch)
            for row, (pair, ids, begin) in enumerate(batch):
                count = len(ids) - begin
                own = each[row, -count:].double()
                self.ledger.count(prompt=len(ids), completion=0, seconds=seconds)
                greedy = bool(likeliest[row, -count:].all())
                done(pair, LogLikelihood(float(own.sum()), count, greedy, tuple(own.tolist())))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


class _Draw(LogitsProcessor):
    """Turns the arg-max of greedy decoding into a draw, row by row, and keeps the log-probability of what it picks.

    Gumbel-max: argmax_i(z_i / T - log E_i), with E_i standard exponential, is distributed as softmax(z / T). Tokens
    outside the nucleus (those before which the likelier ones already reach ``top_p``) are never picked.
    """

    def __init__(self, temperature: float, seeds: list[int], top_p: float = 1.0) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature > 0 else []
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        picked = scores.float()
        if self.temperature > 0:
            waits = [
                torch.empty(scores.shape[1], dtype=torch.float64).exponential_(generator=g) for g in self.generators
            ]
            picked = picked.double() / self.temperature
            if self.top_p < 1:
                likely, order = picked.softmax(-1).sort(-1, descending=True)
                outside = likely.cumsum(-1) - likely >= self.top_p
                picked = picked.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
            picked = picked - torch.stack(waits).log().to(scores.device)
        choice = picked.argmax(-1, keepdim=True)
        self.logprobs.append(log_softmax(scores.float(), dim=-1).gather(-1, choice)[:, 0].cpu())
        return picked


class _Halt(StoppingCriteria):
    """Ends a row when its generated text, not its prompt, holds a stop string; remembers after how many tokens."""

    def __init__(self, tokenizer: Any, width: int, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.width, self.stop = tokenizer, width, stop
        self.at: dict[int, int] = {}

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.stop:
            for row, new in enumerate(input_ids[:, self.width :].tolist()):
                if row not in self.at and cut_at_stop(self.text(new), self.stop)[1]:
                    self.at[row] = len(new)
        ended = [row in self.at for row in range(input_ids.shape[0])]
        return torch.tensor(ended, device=input_ids.device)


class _evaluating:
    """The module in evaluation mode for a while."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.was = self.module.training
        self.module.eval()

    def __exit__(self, *error: object) -> None:
        self.module.train(self.was)
