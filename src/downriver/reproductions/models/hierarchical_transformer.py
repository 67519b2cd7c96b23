"""Paper 31: a language model of bytes and words against a twin on byte pairs, at equal FLOPs of training.

The paper trains up to 7B parameters and goes on in German. Here both twins read the docstrings of Python's standard
library for as many FLOPs, then the same passages of C++ headers (those that torch brings), which are new to both.
What counts are bits per byte: on held-out docstrings; on the unchanged rest of a passage whose first part has one
letter in ten perturbed, over what it takes without; on headers after going on, and how much the docstrings suffered.
Steps are words a byte for HAT, tokens a byte for the twin. ``full`` has the sizes of a longer check, some ten minutes a
seed.
"""

import ast
import functools
import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from downriver.core import Budget, InputError, Measurement, generator, metered, seeded
from downriver.models import HATConfig, HATForCausalLM, HATTokenizer, Model, bpe_tokenizer, small_language_model
from downriver.models.hat_tokenizer import PAD, WORD
from downriver.reproductions.paper import Paper
from downriver.study import Arm, below, better, shared, study
from downriver.training.engine import fine_tune
from downriver.training.rows import TokenRows

paper = Paper(
    number=31,
    slug="hierarchical_transformer",
    title="Hierarchical Autoregressive Transformers: Combining Byte- and Word-Level Processing for Robust, Adaptable "
    "Language Models",
    date="2025-01",
    room="models",
    claim="A byte-level encoder and decoder round a word-level backbone match subword models, suffer less from "
    "perturbed input, and adapt to a new language faster, better and with less forgetting.",
)

CLEAN, OVER, LOST = "bits per byte", "bits per byte over BPE's", "bits per byte lost to perturbed letters"
STEPS, SECONDS, NEW, FORGOTTEN = (
    "steps per new byte",
    "seconds per new MB",
    "bits per new byte",
    "bits per byte forgotten",
)
CHARACTERS, BATCH, SHARE = 256, 8, 0.1


@dataclass(frozen=True)
class Scale:
    """Layers of encoder and decoder (of width ``width`` / 2), of both backbones; training in FLOPs, then passages."""

    byte_layers: int
    layers: int
    width: int
    vocabulary: int
    flops: float
    passages: int
    held: int
    files: int


SCALES = {
    "full": Scale(2, 4, 128, 4096, 5e12, 4000, 100, 1000),
    "small": Scale(1, 2, 128, 4096, 3e11, 240, 40, 100),
    "tiny": Scale(1, 1, 32, 400, 1e9, 16, 4, 12),
}


@dataclass(frozen=True)
class Twin:
    """A language model, and how it writes a text: opening, symbols or tokens, closing."""

    model: Model
    encode: Callable[[str], list[int]]
    steps: Callable[[str], int]
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    pad: int

    def ids(self, *parts: str) -> list[int]:
        return [*self.opening, *(i for part in parts if part for i in self.encode(part)), *self.closing]

    def trained(self, texts: Sequence[str], budget: str, seed: int, rate: float) -> "Twin":
        """A copy trained on the texts."""
        rows = Dataset.from_dict({"input_ids": [self.ids(text) for text in texts]})
        task = TokenRows("passages", {"train": rows}, self.pad)
        settings: Any = {"learning_rate": rate, "batch_size": BATCH, "schedule": "cosine", "seed": seed}
        model = fine_tune(self.model, task, budget, **settings)
        return Twin(model, self.encode, self.steps, self.opening, self.closing, self.pad)

    @torch.no_grad()
    def bits(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> float:
        """Bits per byte of the texts, each after its context."""
        total, contexts = 0.0, contexts or [""] * len(texts)
        for start in range(0, len(texts), 2 * BATCH):
            pairs = list(zip(contexts[start : start + 2 * BATCH], texts[start : start + 2 * BATCH], strict=True))
            rows = [torch.tensor(self.ids(*pair)) for pair in pairs]
            ids = pad_sequence(rows, batch_first=True, padding_value=self.pad)
            targets = torch.full_like(ids, -100)
            for row, (context, _) in enumerate(pairs):
                first = 1 + len(self.encode(context)) if context else 1
                targets[row, first : len(rows[row])] = rows[row][first:]
            mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
            logits = self.model(input_ids=ids, attention_mask=mask.long())["logits"]
            total += F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum").item()
        return total / math.log(2) / sum(len(text.encode()) for text in texts)


@study(
    "hierarchical_transformer",
    title="Bytes and words against byte pairs, at equal FLOPs",
    claims=[
        below("HAT", on=OVER, value=1.10),
        better("HAT", than="BPE", on=LOST),
        better("HAT", than="BPE", on=STEPS),
        better("HAT", than="BPE", on=SECONDS),
        better("HAT", than="BPE", on=NEW),
        better("HAT", than="BPE", on=FORGOTTEN),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the files, the models, the order of the texts and the perturbed letters."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    size = SCALES[scale]

    @shared
    def texts() -> tuple[list[str], list[str]]:
        return passages(docstrings(), "docstrings", seed, size.files, size.held)

    @shared
    def new_texts() -> tuple[list[str], list[str]]:
        return passages(headers(), "headers", seed, size.files, size.held)

    @shared
    def twin(name: str) -> Twin:
        train, _ = texts()
        start = hat(size, seed) if name == "HAT" else bpe(size, seed, train)
        return start.trained(train, f"{size.flops} flops", seed, 2e-3)

    @shared
    def clean(name: str) -> float:
        return twin(name).bits(texts()[1])

    def measured(name: str) -> list[Measurement]:
        own, (_, held), (new, new_held) = twin(name), texts(), new_texts()
        contexts, rest = zip(*map(halves, held), strict=True)
        rng = generator("perturbed", seed)
        perturbed = [perturb(context, SHARE, rng) for context in contexts]
        new = new[: size.passages]
        with metered() as meter:
            adapted = own.trained(new, f"{len(new) // BATCH} steps", seed, 1e-3)
        new_bytes = sum(len(text.encode()) for text in new)
        found = {
            CLEAN: clean(name),
            OVER: clean(name) / clean("BPE"),
            LOST: own.bits(rest, perturbed) - own.bits(rest, contexts),
            STEPS: sum(map(own.steps, new)) / new_bytes,
            SECONDS: meter.cost.seconds / new_bytes * 1e6,
            NEW: adapted.bits(new_held),
            "bits per new byte before": own.bits(new_held),
            FORGOTTEN: adapted.bits(held) - clean(name),
        }
        return [Measurement(metric, value, direction="lower") for metric, value in found.items()]

    for name in ("HAT", "BPE"):
        yield Arm(name, functools.partial(measured, name))


def hat(size: Scale, seed: int) -> Twin:
    """The hierarchical model; a last [W] closes the last word of a text."""
    byte_sizes = _sizes(size.width // 2, size.byte_layers)
    config = HATConfig(encoder=byte_sizes, decoder=byte_sizes, backbone=_sizes(size.width, size.layers))
    with seeded("hat", seed):
        model = Model(HATForCausalLM(config), kind="causal-lm", pooling="last", source="HAT")
    tokenizer = HATTokenizer()
    return Twin(model, tokenizer.stream, lambda text: len(tokenizer.words(text)), (), (WORD,), PAD)


def bpe(size: Scale, seed: int, texts: Sequence[str]) -> Twin:
    """The Llama on byte pairs learnt from the texts."""
    tokenizer = bpe_tokenizer(texts, size.vocabulary)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    sizes: Any = {"width": size.width, "layers": size.layers, "heads": 4, "context": 2 * CHARACTERS, "seed": seed}
    model = small_language_model("causal-lm", tokenizer, **sizes)
    return Twin(model, encode, lambda text: len(encode(text)), (tokenizer.bos_token_id,), (), tokenizer.pad_token_id)


def _sizes(width: int, layers: int) -> dict[str, int]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers} | heads


def docstrings() -> dict[str, Callable[[], str]]:
    """Of every file of the standard library: what reads its docstrings."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if "site-packages" not in path.parts and "test" not in path.parts]
    return {str(path.relative_to(root)): functools.partial(_documentation, path) for path in sorted(found)}


def headers() -> dict[str, Callable[[], str]]:
    """The C++ headers of torch's core."""
    root = Path(torch.__file__).parent / "include" / "c10"
    return {
        str(path.relative_to(root)): functools.partial(path.read_text, "utf-8", "replace")
        for path in sorted(root.rglob("*.h"))
    }


def passages(
    sources: dict[str, Callable[[], str]], name: str, seed: int, files: int, held: int
) -> tuple[list[str], list[str]]:
    """Passages of equal length to train on, and ``held`` others of files of their own, a fifth of ``files``."""
    names = sorted(sources)
    order = [names[i] for i in generator(name, "files", seed).permutation(len(names))[:files]]
    rng = generator(name, "passages", seed)

    def drawn(chosen: Sequence[str]) -> list[str]:
        texts = [sources[file]() for file in chosen]
        cut = [t[i : i + CHARACTERS].strip() for t in texts for i in range(0, len(t) - CHARACTERS, CHARACTERS)]
        return [cut[i] for i in rng.permutation(len(cut))]

    outside = max(1, len(order) // 5)
    return drawn(order[outside:]), drawn(order[:outside])[:held]


def halves(text: str) -> tuple[str, str]:
    """A text cut before the first space of its second half (or at its middle), where both twins cut too."""
    middle = text.find(" ", len(text) // 2)
    middle = middle if 0 < middle < len(text) - 1 else len(text) // 2
    return text[:middle], text[middle:]


def perturb(text: str, share: float, rng: np.random.Generator) -> str:
    """A share of the letters is exchanged with the next character, left out, doubled by another letter, replaced by
    one, or put in upper case.

    >>> perturb("the river runs to the sea", 0.0, generator("example"))
    'the river runs to the sea'
    """
    letters, found, place = "abcdefghijklmnopqrstuvwxyz", [], 0
    while place < len(text):
        here, other = text[place], letters[rng.integers(26)]
        place += 1
        if not here.isalpha() or rng.random() >= share:
            found.append(here)
            continue
        kind = rng.integers(5)
        if kind == 0 and place < len(text):
            found += [text[place], here]
            place += 1
        else:
            found.append([here, "", here + other, other, here.upper()][kind])
    return "".join(found)


def _documentation(path: Path) -> str:
    described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    try:
        nodes = ast.walk(ast.parse(path.read_text("utf-8", "replace")))
    except (SyntaxError, ValueError):  # some files are there to be bad
        return ""
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, described))))


studies = (reproduction,)
