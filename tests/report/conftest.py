"""Studies whose numbers are known exactly, run for real into a ledger of their own."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest

from downriver.core import Cost, Measurement
from downriver.forecast import Backtest, LearningCurve, backtest
from downriver.study import Arm, Claim, Result, better, keeps, study

BASE = (0.610, 0.622, 0.601, 0.615, 0.608)
GAINS: Mapping[str, Sequence[float]] = {
    "probe": (0.0,) * 5,
    "full": (0.080, 0.085, 0.090, 0.078, 0.083),
    "lora": (0.060, 0.070, 0.065, 0.055, 0.062),
    "merge": (0.083, 0.081, 0.093, 0.074, 0.086),
}
COSTS: Mapping[str, Cost] = {
    "probe": Cost(22_000_000, 1_155, 2000, 256_000, 2.0e12, 8.0, 10**9),
    "full": Cost(22_000_000, 22_000_000, 2000, 256_000, 4.6e13, 64.0, 10**9),
    "lora": Cost(22_000_000, 147_000, 2000, 256_000, 3.9e13, 51.0, 10**9),
    "merge": Cost(22_000_000, 22_000_000, 4000, 512_000, 9.3e13, 130.0, 10**9),
}
CLAIMS = (
    better("full", than="probe", on="accuracy", margin=0.02),  # holds
    keeps("lora", than="full", on="accuracy", within=0.01),  # fails
    better("merge", than="full", on="accuracy"),  # undecided
)
MakeStudy = Callable[..., Result]


@pytest.fixture(scope="session")
def run_study(tmp_path_factory: pytest.TempPathFactory) -> MakeStudy:
    """Run arms given as functions of the seed; each returns measurements or raises."""

    def make(
        arms: Mapping[str, Callable[[int], Sequence[Measurement]]],
        seeds: int = 5,
        claims: Sequence[Claim] = (),
        title: str = "",
        name: str = "sample",
    ) -> Result:
        @study(name, claims=claims, seeds=seeds, budget="2000 examples", title=title)
        def declared(seed: int, budget: object, scale: str) -> Iterator[Arm]:
            for arm, measure in arms.items():
                yield Arm(arm, lambda measure=measure: measure(seed))

        return declared.run(tmp_path_factory.mktemp("runs"), executor="serial", progress=False)

    return make


@pytest.fixture(scope="session")
def result(run_study: MakeStudy) -> Result:
    """Four arms, five seeds, four metrics; one claim holds, one fails, one is undecided."""

    def arm(name: str, number: int) -> Callable[[int], Sequence[Measurement]]:
        def measure(seed: int) -> list[Measurement]:
            accuracy, wobble = BASE[seed] + GAINS[name][seed], 0.001 * ((seed * 7 + number) % 5)
            values = {
                "accuracy": (accuracy, "share", "higher"),
                "loss": (2.0 - accuracy, "nats", "lower"),
                "ece": (0.03 + 0.01 * number + wobble, "share", "lower"),
                "retention": (0.99 - 0.01 * number + wobble, "share kept", "higher"),
                "mrr_before": (0.5 + 0.01 * seed, "share", "higher"),
            }
            return [
                Measurement(metric, value, task="news", unit=unit, direction=direction, cost=COSTS[name])
                for metric, (value, unit, direction) in values.items()
            ]

        return measure

    arms = {name: arm(name, number) for number, name in enumerate(GAINS)}
    return run_study(arms, claims=CLAIMS, title="What does fine-tuning buy?")


@pytest.fixture(scope="session")
def wounded(run_study: MakeStudy) -> Result:
    """A hostile name, an arm that always fails, one that fails once, a metric that is not a number."""

    def dead(seed: int) -> list[Measurement]:
        raise RuntimeError("out of <b>memory</b>")

    def once(seed: int) -> list[Measurement]:
        if seed == 1:
            raise ValueError("diverged")
        return [Measurement("accuracy", 0.70 + seed / 100), Measurement("f1", 0.5)]

    arms = {
        "<script>alert('x')</script>": lambda seed: [
            Measurement("accuracy", 0.6 + seed / 100),
            Measurement("f1", float("nan")),
        ],
        "dead": dead,
        "once": once,
    }
    claim = better("once", than="<script>alert('x')</script>", on="accuracy")
    return run_study(arms, seeds=3, claims=[claim], title="Ties & <i>tears</i>", name="wounded")


@pytest.fixture(scope="session")
def single(run_study: MakeStudy) -> Result:
    """One seed: nothing can be decided."""
    arms = {"a": lambda seed: [Measurement("accuracy", 0.5)], "b": lambda seed: [Measurement("accuracy", 0.6)]}
    return run_study(arms, seeds=1, claims=[better("b", than="a", on="accuracy")], name="single")


@pytest.fixture(scope="session")
def wide(run_study: MakeStudy) -> Result:
    """Twenty arms with long names, ten metrics."""

    def arm(number: int) -> Callable[[int], Sequence[Measurement]]:
        cost = Cost(trained_parameters=number * 1000, seconds=float(number + 1), flops=1e12 * (number + 1))
        return lambda seed: [
            Measurement(f"metric {k}", 10.0 ** (k - 4) * (1 + number / 10 + seed / 50), cost=cost) for k in range(10)
        ]

    return run_study({f"a rather long arm name {i:02d}": arm(i) for i in range(20)}, seeds=3, name="wide")


@pytest.fixture(scope="session")
def forecasts() -> list[Backtest]:
    """A learning curve with one hidden point, and one with three."""
    n = np.array([50.0, 100, 200, 400, 800, 1600, 3200, 6400])
    error = 0.22 + 1.6 * n**-0.42 + 0.003 * np.array([1, -1, 1, 1, -1, 1, -1, 1])
    return [backtest(LearningCurve(), (n, error), hide=hide) for hide in (1, 3)]
