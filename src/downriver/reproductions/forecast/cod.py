"""Paper 2: clustering items by difficulty forecasts a benchmark better than its mean does.

The benchmark is generated: 600 items in five families (easy, medium, hard, late, never), each item's pass rate a law of
compute with parameters of its own, 100 samples an item and model, seven models from 1 to 729 times the smallest. One
stronger model at 2 187 times is known as an anchor; the target is 50 000 times the smallest. The law of an item is the
form that both methods fit, so this tests the grouping and the mapping, not the form.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from downriver.core import Budget, InputError, Measurement
from downriver.core.seeds import generator
from downriver.forecast.cod import CODPredictor, EndToEndLaw
from downriver.forecast.fit import Array
from downriver.reproductions.paper import Paper
from downriver.study import Arm, better, shared
from downriver.study.study import study

paper = Paper(
    number=2,
    slug="cod",
    title="Unveiling Downstream Performance Scaling of LLMs: A Clustering-Based Perspective",
    date="2025-02",
    room="forecast",
    claim="Forecasting groups of items of like difficulty, without those that have not emerged, and mapping their "
    "score to the whole benchmark is more exact than extrapolating the benchmark's mean.",
)

COMPUTE = 3.0 ** np.arange(7)
ANCHOR, TARGET = 3.0**7, 50_000.0
SAMPLES, CHANCE = 100, 0.05
# share of the items; a, b and c of the family's middle
FAMILIES = (
    (0.25, 1.5, 0.45, 0.02),
    (0.25, 4.0, 0.35, 0.05),
    (0.2, 8.0, 0.3, 0.08),
    (0.2, 60.0, 0.45, 0.08),
    (0.1, 1e4, 0.2, 0.0),
)
JITTER = 0.15  # standard deviation of log a and log b within a family
ITEMS = {"small": 600, "tiny": 200}
OFF = "absolute error"


@study(
    "cod",
    claims=[better("cod", than="end to end", on=OFF), better("cod", than="cod without mapping", on=OFF)],
    seeds=8,
    title="A generated benchmark of five families of items, forecast at 69 times the largest model measured",
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """Forecast one generated benchmark; a seed draws items and samples anew."""
    if scale not in ITEMS:
        raise InputError(f"scale {scale!r} is not one of {', '.join(ITEMS)}")

    @shared
    def benchmark() -> tuple[Array, Array, float]:
        return generate(ITEMS[scale], generator(paper.slug, "benchmark", seed))

    def forecast(name: str) -> list[Measurement]:
        rates, anchor, truth = benchmark()
        return [Measurement(OFF, abs(FORECASTS[name](rates, anchor) - truth), task="generated", direction="lower")]

    for name in FORECASTS:
        yield Arm(name, functools.partial(forecast, name))


studies = (reproduction,)


def generate(items: int, rng: np.random.Generator) -> tuple[Array, Array, float]:
    """Sampled pass rates (items, models), those of the anchor, and the target's expected score."""
    family = rng.choice(len(FAMILIES), size=items, p=[f[0] for f in FAMILIES])
    a, b, c = np.array([f[1:] for f in FAMILIES])[family].T
    a, b = a * np.exp(JITTER * rng.standard_normal(items)), b * np.exp(JITTER * rng.standard_normal(items))

    def solved(compute: Array) -> Array:
        return CHANCE + (1 - CHANCE) * np.exp(-a[:, None] * compute ** -b[:, None] - c[:, None])

    measured = rng.binomial(SAMPLES, solved(np.append(COMPUTE, ANCHOR))) / SAMPLES
    return measured[:, :-1], measured[:, -1], float(solved(np.array([TARGET])).mean())


def _cod(rates: Array, anchor: Array, mapping: str = "spline") -> float:
    return CODPredictor(mapping=mapping, chance=CHANCE).fit(rates, COMPUTE, [anchor]).predict(TARGET).score  # type: ignore[arg-type]


FORECASTS: dict[str, Callable[[Array, Array], float]] = {
    "cod": _cod,
    "cod without mapping": functools.partial(_cod, mapping="linear"),
    "end to end": lambda rates, anchor: EndToEndLaw().fit(COMPUTE, rates.mean(axis=0)).predict(TARGET),
    "end to end with anchor": lambda rates, anchor: (
        EndToEndLaw().fit(np.append(COMPUTE, ANCHOR), np.append(rates.mean(axis=0), anchor.mean())).predict(TARGET)
    ),
}
