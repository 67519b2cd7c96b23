"""Paper 20: a cap on the examples that count, when one small model is tuned on tasks of very different sizes.

The paper tunes OPT-30B and 175B on some 1500 tasks. Here a Llama of two layers and width 128 is tuned, from random
weights, on 18 generated tasks on lists of letters and digits: four tasks in each of six categories, each told in two
ways; of the 24 one category of four is held out, and one task each of two others. Sizes run from 20 to 1000 examples,
dealt to the tasks anew by each seed. The arms differ in nothing but the probabilities of the tasks.

Nothing is claimed of fully held-out categories: a model of this size has no words for what it was never told.

Fixed beforehand on another seed (100): how the tasks are told (shorter than at first, which learnt too slowly) and the
number of steps (of 200, 400 and 600 the last, where the largest task, an easy one there, was learnt in both arms). Seen
on the study's own seeds: small tasks gain in two of three. The largest task, a hard one in all three, falls from an
exact match of 0.69, 1.00 and 0.60 to 0.38, 0.34 and 0.21: with a third of the draws it is not learnt in so few steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from downriver.adapt.opt_iml import opt_iml
from downriver.core import Budget, InputError, Measurement, generator
from downriver.data.mix.tasks import TaskMixture
from downriver.evaluate.generalization import by_level, evaluate_generalization
from downriver.models import Model, small_language_model, word_tokenizer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, better, keeps, shared, study
from downriver.tasks.generalization import InstructionTask, Levels, Template

paper = Paper(
    number=20,
    slug="opt_iml",
    title="OPT-IML: Scaling Language Model Instruction Meta Learning through the Lens of Generalization",
    date="2022-12",
    room="data",
    claim="Drawing instruction tasks in proportion to their examples up to a cap serves all of them better than "
    "drawing them in plain proportion.",
)

LETTERS, DIGITS, LENGTHS = "abcdefgh", "0123456789", (3, 4)
SMALLEST, LARGEST, CAP = 20, 1000, 100
HELD, HELD_LARGEST = 50, 200  # examples to measure a task by; the largest task by more, as its loss has a bound
CONTEXT, BATCH, RATE = 64, 8, 3e-3
SCALES = {"small": 600, "tiny": 4}  # optimiser steps

Rule = Callable[[Sequence[str]], Sequence[str]]


def _digits(rule: Callable[[int], int]) -> Rule:
    return lambda x: [str(rule(int(d)) % 10) for d in x]


@dataclass(frozen=True)
class Kind:
    """A category: what its lists are made of, its two ways of telling, and its tasks by the words that name them."""

    alphabet: str
    tellings: tuple[str, str]
    rules: dict[str, Rule]


KINDS = {
    "pick": Kind(
        LETTERS,
        ("{what} of {x} :", "{x} , which is {what} ?"),
        {"first": lambda x: x[:1], "last": lambda x: x[-1:], "second": lambda x: x[1:2], "third": lambda x: x[2:3]},
    ),
    "reorder": Kind(
        LETTERS,
        ("write {x} {what} :", "{what} , from {x} :"),
        {
            "backwards": lambda x: x[::-1],
            "sorted": sorted,
            "swapped": lambda x: [*x[1::-1], *x[2:]],
            "rotated": lambda x: [*x[1:], x[0]],
        },
    ),
    "edit": Kind(
        LETTERS,
        ("{what} of {x} :", "take {x} and {what} :"),
        {
            "drop head": lambda x: x[1:],
            "drop end": lambda x: x[:-1],
            "copy all": lambda x: x,
            "copy twice": lambda x: [*x, *x],
        },
    ),
    "digits": Kind(
        DIGITS,
        ("{what} each of {x} :", "{x} , each {what} ?"),
        {
            "increase": _digits(lambda d: d + 1),
            "decrease": _digits(lambda d: d - 1),
            "double": _digits(lambda d: 2 * d),
            "complement": _digits(lambda d: 9 - d),
        },
    ),
    "summary": Kind(
        DIGITS,
        ("{what} among {x} :", "{x} , the {what} ?"),
        {
            "largest": lambda x: [max(x)],
            "smallest": lambda x: [min(x)],
            "median": lambda x: [sorted(x)[len(x) // 2]],
            "commonest": lambda x: [max(sorted(set(x)), key=list(x).count)],
        },
    ),
    "count": Kind(
        LETTERS,
        ("how many {what} in {x} ?", "{x} , count {what} :"),
        {
            "letters": lambda x: [str(len(x))],
            "vowels": lambda x: [str(sum(c in "ae" for c in x))],
            "kinds": lambda x: [str(len(set(x)))],
            "repeats": lambda x: [str(len(x) - len(set(x)))],
        },
    ),
}
FULLY, PARTIALLY = "count", ("third", "copy all")


class World:
    """The tasks of one seed: sizes dealt to them, examples to train on, and others to measure by."""

    def __init__(self, seed: int) -> None:
        rng = generator("opt-iml", seed)
        trained = [w for kind, of in KINDS.items() if kind != FULLY for w in of.rules if w not in PARTIALLY]
        sizes = np.geomspace(SMALLEST, LARGEST, len(trained)).round().astype(int)
        self.sizes = dict(zip(trained, rng.permutation(sizes).tolist(), strict=True))
        self.largest = max(self.sizes, key=lambda name: self.sizes[name])
        self.small = {name for name, n in self.sizes.items() if n < CAP}
        train, held = [], {}
        for category, kind in KINDS.items():
            for name in kind.rules:
                count = HELD_LARGEST if name == self.largest else HELD
                examples = _examples(kind, name, self.sizes.get(name, 0) + count, rng)
                held[name] = _task(category, name, examples[:count])
                if name in self.sizes:
                    train.append(_task(category, name, examples[count:]))
        fully = tuple(held[name] for name in KINDS[FULLY].rules)
        supervised = tuple(held[name] for name in self.sizes)
        self.levels = Levels(tuple(train), fully, tuple(held[name] for name in PARTIALLY), supervised)
        told = [" ".join(kind.tellings).format(what=what, x="") for kind in KINDS.values() for what in kind.rules]
        self.tokenizer = word_tokenizer([*told, *LETTERS, *DIGITS], context=CONTEXT, lower=False)

    def model(self, seed: int) -> Model:
        return small_language_model(
            "causal-lm", self.tokenizer, width=128, layers=2, heads=4, context=CONTEXT, seed=seed
        )


@study(
    "opt-iml",
    title="Eighteen tasks of 20 to 1000 examples, drawn with and without a cap",
    claims=[
        better("capped", than="proportional", on="exact match", task="fully supervised"),
        better("capped", than="proportional", on="exact match", task="small tasks"),
        keeps("capped", than="proportional", on="exact match", task="largest task", within=0.03),
        better("capped", than="untrained", on="exact match", task="partially supervised"),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """Two mixtures at equal steps from one start; a seed draws sizes, examples, weights and order anew."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")

    @shared
    def world() -> World:
        return World(seed)

    def tuned(cap: float | None) -> list[Measurement]:
        here = world()
        model = opt_iml(
            here.model(seed),
            TaskMixture(here.levels.train, cap=cap, seed=seed),
            f"{SCALES[scale]} steps",
            block=CONTEXT,
            batch_size=BATCH,
            learning_rate=RATE,
            warmup=SCALES[scale] // 20,
            dropout=0.0,
            seed=seed,
        )
        return measured(model, here)

    yield Arm("untrained", lambda: measured(world().model(seed), world()))
    yield Arm("proportional", lambda: tuned(None))
    yield Arm("capped", lambda: tuned(CAP))


studies: tuple[Study, ...] = (reproduction,)


def measured(model: Model, world: World) -> list[Measurement]:
    """Exact match by level, and within the supervised level that of the small tasks and of the largest."""
    table = evaluate_generalization(model, world.levels, shots=(0,))
    found = {m.task: m.value for m in by_level(table)}
    value = dict(table.filter(level="fully supervised").select("task", "value").iter_rows())
    found["small tasks"] = float(np.mean([value[name] for name in world.small]))
    found["largest task"] = value[world.largest]
    return [Measurement("exact match", v, task=task, unit="share") for task, v in found.items()]


def _task(category: str, name: str, examples: Sequence[dict[str, str]]) -> InstructionTask:
    tellings = [telling.replace("{what}", name) for telling in KINDS[category].tellings]
    return InstructionTask(name, category, category, examples, tuple(Template(t, "{y}") for t in tellings))


def _examples(kind: Kind, name: str, count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """So many different lists, with the answers."""
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        x = rng.choice(list(kind.alphabet), size=rng.choice(LENGTHS)).tolist()
        found.setdefault(" ".join(x), {"x": " ".join(x), "y": " ".join(kind.rules[name](x))})
    return list(found.values())
