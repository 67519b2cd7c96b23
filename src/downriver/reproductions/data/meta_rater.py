"""Paper 17: weights learned from cheap proxies beat equal weights, and those beat the best single score.

The paper rates 627 billion tokens by 25 scores; here 5000 documents have eight. The pool is newsgroup posts, clean,
with their words shuffled, or with a phrase repeated, and stories of Reuters; the aim is a low loss on later posts. The
proxy is an interpolated bigram model, and a transformer of one layer confirms. Weights are learned on one half of the
later posts and judged on the other; the best single score is picked with the knowledge of the first half.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import polars as pl

from downriver import tasks
from downriver.core import Budget, InputError, Measurement, assets, generator
from downriver.data.score import DSIRScorer, LossScorer
from downriver.data.select.meta_rater import MetaRater
from downriver.data.select.select import select
from downriver.models import small_language_model, word_tokenizer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, below, better, shared, study
from downriver.training import TokenRows, fine_tune

paper = Paper(
    number=17,
    slug="meta_rater",
    title="Meta-rater: A Multi-dimensional Data Selection Method for Pre-training Language Models",
    date="2025-04",
    room="data",
    claim="Weights of many quality scores, learned from the losses of small proxies, select better data than equal "
    "weights or any single score.",
)

WORDS, SEEDS, KAPPA, BETA = 100, 100, 5.0, 100.0
LOSS, CONFIRMED, NOISE, RHO = (
    "bigram loss",
    "transformer loss",
    "weight of the noise score",
    "held-out rank correlation",
)
# clean, shuffled, repeated, off-domain documents; posts to validate on (as many to test on); proxies; steps
SCALES = {"small": (2200, 800, 500, 1500, 1000, 256, 150), "tiny": (120, 50, 30, 80, 60, 24, 4)}


@study(
    "meta_rater",
    title="Eight scores of posts, shuffled posts, repeated phrases and news",
    claims=[
        better("meta-rater", than="equal weights", on=LOSS),
        better("equal weights", than="best single score", on=LOSS),
        better("best single score", than="random", on=LOSS),
        below("meta-rater", on=NOISE, value=1 / 8),
        better("meta-rater", than="random", on=CONFIRMED),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """One pool with its scores a seed; every arm keeps a quarter of it."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    *sizes, proxies, steps = SCALES[scale]

    @shared
    def world() -> "World":
        return World(seed, *sizes)

    def measured(rows: np.ndarray) -> list[Measurement]:
        return [
            Measurement(LOSS, world().test.loss(rows), direction="lower"),
            Measurement(CONFIRMED, transformer_loss(world(), rows, steps, seed), direction="lower"),
        ]

    def rater() -> MetaRater:
        k = len(world().pool) // 4
        return MetaRater(world().validation.loss, k=k, n_proxies=proxies, seed=seed)

    def meta() -> list[Measurement]:
        fitted = rater().fit(world().scores)
        found = measured(fitted.select(world().scores).indices)
        rho = float(fitted.cv_report().rho[0])
        return [*found, Measurement(NOISE, fitted.weights_["noise"], direction="lower"), Measurement(RHO, rho)]

    def with_weights(weights: dict[str, float]) -> np.ndarray:
        return rater().select(world().scores, weights=weights).indices

    def single() -> list[Measurement]:
        choices = [with_weights({name: 1.0}) for name in NAMES]
        return measured(min(choices, key=world().validation.loss))

    def drawn() -> list[Measurement]:
        return measured(select(world().scores, "random", tau=4, seed=seed).indices)

    yield Arm("random", drawn)
    yield Arm("best single score", single)
    yield Arm("equal weights", lambda: measured(with_weights(dict.fromkeys(NAMES, 1 / len(NAMES)))))
    yield Arm("meta-rater", meta)


studies: tuple[Study, ...] = (reproduction,)

NAMES = ("length", "entropy", "types", "known", "word length", "fluency", "dsir", "noise")


class World:
    """The pool, its eight scores (higher is better), and two halves of later posts to measure selections on."""

    def __init__(self, seed: int, clean: int, shuffled: int, repeated: int, foreign: int, held: int) -> None:
        task = tasks.load("20newsgroups")
        rng = generator("meta_rater pool", seed)
        posts = drawn(list(task.texts("train")), SEEDS + clean + shuffled + repeated, rng)
        known, posts = posts[:SEEDS], posts[SEEDS:]
        mixed = [list(rng.permutation(words)) for words in posts[clean : clean + shuffled]]
        phrases = [(words[:5] * len(words))[: len(words)] for words in posts[clean + shuffled :]]
        self.pool = posts[:clean] + mixed + phrases + drawn(stories(), foreign, rng)
        later = drawn(list(task.texts("test")), 2 * held, rng)
        self.held = later[held:]
        self.validation, self.test = Bigrams(self.pool, later[:held]), Bigrams(self.pool, self.held)
        self.scores = pl.DataFrame({"id": [f"d{i:05d}" for i in range(len(self.pool))]} | eight(self.pool, known, rng))


def drawn(texts: Sequence[str], number: int, rng: np.random.Generator) -> list[list[str]]:
    """The first words of so many texts of at least 20 words."""
    found = (texts[int(i)].split()[:WORDS] for i in rng.permutation(len(texts)))
    long = (words for words in found if len(words) >= 20)
    return [words for words, _ in zip(long, range(number), strict=False)]


def stories() -> list[str]:
    """News of Reuters, without the three lines of the file's head and the topics."""
    lines = (assets.path("reuters-r8") / "reuters-r8-train.tab").read_text(encoding="utf-8").splitlines()[3:]
    return [line.partition("\t")[2].lower() for line in lines]


def eight(pool: list[list[str]], known: list[list[str]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The scores by name: three need the known clean documents, four the text alone, and one is noise."""
    vocabulary = {word for words in known for word in words}
    texts = [" ".join(words) for words in pool]
    dsir = DSIRScorer([" ".join(words) for words in known], texts, ngrams=1)
    values = {
        "length": [len(words) for words in pool],
        "entropy": [entropy(words) for words in pool],
        "types": [len(set(words)) / len(words) for words in pool],
        "known": [sum(word in vocabulary for word in words) / len(words) for words in pool],
        "word length": [sum(map(len, words)) / len(words) for words in pool],
        "fluency": Bigrams(known, pool).likelihood(np.arange(len(known))),
        "dsir": dsir.score(texts),
        "noise": rng.random(len(pool)),
    }
    return {name: np.asarray(values[name], dtype=np.float64) for name in NAMES}


def entropy(words: list[str]) -> float:
    counts = np.array(list(Counter(words).values()))
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


class Bigrams:
    """The loss on held documents of p(w | h) = (c(h, w) + κ p(w)) / (c(h) + κ), p(w) = (c(w) + β / V) / (N + β), with
    counts of any rows of a pool; what does not depend on the rows is counted once."""

    def __init__(self, pool: list[list[str]], held: list[list[str]]) -> None:
        number: dict[str, int] = {}
        for words in (*pool, *held):
            for word in words:
                number.setdefault(word, len(number))
        self.size = len(number)
        self.owner, head, tail = pairs(pool, number)
        self.held_owner, self.head, self.tail = pairs(held, number)
        known, self.place = np.unique(self.head * self.size + self.tail, return_inverse=True)
        self.distinct = len(known)
        code = head * self.size + tail
        at = np.minimum(np.searchsorted(known, code), len(known) - 1)
        self.code = np.where(known[at] == code, at, len(known))  # pairs that are not held count in one bin
        self.pool_head, self.pool_tail, self.rows = head, tail, len(pool)

    def loss(self, rows: np.ndarray) -> float:
        """Nats a word, over all held words that follow another one."""
        return float(-self._log(rows).mean())

    def likelihood(self, rows: np.ndarray) -> np.ndarray:
        """The mean log-likelihood of each held document, (held,)."""
        return np.bincount(self.held_owner, self._log(rows)) / np.bincount(self.held_owner)

    def _log(self, rows: np.ndarray) -> np.ndarray:
        chosen = np.zeros(self.rows, dtype=bool)
        chosen[rows] = True
        mask = chosen[self.owner]
        both = np.bincount(self.code[mask], minlength=self.distinct + 1)[self.place]
        before = np.bincount(self.pool_head[mask], minlength=self.size)[self.head]
        word = np.bincount(self.pool_tail[mask], minlength=self.size)[self.tail]
        p = (word + BETA / self.size) / (mask.sum() + BETA)
        return np.log((both + KAPPA * p) / (before + KAPPA))


def pairs(texts: list[list[str]], number: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all neighbouring words the text, the first and the second one."""
    ids = np.array([number[word] for words in texts for word in words])
    owner = np.repeat(np.arange(len(texts)), [len(words) for words in texts])
    inside = owner[1:] == owner[:-1]
    return owner[1:][inside], ids[:-1][inside], ids[1:][inside]


def transformer_loss(world: World, rows: np.ndarray, steps: int, seed: int) -> float:
    """The loss on the held posts of a model of one layer that was trained on these rows."""
    tokenizer = word_tokenizer((" ".join(words) for words in world.pool), 2000, context=64, end=False)
    texts = [" ".join(world.pool[row]) for row in rows]
    ids = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    model = fine_tune(
        small_language_model("causal-lm", tokenizer, width=64, layers=1, heads=4, context=64, seed=seed),
        TokenRows("chosen", {"train": datasets.Dataset.from_dict({"input_ids": ids})}),
        Budget(steps, "steps"),
        learning_rate=3e-3,
        batch_size=16,
        schedule="cosine",
        seed=seed,
        in_place=True,
    )
    return float(LossScorer(model, context=64).score([" ".join(words) for words in world.held]).mean())
