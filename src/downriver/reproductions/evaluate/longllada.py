"""Paper 36: texts longer than in training, read by a masked diffusion model and by a causal one of the same size.

The paper asks LLaDA-8B and LLaMA-3-8B for needles. Here two Llamas of two layers, which differ in attention mask and
loss alone, learn the words of Python's standard library in rows of 128 tokens, and to recall: pairs (a key, then one
of that key's own eight values) lie in half of the rows, each twice, and of these rows the second value alone counts. A
needle is such a pair, and the question its key. Recall is learnt on rows of 64 first: from rows of 128 alone the
diffusion model does not learn it in this time. The base of the positions puts the critical dimension at half of a
head's, as LLaDA's does. Recall at the trained length is a claim, too: where it is little, the rest says nothing.
"""

import functools
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from downriver.core import Budget, InputError, Measurement, generator, seeded
from downriver.evaluate.longcontext import Needle, needle_grid, ppl_curve
from downriver.models import (
    MaskedDiffusionConfig,
    MaskedDiffusionLM,
    Model,
    diffusion_objective,
    extend_context,
    word_tokenizer,
)
from downriver.reproductions.paper import Paper
from downriver.study import Arm, above, better, shared, study
from downriver.training.engine import clone, fine_tune
from downriver.training.rows import IGNORED, TokenRows

paper = Paper(
    number=36,
    slug="longllada",
    title="LongLLaDA: Unlocking Long Context Capabilities in Diffusion LLMs",
    date="2025-06",
    room="evaluate",
    claim="Beyond the trained length a diffusion language model keeps its perplexity and finds recent needles where a "
    "causal one does not; a larger base of the positions widens the window without training.",
)

SCALES = {"small": (400, 600, 20, 12), "tiny": (2, 2, 2, 1)}  # steps on rows of 64, of 128; needles a cell; texts
TRAINED, BATCH = 128, 32
DEPTHS = (0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0)
RECENT, EARLY = (0.75, 1.0), (0.0, 0.25)
KNOWN, TWICE, FAR, GROWTH = (
    "recall at 128",
    "recall at 256",
    "recall of the recent at 384",
    "perplexity at 384 over 128",
)

WORDS, KEYS, VALUES, PAIRS = 256, 8, 8, 8  # words of the texts; keys; values of a key; pairs in a row


@study(
    "longllada",
    title="Beyond the trained length: a diffusion and a causal language model",
    claims=[
        above("diffusion", on=KNOWN, value=0.9),
        above("causal", on=KNOWN, value=0.9),
        better("diffusion", than="causal", on=FAR),
        better("diffusion", than="causal", on=GROWTH),
        better("diffusion, scaled", than="diffusion", on=TWICE),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the files held out, keys and values, rows, weights and needles."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    first, second, repeats, texts = SCALES[scale]

    @shared
    def words() -> Words:
        return Words(seed)

    @shared
    def rows() -> TokenRows:
        return words().rows(first * BATCH, second * BATCH)

    @shared
    def trained(kind: str) -> Model:
        return fine_tune(
            untrained(kind, words().tokenizer, seed),
            rows(),
            f"{first + second} steps",
            learning_rate=3e-3,
            batch_size=BATCH,
            schedule="cosine",
            betas=(0.9, 0.98),
            seed=seed,
            order=lambda visit: visit,
            objective=functools.partial(diffusion_objective, answers_only=True) if kind == "diffusion" else None,
        )

    def measured(kind: str, scaled: bool) -> list[Measurement]:
        model = trained(kind)
        if scaled:
            model = clone(model)
            extend_context(model, 2 * TRAINED, train_len=TRAINED)
        settings: Any = {"needles": words().needle, "repeats": repeats, "batch_size": repeats, "new_tokens": 1}
        grid = needle_grid(model, [128, 256, 384], DEPTHS, words().held, **settings, seed=seed, progress=False)
        curve = ppl_curve(model, words().long(3 * TRAINED)[:texts], max_length=3 * TRAINED, progress=False)
        ends = dict(zip((curve.context + 64).tolist(), curve.local.tolist(), strict=True))
        return [
            Measurement(KNOWN, grid.mean(128)),
            Measurement(TWICE, grid.mean(256)),
            Measurement(FAR, grid.mean(384, RECENT)),
            Measurement("recall of the early at 384", grid.mean(384, EARLY)),
            Measurement("perplexity at 128", ends[128], direction="lower"),
            Measurement(GROWTH, ends[384] / ends[128], direction="lower"),
        ]

    for kind in ("diffusion", "causal"):
        yield Arm(kind, functools.partial(measured, kind, False))
        yield Arm(f"{kind}, scaled", functools.partial(measured, kind, True))


class Words:
    """The commonest words of the standard library's files, and rarer ones as keys and values.

    ``held`` are the texts of a tenth of the files, ``tokenizer`` knows a token a word.
    """

    def __init__(self, seed: int) -> None:
        self.seed, rng = seed, generator("longllada words", seed)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        found = [re.findall("[a-z]+", file.read_text(encoding="utf-8", errors="replace").lower()) for file in files]
        ranked = [word for word, _ in Counter(word for words in found for word in words).most_common()]
        common, rare = set(ranked[:WORDS]), rng.permutation(ranked[WORDS : WORDS + KEYS * (1 + VALUES)]).tolist()
        self.keys, self.values = rare[:KEYS], np.array(rare[KEYS:]).reshape(KEYS, VALUES)

        self.tokenizer = word_tokenizer([" ".join([*common, *rare])], end=False)
        texts = [" ".join(word for word in words if word in common) for words in found]
        order = rng.permutation(len(files))
        self.held = [texts[n] for n in order[: len(files) // 10]]
        self.train = np.concatenate([self._ids(texts[n]) for n in order[len(files) // 10 :]])

    def long(self, tokens: int) -> list[str]:
        """The held-out texts of at least so many tokens."""
        return [text for text in self.held if len(text.split()) >= tokens]

    def needle(self, rng: np.random.Generator) -> Needle:
        """A pair to hide."""
        key, value = int(rng.integers(KEYS)), int(rng.integers(VALUES))
        return Needle(f"{self.keys[key]} {self.values[key, value]}", self.keys[key], self.values[key, value])

    def rows(self, first: int, second: int) -> TokenRows:
        """``first`` rows of pairs, 64 tokens long, then ``second`` of 128, every other one plain text."""
        rng = generator("longllada rows", self.seed)
        rows = [self._pairs(rng, TRAINED // 2) for _ in range(first)]
        rows += [self._pairs(rng, TRAINED) if n % 2 else self._plain(rng) for n in range(second)]
        return TokenRows("pairs and texts", {"train": Dataset.from_list(rows)}, pad=self.tokenizer.pad_token_id)

    def _plain(self, rng: np.random.Generator) -> dict[str, list[int]]:
        ids = [self.tokenizer.bos_token_id, *self._passage(rng, TRAINED - 1).tolist()]
        return {"input_ids": ids, "labels": ids}

    def _pairs(self, rng: np.random.Generator, length: int) -> dict[str, list[int]]:
        keys, values = rng.permutation(KEYS)[:PAIRS], rng.integers(VALUES, size=PAIRS)
        pairs = np.array([self._ids(f"{self.keys[k]} {self.values[k, v]}") for k, v in zip(keys, values, strict=True)])
        order = rng.permutation(np.repeat(np.arange(PAIRS), 2))
        again = np.array([pair in order[:n] for n, pair in enumerate(order)])
        labels = np.stack([np.full(2 * PAIRS, IGNORED), np.where(again, pairs[order, 1], IGNORED)], 1)
        text = self._passage(rng, length - 1 - 4 * PAIRS)
        places = np.repeat(np.sort(rng.integers(len(text) + 1, size=2 * PAIRS)), 2)
        return {
            "input_ids": [self.tokenizer.bos_token_id, *np.insert(text, places, pairs[order].ravel()).tolist()],
            "labels": [IGNORED, *np.insert(np.full_like(text, IGNORED), places, labels.ravel()).tolist()],
        }

    def _passage(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = int(rng.integers(len(self.train) - length))
        return self.train[start : start + length]

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def untrained(kind: str, tokenizer: Any, seed: int) -> Model:
    """Two Llama layers of width 64, causal or not."""
    settings: Any = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TRAINED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},  # d_c = 16 of d = 32
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with seeded("longllada weights", seed):
        if kind == "causal":
            causal = LlamaForCausalLM(LlamaConfig(**settings))
            return Model(causal, kind="causal-lm", pooling="last", processor=tokenizer, max_length=TRAINED)
        config = MaskedDiffusionConfig(**settings, mask_token_id=tokenizer.mask_token_id)
        return Model(MaskedDiffusionLM(config), processor=tokenizer, max_length=TRAINED)


studies = (reproduction,)
