"""Paper 4: five small runs forecast larger and longer ones.

The first study trains character models (an MLP on 16 characters) on the source text of Python's standard library:
five small runs are fitted, an over-trained model and a larger one are forecast. Learning rate and batch rule are the
same for all runs. They were fixed before their own forecasts were seen, but not blindly: a batch of 256 for every run,
on similar sizes and one seed, was tried first and the law was off by 5 % (learning rate 0.02) and 8 % (0.01).

The second repeats the paper's fit on its public runs and takes each of the two training sets as one seed: it reports
the errors and claims nothing, for two sets decide nothing. It is there when ``DOWNRIVER_SHARED_DATA`` names a folder
that holds ``overtraining_testbed`` (``exp_data`` of github.com/mlfoundations/scaling).
"""

import collections
import functools
import math
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from downriver.core import Budget, InputError, Measurement, charge
from downriver.forecast.fit import Array, fit_law
from downriver.forecast.forms import PowerLaw
from downriver.forecast.overtraining_law import OverTrainingLaw, paper_runs
from downriver.forecast.table import RunTable
from downriver.reproductions.paper import Paper
from downriver.study import Arm, below, better, shared
from downriver.study.study import study

paper = Paper(
    number=4,
    slug="overtraining_law",
    title="Language models scale reliably with over-training and on downstream tasks",
    date="2024-03",
    room="forecast",
    claim="A law in parameters and tokens, fitted to five small runs, forecasts the loss of much larger and of heavily "
    "over-trained models.",
)

CONTEXT, SYMBOLS = 16, 64
LEARNING_RATE, WARM_UP, TESTED = 0.01, 0.05, 20_000
# width of the character embedding, hidden width, tokens a parameter: 3 000 to 59 000 parameters
SMALL = ((4, 21, 20), (5, 26, 20), (6, 32, 20), (8, 36, 20), (4, 21, 160))
LARGE = ((9, 44, 320), (20, 150, 20))  # 8 and 18 times the compute of the five together
SHARE = {"small": 1.0, "tiny": 0.002}  # of the tokens; tiny runs in seconds and shows nothing

GROUPS = ("rpj", "c4_original")
CLAIM = "relative error"


def _law(runs: RunTable, N: Array, D: Array, loss: str = "lsq") -> Array:
    fitted = OverTrainingLaw(loss=loss).fit(runs.params, runs.tokens, runs.loss)  # type: ignore[arg-type]
    return fitted.fit_.predict(N, D)


FORECASTS: dict[str, Callable[[RunTable, Array, Array], Array]] = {
    "law": _law,
    "robust law": functools.partial(_law, loss="huber_log"),
    "best small run": lambda runs, N, D: np.full(len(N), runs.loss.min()),
    "law of compute": lambda runs, N, D: fit_law(PowerLaw(), [runs.compute], runs.loss).predict(6 * N * D),
}


@study(
    "overtraining-law",
    claims=[
        below("law", on=CLAIM, value=0.05),
        better("law", than="best small run", on=CLAIM),
        better("law", than="law of compute", on=CLAIM),
    ],
    seeds=3,
    title="Five small character models forecast an over-trained and a larger one",
    parameters={"python": platform.python_version()},
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """Forecast two larger runs from five; a seed draws weights and batches anew."""
    if scale not in SHARE:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SHARE)}")

    @shared
    def runs() -> RunTable:
        N, D, loss = np.array([train(*run, share=SHARE[scale]) for run in SMALL + LARGE]).T
        return RunTable(N, D, {"loss": loss})

    def measure(name: str) -> list[Measurement]:
        fitted = np.arange(len(SMALL + LARGE)) < len(SMALL)
        return measured(name, runs(), fitted, ~fitted, "characters")

    for name in FORECASTS:
        yield Arm(name, functools.partial(measure, name))


def _data() -> Path | None:
    folder = Path(os.environ.get("DOWNRIVER_SHARED_DATA", "")) / "overtraining_testbed"
    return folder if "DOWNRIVER_SHARED_DATA" in os.environ and folder.is_dir() else None


@study(
    "overtraining-law-public",
    seeds=2,
    title="Five public runs forecast a 1.4B over-trained and a 6.9B model; each training set is one seed",
)
def public(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """The paper's recipe on one of its training sets: RedPajama (seed 0) or C4 (seed 1), on every evaluation set."""
    if seed >= len(GROUPS):
        raise InputError(f"seed {seed}: the public runs have {len(GROUPS)} training sets")

    @shared
    def table() -> RunTable:
        folder = _data()
        if folder is None:
            raise InputError("DOWNRIVER_SHARED_DATA names no folder that holds overtraining_testbed")
        return RunTable.from_testbed(folder).group(GROUPS[seed])

    def measure(name: str) -> list[Measurement]:
        runs = table()
        once = (runs.params < 2e9) & np.isclose(runs.multiplier, 20, rtol=1e-3)
        held = (runs.params > 1e9) & ~once
        fitted = paper_runs(runs)
        rows = []
        for task, loss in runs.losses.items():
            rows += measured(name, RunTable(runs.params, runs.tokens, {"loss": loss}), fitted, held, task)
        return rows

    for name in FORECASTS:
        yield Arm(name, functools.partial(measure, name))


studies = (reproduction, public) if _data() else (reproduction,)


def measured(name: str, runs: RunTable, fitted: Array, held: Array, task: str) -> list[Measurement]:
    """Forecast the held runs from the fitted ones; the mean absolute relative error, and that of each."""
    forecast = FORECASTS[name](runs.select(fitted), runs.params[held], runs.tokens[held])
    off = np.abs(forecast / runs.loss[held] - 1)
    rows = [(CLAIM, float(off.mean()))]
    rows += [
        (f"{CLAIM} at {m:.0f} tokens a parameter", float(e)) for m, e in zip(runs.multiplier[held], off, strict=True)
    ]
    return [Measurement(metric, value, task=task, direction="lower") for metric, value in rows]


class CharacterModel(nn.Module):
    """The next character from the last 16: embed each, one hidden layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, width)
        self.hidden = nn.Linear(CONTEXT * width, hidden)
        self.out = nn.Linear(hidden, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.embed(x).flatten(1))))


def train(width: int, hidden: int, multiplier: int, share: float = 1.0) -> tuple[float, float, float]:
    """Train one model and give back its parameters, the tokens it saw, and its loss on held-out text.

    Adam, one cosine from ``LEARNING_RATE`` to 0; the batch grows with the square root of the tokens.
    """
    model = CharacterModel(width, hidden)
    N = sum(p.numel() for p in model.parameters())
    tokens = share * multiplier * N
    batch = max(8, round(math.sqrt(tokens) / 7.5))
    steps = max(1, round(tokens / batch))
    seen, tested = corpus()
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1.0, (i + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    for _ in range(steps):
        window = seen[torch.randint(len(seen), (batch,))]
        loss = cross_entropy(model(window[:, :CONTEXT]), window[:, CONTEXT])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    charge(parameters=N, trained_parameters=N, tokens=steps * batch, flops=6.0 * N * steps * batch)
    with torch.no_grad():
        reached = cross_entropy(model(tested[:, :CONTEXT]), tested[:, CONTEXT])
    return float(N), float(steps * batch), float(reached)


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """Windows of 17 characters of the standard library's source text, to train on (every one) and to test on.

    Lower case, the 63 commonest characters and one for all others; every twentieth block of 2 000 characters is held
    out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = (file for file in sorted(root.rglob("*.py")) if not skipped & set(file.relative_to(root).parts))
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files).lower()
    raw = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)
    code = np.full(256, SYMBOLS - 1)
    common = [symbol for symbol, _ in collections.Counter(raw.tolist()).most_common(SYMBOLS - 1)]
    code[common] = np.arange(len(common))
    blocks = torch.from_numpy(code[raw[: len(raw) // 2000 * 2000]]).view(-1, 2000)
    held = torch.arange(len(blocks)) % 20 == 0
    seen, tested = (blocks[rows].flatten().unfold(0, CONTEXT + 1, 1) for rows in (~held, held))
    return seen, tested[:: max(1, len(tested) // TESTED)]
