"""Paper 19: naming the source in training steers a model; a short cooldown without gives back the model without.

The paper's gain is in downstream tasks of models from 600 M parameters on, which nothing here can test. What a small
model shows is the mechanism: a Llama of one layer and width 64 reads passages of at most 35 words of the twenty
newsgroups, with the group's name before them (``url sci.space``), and is judged by the loss on passages of later posts
with no source, the right one and another one drawn at random. The baseline reads the very passages of the cooldown
of a tenth, in the same order, always without a source.

That the cooled-down model beats the baseline without a source is not claimed: at this size it does not, and others
have found the same in the validation loss of large models. A passage is a document of its own: its source stands
before each.

Seen: the right source saves no more than some thousandths of a nat here, less than it saves the baseline (up to 0.025),
which has only ever met the words of a group's name in texts. So small and short a run shows what a cooldown gives
back, and hardly any steering by the source; that the sign is right in every seed is no evidence of the paper's effect.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np

from downriver import tasks
from downriver.core import Budget, InputError, Measurement, generator
from downriver.data.condition.metadata import MetadataFormatter, condition, text_loss
from downriver.models import small_language_model, word_tokenizer
from downriver.models.model import Model
from downriver.pretrain.meco import MeCoSchedule, shared_out
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, above, better, shared, study
from downriver.tasks.task import Task
from downriver.training import TokenRows, fine_tune

paper = Paper(
    number=19,
    slug="meco",
    title="Metadata Conditioning Accelerates Language Model Pre-training",
    date="2025-01",
    room="data",
    claim="Naming a document's source in training steers a model, and a short cooldown without gives back the model "
    "that needs none.",
)

SOURCE = MetadataFormatter(field="group", view="full", template="url {meta} ")
WORDS, LEAST, MOST = 35, 10, 6  # of a passage, of its shortest, and passages a post
BATCH, VOCABULARY = 16, 2000
COOLDOWNS = {"metadata only": 0.0, "cooldown 10 %": 0.1, "cooldown 20 %": 0.2}
# steps, posts to learn from, passages to judge by
SCALES = {"small": (500, 2400, 1000), "tiny": (10, 120, 40)}
NONE, RIGHT, WRONG = "loss without a source", "loss with the right source", "loss with a wrong source"
STEERED, RECOVERED = "loss saved by the right source, not a wrong one", "nats recovered beyond 60 % of the gap"


@study(
    "meco",
    title="A source before passages of twenty newsgroups",
    claims=[
        *(above(arm, on=STEERED, value=0.0) for arm in COOLDOWNS),
        better("baseline", than="metadata only", on=NONE),
        above("cooldown 10 %", on=RECOVERED, value=0.0),
        better("cooldown 20 %", than="cooldown 10 %", on=NONE),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """One vocabulary, one initialisation and one choice of passages a seed; only what stands before them differs."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    steps, posts, judged = SCALES[scale]

    @shared
    def world() -> "World":
        return World(seed, posts, judged)

    @shared
    def losses(cooldown: float | None) -> dict[str, float]:
        return world().losses(train(world(), cooldown, steps, seed))

    def measured(cooldown: float | None) -> list[Measurement]:
        found = losses(cooldown)
        rows = [Measurement(name, value, direction="lower") for name, value in found.items()]
        rows.append(Measurement(STEERED, found[WRONG] - found[RIGHT]))
        if cooldown:
            before, after = losses(0.0)[NONE], losses(None)[NONE]
            rows.append(Measurement(RECOVERED, (before - found[NONE]) - 0.6 * (before - after)))
        return rows

    yield Arm("baseline", lambda: measured(None))
    for name, cooldown in COOLDOWNS.items():
        yield Arm(name, partial(measured, cooldown))


studies: tuple[Study, ...] = (reproduction,)


class World:
    """Passages to learn from and to be judged by, and a vocabulary of words."""

    def __init__(self, seed: int, posts: int, judged: int) -> None:
        task = tasks.load("20newsgroups")
        rng = generator("meco passages", seed)
        self.posts = drawn(task, "train", posts, rng)
        self.held = passages(drawn(task, "test", judged, rng))[:judged]
        others = [[g for g in task.labels if g != row["group"]] for row in self.held]
        self.misled = [
            row | {"group": names[int(rng.integers(len(names)))]} for row, names in zip(self.held, others, strict=True)
        ]
        shown = [SOURCE.of(group) for group in task.labels] * 300  # names belong to the vocabulary
        self.tokenizer: Any = word_tokenizer([*self.posts["text"][:], *shown], VOCABULARY, context=64)

    def losses(self, model: Model) -> dict[str, float]:
        """The loss on the held-out passages, text alone, without a source, with the right and with a wrong one."""
        return {
            NONE: text_loss(model, self.held, tokens=WORDS + 1),
            RIGHT: text_loss(model, self.held, SOURCE, tokens=WORDS + 1),
            WRONG: text_loss(model, self.misled, SOURCE, tokens=WORDS + 1),
        }


def drawn(task: Task, split: str, number: int, rng: np.random.Generator) -> datasets.Dataset:
    """So many posts of a split, with the names of their groups."""
    chosen = rng.permutation(len(task.rows(split)))[:number]
    texts, groups = np.array(task.texts(split), dtype=object)[chosen], task.targets(split)[chosen]
    return datasets.Dataset.from_dict({"text": list(texts), "group": [task.labels[group] for group in groups]})


def passages(posts: datasets.Dataset) -> list[dict[str, str]]:
    """The first passages of each post, with its group; the last may be shorter."""
    found = []
    for text, group in zip(posts["text"][:], posts["group"][:], strict=True):
        words = text.split()
        pieces = [words[i : i + WORDS] for i in range(0, len(words), WORDS)][:MOST]
        found += [{"text": " ".join(piece), "group": group} for piece in pieces if len(piece) >= LEAST]
    return found


def train(world: World, cooldown: float | None, steps: int, seed: int, shown: MetadataFormatter = SOURCE) -> Model:
    """One run with MeCo's settings. ``cooldown=None`` is the baseline: a cooldown of a tenth in which the first phase
    has no source either."""
    share = 0.1 if cooldown is None else cooldown
    first, second = (passages(part) for part in shared_out(world.posts, share, seed))
    model = small_language_model("causal-lm", world.tokenizer, width=64, layers=1, heads=4, context=64, seed=seed)
    conditioned = condition(first, None if cooldown is None else shown, world.tokenizer)
    plain = condition(second, None, world.tokenizer) if second else conditioned.select([])
    schedule = MeCoSchedule(steps, conditioned=conditioned, plain=plain, cooldown=share, batch_size=BATCH, seed=seed)
    return fine_tune(
        model,
        TokenRows("passages", {"train": schedule.rows.remove_columns("doc_id")}),
        Budget(steps, "steps"),
        learning_rate=3e-3,
        batch_size=BATCH,
        weight_decay=0.033,
        warmup=0.05,
        schedule="cosine",
        betas=(0.9, 0.95),
        seed=seed,
        order=schedule,
        in_place=True,
    )
