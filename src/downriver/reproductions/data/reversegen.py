"""Paper 86: a proposer learns to ask what a target gets wrong; tuned on those questions, the target gets better.

The paper explores chat models of 3B to 8B. Here target and proposer are two-layer Llamas of width 64 that know sums of
two two-digit numbers: three quarters of what the target learnt are sums without a carry, and it stops learning once it
gets three of four of any sums right; the proposer learnt only to write sums without a carry; an exact program judges
and answers. Five rounds of 1000 proposals; DPO with β 0.1 and the anchor, 40 steps of 32 pairs. The repair compares
equal numbers of questions: proposals of the warmed-up proposer, failures, half of each, failures under a cluster cap,
and the last round's proposals as they came. What the exploration cost beyond that is the metric «target calls».

Fixed beforehand on another seed (100), which the study never sees: a target trained for a fixed number of steps got
between 43 % and 99 % of sums right, by seed, hence the stop; DPO at 1e-4, decaying, brought the failure rate from .09
to .34, at 2e-4 from .07 to .65 with 90 % valid, hence 1.5e-4.

Seen over eight seeds: failures rise every round (.08 to .30), and 300 of them repair more than 300 ordinary questions
(.944 against .908, from .808), but cost it some of its easy sums (.959, from .976), which half and half does not
(.949, easy .998). The card's negative control does not show: 300 raw proposals of the last round, seven in ten of them
passed, are as good as failures (.954, easy .997). Validity falls below .9 in some seeds.
"""

import re
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState

from downriver.core import Budget, InputError, Measurement, generator
from downriver.data.synth import ExactMatch, Exploration, FailureExplorer, FewShotPrompt, improve, warm_up
from downriver.data.synth.dpo import encode
from downriver.models import HFChat, Model, byte_tokenizer, small_language_model
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, above, better, keeps, shared, study
from downriver.training import TokenRows, fine_tune

paper = Paper(
    number=86,
    slug="reversegen",
    title="Forewarned is Forearmed: Leveraging LLMs for Data Synthesis through Failure-Inducing Exploration",
    date="2024-10",
    room="data",
    claim="A model trained to write queries on which a target fails finds ever more of them, and tuning the target on "
    "those repairs it better than on as many ordinary ones.",
)

CONTEXT = 12  # tokens
HARD, ENOUGH = 0.25, 0.75  # the share of any sums at all in the target's training, and the accuracy that ends it
# most training steps of the target, those of the proposer, proposals a round, rounds, DPO steps, questions to repair
# with, test sums
SCALES = {"small": (600, 150, 1000, 5, 40, 300, 1000), "tiny": (50, 120, 60, 2, 4, 20, 50)}
DPO = {"learning_rate": 1.5e-4, "nll_weight": 1.0, "batch_size": 32}


@study(
    "reversegen",
    title="Sums that a small model gets wrong, found by another",
    claims=[
        above("exploration", on="smallest rise", value=0.0),
        above("exploration", on="growth", value=3.0),
        above("exploration", on="validity", value=0.9),
        better("failures", than="warm-up", on="accuracy"),
        keeps("failures", than="target", on="easy accuracy", within=0.01),
    ],
    seeds=8,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """One target and one exploration a seed, several ways to repair."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    learn, warm, proposals, rounds, steps, number, tests = SCALES[scale]
    test, easy = sums(generator("any", seed), tests), sums(generator("easy", seed), tests, carry=False)

    @shared
    def target() -> Model:
        rng, model = generator("target", seed), blank(seed)
        asked = sums(rng, int(10_000 * (1 - HARD)), carry=False) + sums(rng, int(10_000 * HARD))
        rows = datasets.Dataset.from_list(encode(model, list(zip(asked, solve(asked), strict=True))))
        return fine_tune(
            model,
            TokenRows("sums", {"train": rows}),
            Budget(learn, "steps"),
            learning_rate=3e-3,
            batch_size=64,
            schedule="constant",
            seed=seed,
            callbacks=[Enough(sums(rng, 400))],
        )

    @shared
    def exploration() -> Exploration:
        builder = FewShotPrompt(sums(generator("proposer", seed), 2000, carry=False), "", k=0)
        rate, batch = 3e-3, 64
        proposer = warm_up(
            blank(seed + 1000), builder, Budget(warm, "steps"), learning_rate=rate, batch_size=batch, seed=seed
        )
        loop = FailureExplorer(
            proposer,
            target(),
            ExactMatch(solve),
            builder,
            validity=valid,
            dedup=None,
            rounds=rounds,
            n_per_round=proposals,
            dpo=DPO | {"budget": Budget(steps, "steps")},
            max_tokens=7,
            answer_tokens=4,
            batch_size=500,
            seed=seed,
        )
        return loop.run()

    def explored() -> list[Measurement]:
        figures = exploration().frame()
        rates = figures["failure_rate"].to_list()
        rises = np.diff([*rates, *[rates[-1]] * (rounds - len(rates))])  # a round that did not come is no rise
        return [
            Measurement("smallest rise", float(rises.min())),
            Measurement("growth", rates[-1] / max(rates[0], 1 / proposals)),
            Measurement("validity", float(min(figures["validity"]))),
            Measurement("unique in the last round", figures["unique"][-1]),
            Measurement("target calls", float(figures["calls"].sum()), direction="lower"),
            *(Measurement(f"failure rate {i}", rate, direction="none") for i, rate in enumerate(rates, start=1)),
        ]

    def found(kind: str) -> list[str]:
        """So many questions of a kind, in random order."""
        state = exploration()
        if kind == "failures":
            queries = list(state.training_set()["query"])
        elif kind == "capped":
            queries = list(state.training_set(max_per_cluster=number // 10, clusters=20)["query"])
        else:
            place = 0 if kind == "warm-up" else -1
            queries = (
                state.rounds[place]
                .proposals.filter(state.rounds[place].proposals["status"] != "invalid")["query"]
                .to_list()
            )
        order = generator("questions", seed, kind).permutation(len(queries))
        return [queries[i] for i in order[:number]]

    def repaired(*kinds: str) -> list[Measurement]:
        queries = [query for kind in kinds for query in found(kind)[: number // len(kinds)]]
        tuned = improve(
            target(),
            queries,
            solve,
            budget=Budget(10 * number, "examples"),
            learning_rate=5e-4,
            batch_size=min(32, number),
            seed=seed,
        )
        return [*measured(tuned), Measurement("questions", float(len(queries)), direction="none")]

    def measured(model: Model) -> list[Measurement]:
        return [Measurement("accuracy", accuracy(model, test)), Measurement("easy accuracy", accuracy(model, easy))]

    yield Arm("target", lambda: measured(target()))
    yield Arm("exploration", explored)
    yield Arm("warm-up", lambda: repaired("warm-up"))
    yield Arm("failures", lambda: repaired("failures"))
    yield Arm("half and half", lambda: repaired("failures", "warm-up"))
    yield Arm("capped failures", lambda: repaired("capped"))
    yield Arm("last round, raw", lambda: repaired("last"))


studies: tuple[Study, ...] = (reproduction,)


class Enough(TrainerCallback):
    """Ends training once three of four sums are right: looks every 25 steps."""

    def __init__(self, questions: list[str]) -> None:
        self.questions = questions

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if state.global_step % 25 == 0 and accuracy(model, self.questions) >= ENOUGH:
            control.should_training_stop = True
            model.train()


def sums(rng: np.random.Generator, n: int, carry: bool = True) -> list[str]:
    """``n`` questions such as ``07+45=``; without ``carry`` no column of digits adds up to ten."""
    digits = rng.integers(10, size=(n, 4)) if carry else np.empty((0, 4), dtype=int)
    while len(digits) < n:
        drawn = rng.integers(10, size=(2 * n, 4))
        digits = np.concatenate([digits, drawn[(drawn[:, :2] + drawn[:, 2:]).max(axis=1) < 10]])
    return [f"{a}{b}+{c}{d}=" for a, b, c, d in digits[:n]]


def solve(questions: list[str]) -> list[str]:
    """The sums in three digits, the last first: so they are learnt sooner.

    >>> solve(["07+45="])
    ['250']
    """
    return [f"{int(q[:2]) + int(q[3:5]):03d}"[::-1] for q in questions]


def valid(questions: list[str]) -> list[bool]:
    """Which texts are questions at all."""
    return [re.fullmatch(r"\d\d\+\d\d=", q) is not None for q in questions]


def blank(seed: int) -> Model:
    """A model that knows nothing yet."""
    return small_language_model(
        "causal-lm", byte_tokenizer(CONTEXT), width=64, layers=2, context=CONTEXT + 4, seed=seed
    )


def accuracy(model: Model, questions: list[str]) -> float:
    """The share of questions that greedy decoding answers right."""
    chat = HFChat(model, batch_size=500, strings="text", progress=False)
    answers = [some[0].text for some in chat.generate(questions, max_tokens=4)]
    return float(np.mean([answer == right for answer, right in zip(answers, solve(questions), strict=True)]))
