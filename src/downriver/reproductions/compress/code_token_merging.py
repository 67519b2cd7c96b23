"""Paper 69: subtokens of one identifier merged after the embeddings, against none, random merging and truncation.

The paper merges in CodeBERT, CodeT5 and their like. Here a BERT of four layers and a tokenizer of 4096 subtokens learn
Python's standard library by masked language modelling. Then every arm fine-tunes it, with its merge in place, to tell
from a function alone which of ten packages it comes from; whole files are held out. Random merging joins as many
neighbours as the identifiers have, anywhere; truncation keeps as many subtokens as there are groups.
"""

import ast
import functools
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from downriver.compress import add_token_merging
from downriver.core import Budget, InputError, Measurement, generator
from downriver.domains.code import GroupingTokenizer, SubtokenGrouper, merge_stats
from downriver.evaluate.evaluate import evaluate
from downriver.models import Model, bpe_tokenizer, small_language_model
from downriver.pretrain.masked_lm import masked_lm
from downriver.reproductions.paper import Paper
from downriver.study import Arm, above, better, keeps, shared, study
from downriver.tasks.task import Task
from downriver.training.engine import clone, fine_tune

paper = Paper(
    number=69,
    slug="code_token_merging",
    title="On the Effect of Token Merging on Pre-trained Models for Code",
    date="2025-07",
    room="compress",
    claim="Merging the hidden states of the subtokens of one unit saves a code model 1 to 19 % of its FLOPs and costs "
    "less than two points of F1 at worst.",
)

# width, files and steps of masked language modelling, functions of a package to train on and to test on, visits to them
SCALES = {"small": (64, 200, 40, 150, 50, 2400), "tiny": (32, 20, 4, 8, 4, 64)}
LAYERS, VOCABULARY, CONTEXT, BATCH = 4, 4096, 192, 16
PACKAGES, FILES, CHARACTERS = 10, 5, (120, 450)  # so many packages of so many files at least; length of a function


class RandomMerging(GroupingTokenizer):
    """Groups of neighbours drawn at random, as many of them as the identifiers would make."""

    def groups(self, encoding: Any, texts: Sequence[str]) -> list[int]:
        """Close as many of the joints between ordinary subtokens as merging identifiers closes."""
        proper = super().groups(encoding, texts)
        tokens = sum(group >= 0 for group in proper)
        closed = tokens - 1 - max(proper)
        joints = generator("random merging", zlib.crc32(texts[0].encode())).permutation(tokens - 3)[:closed] + 2
        opened = torch.ones(tokens, dtype=torch.long)
        opened[joints] = 0
        return [*(opened.cumsum(0) - 1).tolist(), *[-1] * (len(proper) - tokens)]


class Truncating(GroupingTokenizer):
    """No merging: of every text as many subtokens as it would have groups."""

    def __call__(self, text: Any, text_pair: Any = None, **settings: Any) -> Any:
        """Encode and cut."""
        encoded = super().__call__(text, text_pair, **settings)
        kept = encoded.pop("group_ids").amax(1) + 1
        beyond = torch.arange(encoded["input_ids"].shape[1]) >= kept[:, None]
        encoded["input_ids"][beyond] = self.pad_token_id
        encoded["attention_mask"][beyond] = 0
        for name in ("input_ids", "attention_mask"):
            encoded[name] = encoded[name][:, : int(kept.max())]
        return encoded


@study(
    "code_token_merging",
    title="Identifiers merged in a small encoder of Python sources",
    claims=[
        above("mean", on="FLOP saving", value=0.10),
        keeps("mean", than="none", on="accuracy", within=0.03),
        better("mean", than="random", on="accuracy"),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the files held out, the functions, the model and the order of the texts."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    width, files, steps, train, test, visits = SCALES[scale]

    @shared
    def data() -> tuple[Task, list[str]]:
        return functions(seed, train, test)

    @shared
    def pretrained() -> Model:
        texts = data()[1][:files]
        tokenizer = bpe_tokenizer(texts, VOCABULARY, context=CONTEXT)
        model = small_language_model(
            "masked-lm", tokenizer, width=width, layers=LAYERS, heads=4, context=CONTEXT, seed=seed
        )
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # nothing is seen often enough to be learnt by heart
        settings: Any = {"batch_tokens": BATCH * CONTEXT, "learning_rate": 2e-3, "seed": seed}
        return masked_lm(model, texts, f"{steps} steps", **settings)

    def measured(name: str) -> list[Measurement]:
        task, model = data()[0], pretrained()
        grouper = SubtokenGrouper()
        if name == "truncation":
            made = clone(model)
            made.processor = Truncating(model.processor, grouper)
        elif name == "none":
            made = model
        else:
            mode: Any = "learned" if name == "learned" else "mean"
            made = add_token_merging(model, grouper, mode=mode)
            if name == "random":
                made.processor = RandomMerging(model.processor, grouper)
        settings: Any = {"learning_rate": 1e-3, "batch_size": BATCH, "seed": seed}
        tuned = fine_tune(made.with_head(task), task, f"{visits} examples", **settings)
        rows = evaluate(tuned, task)
        if name in ("mean", "learned"):
            texts = task.rows("test")["text"]
            stats = merge_stats(texts, model.processor, grouper, model=made, max_length=CONTEXT, progress=False)
            rows.append(Measurement("positions", stats.ratio, direction="lower"))
            rows += [
                Measurement("FLOP saving" if part == "mean" else f"FLOP saving, {part}", value)
                for part, value in stats.saving.items()
            ]
        return rows

    for name in ("none", "mean", "learned", "random", "truncation"):
        yield Arm(name, functools.partial(measured, name))


def functions(seed: int, train: int, test: int) -> tuple[Task, list[str]]:
    """Functions of the ten packages that have most, a quarter of each one's files held out, and the other files."""
    packages = _packages()
    sizes = {name: sum(map(len, files.values())) for name, files in packages.items() if len(files) >= FILES}
    chosen = sorted(sorted(sizes, key=lambda name: (-sizes[name], name))[:PACKAGES])
    rng = generator("code_token_merging functions", seed)
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    held, seen = set(), set()
    for label, name in enumerate(chosen):
        files = list(packages[name])
        away = {files[i] for i in rng.permutation(len(files))[: -(-len(files) // 4)]}
        held |= away
        for split, count in (("train", train), ("test", test)):
            texts = [t for f in files if (f in away) == (split == "test") for t in packages[name][f]]
            new = [text for text in dict.fromkeys(texts) if text not in seen]
            seen |= set(new)
            rows[split] += [(new[i], label) for i in rng.permutation(len(new))[:count]]
    splits = {
        split: Dataset.from_dict({"text": [text for text, _ in found], "label": [label for _, label in found]})
        for split, found in rows.items()
    }
    others = [file for name in chosen for file in packages[name] if file not in held]
    read = [others[i].read_text(encoding="utf-8") for i in rng.permutation(len(others))]
    return Task("packages", "text-classification", splits, ("text",), "label", tuple(chosen), ("accuracy",)), read


@functools.cache
def _packages() -> dict[str, dict[Path, list[str]]]:
    """The functions of every file, by package; tests and what was installed besides are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    packages: dict[str, dict[Path, list[str]]] = {}
    for file in sorted(root.glob("*/**/*.py")):
        parts = file.relative_to(root).parts
        outside = {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts)
        if not outside and (found := list(_functions(file))):
            packages.setdefault(parts[0], {})[file] = found
    return packages


def _functions(file: Path) -> Iterator[str]:
    """The functions and methods of a file that are neither too short nor too long."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # some files are there to be bad
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno]).strip()
            if CHARACTERS[0] <= len(source) <= CHARACTERS[1]:
                yield source


studies = (reproduction,)
