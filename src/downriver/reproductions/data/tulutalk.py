"""Paper 68: of two annotated instruction sets a curated mix of fewer rows teaches more than either.

The paper curates 808 000 conversations out of two public sets and tunes models of 1.7B and 8B. Here two sources of 3000
instructions come from exact programs, eight categories in different proportions; 30 % of the answers are corrupted (cut
off, wrong, or another request's), one request in twelve is vague, and four of the categories are mostly written without
a closing mark, which the annotator takes for lesser quality. ``HeuristicAnnotator`` tags task and quality; the reward
is a BERT of two layers that learnt from 500 pairs of clean and corrupted answers. A two-layer Llama learns from each
selection for the same number of steps; the score is exact match on clean questions, mean over the categories. The
curated set has 14 % fewer rows than a source, as TuluTalk has; the random one as many as the curated.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import polars as pl
import torch

from downriver.core import Budget, InputError, Measurement, generator
from downriver.data.annotate import HeuristicAnnotator
from downriver.data.select.curate import Curator, TaskBalance, profile
from downriver.data.synth import sft
from downriver.models import HFChat, Model, small_language_model, word_tokenizer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, below, better, shared, study
from downriver.tasks import Task
from downriver.training import fine_tune

paper = Paper(
    number=68,
    slug="tulutalk",
    title="Fixing It in Post: A Comparative Study of LLM Post-Training Data Quality and Model Performance",
    date="2025-06",
    room="data",
    claim="Annotating two instruction sets and keeping the best of both, the task mix repaired, gives fewer rows that "
    "teach more than either set.",
)

LETTERS = "abcdefghijklmnop"
CATEGORIES = ("sum", "next", "reverse", "largest", "sort", "number", "after", "compare")
STARVED = CATEGORIES[4:]  # mostly written without a closing mark
MIX = {"A": (4, 4, 1, 1, 4, 4, 1, 1), "B": (1, 1, 4, 4, 1, 1, 4, 4)}
WORDS = (
    "calculate function next reverse table largest schedule what is the number of suggest after compare less more equal"
    " do it help fix this . ? + ="
)
RULE = "quality>=excellent & st_reward>=q(.3, by='source')"
CORRUPTED, VAGUE, FEWER = 0.3, 1 / 12, 0.86
# rows a source, pairs for the reward model, its steps and those of each arm, test questions a category
SCALES = {"small": (3000, 500, 200, 250, 60), "tiny": (150, 20, 2, 3, 4)}
Row = dict[str, Any]


@study(
    "tulutalk",
    title="Two sources of instructions, three in ten answers corrupted, curated into one",
    claims=[
        better("curated", than="source A", on="exact match"),
        better("curated", than="source B", on="exact match"),
        better("curated", than="random", on="exact match"),
        better("A and B", than="quality only", on="starved categories"),
        better("curated", than="quality only", on="starved categories"),
        below("curated", on="mix off by", value=0.021),  # the tolerance, and a thousandth for whole rows
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """Six selections of the same pool, and a model tuned on each."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    rows, pairs, learn, steps, tests = SCALES[scale]
    world = World(seed)
    test = [world.request(category) for category in CATEGORIES for _ in range(tests)]

    @shared
    def pool() -> list[Row]:
        return [row | {"id": f"{s}{i:05d}"} for s in MIX for i, row in enumerate(world.source(s, rows))]

    @shared
    def table() -> pl.DataFrame:
        frame = HeuristicAnnotator().annotate(map(_chat, pool())).frame
        scores = reward(world, pairs, learn, seed, [f"{r['asked']} = {r['answer']}" for r in pool()])
        return frame.with_columns(st_reward=pl.Series(scores), reward_scale=pl.lit("small reward model"))

    def of_source(name: str) -> list[int]:
        return [i for i, row in enumerate(pool()) if row["source"] == name]

    def curated() -> list[int]:
        balance = TaskBalance(mix(table()))
        curator = Curator(RULE, balance, drop=("failed",), target_size=round(FEWER * rows), seed=seed)
        return curator.fit(table()).indices.tolist()

    def measured(chosen: Sequence[int]) -> list[Measurement]:
        lessons = [(pool()[i]["asked"], pool()[i]["answer"]) for i in chosen]
        blank = small_language_model("causal-lm", world.tokenizer, layers=2, context=24, seed=seed)
        model = sft(blank, lessons, Budget(steps, "steps"), learning_rate=3e-3, batch_size=64, seed=seed)
        hits = matched(model, test)
        by_category = {c: float(np.mean(hits[i * tests : (i + 1) * tests])) for i, c in enumerate(CATEGORIES)}
        shares = mix(table()[list(chosen)])
        gap = max(abs(shares.get(task, 0) - share) for task, share in mix(table()).items())
        return [
            Measurement("exact match", float(np.mean(list(by_category.values())))),
            Measurement("starved categories", float(np.mean([by_category[c] for c in STARVED]))),
            Measurement("mix off by", gap, direction="lower"),
            Measurement("corrupted", float(np.mean([pool()[i]["corrupted"] for i in chosen])), direction="lower"),
            Measurement("rows", float(len(chosen)), direction="none"),
        ]

    yield Arm("source A", lambda: measured(of_source("A")))
    yield Arm("source B", lambda: measured(of_source("B")))
    yield Arm("A and B", lambda: measured(range(2 * rows)))
    yield Arm(
        "random",
        lambda: measured(generator("random", seed).choice(2 * rows, round(FEWER * rows), replace=False).tolist()),
    )
    yield Arm("quality only", lambda: measured(Curator(RULE, seed=seed).fit(table()).indices.tolist()))
    yield Arm("curated", lambda: measured(curated()))


studies: tuple[Study, ...] = (reproduction,)


class World:
    """Programs that write requests and answer them, from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = generator("tulutalk", seed)
        self.numbers = self.rng.permutation(40)
        names = [*map(str, range(40)), *(f"k{i}" for i in range(40)), *LETTERS]
        self.tokenizer = word_tokenizer([" ".join([WORDS, *names])], context=24, lower=False)

    def request(self, category: str) -> tuple[str, str]:
        """A request without its closing mark, and the right answer."""
        digits = self.rng.integers(10, size=3)
        letters = [LETTERS[i] for i in self.rng.integers(len(LETTERS) - 4, size=3)]
        a, b, _ = digits.tolist()
        if category == "sum":
            return f"calculate {a} + {b}", str(a + b)
        if category == "next":
            return f"function next {letters[0]}", LETTERS[LETTERS.index(letters[0]) + 1]
        if category == "reverse":
            return f"reverse {' '.join(letters)}", " ".join(reversed(letters))
        if category == "largest":
            return f"table {' '.join(map(str, digits))} largest", str(digits.max())
        if category == "sort":
            return f"schedule {' '.join(map(str, digits))}", " ".join(map(str, np.sort(digits)))
        if category == "number":
            key = int(self.rng.integers(40))
            return f"what is the number of k{key}", str(self.numbers[key])
        if category == "after":
            start, n = LETTERS.index(letters[0]), 2 + a % 3
            return f"suggest {n} after {letters[0]}", " ".join(LETTERS[start + 1 : start + 1 + n])
        return f"compare {a} {b}", "less" if a < b else "more" if a > b else "equal"

    def source(self, name: str, n: int) -> list[Row]:
        """Rows of a source: request, answer, and whether the answer was corrupted."""
        weights = np.array(MIX[name]) / sum(MIX[name])
        return [self.row(name, CATEGORIES[c]) for c in self.rng.choice(len(CATEGORIES), n, p=weights)]

    def row(self, source: str, category: str) -> Row:
        asked, answer = self.request(category)
        corrupted = bool(self.rng.random() < CORRUPTED)
        if corrupted:
            answer = self.corrupt(category, answer)
        closing = self.rng.random() < (0.15 if category in STARVED else 0.8)
        asked = f"{asked} {'?' if category == 'number' else '.'}" if closing else asked
        if self.rng.random() < VAGUE:
            asked, corrupted = ("do it", "help", "fix this")[int(self.rng.integers(3))], True
        return {"source": source, "category": category, "asked": asked, "answer": answer, "corrupted": corrupted}

    def corrupt(self, category: str, answer: str) -> str:
        """An answer cut off, wrong, or of another kind; never the right one."""
        while True:
            kind = int(self.rng.integers(3))
            if kind == 0:
                found = " ".join(answer.split()[:-1])
            else:
                others = [category] if kind == 1 else [c for c in CATEGORIES if c != category]
                found = self.request(others[int(self.rng.integers(len(others)))])[1]
            if found != answer and (found or kind == 0):
                return found


def reward(world: World, pairs: int, steps: int, seed: int, texts: list[str]) -> list[float]:
    """Scores of requests with answers by a small classifier that learnt clean from corrupted."""
    lessons: list[tuple[str, int]] = []
    for i in range(pairs):
        category = CATEGORIES[i % len(CATEGORIES)]
        asked, answer = world.request(category)
        lessons += [(f"{asked} = {answer}", 1), (f"{asked} = {world.corrupt(category, answer)}", 0)]
    columns = dict(zip(("text", "label"), map(list, zip(*lessons, strict=True)), strict=True))
    task = Task(
        "reward",
        "text-classification",
        {"train": datasets.Dataset.from_dict(columns)},
        ("text",),
        "label",
        labels=("corrupted", "clean"),
    )
    model = small_language_model("masked-lm", world.tokenizer, layers=2, context=24, seed=seed).with_head(task)
    model = fine_tune(model, task, Budget(steps, "steps"), learning_rate=1e-3, batch_size=32, seed=seed)
    collate, scores = model.collate(task), []
    with torch.no_grad():
        for start in range(0, len(texts), 256):
            logits = model(**collate([{"text": text} for text in texts[start : start + 256]]))["logits"]
            scores += (logits[:, 1] - logits[:, 0]).tolist()
    return scores


def mix(frame: pl.DataFrame) -> Mapping[str, float]:
    """The shares of the tasks among requests that are not vague."""
    return profile(frame.filter(pl.col("quality").is_in(["good", "excellent"])), by=["task"]).shares["task"]


def matched(model: Model, test: Sequence[tuple[str, str]]) -> list[bool]:
    """Which questions, half of them with a closing mark, greedy decoding answers right."""
    asked = [f"{request} ." if i % 2 else request for i, (request, _) in enumerate(test)]
    answers = HFChat(model, batch_size=250, strings="text", progress=False).generate(asked, max_tokens=6)
    return [some[0].text.strip() == right for some, (_, right) in zip(answers, test, strict=True)]


def _chat(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": row["asked"]}, {"role": "assistant", "content": row["answer"]}]
    return {"id": row["id"], "source": row["source"], "messages": messages}
