"""The data-scaling part of Merlin: zero-shot findings against the number of scans trained on, and its forecast.

Generated scans of 24 x 24 x 16 voxels show a body with three organs and up to six findings; templated reports speak of
each. A small three-dimensional network and an encoder of sentences are trained on pairs, in turn on whole reports and
on one organ's section, and find the six by comparing prompts, as the paper does. A power of the number of scans is
fitted to the scores at 64, 128 and 256 scans and forecasts the one at 512. The paper's 3D ResNet, its diagnosis codes
and its other tasks are not part of this.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import Tensor, nn

from downriver.core import Budget, InputError, Measurement, charge, generator, seeded
from downriver.forecast.data_scaling import DataScalingCurve
from downriver.reproductions.paper import Paper
from downriver.study import Arm, below, better, shared, study

paper = Paper(
    number=15,
    slug="merlin",
    title="Merlin: A Vision Language Foundation Model for 3D Computed Tomography",
    date="2024-06",
    room="domains",
    claim="The data-scaling part only: the zero-shot score of a scan-and-report model grows with the number of "
    "pretraining scans along a power law that small numbers forecast. The CT model itself is not tested here.",
)

SIDE, DEPTH = 24, 16
ORGANS = {"liver": (9, 7, 8), "spleen": (9, 17, 8), "bladder": (17, 12, 5)}  # row, column, slice
# organ, words, offset from the organ's middle, density above the organ's
FINDINGS = (
    ("liver", "cyst", (-2, -1, 2), -0.7),
    ("liver", "tumour", (2, 1, -2), 0.6),
    ("spleen", "infarct", (-2, 1, 2), -0.6),
    ("spleen", "haematoma", (2, -1, -2), 0.7),
    ("bladder", "stone", (-1, -2, 1), 0.9),
    ("bladder", "diverticulum", (1, 2, -1), -0.6),
)
WORDS = ("<pad>", "the", "shows", "a", "no", *ORGANS, *(f[1] for f in FINDINGS))
LONGEST = 5  # words of a sentence
NOISE, PREVALENCE, TESTED = 0.25, 0.4, 300
FITTED, TARGET = (64, 128, 256), 512
BATCH, RATE, WIDTH, SPACE = 32, 3e-3, 16, 32
STEPS = {"small": 240, "tiny": 3}


@dataclass(frozen=True)
class Scans:
    """Volumes (n, 1, depth, side, side) and which of the six findings each has (n, 6)."""

    volumes: Tensor
    present: Tensor


@study(
    "merlin-data-scaling",
    claims=[
        better(f"{TARGET} scans", than=f"{FITTED[0]} scans", on="macro F1", margin=0.05),
        below("forecast", on="absolute error", value=0.05),
    ],
    seeds=5,
    title="Zero-shot findings in generated scans, forecast at twice the largest number measured",
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws scans, weights and batches; every number of scans is trained on for as many steps."""
    if scale not in STEPS:
        raise InputError(f"scale {scale!r} is not one of {', '.join(STEPS)}")

    @shared
    def scores() -> dict[int, float]:
        test = scans(TESTED, "test", seed)
        train = scans(TARGET, "train", seed)
        return {n: macro_f1(trained(train, n, STEPS[scale], seed), test) for n in (*FITTED, TARGET)}

    def score(n: int) -> list[Measurement]:
        return [Measurement("macro F1", scores()[n], task="findings", direction="higher")]

    for n in (*FITTED, TARGET):
        yield Arm(f"{n} scans", functools.partial(score, n))
    yield Arm("forecast", lambda: forecast(scores()))


studies = (reproduction,)


def forecast(scores: dict[int, float]) -> list[Measurement]:
    """The score forecast for the largest number of scans from the others, and how far off it is."""
    curve = DataScalingCurve().fit(FITTED, [scores[n] for n in FITTED])
    found = float(curve.predict(TARGET))
    return [
        Measurement("macro F1", found, task="findings", direction="higher"),
        Measurement("exponent", curve.params_["b"], task="findings"),
        Measurement("absolute error", abs(found - scores[TARGET]), task="findings", direction="lower"),
    ]


def scans(n: int, name: str, seed: int) -> Scans:
    """Noisy bodies with three organs, of a place and size that vary, and findings at the organs' own spots."""
    rng = generator("merlin", name, seed)
    z, y, x = np.mgrid[:DEPTH, :SIDE, :SIDE].astype(np.float32)
    present = rng.random((n, len(FINDINGS))) < PREVALENCE
    volumes = rng.normal(0, NOISE, (n, DEPTH, SIDE, SIDE)).astype(np.float32)
    for volume, has in zip(volumes, present, strict=True):
        volume += 0.3 * (((y - 12) / 11) ** 2 + ((x - 12) / 11) ** 2 < 1)
        for organ, (row, column, level) in ORGANS.items():
            at = np.array([row, column, level]) + rng.integers(-1, 2, 3)
            volume += 0.4 * (_distance(y, x, z, at) < rng.uniform(4, 5))
            for k, (where, _, offset, density) in enumerate(FINDINGS):
                if where == organ and has[k]:
                    spot = at + np.array(offset) + rng.integers(-1, 2, 3)
                    volume += density * (_distance(y, x, z, spot) < rng.uniform(1.2, 2.2))
    return Scans(torch.from_numpy(volumes)[:, None], torch.from_numpy(present))


def _distance(y: np.ndarray, x: np.ndarray, z: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.sqrt((y - at[0]) ** 2 + (x - at[1]) ** 2 + (z - at[2]) ** 2)


def sentence(finding: int, present: bool) -> list[int]:
    """The report's words on one finding, as ids, padded.

    >>> [WORDS[i] for i in sentence(0, False)]
    ['the', 'liver', 'shows', 'no', 'cyst']
    """
    organ, name, *_ = FINDINGS[finding]
    return [WORDS.index(word) for word in ("the", organ, "shows", "a" if present else "no", name)]


SENTENCES = torch.tensor(
    [[sentence(k, bool(p)) for p in (0, 1)] for k in range(len(FINDINGS))]
)  # finding, present, word


class Encoders(nn.Module):
    """Scans and reports in one space: three strided convolutions; sentences of words, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv3d(1, WIDTH, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv3d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(WIDTH * (DEPTH // 4) * (SIDE // 4) ** 2, SPACE),
        )
        self.words = nn.Embedding(len(WORDS), SPACE)
        self.sentence = nn.Sequential(nn.Linear(LONGEST * SPACE, 2 * SPACE), nn.ReLU(), nn.Linear(2 * SPACE, SPACE))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def scan(self, volumes: Tensor) -> Tensor:
        """(n, 1, depth, side, side) → (n, space), of length 1."""
        return F.normalize(self.image(volumes), dim=1)

    def report(self, sentences: Tensor) -> Tensor:
        """Word ids (n, sentences, words) → (n, space), of length 1."""
        return F.normalize(self.sentence(self.words(sentences).flatten(2)).mean(dim=1), dim=1)

    def forward(self, volumes: Tensor, sentences: Tensor) -> Tensor:
        """The contrastive loss of a batch, both ways."""
        logits = self.scale.exp() * self.scan(volumes) @ self.report(sentences).T
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def trained(train: Scans, n: int, steps: int, seed: int) -> Encoders:
    """Train on the first n scans; batches have, in turn, whole reports and one organ's section."""
    with seeded("merlin", "weights", seed):
        model = Encoders()
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
        rng = generator("merlin", "batches", seed)
        finding, organs = torch.arange(len(FINDINGS)), list(ORGANS)
        for step in range(steps):
            rows = torch.from_numpy(rng.choice(n, size=BATCH, replace=False))
            organ = organs[int(rng.integers(len(organs)))]
            told = finding if step % 2 == 0 else torch.tensor([k for k, f in enumerate(FINDINGS) if f[0] == organ])
            loss = model(train.volumes[rows], SENTENCES[told, train.present[rows][:, told].long()])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    charge(examples=steps * BATCH, parameters=sum(p.numel() for p in model.parameters()))
    return model.eval()


@torch.no_grad()
def macro_f1(model: Encoders, test: Scans) -> float:
    """Zero-shot: a finding is present where the scan is nearer to the sentence that says so than to its denial."""
    said = model.report(SENTENCES.flatten(0, 1)[:, None]).view(len(FINDINGS), 2, SPACE)
    near = torch.einsum("nd,kpd->nkp", model.scan(test.volumes), said)
    found = (near[..., 1] > near[..., 0]).numpy()
    return float(f1_score(test.present.numpy(), found, average="macro", zero_division=0.0))
