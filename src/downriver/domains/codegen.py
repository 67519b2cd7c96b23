"""Code from words: pairs of intent and code, prompts with and without examples, tuning recipes, and scored outputs.

Reach for ``study.codegen_study`` to compare ways of adapting a model to them. Data format, recipes and metrics are
those of Weyssow et al., "Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language
Models" (2023), state of January 2024. Training is by AdamW in place of Adafactor.
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
from typing import Any

import datasets
import peft
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from tqdm import tqdm

from downriver.core import Budget, InputError, charge, generator, seeded, unknown
from downriver.data.synth.dpo import encode
from downriver.models.model import Model
from downriver.nn.preference import IGNORED
from downriver.training import TokenRows, fine_tune
from downriver.training.engine import clone

PROMPT = "### Instruction:\n{intent}\n### Response:\n"
STOP = "\n###"
INITIAL = "Generate Python code given a natural language instruction."
"""Text whose embeddings a tuned prompt starts from."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
FEED_FORWARD = ("down_proj", "fc2", "dense_4h_to_h")
Pair = Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """How one method is trained: its learning rate and what peft builds it from (None: all weights)."""

    learning_rate: float
    peft_type: str | None


RECIPES = {
    "full": Recipe(5e-5, None),
    "lora": Recipe(3e-4, "LORA"),
    "ia3": Recipe(3e-3, "IA3"),
    "prompt": Recipe(3e-3, "PROMPT_TUNING"),
    "prefix": Recipe(3e-2, "PREFIX_TUNING"),
}
"""The paper's: LoRA of rank 16, alpha 32 and dropout 0.05 on queries, keys and values; (IA)³ on these and the
feed-forward layers; 20 virtual tokens of a prompt; 10 of a prefix."""


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

    def token_rows(self, model: Model, splits: Sequence[str] = ("train", "validation")) -> TokenRows:
        """Prompt, code and end of text; the loss is on the last two."""
        rows = {
            split: datasets.Dataset.from_list(
                encode(model, [(PROMPT.format(intent=row["intent"]), row["code"]) for row in self.splits[split]])
            )
            for split in splits
        }
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
    seed: int = 0,
) -> Model:
    """The model adapted to the task by one of ``RECIPES``; the weights are those with the lowest validation loss.

    ``budget`` is five epochs by default, ``learning_rate`` the recipe's (they differ 600 times: one rate for all
    methods compares rates). Raises ``InputError`` for unknown methods and models without the layers that it needs.
    """
    if method not in RECIPES:
        raise unknown("method", method, RECIPES)
    recipe, tuned = RECIPES[method], clone(model)
    if recipe.peft_type:
        with seeded("codegen", method, seed):
            tuned.backbone = peft.get_peft_model(tuned.backbone, _config(tuned, recipe.peft_type))
        if method == "prompt":
            _start_from_text(tuned)
    return fine_tune(
        tuned,
        task.token_rows(tuned),
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


def prompts(
    intents: Sequence[str], examples: Sequence[Pair] = (), *, shots: int = 0, retrieve: bool = False, seed: int = 0
) -> list[str]:
    """A prompt for every intent, after ``shots`` examples: drawn at random, or with ``retrieve`` the most similar ones
    (TF-IDF), the nearest last. An example with the very intent is never shown.

    >>> prompts(["add"], [{"intent": "add", "code": "x"}, {"intent": "sub", "code": "y"}], shots=1)[0].count("add")
    1
    """
    if shots and len(examples) <= shots:
        raise InputError(f"{len(examples)} examples: more than {shots} are expected")
    found = []
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
        before = "".join(PROMPT.format(intent=texts[i]) + examples[i]["code"] + "\n" for i in chosen)
        found.append(before + PROMPT.format(intent=intent))
    return found


@torch.no_grad()
def generate_code(
    model: Model,
    asked: Sequence[str],
    *,
    k: int = 10,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = True,
) -> list[list[str]]:
    """The k best outputs of a beam search of width k for each prompt, the best first; cut at the end of the code.

    Raises ``InputError`` where a prompt leaves no room for ``max_new_tokens``: cut examples make no fair comparison.
    """
    tokenizer: Any = model.processor
    module: Any = model.backbone
    training = model.training
    model.eval()
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [start + row for row in tokenizer(list(asked), add_special_tokens=False)["input_ids"]]
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
                found[i] = [text.split(STOP)[0].rstrip() for text in texts[place * k : (place + 1) * k]]
            bar.update(len(chosen))
    model.train(training)
    return found


@torch.no_grad()
def target_loss(model: Model, asked: Sequence[str], code: Sequence[str], *, batch_size: int = 16) -> float:
    """Nats a token of the code and its end, given the prompts; over all tokens of all items."""
    training = model.training
    model.eval()
    rows = encode(model, list(zip(asked, code, strict=True)))
    total = count = 0.0
    for begin in range(0, len(rows), batch_size):
        part = [dict(row) for row in rows[begin : begin + batch_size]]
        table = TokenRows("rows", {"train": datasets.Dataset.from_list(part)}, pad=model.processor.pad_token_id or 0)
        batch = {name: value.to(model.device) for name, value in table.collate(model)(part).items()}
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, count = total + float(completion_loss(model, batch)["loss"]) * tokens, count + tokens
    model.train(training)
    return total / max(count, 1)


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
