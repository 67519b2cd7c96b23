"""Captions in languages that were only ever translated into: small grafted models on drawn scenes.

The paper trains Florence-2 with Gemma's vocabulary on millions of captions and translations. Here a scene is 16 x 16
pixels with an object on the left and one on the right; four languages differ in their words, in the order of colour
and shape, and in the object that they begin with; three small models of the same architecture caption in two of the
languages and translate into three. The image of a translation shares one of its two objects with the text, as the
nearest image of a matched sentence does: the text must be read.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downriver.core import Budget, InputError, Measurement, charge, count_flops, generator, seeded
from downriver.domains.caption import GraftedVLM, small_parts
from downriver.forecast.pareto import ParetoPowerLaw
from downriver.models import word_tokenizer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, below, better, shared, study
from downriver.tasks import CellBalancedSampler, CellGrid

paper = Paper(
    number=28,
    slug="florenz",
    title="Florenz: Scaling Laws for Systematic Generalization in Vision-Language Models",
    date="2025-03",
    room="domains",
    claim="A model that captions in some languages and translates into others learns to caption in those too, the "
    "better the larger it is, along a power law of compute; a forced opening brings it to answer in them.",
)

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
SHAPES = {
    "square": ("11111", "11111", "11111", "11111", "11111"),
    "cross": ("00100", "00100", "11111", "00100", "00100"),
    "ring": ("11111", "10001", "10001", "10001", "11111"),
}
# what is said of an object, colour or shape first, and which object comes first
ORDERS = {"L1": ("colour", "left"), "L2": ("shape", "left"), "L3": ("shape", "right"), "L4": ("colour", "right")}
CAPTIONED, TRANSLATED, UNSEEN = ("L1", "L2"), ("L2", "L3", "L4"), ("L3", "L4")
PROMPTS = {"caption": "caption {language}", "translate": "translate {language} : {source}"}
OPENINGS = {language: f"{language}.see" for language in ORDERS}

WIDTHS = {"small": 16, "medium": 32, "large": 64}
BATCH, RATE, WARMUP = 32, 3e-3, 50
Thing = tuple[str, str]  # colour and shape
Scene = tuple[Thing, Thing]  # on the left, on the right


@dataclass(frozen=True)
class Scale:
    """Scenes to train on and to test on, 81 at most, and the steps after which a model is tested."""

    trained: int
    tested: int
    checkpoints: tuple[int, ...]


SCALES = {"small": Scale(60, 21, (30, 60, 120, 240)), "tiny": Scale(8, 4, (1, 2, 3, 4))}


@dataclass(frozen=True)
class Run:
    """One training run: compute in GMACs and mean cross-entropy of unseen captions at each checkpoint, and the end."""

    gmacs: list[float]
    unseen: list[float]
    seen: float
    translated: float
    model: GraftedVLM


@study(
    "florenz",
    claims=[
        better("large", than="small", on="UC cross-entropy"),
        better("large", than="control", on="UC cross-entropy", margin=1.0),
        better("large, opening forced", than="large", on="UC exact match", margin=0.1),
        below("Pareto law", on="upper end of the slope", value=0.0),
    ],
    seeds=3,
    title="Captions of drawn scenes in languages that were only translated into",
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws scenes, weights and batches; the control is the large model without translations to L3 and L4."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    sizes = SCALES[scale]

    @shared
    def run_of(size: str) -> Run:
        return trained(size, seed, sizes)

    def measured(size: str, opening: str | None = None) -> list[Measurement]:
        run = run_of(size)
        return [*losses(run), *written(run.model, seed, sizes, opening)]

    for size in WIDTHS:
        yield Arm(size, functools.partial(measured, size))
    yield Arm("large, opening forced", functools.partial(measured, "large", "auto"))
    yield Arm("control", lambda: losses(trained("large", seed, sizes, without=UNSEEN)))
    yield Arm("Pareto law", lambda: pareto([run_of(size) for size in WIDTHS]))


studies = (reproduction,)


def losses(run: Run) -> list[Measurement]:
    """Cross-entropy, in nats a word, of unseen captions, seen captions and seen translations at the last checkpoint."""
    values = {"UC": run.unseen[-1], "SC": run.seen, "ST": run.translated}
    return [Measurement(f"{name} cross-entropy", v, task="scenes", direction="lower") for name, v in values.items()]


def written(model: GraftedVLM, seed: int, sizes: Scale, opening: str | None) -> list[Measurement]:
    """How many captions in unseen languages are right word for word, and how many are in the language asked for."""
    scenes = [(scene, k) for scene in parted(seed, sizes)[1] for k in range(4)]
    images = torch.stack([drawn(*scene) for scene in scenes])
    right, asked = [], []
    for language in UNSEEN:
        texts = model.generate(images, "caption", language, prefix=opening, max_new_tokens=8)
        right += [text == said(scene, language) for text, (scene, _) in zip(texts, scenes, strict=True)]
        asked += [bool(text) and all(word.startswith(language) for word in text.split()[1:]) for text in texts]
    return [
        Measurement("UC exact match", float(np.mean(right)), task="scenes", direction="higher"),
        Measurement("UC in the language asked for", float(np.mean(asked)), task="scenes", direction="higher"),
    ]


def pareto(runs: Sequence[Run]) -> list[Measurement]:
    """The slope of log loss on log compute over the best of all checkpoints, and the end of its 95 % interval.

    Where fewer than three checkpoints are on the front there is no such line, and both are missing.
    """
    compute, loss = (np.concatenate([getattr(run, name) for run in runs]) for name in ("gmacs", "unseen"))
    try:
        law = ParetoPowerLaw().fit(compute, loss)
        slope, high = law.params_["compute"], law.ci()["compute"][1]
    except InputError:
        slope = high = float("nan")
    return [
        Measurement("slope", slope, task="scenes", direction="lower"),
        Measurement("upper end of the slope", high, task="scenes", direction="lower"),
    ]


def said(scene: Scene, language: str) -> str:
    """The caption of a scene: an opening, and two words for each object.

    >>> said((("red", "ring"), ("blue", "square")), "L3")
    'L3.see L3.square L3.blue L3.ring L3.red'
    """
    first, side = ORDERS[language]
    things = scene if side == "left" else scene[::-1]
    words = [word for thing in things for word in (thing if first == "colour" else thing[::-1])]
    return " ".join([OPENINGS[language], *(f"{language}.{word}" for word in words)])


@functools.cache
def drawn(scene: Scene, number: int) -> Tensor:
    """The scene's pixels, (3, 16, 16): an object a side, each in the upper or the lower half by ``number``, 0 to 3."""
    image = torch.zeros(3, 16, 16)
    for side, (colour, shape) in enumerate(scene):
        mask = torch.tensor([[float(bit) for bit in row] for row in SHAPES[shape]])
        top, left = 8 * (number >> side & 1) + 1, 8 * side + 1
        paint = torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None, None]
        image[:, top : top + 5, left : left + 5] = paint * mask
    return image


def parted(seed: int, sizes: Scale) -> tuple[list[Scene], list[Scene]]:
    """Different scenes to train on and to test on."""
    things = list(itertools.product(COLOURS, SHAPES))
    scenes: list[Scene] = list(itertools.product(things, things))
    order = generator("florenz", "scenes", seed).permutation(len(scenes))
    chosen = [scenes[i] for i in order]
    return chosen[sizes.tested :][: sizes.trained], chosen[: sizes.tested]


def grid(without: Sequence[str] = ()) -> CellGrid:
    """Captions in L1 and L2, translations from L1 into the others but ``without``; captions in L3 and L4 are held."""
    seen = {("caption", language) for language in CAPTIONED}
    seen |= {("translate", language) for language in TRANSLATED if language not in without}
    return CellGrid(["caption", "translate"], list(ORDERS), seen, {("caption", language) for language in UNSEEN})


def row(scene: Scene, number: int, task: str, language: str) -> dict[str, Any]:
    """One example; a translation's image keeps the left object of its text and has another on the right."""
    text = said(scene, language)
    if task == "caption":
        return {"image": drawn(scene, number), "task": task, "language": language, "source": None, "target": text}
    rng = generator("florenz", "near", scene, number)
    near: Scene = (scene[0], (str(rng.choice(list(COLOURS))), str(rng.choice(list(SHAPES)))))
    return {
        "image": drawn(near, number),
        "task": task,
        "language": language,
        "source": said(scene, "L1"),
        "target": text,
    }


def trained(size: str, seed: int, sizes: Scale, without: Sequence[str] = ()) -> Run:
    """Train one model on its seen cells, each equally often, at a constant rate; test it at every checkpoint."""
    train, test = parted(seed, sizes)
    cells = grid(without)
    rows = [row(scene, k, *cell) for cell in sorted(cells.seen) for scene in train for k in range(4)]
    columns = {name: [r[name] for r in rows] for name in ("task", "language")}
    order = iter(CellBalancedSampler(columns, cells, n=BATCH * sizes.checkpoints[-1], seed=seed))
    words = word_tokenizer(
        [*(said(s, language) for s in train for language in ORDERS), "caption translate : " + " ".join(ORDERS)],
        lower=False,
    )
    gmacs, unseen, used, flops = [], [], 0.0, 0.0
    with seeded("florenz", "weights", seed):
        parts = small_parts(words, width=WIDTHS[size], layers=1, heads=4, seed=seed)
        model = GraftedVLM(*parts, tokenizer=words, prompts=PROMPTS, prefixes=OPENINGS)
        every = model.train().collate(rows)
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
        for step in range(1, sizes.checkpoints[-1] + 1):
            chosen = torch.tensor([next(order) for _ in range(BATCH)])
            batch = {name: tensor[chosen] for name, tensor in every.items()}
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, step / WARMUP)
            if step == 1:  # all steps cost the same
                flops = count_flops(lambda: model(**batch)["loss"].backward())  # noqa: B023
            else:
                model.train()(**batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            used += flops
            if step in sizes.checkpoints:
                gmacs.append(used / 2e9)
                unseen.append(_loss(model, test, "caption", UNSEEN))
    charge(examples=BATCH * sizes.checkpoints[-1], flops=used, parameters=sum(p.numel() for p in model.parameters()))
    translated = [language for language in TRANSLATED if language not in without]
    return Run(
        gmacs, unseen, _loss(model, test, "caption", CAPTIONED), _loss(model, test, "translate", translated), model
    )


@torch.no_grad()
def _loss(model: GraftedVLM, scenes: Sequence[Scene], task: str, languages: Sequence[str]) -> float:
    model.eval()
    batches = [
        model.collate([row(scene, k, task, language) for scene in scenes for k in range(4)]) for language in languages
    ]
    return float(np.mean([float(model(**batch)["loss"]) for batch in batches]))
