"""Code from words: pairs of intent and code, prompts with and without examples, tuning recipes, and scored outputs.

Reach for ``study.codegen_study`` to compare ways of adapting a model to them. Data format, recipes and metrics are
those of Weyssow et al., "Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language
Models" (2023), state of January 2024, and its later chats. Departures: AdamW in place of Adafactor, a validation an
epoch in place of five, and causal language models only.
"""

import ast
import copy
import functools
import json
import math
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import peft
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from tqdm import tqdm

from downriver.core import Budget, InputError, charge, generator, seeded, unknown
from downriver.data.synth.dpo import Messages, encode
from downriver.models.model import Model
from downriver.models.quantised import Bits, missing, quantised
from downriver.nn.preference import IGNORED
from downriver.training import TokenRows, fine_tune
from downriver.training.engine import accelerator, clone

PROMPT = "### Instruction:\n{intent}\n### Response:\n"
STOP = "\n###"
INITIAL = "Generate Python code given a natural language instruction."
"""Text whose embeddings a tuned prompt starts from."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
FEED_FORWARD = ("down_proj", "fc2", "dense_4h_to_h")
Pair = Mapping[str, str]
Style = Literal["instruction", "chat"]


@dataclass(frozen=True)
class Recipe:
    """How one method is trained: its learning rate, what peft builds it from (None: all weights), and the bits of the
    frozen weights (None: as they are)."""

    learning_rate: float
    peft_type: str | None
    bits: Bits | None = None


RECIPES = {
    "full": Recipe(5e-5, None),
    "lora": Recipe(3e-4, "LORA"),
    "ia3": Recipe(3e-3, "IA3"),
    "prompt": Recipe(3e-3, "PROMPT_TUNING"),
    "prefix": Recipe(3e-2, "PREFIX_TUNING"),
    "qlora8": Recipe(3e-4, "LORA", 8),
    "qlora4": Recipe(3e-4, "LORA", 4),
}
"""The paper's: LoRA of rank 16, alpha 32 and dropout 0.05 on queries, keys and values; (IA)³ on these and the
feed-forward layers; 20 virtual tokens of a prompt; 10 of a prefix; QLoRA, which is LoRA on weights in 8 or 4 bits."""


@dataclass(frozen=True)
class CodeTask:
    """Pairs of ``intent`` and ``code`` in the splits ``train``, ``validation`` and ``test``, and ``tests`` where there
    are any: Python that fails after code that is wrong.

    Raises ``InputError`` naming split, row and field.

    >>> pair = {"intent": "add two numbers", "code": "return a + b"}
    >>> CodeTask("sums", {"train": [pair], "validation": [pair], "test": [pair]}).has_tests
    False
    """

    name: str
    splits: Mapping[str, Sequence[Pair]]

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            if not self.splits.get(split):
                raise InputError(f"code task {self.name!r} has no rows in {split!r}")
            for number, row in enumerate(self.splits[split]):
                for field in ("intent", "code"):
                    if not isinstance(row.get(field), str) or not row[field].strip():
                        raise InputError(f"code task {self.name!r}, {split!r}, row {number}: no {field}")

    @property
    def has_tests(self) -> bool:
        """Whether every row of the test split has tests."""
        return all(row.get("tests") for row in self.splits["test"])

    @classmethod
    def from_jsonl(cls, folder: str | os.PathLike[str]) -> "CodeTask":
        """``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` in a folder: intent and code a line."""
        splits = {}
        for split in ("train", "validation", "test"):
            path = Path(folder) / f"{split}.jsonl"
            if not path.is_file():
                raise InputError(f"{path} is missing: train, validation and test are expected")
            rows = []
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {number}: {error}") from None
                if not isinstance(rows[-1], dict):
                    raise InputError(f"{path}, line {number}: an object with intent and code is expected")
            splits[split] = rows
        return cls(Path(folder).name, splits)

    @classmethod
    def from_datasets(
        cls,
        name: str,
        splits: Mapping[str, Any],
        *,
        intent: str = "intent",
        code: str = "code",
        tests: str | None = None,
    ) -> "CodeTask":
        """From the splits of a ``datasets.DatasetDict``, with the columns that hold intent, code and tests."""
        columns = {"intent": intent, "code": code} | ({"tests": tests} if tests else {})
        for split, rows in splits.items():
            if missing := sorted(set(columns.values()) - set(rows.column_names)):
                raise InputError(f"code task {name!r}, {split!r}: no column {', '.join(missing)}")
        named = {
            split: [{field: row[column] for field, column in columns.items()} for row in rows]
            for split, rows in splits.items()
        }
        return cls(name, named)

    @classmethod
    def stdlib(cls, seed: int = 0, *, characters: int = 96) -> "CodeTask":
        """Functions of Python's standard library whose body is one ``return``: name and first sentence of the
        docstring to that line. No module is in two splits; none of a function and its text is longer than
        ``characters``."""
        modules = _stdlib()
        order = generator("codegen stdlib", seed).permutation(len(modules))
        splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
        seen: set[str] = set()
        for place, number in enumerate(order.tolist()):
            split = ("train", "train", "train", "validation", "test")[place % 5]
            for pair in modules[number]:
                if max(map(len, pair.values())) <= characters and pair["code"] not in seen:
                    seen.add(pair["code"])
                    splits[split].append(pair)
        return cls("stdlib", splits)

    def token_rows(
        self, model: Model, splits: Sequence[str] = ("train", "validation"), style: Style = "instruction"
    ) -> TokenRows:
        """Prompt, code and end of text; the loss is on the last two."""
        rows = {}
        for split in splits:
            asked = prompts([row["intent"] for row in self.splits[split]], style=style)
            code = [row["code"] for row in self.splits[split]]
            rows[split] = datasets.Dataset.from_list(_encoded(model, asked, code))
        return TokenRows(self.name, rows, pad=model.processor.pad_token_id or 0)


@functools.cache
def _stdlib() -> list[list[dict[str, str]]]:
    """The pairs of every module of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(p for p in root.rglob("*.py") if not {"site-packages", "dist-packages", "test"} & set(p.parts))
    return [list(returns(path.read_text("utf-8", "replace"))) for path in modules]


def returns(source: str) -> Iterator[dict[str, str]]:
    """Functions of a module with a docstring, or a name of several words, whose body is one ``return``.

    >>> list(returns('def is_even(n):\\n    "Whether it is even. Or not."\\n    return n % 2 == 0'))
    [{'intent': 'is even: Whether it is even.', 'code': 'return n % 2 == 0'}]
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = re.split(r"\r\n?|\n", source)  # as the parser counts them
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        text = ast.get_docstring(node)
        body = node.body[1:] if text else node.body
        words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", node.name)).lower()
        if len(body) != 1 or not isinstance(body[0], ast.Return) or not (text or " " in words):
            continue
        statement = body[0]
        sentence = re.split(r"(?<=\.)\s|\n", text.strip())[0] if text else ""
        if statement.lineno == statement.end_lineno:
            line = lines[statement.lineno - 1].encode()
            code = line[statement.col_offset : statement.end_col_offset].decode()
            yield {"intent": f"{words}: {sentence}" if sentence else words, "code": code}


def tune(
    model: Model,
    task: CodeTask,
    method: str,
    budget: Budget | str | None = None,
    *,
    learning_rate: float | None = None,
    batch_size: int = 8,
    validations: int = 5,
    style: Style = "instruction",
    seed: int = 0,
) -> Model:
    """The model adapted to the task by one of ``RECIPES``; the weights are those with the lowest validation loss.

    ``budget`` is five epochs by default, ``learning_rate`` the recipe's (they differ 600 times: one rate for all
    methods compares rates), ``style`` as in ``format_prompt``. A model in few bits stays where it was trained.

    Raises ``InputError`` for unknown methods, models that are no causal language models, lack the layers that the
    method needs, or the chat template; ``MissingExtra`` where QLoRA lacks bitsandbytes.
    """
    if method not in RECIPES:
        raise unknown("method", method, RECIPES)
    if model.kind != "causal-lm":
        raise InputError(f"{model.source or 'the model'} is of the kind {model.kind}: a causal-lm is expected")
    recipe = RECIPES[method]
    tuned = quantised(model, recipe.bits, device=accelerator()) if recipe.bits else clone(model)
    if recipe.peft_type:
        with seeded("codegen", method, seed):
            tuned.backbone = peft.get_peft_model(tuned.backbone, _config(tuned, recipe.peft_type))
        if method == "prompt":
            _start_from_text(tuned)
    return fine_tune(
        tuned,
        task.token_rows(tuned, style=style),
        budget or Budget(5 * len(task.splits["train"]), "examples"),
        learning_rate=learning_rate or recipe.learning_rate,
        batch_size=batch_size,
        warmup=0.05,
        validation=validations,
        objective=completion_loss,
        seed=seed,
        in_place=True,
    )


def completion_loss(model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean cross-entropy over the code; logits at virtual tokens before the text are left out."""
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"})["logits"]
    logits = logits[:, -labels.shape[1] :]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    return {"loss": loss, "logits": logits}


def lacking(method: str) -> str | None:
    """Why a recipe cannot be followed on this machine; None where it can.

    >>> lacking("lora")
    """
    bits = RECIPES[method].bits if method in RECIPES else None
    return missing(bits, accelerator()) if bits else None


def format_prompt(intent: str, examples: Sequence[Pair] = (), style: Style = "instruction") -> str | Messages:
    """What a model is asked, after examples: the paper's text, or for ``chat`` messages, which the tokenizer's chat
    template writes.

    >>> format_prompt("add", [{"intent": "subtract", "code": "a - b"}])
    '### Instruction:\\nsubtract\\n### Response:\\na - b\\n### Instruction:\\nadd\\n### Response:\\n'
    >>> format_prompt("add", style="chat")
    [{'role': 'user', 'content': 'add'}]
    """
    if style not in get_args(Style):
        raise unknown("style", style, get_args(Style))
    if style == "instruction":
        before = "".join(PROMPT.format(intent=row["intent"]) + row["code"] + "\n" for row in examples)
        return before + PROMPT.format(intent=intent)
    turns = [
        {"role": role, "content": row[field]}
        for row in examples
        for role, field in (("user", "intent"), ("assistant", "code"))
    ]
    return [*turns, {"role": "user", "content": intent}]


def prompts(
    intents: Sequence[str],
    examples: Sequence[Pair] = (),
    *,
    shots: int = 0,
    retrieve: bool = False,
    style: Style = "instruction",
    seed: int = 0,
) -> list[str | Messages]:
    """A prompt for every intent, after ``shots`` examples: drawn at random, or with ``retrieve`` the most similar ones
    (TF-IDF), the nearest last. An example with the very intent is never shown. ``style`` as in ``format_prompt``.

    >>> prompts(["add"], [{"intent": "add", "code": "x"}, {"intent": "sub", "code": "y"}], shots=1)[0].count("add")
    1
    """
    if shots and len(examples) <= shots:
        raise InputError(f"{len(examples)} examples: more than {shots} are expected")
    found: list[str | Messages] = []
    texts = [row["intent"] for row in examples]
    near: Any = None
    if shots and retrieve:
        space = TfidfVectorizer(token_pattern=r"\w+").fit(texts)
        near = (space.transform(intents) @ space.transform(texts).T).toarray()
    for number, intent in enumerate(intents):
        chosen: list[int] = []
        if shots:
            order = (-near[number]).argsort(kind="stable") if retrieve else _drawn(len(texts), seed, number)
            chosen = [int(i) for i in order if texts[i].strip() != intent.strip()][:shots][::-1]
        found.append(format_prompt(intent, [examples[i] for i in chosen], style))
    return found


@torch.no_grad()
def generate_code(
    model: Model,
    asked: Sequence[str | Messages],
    *,
    k: int = 10,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = True,
) -> list[list[str]]:
    """The k best outputs of a beam search of width k for each prompt, the best first; cut at the end of the code. Of an
    answer in a chat the first block between fences is taken, where there is one.

    Raises ``InputError`` where a prompt leaves no room for ``max_new_tokens``: cut examples make no fair comparison.
    """
    tokenizer: Any = model.processor
    module: Any = model.backbone
    training = model.training
    model.eval()
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    written = [prompt if isinstance(prompt, str) else _chat(model, prompt) for prompt in asked]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    ids = [start + row if isinstance(prompt, str) else row for prompt, row in zip(asked, ids, strict=True)]
    for text, row in zip(asked, ids, strict=True):
        if len(row) + max_new_tokens > model.max_length:
            raise InputError(
                f"the prompt {text!r:.60} has {len(row)} tokens: with {max_new_tokens} new ones the model takes "
                f"{model.max_length}, so take fewer examples or max_new_tokens"
            )
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: list[list[str]] = [[] for _ in ids]
    with tqdm(total=len(ids), desc="outputs", disable=not progress, delay=2) as bar:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            width = max(len(ids[i]) for i in chosen)
            pad = tokenizer.pad_token_id or 0
            rows = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in chosen], device=model.device)
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=model.device)
            out = module.generate(
                input_ids=rows,
                attention_mask=mask,
                num_beams=k,
                num_return_sequences=k,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
            )
            charge(examples=len(chosen))
            new = out[:, width:] if out.shape[1] > width else out
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            for place, i in enumerate(chosen):
                cut = _before_stop if isinstance(asked[i], str) else _unfenced
                found[i] = [cut(text) for text in texts[place * k : (place + 1) * k]]
            bar.update(len(chosen))
    model.train(training)
    return found


def target_loss(model: Model, asked: Sequence[str | Messages], code: Sequence[str], *, batch_size: int = 16) -> float:
    """Nats a token of the code and its end, given the prompts; over all tokens of all items."""
    return nats_a_token(target_nats(model, asked, code, batch_size=batch_size))


def nats_a_token(items: Sequence[tuple[float, int]]) -> float:
    """The mean over all tokens of items with so many nats and tokens.

    >>> nats_a_token([(3.0, 1), (1.0, 3)])
    1.0
    """
    return sum(nats for nats, _ in items) / max(sum(tokens for _, tokens in items), 1)


@torch.no_grad()
def target_nats(
    model: Model, asked: Sequence[str | Messages], code: Sequence[str], *, batch_size: int = 16
) -> list[tuple[float, int]]:
    """Nats and tokens of the code and its end, given the prompt, item by item."""
    training = model.training
    model.eval()
    rows = _encoded(model, asked, code)
    found = []
    for begin in range(0, len(rows), batch_size):
        part = [dict(row) for row in rows[begin : begin + batch_size]]
        table = TokenRows("rows", {"train": datasets.Dataset.from_list(part)}, pad=model.processor.pad_token_id or 0)
        batch = {name: value.to(model.device) for name, value in table.collate(model)(part).items()}
        labels = batch["labels"][:, 1:]
        logits = completion_loss(model, batch)["logits"][:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(1)
        found += list(zip(nats.tolist(), (labels != IGNORED).sum(1).tolist(), strict=True))
    model.train(training)
    return found


def _encoded(model: Model, asked: Sequence[str | Messages], code: Sequence[str]) -> list[dict[str, list[int]]]:
    for prompt in asked:
        if not isinstance(prompt, str):
            _chat(model, prompt)  # says what lacks
            break
    return encode(model, list(zip(asked, code, strict=True)))


def _chat(model: Model, prompt: Messages) -> str:
    """Messages as the tokenizer's template writes them, ready for the answer."""
    tokenizer: Any = model.processor
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"the tokenizer of {model.source or 'the model'} has no chat template: style='instruction'")
    return str(tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))


def _before_stop(text: str) -> str:
    return text.split(STOP)[0].rstrip()


def _unfenced(text: str) -> str:
    fenced = re.search(r"```\w*\n(.*?)(?:```|$)", text, re.DOTALL)
    return (fenced[1] if fenced else text).strip("\n").rstrip()


def _config(model: Model, kind: str) -> peft.PeftConfig:
    names = {name.split(".")[-1] for name, _ in model.backbone.named_modules()}
    attention, feed = ([name for name in known if name in names] for known in (ATTENTION, FEED_FORWARD))
    if not attention:
        raise InputError(f"{model.source or 'the model'} has none of the attention layers {', '.join(ATTENTION)}")
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if kind == "LORA":
        return peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=attention, **settings)
    if kind == "IA3":
        return peft.IA3Config(target_modules=attention + feed, feedforward_modules=feed, **settings)
    if kind == "PROMPT_TUNING":
        return peft.PromptTuningConfig(num_virtual_tokens=20, **settings)
    return peft.PrefixTuningConfig(num_virtual_tokens=10, **settings)


def _start_from_text(model: Model) -> None:
    """The tuned prompt starts as the embeddings of ``INITIAL``, repeated to its length."""
    adapted: Any = model.backbone
    ids = model.processor(INITIAL, add_special_tokens=False)["input_ids"]
    prompt = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
    repeated = (ids * math.ceil(len(prompt) / len(ids)))[: len(prompt)]
    with torch.no_grad():
        words = copy.deepcopy(adapted.get_base_model().get_input_embeddings())
        prompt.copy_(words(torch.tensor(repeated, device=prompt.device)))


def _drawn(count: int, seed: int, number: int) -> Any:
    return generator("codegen examples", seed, number).permutation(count)
