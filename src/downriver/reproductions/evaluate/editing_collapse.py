"""Paper 33: few edits of facts ruin a small language model; perplexity tells, and a guard takes the edits back.

The paper edits GPT-2-XL, GPT-J and Llama-2-7B. Here a GPT-2 of three layers, one token a word, learns 240 facts (six
relations of forty subjects, written relation, subject, object) between stretches of text drawn from a Markov chain, and
is edited; perplexity is that of held-out stretches, and what it stands for is the accuracy on the facts left unedited.

Fixed beforehand on another seed (100), whose model the study never sees:

- the order of words. With the subject before the relation no layer took one of eight single edits by consistent ROME
  with the authors' settings: so shallow a model looks a fact up at the relation;
- the layer. With the subject last the first layer took all of ten, the two others eight each;
- fine-tuning's learning rate. Of thirty edits in a row 5e-4, the authors' for GPT-2-XL, took 80 % and doubled the
  perplexity barely; 2e-3 took all and doubled it at the eleventh edit, 5e-3 at the second. The last is used.

Seen there, too: facts go long before perplexity does. One edit before the guard fires the model has lost many of them;
what keeps them is the rollback to the state before the first edit, and that is what is claimed.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from downriver.adapt.edit import Ft, Rome, apply_edit, recalls
from downriver.core import Budget, InputError, Measurement, charge, count_flops, generator
from downriver.evaluate.collapse import CollapseGuard, CollapseWarning, validity
from downriver.evaluate.perplexity import SurrogatePerplexity
from downriver.models.model import Model
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, above, below, shared, study

paper = Paper(
    number=33,
    slug="editing_collapse",
    title="The Butterfly Effect of Model Editing: Few Edits Can Trigger Large Language Models Collapse",
    date="2024-02",
    room="evaluate",
    claim="A few edits of facts can ruin a language model, and its perplexity on a handful of texts shows it.",
)

SUBJECTS, RELATIONS, OBJECTS, WORDS = 40, 6, 40, 39
FOLLOWERS = 8  # words that may follow a word in the text between facts
KINDS = {"r": RELATIONS, "s": SUBJECTS, "o": OBJECTS, "w": WORDS}
VOCABULARY = ("<pad>", "<s>", ".", *(f"{kind}{i}" for kind, number in KINDS.items() for i in range(number)))
LAYER, RATE = 0, 5e-3
REL = 2.0  # the guard's factor
# optimiser steps, single edits, edits of consistent ROME in a row, and of fine-tuning
SCALES = {"small": (500, 20, 25, 30), "tiny": (8, 2, 2, 2)}
CORRELATION = "Spearman of log perplexity and accuracy"


@study(
    "editing-collapse",
    title="Edits of a small model that knows 240 facts",
    claims=[
        above("single C-ROME", on="efficacy", value=0.9),
        below("pooled", on=CORRELATION, value=-0.8),
        below("guarded FT", on="edits made", value=10.5),
        above("guarded FT", on="accuracy", value=0.95),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """Single and sequential edits; a seed draws the facts, the text, the model and the edits anew."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    steps, singles, romes, fines = SCALES[scale]
    world = World(seed)
    surrogate = SurrogatePerplexity(world.held, start_token=True)

    @shared
    def model() -> Model:
        return train(world, steps)

    def measure(edited: Model) -> tuple[float, float]:
        return float(surrogate(edited)), float(recalls(edited, world.others).mean())

    @shared
    def single() -> "Path":
        path, edited = Path(), copy.deepcopy(model())
        for edit in world.edits[:singles]:
            result = apply_edit(edited, [edit], "c_rome", settings("c_rome", world))
            path.add(*measure(edited), result.efficacy)
            result.undo()
        return path

    @shared
    def sequence(method: Any, number: int) -> "Path":
        path, edited = Path(), copy.deepcopy(model())
        for edit in world.edits[:number]:
            result = apply_edit(edited, [edit], method, settings(method, world))
            path.add(*measure(edited), result.efficacy)
        return path

    def unedited() -> list[Measurement]:
        perplexity, accuracy = measure(model())
        return [Measurement("perplexity", perplexity, direction="lower"), Measurement("accuracy", accuracy)]

    def pooled() -> list[Measurement]:
        before = measure(model())[0]
        paths = [single(), sequence("c_rome", romes), sequence("ft", fines)]
        return correlated(
            [p for path in paths for p in path.perplexity], [a for path in paths for a in path.accuracy], before
        )

    def guarded() -> list[Measurement]:
        edited = copy.deepcopy(model())
        guard = CollapseGuard(surrogate, rel=REL, abs=math.inf, warn=REL)
        reference, made, before = guard.measure(edited), fines + 1, math.nan  # one more than all: it never fired
        with warnings.catch_warnings(), guard.watch(edited, reference=reference) as report:
            warnings.simplefilter("ignore", CollapseWarning)
            for number, edit in enumerate(world.edits[:fines], start=1):
                last = measure(edited)[1]
                apply_edit(edited, [edit], "ft", settings("ft", world))
                if guard.judge(reference, guard.measure(edited)) == "collapsed":
                    made, before = number, last
                    break
        return [
            Measurement("edits made", made, direction="lower"),
            Measurement("rolled back", float(report.rolled_back)),
            Measurement("accuracy", measure(edited)[1]),
            Measurement("accuracy one edit before", before),
        ]

    yield Arm("unedited", unedited)
    yield Arm("single C-ROME", lambda: single().measured())
    yield Arm("sequential C-ROME", lambda: sequence("c_rome", romes).measured())
    yield Arm("sequential FT", lambda: sequence("ft", fines).measured())
    yield Arm("pooled", pooled)
    yield Arm("guarded FT", guarded)


studies: tuple[Study, ...] = (reproduction,)


def settings(method: str, world: "World") -> Rome | Ft:
    """Consistent ROME as its authors have it; fine-tuning without a bound."""
    if method == "ft":
        return Ft(layer=LAYER, learning_rate=RATE, epsilon=None)
    return Rome(layer=LAYER, contexts=world.contexts)


class Path:
    """Perplexity and accuracy of one edited model after another, and whether each edit took."""

    def __init__(self) -> None:
        self.perplexity: list[float] = []
        self.accuracy: list[float] = []
        self.efficacy: list[float] = []

    def add(self, perplexity: float, accuracy: float, efficacy: float) -> None:
        self.perplexity.append(perplexity)
        self.accuracy.append(accuracy)
        self.efficacy.append(efficacy)

    def measured(self) -> list[Measurement]:
        """The share of edits that took, and the last model's figures."""
        return [
            Measurement("efficacy", float(np.mean(self.efficacy))),
            Measurement("perplexity", self.perplexity[-1], direction="lower"),
            Measurement("accuracy", self.accuracy[-1]),
        ]


def correlated(perplexities: Sequence[float], accuracies: Sequence[float], before: float) -> list[Measurement]:
    """The correlation over all models, and over those below the guard's warning only."""
    found = validity(perplexities, accuracies, threshold=1.5 * before)
    return [
        Measurement(CORRELATION, found.spearman.value, direction="lower"),
        Measurement(f"{CORRELATION}, below 1.5 times", found.spearman_below.value, direction="lower"),
        Measurement("models", float(found.spearman.n), direction="none"),
        Measurement("models below 1.5 times", float(found.spearman_below.n), direction="none"),
    ]


class World:
    """Facts, text, and the edits to be made, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = generator("editing collapse", seed)
        self.object = rng.integers(OBJECTS, size=(SUBJECTS, RELATIONS))
        self.next = np.array([rng.choice(WORDS, FOLLOWERS, replace=False) for _ in range(WORDS)])
        self.held = [self.text(12) for _ in range(50)]
        self.contexts = [f"{self.text(words)} . {{}}" for words in [3] * 10 + [8] * 10]  # as many as the authors'
        places = [(int(s), int(rng.integers(RELATIONS))) for s in rng.permutation(SUBJECTS)[:30]]
        new = [(int(self.object[place]) + int(rng.integers(1, OBJECTS))) % OBJECTS for place in places]
        self.edits = [self.fact(s, r, o) for (s, r), o in zip(places, new, strict=True)]
        self.others = [self.fact(s, r) for s in range(SUBJECTS) for r in range(RELATIONS) if (s, r) not in set(places)]

    def fact(self, subject: int, relation: int, target: int | None = None) -> dict[str, str]:
        target = int(self.object[subject, relation]) if target is None else target
        return {"prompt": f"r{relation} {{}}", "subject": f"s{subject}", "target_new": f"o{target}"}

    def text(self, words: int) -> str:
        """A walk along the chain; the rank of the next word among the followers falls off exponentially."""
        walk = [int(self.rng.integers(WORDS))]
        while len(walk) < words:
            walk.append(int(self.next[walk[-1], min(FOLLOWERS - 1, int(self.rng.exponential(2.5)))]))
        return " ".join(f"w{word}" for word in walk)

    def passage(self, words: int = 24) -> list[str]:
        """Facts, three of four, and stretches of text, each closed by a full stop."""
        found: list[str] = []
        while len(found) < words:
            if self.rng.random() < 0.75:
                s, r = int(self.rng.integers(SUBJECTS)), int(self.rng.integers(RELATIONS))
                found += [f"r{r}", f"s{s}", f"o{self.object[s, r]}", "."]
            else:
                found += [*self.text(int(self.rng.integers(5, 10))).split(), "."]
        return found[:words]


def train(world: World, steps: int, batch: int = 32) -> Model:
    """A GPT-2 of three layers and width 64 on fresh passages; Adam, one cycle up to 5e-3, clipped gradients."""
    place = {word: i for i, word in enumerate(VOCABULARY)}
    config = transformers.GPT2Config(
        vocab_size=len(place),
        n_positions=48,
        n_embd=64,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=0,
    )
    net: Any = transformers.GPT2LMHeadModel(config)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.9, 0.98), fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps, pct_start=0.2, cycle_momentum=False)

    def step() -> None:
        rows = torch.tensor([[1, *(place[word] for word in world.passage())] for _ in range(batch)])
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        cycle.step()

    flops = count_flops(step)
    for _ in range(steps - 1):
        step()
    size = sum(p.numel() for p in net.parameters())
    charge(parameters=size, trained_parameters=size, tokens=steps * batch * 25, flops=flops * steps)
    return Model(net, kind="causal-lm", processor=tokenizer(place), max_length=48)


def tokenizer(place: Mapping[str, int]) -> transformers.PreTrainedTokenizerFast:
    """One token a word; every text begins with ``<s>``."""
    words = Tokenizer(WordLevel(dict(place), unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>")
