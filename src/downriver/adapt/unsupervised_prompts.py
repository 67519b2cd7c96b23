"""Learn a prompt and the labels of unlabelled texts together, with nothing but queries to a language model.

Reach for it when a model behind an API should sort texts and nobody has labelled any. Zhang et al., "On Unsupervised
Prompt Learning for Classification with Black-box Language Models" (2024), on the optimiser of black-box discrete prompt
learning (Diao et al. 2023). The paper's abstract leaves open how reliable texts are chosen (here: the most confident of
every class, more of them every epoch) and how demonstrations are drawn (here: balanced over classes). The paper's
second version writes prompts by critique instead (``writer``). Probabilities step along the plain gradient: Adam's
weight decay has no meaning on the simplex.
"""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from downriver.adapt.prompt_critique import Critique
from downriver.core import InputError, atomic_write, generator, unknown
from downriver.models.chat.protocol import ChatModel

Array = np.ndarray
Estimate = Literal["exact", "bdpl"]
CONTENT_FREE = "N/A"
CLIP = 3.0
"""Largest norm of a gradient: the value of the optimiser's released code."""


class LabelScorer:
    """A language model as a classifier: log-probabilities of label words after a prompt, every prompt asked once.

    With a model that scores continuations (``HFChat``) they are log-likelihoods, summed over a word's tokens; with any
    other one, shares among ``samples`` answers, one added to each class. ``calls`` counts the prompts asked.
    """

    def __init__(self, lm: ChatModel, words: Sequence[str], *, samples: int = 8, seed: int = 0) -> None:
        self.lm, self.words, self.samples, self.seed, self.calls = lm, list(words), samples, seed, 0
        self._known: dict[str, Array] = {}

    def new(self, prompts: Sequence[str]) -> int:
        """How many calls these prompts would take."""
        return len(set(prompts) - self._known.keys())

    def __call__(self, prompts: Sequence[str]) -> Array:
        """(prompts, classes), normalised."""
        waiting = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        self.calls += len(waiting)
        if waiting and "loglikelihood" in self.lm.capabilities:
            found = self.lm.loglikelihood([(prompt, word) for prompt in waiting for word in self.words])
            scores = np.array([answer.total for answer in found]).reshape(len(waiting), -1)
        elif waiting:
            answers = self.lm.generate(waiting, max_tokens=8, temperature=1.0, n=self.samples, seed=self.seed)
            counts = np.array(
                [np.bincount(list(map(self._said, each)), minlength=len(self.words) + 1) for each in answers]
            )
            scores = np.log(counts[:, 1:] + 1.0)
        if waiting:
            scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
            self._known |= dict(zip(waiting, scores, strict=True))
        return np.array([self._known[prompt] for prompt in prompts])

    def _said(self, answer: Any) -> int:
        """Which word an answer begins with, from 1; of "no" and "no idea" the longer one. 0 for none."""
        text = answer.text.strip().lower()
        starts = [(len(w), k) for k, w in enumerate((w.strip().lower() for w in self.words), 1) if text.startswith(w)]
        return max(starts, default=(0, 0))[1]


def project_simplex(rows: Array) -> Array:
    """The nearest points of the probability simplex, row by row (Euclidean, exact by sorting).

    >>> project_simplex(np.array([[0.5, 0.9], [0.2, 0.8]])).round(2).tolist()
    [[0.3, 0.7], [0.2, 0.8]]
    """
    falling = -np.sort(-rows, axis=1)
    above = (falling.cumsum(axis=1) - 1) / np.arange(1, rows.shape[1] + 1)
    last = (falling > above).sum(axis=1) - 1
    return np.maximum(rows - above[np.arange(len(rows)), last][:, None], 0)


def policy_gradient(drawn: Array, losses: Array, p: Array, estimate: Estimate = "exact") -> Array:
    """ĝ = 1/(I − 1) Σ_j ∇ log P(t^(j)) (L_j − mean L), for prompts ``drawn`` (I, n) of the rows of ``p`` (n, N).

    ``exact``: ∂ log P / ∂p_{i,c} is 1/p_{i,c} for the token drawn and 0 for others; ``bdpl``: −1/p for the others, as
    in the released code.
    """
    picked = drawn[:, :, None] == np.arange(p.shape[1])
    signs = np.where(picked, 1.0, -1.0 if estimate == "bdpl" else 0.0)
    weights = (losses - losses.mean()) / (len(losses) - 1)
    return np.tensordot(weights, signs, axes=1) / np.maximum(p, 1e-12)


def pmi_ngrams(texts: Sequence[str], count: int) -> list[str]:
    """Neighbouring words that belong together, by pointwise mutual information times frequency, then frequent words.

    >>> pmi_ngrams(["new york is big", "in new york", "big is new"], 2)
    ['new york', 'new']
    """
    words = [text.split() for text in texts]
    single = Counter(word for text in words for word in text)
    pairs = Counter(pair for text in words for pair in pairwise(text))
    total, joint = max(1, single.total()), max(1, pairs.total())

    def value(pair: tuple[str, str]) -> float:
        return pairs[pair] * math.log(pairs[pair] / joint * total**2 / (single[pair[0]] * single[pair[1]]))

    often = [pair for pair in pairs if pairs[pair] > 1]
    chosen = [" ".join(pair) for pair in sorted(often, key=lambda pair: (-value(pair), pair))[: count // 2]]
    return (chosen + [word for word, _ in sorted(single.items(), key=lambda item: (-item[1], item[0]))])[:count]


@dataclass(frozen=True)
class Plan:
    """What a fit costs at most, in prompts asked: ``labelling`` and ``training``, or ``bound``, the budget, if it is
    less. Each of them gets so many ``answers`` and has about so many ``characters``."""

    labelling: int
    training: int
    bound: int
    answers: int
    characters: float

    @property
    def calls(self) -> int:
        """At most so many prompts."""
        return min(self.labelling + self.training, self.bound)

    @property
    def requests(self) -> int:
        """At most so many answers."""
        return self.calls * self.answers

    @property
    def tokens(self) -> int:
        """About so many tokens to be read, at four characters each."""
        return round(self.requests * self.characters / 4)


class _Policy:
    """A prompt of n tokens, each drawn from N candidates with learnt probabilities ``p`` (n, N), uniform at first."""

    def __init__(
        self,
        candidates: Sequence[str],
        n_tokens: int,
        samples: int,
        learning_rate: float,
        estimate: Estimate,
        rng: np.random.Generator,
    ) -> None:
        self.candidates, self.samples, self.learning_rate = list(candidates), samples, learning_rate
        self.estimate, self.rng = estimate, rng
        self.p = np.full((n_tokens, len(self.candidates)), 1 / len(self.candidates))

    def propose(self, hardest: Sequence[tuple[str, str, float]]) -> list[str]:
        count = len(self.candidates)
        self._drawn = np.stack([self.rng.choice(count, size=self.samples, p=row) for row in self.p], axis=1)
        return [self._text(row) for row in self._drawn]

    def learn(self, losses: Array) -> None:
        gradient = policy_gradient(self._drawn, losses, self.p, self.estimate)
        gradient *= min(1.0, CLIP / max(float(np.linalg.norm(gradient)), 1e-12))
        self.p = project_simplex(self.p - self.learning_rate * gradient)

    @property
    def best(self) -> str:
        return self._text(self.p.argmax(axis=1))

    def _text(self, tokens: Array) -> str:
        return " ".join(self.candidates[token] for token in tokens)


class UnsupervisedPromptLearner(ClassifierMixin, BaseEstimator):
    """A scikit-learn classifier that is fitted to texts without labels.

    Parameters
    ----------
    lm
        A ``ChatModel``: ``HFChat`` for a model in this process, ``OpenAIChat`` for an endpoint; with ``cache=…``
        nothing is paid for twice, and a fit that was cut off runs to its place again for nothing.
    labels
        Class names and the words that stand for them, or words alone.
    template
        Has ``{prompt}``, ``{demos}`` and ``{text}``; what follows it is the label word.
    demo
        How a demonstration is written, with ``{text}`` and ``{label}``.
    n_tokens, n_candidates
        n tokens of the prompt, each from N candidates (6 and 20, the released optimiser's).
    candidates
        ``"pmi"``: n-grams of the texts themselves; or a list.
    writer
        Another ``ChatModel`` that writes prompts after a critique of the present one (``Critique``), in place of the
        tokens drawn; it gives I − 1 answers a step, which are no part of the budget.
    samples
        I prompts a step (20), so a step asks I × batch prompts.
    answers
        To every prompt, from a model that gives answers only (8); one that scores continuations is asked once.
    k_demos
        Demonstrations in every query, training included (the paper's point); 0 for none.
    rho, rho_max
        Share of the texts that is taken for reliable: at first, and in the last epoch.
    learning_rate
        On the probabilities; the gradient's norm is at most 3.
    batch_size, epochs, budget
        128 texts, 30 and 8000 prompts asked, the released optimiser's.
    calibrate
        Take off what the model says to a text without content.
    estimate
        Of the gradient: see ``policy_gradient``.
    agreement
        Two labellings in a row that agree on this share end the fit.

    After ``fit``: ``prompt_``, ``pseudo_labels_`` (a polars frame: text, label, confidence, zero_shot, reliable),
    ``history_`` (a frame, a row an epoch), ``calls_``, ``classes_``.

    Raises ``InputError`` for fewer than two classes, equal words, templates without their fields, and a budget that
    does not pay for labelling the texts twice.

    >>> from downriver.models.chat import ScriptedChat
    >>> lm = ScriptedChat(lambda messages: "good" if "sun" in messages[-1]["content"].split("\\n")[-1] else "bad")
    >>> learner = UnsupervisedPromptLearner(lm, ["bad", "good"], epochs=1, samples=2, k_demos=0, calibrate=False)
    >>> learner.fit(["sun today", "rain today", "sun again", "more rain"]).predict(["the sun", "the rain"]).tolist()
    ['good', 'bad']
    """

    def __init__(
        self,
        lm: ChatModel,
        labels: Sequence[str] | Mapping[str, str],
        *,
        template: str = "{prompt}\n{demos}{text} =>",
        demo: str = "{text} => {label}\n",
        n_tokens: int = 6,
        candidates: Literal["pmi"] | Sequence[str] = "pmi",
        n_candidates: int = 20,
        writer: ChatModel | None = None,
        samples: int = 20,
        answers: int = 8,
        k_demos: int = 4,
        rho: float = 0.2,
        rho_max: float = 0.8,
        learning_rate: float = 1e-2,
        batch_size: int = 128,
        epochs: int = 30,
        budget: int = 8000,
        calibrate: bool = True,
        estimate: Estimate = "exact",
        agreement: float = 0.99,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.lm = lm
        self.labels = labels
        self.template = template
        self.demo = demo
        self.n_tokens = n_tokens
        self.candidates = candidates
        self.n_candidates = n_candidates
        self.writer = writer
        self.samples = samples
        self.answers = answers
        self.k_demos = k_demos
        self.rho = rho
        self.rho_max = rho_max
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.epochs = epochs
        self.budget = budget
        self.calibrate = calibrate
        self.estimate = estimate
        self.agreement = agreement
        self.seed = seed
        self.progress = progress

    def plan(self, texts: Sequence[str]) -> Plan:
        """The most that ``fit`` on these texts asks, before anything is asked."""
        extra = int(self.calibrate)
        labelling = (len(texts) + extra) * (self.epochs + 1)
        shares = [self._rho(epoch) for epoch in range(self.epochs)]
        visited = [min(len(texts), math.ceil(share * len(texts)) + len(self.labels)) for share in shares]
        steps = [math.ceil(count / self.batch_size) for count in visited]
        training = self.samples * (sum(visited) + extra * sum(steps))
        text = sum(map(len, texts)) / max(1, len(texts))
        words = texts if isinstance(self.candidates, str) else self.candidates
        word = sum(map(len, words)) / max(1, sum(len(each.split()) for each in words)) + 1
        label = max(map(len, self.labels.values() if isinstance(self.labels, Mapping) else self.labels))
        frame = len(self.template.format(prompt="", demos="", text=""))
        demo = text + label + len(self.demo.format(text="", label=""))
        characters = frame + self.n_tokens * word + self.k_demos * demo + text
        scored = "loglikelihood" in self.lm.capabilities
        return Plan(labelling, training, self.budget, 1 if scored else self.answers, characters)

    def fit(self, texts: Sequence[str], y: None = None) -> Self:
        """Learn prompt and labels; ``y`` is not used."""
        names, words = self._check(texts)
        texts = list(texts)
        self.classes_ = np.array(names)
        ask = self._ask = LabelScorer(self.lm, words, samples=self.answers, seed=self.seed)
        rng = generator("unsupervised prompts", self.seed)
        search = self._search(texts, names, rng)

        zero_shot = self._probabilities(ask, "", texts, None)
        probabilities, guessed = zero_shot, _labels(zero_shot, names)
        self._texts, self._words = texts, words
        self._reliable = self._choose(zero_shot, guessed, 0)
        history = []
        self.prompt_ = ""
        last = len(texts) + int(self.calibrate)  # what the labelling at the end of an epoch asks
        with tqdm(total=self.epochs, desc="prompts", disable=not self.progress, delay=2) as bar:
            for epoch in range(self.epochs):
                self._labels, self._draw = guessed, epoch
                places = rng.permutation(np.flatnonzero(self._reliable))
                loss, steps = 0.0, 0
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    sure = probabilities[batch, guessed[batch]]
                    hardest = [(texts[batch[i]], names[guessed[batch[i]]], float(sure[i])) for i in np.argsort(sure)]
                    prompts = search.propose(hardest)
                    queries = [self._queries(prompt, [texts[i] for i in batch], batch) for prompt in prompts]
                    if ask.calls + ask.new([q for each in queries for q in each]) + last > self.budget:
                        break
                    losses = np.array(
                        [
                            -np.log(
                                np.maximum(self._calibrated(ask, each)[np.arange(len(batch)), guessed[batch]], 1e-12)
                            ).mean()
                            for each in queries
                        ]
                    )
                    search.learn(losses)
                    loss, steps = loss + float(losses.mean()), steps + 1
                if ask.calls + last > self.budget:
                    break
                self.prompt_ = search.best if steps else self.prompt_
                probabilities = self._probabilities(ask, self.prompt_, texts, np.arange(len(texts)))
                before, guessed = guessed, _labels(probabilities, names)
                self._reliable = self._choose(probabilities, guessed, epoch)
                agreed = float((before == guessed).mean())
                row = {"epoch": epoch, "loss": loss / max(steps, 1), "agreement": agreed, "calls": ask.calls}
                history.append(row | {"reliable": int(self._reliable.sum()), "prompt": self.prompt_, "steps": steps})
                bar.update(1)
                if not steps or (epoch > 0 and agreed >= self.agreement):
                    break
        self._labels, self._draw = guessed, -1
        if isinstance(search, _Policy):
            self.probabilities_, self.candidates_ = search.p, search.candidates
        self.history_ = pl.DataFrame(history)
        self.calls_ = ask.calls
        self.pseudo_labels_ = pl.DataFrame(
            {
                "text": texts,
                "label": [names[k] for k in guessed],
                "confidence": probabilities.max(axis=1),
                "zero_shot": zero_shot.max(axis=1),
                "reliable": self._reliable,
            }
        )
        return self

    def _search(self, texts: Sequence[str], names: Sequence[str], rng: np.random.Generator) -> "_Policy | Critique":
        if self.writer is not None:
            return Critique(self.writer, names, samples=self.samples, seed=self.seed)
        candidates = pmi_ngrams(texts, self.n_candidates) if isinstance(self.candidates, str) else list(self.candidates)
        if not candidates:
            raise InputError("the texts have no words for a prompt: give candidates")
        return _Policy(candidates, self.n_tokens, self.samples, self.learning_rate, self.estimate, rng)

    def predict_proba(self, texts: Sequence[str]) -> Array:
        """(texts, classes), in the format of training: the prompt, demonstrations, the text."""
        check_is_fitted(self, "pseudo_labels_")
        known = {text: place for place, text in enumerate(self._texts)}
        own = np.array([known.get(text, -1) for text in texts])
        return self._probabilities(self._ask, self.prompt_, list(texts), own)

    def predict(self, texts: Sequence[str]) -> Array:
        """The class names."""
        return self.classes_[self.predict_proba(texts).argmax(axis=1)]

    def export_finetuning_set(self, path: str | os.PathLike[str], *, min_confidence: float = 0.0) -> int:
        """Write the texts with their labels as JSON lines (text, label, confidence), to fine-tune a model on; gives
        their number."""
        check_is_fitted(self, "pseudo_labels_")
        if not 0 <= min_confidence <= 1:
            raise InputError(f"min_confidence is {min_confidence}: from 0 to 1 is expected")
        rows = self.pseudo_labels_.filter(pl.col("confidence") >= min_confidence)
        with atomic_write(Path(path), "w") as file:
            for row in rows.select("text", "label", "confidence").iter_rows(named=True):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return len(rows)

    def _rho(self, epoch: int) -> float:
        return self.rho + (self.rho_max - self.rho) * epoch / max(1, self.epochs - 1)

    def _choose(self, probabilities: Array, guessed: Array, epoch: int) -> Array:
        """The most confident texts, as many of every class."""
        each = max(1, math.ceil(self._rho(epoch) * len(guessed) / probabilities.shape[1]))
        chosen = np.zeros(len(guessed), dtype=bool)
        for k in range(probabilities.shape[1]):
            own = np.flatnonzero(guessed == k)
            chosen[own[np.argsort(-probabilities[own, k], kind="stable")[:each]]] = True
        return chosen

    def _probabilities(self, ask: LabelScorer, prompt: str, texts: Sequence[str], own: Array | None) -> Array:
        return self._calibrated(ask, self._queries(prompt, texts, own))

    def _calibrated(self, ask: LabelScorer, queries: Sequence[str]) -> Array:
        scores = ask(queries)
        if self.calibrate:
            scores, free = scores[:-1], scores[-1]
            scores = scores - free
        found = np.exp(scores - scores.max(axis=1, keepdims=True))
        return found / found.sum(axis=1, keepdims=True)

    def _queries(self, prompt: str, texts: Sequence[str], own: Array | None) -> list[str]:
        """One a text, and one more without content to calibrate by. ``own``: each text's place among the fitted ones
        (−1 for none), so that none is its own demonstration; None: no demonstrations."""
        asked = [*texts, CONTENT_FREE] if self.calibrate else list(texts)
        places = None if own is None else [*own.tolist(), -1]
        return [
            self.template.format(
                prompt=prompt, demos="" if places is None else self._demos(places[i]), text=text
            ).lstrip()
            for i, text in enumerate(asked)
        ]

    def _demos(self, own: int) -> str:
        """k reliable texts with their labels, balanced over classes, the same for the same text and epoch."""
        if not self.k_demos:
            return ""
        rng = generator("demonstrations", self.seed, self._draw, own)
        keys = rng.random(len(self._texts))  # a text's key does not depend on classes or their order
        chosen: list[int] = []
        piles = []
        itself = self._texts[own] if own >= 0 else None  # wherever it stands
        for k in range(len(self._words)):
            pile = [int(i) for i in np.flatnonzero(self._reliable & (self._labels == k)) if self._texts[i] != itself]
            piles.append(sorted(pile, key=lambda i: keys[i], reverse=True))
        piles.sort(key=lambda pile: keys[pile[-1]] if pile else 2.0)
        while len(chosen) < self.k_demos and any(piles):
            chosen += [pile.pop() for pile in piles if pile][: self.k_demos - len(chosen)]
        ordered = sorted(chosen, key=lambda i: keys[i])
        return "".join(
            self.demo.format(text=self._texts[i], label=self._words[self._labels[i]].strip()) for i in ordered
        )

    def _check(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("texts: a list of strings is expected")
        pairs = self.labels.items() if isinstance(self.labels, Mapping) else ((word, word) for word in self.labels)
        names, words = ([*found] for found in zip(*pairs, strict=True)) if self.labels else ([], [])
        words = [f" {word.strip()}" for word in words]
        if len(names) < 2 or len({word.lower() for word in words}) < len(words) or " " in words:
            raise InputError(f"labels are {self.labels!r}: at least two classes with different words are expected")
        for name, text, fields in (
            ("template", self.template, ("prompt", "demos", "text")),
            ("demo", self.demo, ("text", "label")),
        ):
            if any("{" + field + "}" not in text for field in fields):
                raise InputError(f"{name} is {text!r}: {', '.join('{' + f + '}' for f in fields)} are expected in it")
            try:
                text.format(**dict.fromkeys(fields, ""))
            except (LookupError, ValueError) as error:
                raise InputError(
                    f"{name} is {text!r}: {error} in braces; one that stands for itself is doubled"
                ) from None
        if isinstance(self.candidates, str) and self.candidates != "pmi":
            raise unknown("candidates", self.candidates, ("pmi", "a list"))
        if not self.candidates or not all(isinstance(each, str) and each.strip() for each in self.candidates):
            raise InputError(f"candidates are {self.candidates!r}: words that are not empty are expected")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}: a positive number is expected")
        numbers: dict[str, Any] = {
            "n_tokens": 1, "n_candidates": 1, "samples": 2, "answers": 1, "k_demos": 0, "batch_size": 1, "epochs": 1,
        }  # fmt: skip
        for name, least in numbers.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: at least {least} is expected")
        if not 0 < self.rho <= self.rho_max <= 1:
            raise InputError(f"rho is {self.rho}, rho_max {self.rho_max}: 0 < rho ≤ rho_max ≤ 1 is expected")
        least = 2 * (len(texts) + int(self.calibrate))
        if len(texts) < len(names) or self.budget < least:
            raise InputError(
                f"{len(texts)} texts, a budget of {self.budget} calls: at least {len(names)} texts are expected, and "
                f"{least} calls to label them at the beginning and at the end"
            )
        return names, words


def _labels(probabilities: Array, names: Sequence[str]) -> Array:
    """The likeliest classes; where one would get no text, after taking off how likely each is on average."""
    guessed = probabilities.argmax(axis=1)
    lacking = [name for k, name in enumerate(names) if not (guessed == k).any()]
    if lacking:
        warnings.warn(
            f"no text is likeliest of class {', '.join(map(repr, lacking))}: calibrated by means", stacklevel=3
        )
        scores = np.log(np.maximum(probabilities, 1e-12))
        guessed = (scores - scores.mean(axis=0)).argmax(axis=1)
    return guessed
