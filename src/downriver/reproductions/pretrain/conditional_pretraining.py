"""Paper 13: learnt behind tags, text that is not wanted stays away when the good tag is asked for.

The paper trains GPT-2 small on 3.3 billion tokens. Here a Llama of one layer and width 64 learns lines of dialogue (a
television series, one line of 4 to 24 words a document); what is not wanted are words that the lexicon of VADER rates
negative, and a line with one of them is misaligned. Lines are sampled at temperature 0.7 and top-p 0.9, as in the
paper, and judged by the same lexicon; the loss is that on wanted lines of episodes held out, where a few stock phrases
(a line of four words) are those of other episodes.

So short a run is at the beginning of the curve: the tag's effect grows with training, and filtering, which never sees
an unwanted word, is far ahead of it here. The paper's comparison of the two is not tested.
"""

import csv
import re
from collections.abc import Iterator
from typing import Any

import datasets

from downriver.core import Budget, InputError, Measurement, assets, generator
from downriver.data.condition.annotate import annotate
from downriver.data.condition.control_tokens import ControlTokens, misalignment_report, sample_aligned
from downriver.data.condition.metadata import MetadataFormatter, text_loss
from downriver.data.score.lint import LexiconScorer
from downriver.models import small_language_model, word_tokenizer
from downriver.models.model import Model
from downriver.pretrain.conditional_pretraining import conditional_pretraining
from downriver.pretrain.feedback import MLE, Conditional, Filtered, Objective
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, below, better, shared, study
from downriver.tasks.task import Task

paper = Paper(
    number=13,
    slug="conditional_pretraining",
    title="Pretraining Language Models with Human Preferences",
    date="2023-02",
    room="pretrain",
    claim="Pretraining behind tags for wanted and unwanted text keeps unwanted text away when the good tag is asked "
    "for, at no cost in modelling wanted text.",
)

CONTROL = ControlTokens()
VOCABULARY, BLOCK, BATCH, LONGEST = 2000, 64, 6, 32
# steps, samples an arm, lines to judge the loss by (all that there are at most)
SCALES = {"small": (600, 800, 2000), "tiny": (4, 12, 20)}
RATE, LOSS, RELATIVE = "share of samples with a negative word", "loss on wanted lines", "that loss over MLE's"


@study(
    "conditional-pretraining",
    title="Negative words in lines of dialogue",
    claims=[
        better("good tag", than="MLE", on=RATE),
        better("MLE", than="bad tag", on=RATE),
        better("filtering", than="MLE", on=RATE),
        below("good tag", on=RELATIVE, value=1.01),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the episodes held out, the initialisation, the order and the samples; steps are the same for all."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    steps, samples, held = SCALES[scale]

    @shared
    def world() -> "World":
        return World(seed, held)

    @shared
    def mle() -> Model:
        return train(world(), MLE(), steps, seed)

    @shared
    def conditional() -> Model:
        return train(world(), Conditional(CONTROL), steps, seed)

    def measured(model: Model, tag: str | None) -> list[Measurement]:
        lines = sample_aligned(model, n=samples, tag=tag, max_new_tokens=LONGEST, batch_size=400, seed=seed)
        report = misalignment_report(lines, world().scorer)
        loss = world().loss(model, CONTROL.aligned if tag == "aligned" else "")
        return [
            Measurement(RATE, report["rate"], direction="lower"),
            Measurement("mean score of samples", report["mean"], direction="lower"),
            Measurement("largest score of 25 samples", report["expected_max"], direction="lower"),
            Measurement("different bigrams", report["distinct_2"]),
            *([Measurement(LOSS, loss, direction="lower")] if tag != "misaligned" else []),
        ]

    def good() -> list[Measurement]:
        rows = measured(conditional(), "aligned")
        relative = rows[-1].value / world().loss(mle(), "")
        return [*rows, Measurement(RELATIVE, relative, direction="lower")]

    yield Arm("MLE", lambda: measured(mle(), None))
    yield Arm("good tag", good)
    yield Arm("bad tag", lambda: measured(conditional(), "misaligned"))
    yield Arm("filtering", lambda: measured(train(world(), Filtered(0.0), steps, seed), None))


studies: tuple[Study, ...] = (reproduction,)


class World:
    """Lines to learn from, wanted ones to be judged by, and what finds the unwanted."""

    def __init__(self, seed: int, held: int) -> None:
        episodes = transcript()
        order = generator("episodes", seed).permutation(len(episodes)).tolist()
        last = len(order) // 10
        later, first = [[line for i in part for line in episodes[i]] for part in (order[:last], order[last:])]
        self.scorer = LexiconScorer(negative_words(), "vader, negative")
        wanted = annotate([{"text": line} for line in later], self.scorer, segment="document", threshold=0.0)
        self.held = [t for t, bad in zip(wanted["text"][:], wanted["misaligned"][:], strict=True) if not bad[0]][:held]
        self.task = Task(
            "lines", "language-modelling", {"train": datasets.Dataset.from_dict({"text": first})}, ("text",), None
        )
        self.tokenizer: Any = word_tokenizer(first, VOCABULARY, context=BLOCK)

    def loss(self, model: Model, tag: str) -> float:
        """The loss on the wanted lines held out, behind the tag if one is given; the tag itself does not count."""
        shown = MetadataFormatter(field="tag", view="full", template="{meta}") if tag else None
        return text_loss(model, [{"text": line, "tag": tag} for line in self.held], shown, tokens=BLOCK - 2)


def train(world: World, objective: Objective, steps: int, seed: int) -> Model:
    """One run from nothing."""
    model = small_language_model("causal-lm", world.tokenizer, width=64, layers=1, heads=4, context=BLOCK, seed=seed)
    return conditional_pretraining(
        model,
        world.task,
        Budget(steps, "steps"),
        scorer=world.scorer,
        objective=objective,
        segment="document",
        threshold=0.0,
        block=BLOCK,
        learning_rate=3e-3,
        batch_size=BATCH,
        seed=seed,
    )


def transcript() -> list[list[str]]:
    """The lines of 4 to 24 words of every episode."""
    path = assets.path("friends-transcripts") / "friends-transcripts.tab"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]
    episodes: dict[str, list[str]] = {}
    for row in rows:
        line = " ".join(row[5].split()) if len(row) == 6 else ""
        if 4 <= len(line.split()) <= 24:
            episodes.setdefault(row[2], []).append(line)
    return [lines for _, lines in sorted(episodes.items())]


def negative_words() -> list[str]:
    """The words, not the signs, that VADER's lexicon rates below 0."""
    lines = (assets.path("vader-lexicon") / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    entries = (line.split("\t") for line in lines if line)
    return [word for word, rating, *_ in entries if float(rating) < 0 and re.fullmatch(r"[a-z]+(?:['’-][a-z]+)*", word)]
