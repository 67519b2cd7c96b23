"""Tags before segments say how well each is wanted; a model that learns text behind its tag can be asked for the good.

Reach for it through ``pretrain.conditional_pretraining``, or alone to tag rows for a training of your own. Korbak et
al. (2023), «Pretraining Language Models with Human Preferences». Beyond the paper: more tags than two, by quantiles of
the score, and rows for new tags of a model that was pretrained without them, at the mean of the old ones.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from downriver.core import InputError, generator
from downriver.data.condition.annotate import SegmentScorer, scores_of
from downriver.data.condition.encode import IGNORED
from downriver.data.condition.generate import continue_ids
from downriver.data.synth.diversity import self_bleu
from downriver.models.model import Model


@dataclass(frozen=True)
class ControlTokens:
    """The tags, and how they are put.

    Parameters
    ----------
    aligned, misaligned
        The tags of the best and of the worst segments (the paper's).
    drop
        The share of segments left without a tag, so that the model still works without (0.01; 0.1 for code).
    n_bins
        2: aligned or misaligned, by the threshold of ``annotate``. More: bins with equally many segments, the tags
        between ``<|aligned-1|>``, ``<|aligned-2|>``, … from good to bad.

    >>> ControlTokens(n_bins=4).tags
    ('<|aligned|>', '<|aligned-1|>', '<|aligned-2|>', '<|misaligned|>')
    """

    aligned: str = "<|aligned|>"
    misaligned: str = "<|misaligned|>"
    drop: float = 0.01
    n_bins: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise InputError(f"drop is {self.drop}: a share from 0 to 1 is expected")
        if self.n_bins < 2:
            raise InputError(f"n_bins is {self.n_bins}: at least 2 are expected")
        if not self.aligned or not self.misaligned or self.aligned == self.misaligned:
            raise InputError(f"tags {self.aligned!r} and {self.misaligned!r}: two different texts are expected")

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags, from good to bad."""
        stem = self.aligned.removesuffix("|>")
        end = self.aligned[len(stem) :]
        return (self.aligned, *(f"{stem}-{i}{end}" for i in range(1, self.n_bins - 1)), self.misaligned)

    def ids(self, tokenizer: Any) -> list[int]:
        """The token ids of the tags; ``InputError`` when the tokenizer does not have them."""
        known = tokenizer.get_vocab()
        for tag in self.tags:
            if tag not in known:
                raise InputError(f"the tokenizer has no token {tag!r}: apply(model) adds the tags")
        return [known[tag] for tag in self.tags]

    def apply(self, model: Model) -> Model:
        """A copy of the model whose tokenizer and embeddings have the tags.

        New rows (of input embeddings, and of output embeddings where those are apart) are the mean of the old ones;
        the logits of old tokens are what they were. With LoRA afterwards, train the new rows too:
        ``trainable_token_indices=control.ids(model.processor)``.

        Raises ``InputError`` when a tag is in the vocabulary already, and for a model with an adapter.
        """
        backbone: Any = model.backbone
        if model.kind != "causal-lm" or model.processor is None:
            raise InputError(f"{model.source or 'the model'} is a {model.kind}: a causal-lm with tokenizer is expected")
        if hasattr(backbone, "get_base_model"):
            raise InputError("the model has an adapter: add the tags before it")
        for tag in self.tags:
            if tag in model.processor.get_vocab():
                raise InputError(f"the tag {tag!r} is in the vocabulary already: choose another text for it")
        new = copy.deepcopy(model)
        tokenizer, backbone = new.processor, new.backbone
        old = len(tokenizer)
        tokenizer.add_tokens(list(self.tags), special_tokens=True)
        tied = backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight
        if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
            backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in {backbone.get_input_embeddings(), *([] if tied else [backbone.get_output_embeddings()])}:
                for rows in [layer.weight, *([layer.bias] if getattr(layer, "bias", None) is not None else [])]:
                    rows[old : len(tokenizer)] = rows[:old].mean(dim=0)
        return new

    def bins(self, annotated: datasets.Dataset) -> list[list[int]]:
        """The number of the tag of every segment: 0 is the best."""
        if self.n_bins == 2:
            return [[int(bad) for bad in row] for row in annotated["misaligned"][:]]
        scores = annotated["scores"][:]
        every = np.concatenate([np.asarray(row) for row in scores])
        edges = np.quantile(every, np.arange(1, self.n_bins) / self.n_bins)
        if len(np.unique(edges)) < len(edges):
            warnings.warn(f"equal scores: some of the {self.n_bins} bins are empty", stacklevel=2)
        return [np.searchsorted(edges, row, side="left").tolist() for row in scores]


def segment_rows(
    annotated: datasets.Dataset, tokenizer: Any, control: ControlTokens | None = None, *, seed: int = 0
) -> datasets.Dataset:
    """Token rows of annotated documents: start token, segments (each behind its tag with ``control``), end token.

    ``token_scores`` (float32) give every token the score of its segment; tags and the start token have that of the
    segment they lead, the end token that of the last. Everything is learnt but the start token. Which tags are left
    out depends on ``seed``.

    >>> from downriver.data.condition import annotate
    >>> from downriver.models.tokenizers import word_tokenizer
    >>> rows = annotate([{"text": "hi. no!"}], lambda texts: np.array(["no" in t for t in texts], float), threshold=0.5)
    >>> segment_rows(rows, word_tokenizer(["hi . no !"]))["token_scores"][0]
    [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    """
    texts = annotated["texts"][:]
    flat = [segment for row in texts for segment in row]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    tags = control.ids(tokenizer) if control else []
    bins = iter(control.bins(annotated)) if control else iter(())
    tagged = iter(generator("control tokens", seed).random(len(flat)) >= (control.drop if control else 1))
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    first, last = [start] if start is not None else [], [end] if end is not None else []
    columns: dict[str, list[list[Any]]] = {"input_ids": [], "labels": [], "token_scores": []}
    for scores in annotated["scores"][:]:
        ids, values = list(first), [scores[0]] * len(first)
        row_bins = next(bins) if control else [0] * len(scores)
        for score, level in zip(scores, row_bins, strict=True):
            segment = next(encoded)
            if next(tagged):
                segment = [tags[level], *segment]
            ids += segment
            values += [score] * len(segment)
        columns["input_ids"].append(ids + last)
        columns["labels"].append([*[IGNORED] * len(first), *ids[len(first) :], *last])
        columns["token_scores"].append(values + [scores[-1]] * len(last))
    types = {"input_ids": pa.int64(), "labels": pa.int64(), "token_scores": pa.float32()}
    return datasets.Dataset(pa.table({name: pa.array(columns[name], pa.list_(kind)) for name, kind in types.items()}))


def sample_aligned(
    model: Model,
    prompts: Sequence[str] | None = None,
    *,
    control: ControlTokens | None = None,
    tag: str | None = "aligned",
    control_after_prompt: bool = True,
    n: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """Sample texts behind a tag; no tag is ever part of what comes out.

    Parameters
    ----------
    prompts
        Continued in turn; default: none, texts from their beginning.
    control, tag
        The tags (default: the paper's two), and which of them is put: ``aligned``, ``misaligned``, a tag itself, or
        ``None`` (a model without tags; with them, a warning).
    control_after_prompt
        The tag stands between prompt and continuation, as it stands before a segment in training; else before both.
    n
        How many samples; default 4096 (the paper's), or one a prompt.
    temperature, top_p, max_new_tokens
        The paper's: 0.7, 0.9, 128 (640 for code).

    Raises ``InputError`` for an unknown tag, or a tokenizer without the tags that a tag is asked of.

    >>> from downriver.models import small
    >>> lm = ControlTokens().apply(small("causal-lm", "nano"))
    >>> [type(text) for text in sample_aligned(lm, ["the river"], max_new_tokens=4)]
    [<class 'str'>]
    """
    control, tokenizer = control or ControlTokens(), model.processor
    has_tags = set(control.tags) <= set(tokenizer.get_vocab())
    if tag is None and has_tags:
        warnings.warn("the model has learnt tags and is asked without one", stacklevel=2)
    named = {"aligned": control.aligned, "misaligned": control.misaligned}.get(tag or "", tag)
    if named is not None and named not in control.tags:
        raise InputError(f"tag {tag!r}: aligned, misaligned or one of {', '.join(control.tags)} is expected")
    forbidden = control.ids(tokenizer) if tag is not None or has_tags else []
    asked = [tokenizer.convert_tokens_to_ids(named)] if named is not None else []
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    encoded = [list(ids) for ids in tokenizer(list(prompts or [""]), add_special_tokens=False)["input_ids"]]
    prefixes = [[*start, *ids, *asked] if control_after_prompt else [*start, *asked, *ids] for ids in encoded]
    n = (len(prefixes) if prompts else 4096) if n is None else n
    found = continue_ids(
        model,
        [prefixes[i % len(prefixes)] for i in range(n)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        forbidden=forbidden,
        seed=seed,
        batch_size=batch_size,
    )
    return tokenizer.batch_decode(found, skip_special_tokens=True)


def misalignment_report(
    samples: Sequence[str], scorer: SegmentScorer | Any, *, of: int = 25, hit: float = 0.0
) -> dict[str, float]:
    """How bad samples are, and how varied.

    ``mean`` and ``rate`` (the share above ``hit``) of the scores, ``expected_max`` of ``of`` samples (the mean of the
    largest in all groups of 25 that could be drawn, the paper's number; NaN for fewer samples), ``self_bleu`` (1:
    every sample has a copy), and ``distinct_1`` to ``distinct_3``, the share of word n-grams that are different. An
    empty sample scores 0.

    >>> bad = lambda texts: np.array(["bad" in text for text in texts], float)
    >>> report = misalignment_report(["good day", "bad day"], bad, of=2)
    >>> report["mean"], report["rate"], report["expected_max"], report["distinct_1"]
    (0.5, 0.5, 1.0, 0.75)
    """
    if not len(samples):
        raise InputError("no sample is given: one at least is expected")
    scores = np.zeros(len(samples))
    spoken = [i for i, sample in enumerate(samples) if sample.strip()]
    if spoken:
        scores[spoken] = scores_of(scorer, [samples[i] for i in spoken])
    report = {
        "mean": float(scores.mean()),
        "rate": float((scores > hit).mean()),
        "expected_max": _expected_max(np.sort(scores), of),
        "self_bleu": self_bleu(samples),
    }
    words = [sample.split() for sample in samples]
    for order in (1, 2, 3):
        grams = [gram for row in words for gram in _ngrams(row, order)]
        report[f"distinct_{order}"] = len(set(grams)) / len(grams) if grams else float("nan")
    return report


def _ngrams(words: Sequence[str], order: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(order)), strict=False)


def _expected_max(ascending: np.ndarray, of: int) -> float:
    """The expected largest of ``of`` scores drawn without replacement: Σ x₍ᵢ₎ C(i-1, k-1) / C(n, k)."""
    n = len(ascending)
    if n < of:
        return float("nan")
    chance, total = of / n, 0.0  # that the largest of all is drawn
    for i in range(n, of - 1, -1):
        total += chance * float(ascending[i - 1])
        chance *= (i - of) / (i - 1) if i > 1 else 0.0
    return total
