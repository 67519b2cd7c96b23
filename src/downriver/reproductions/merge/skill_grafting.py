"""Paper 43: how much of a fine-tuning a few of its entries carry, on handwritten digits.

The paper fine-tunes RoBERTa and GPT-2 and finds 0.01 % of the parameters to be enough. A network of 64, 512 and 512
units is not so over-parameterised: here a few per cent are. It learns 700 digits, then the transposed images with
64 labels and a frozen head; a mask learnt from these labels is held against the entries that moved most and against
random ones, all of one size.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from downriver.core import Budget, InputError, Measurement, generator, seeded
from downriver.merge.skill_grafting import Graft, graft, localize_skill
from downriver.nn.sparse_patch import SparseMask
from downriver.reproductions.paper import Paper
from downriver.study import Arm, above, below, better, shared, study

paper = Paper(
    number=43,
    slug="skill_grafting",
    title="Task-Specific Skill Localization in Fine-tuned Language Models",
    date="2023-02",
    room="merge",
    claim="A tiny share of the parameters carries most of what fine-tuning taught: their fine-tuned values alone, put "
    "onto the pretrained model, work almost as well.",
)

SCALES = {"small": (512, 300, 50), "tiny": (64, 60, 8)}  # width, epochs, steps of the mask
BASE = 0.005  # share of the entries that the search starts from
LEAST, MOST = 0.88, 0.03  # of the fine-tuned accuracy; of the parameters


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) in [0, 1] and labels: to pretrain, and transposed ones to fine-tune and to test."""

    pretrain: tuple[Tensor, Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@study(
    "skill_grafting",
    title="Transposed digits with 64 labels: regions of one size",
    claims=[
        above("learned", on="share of the fine-tuned accuracy", value=LEAST),
        below("learned", on="share of the parameters", value=MOST),
        better("learned", than="movement", on="accuracy"),
        better("movement", than="random", on="accuracy"),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the images, the network and the random region."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    width, epochs, steps = SCALES[scale]

    @shared
    def data() -> Digits:
        return digits(seed)

    @shared
    def pretrained() -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        return fit(model, data().pretrain, epochs=60, batch=32, frozen=())

    @shared
    def finetuned() -> nn.Sequential:
        return fit(copy.deepcopy(pretrained()), data().train, epochs=epochs, batch=16, frozen=("4.weight", "4.bias"))

    @shared
    def learned() -> Graft:
        x, y = data().train
        batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, len(x), 16)]
        with seeded("skill_grafting", seed):
            return localize_skill(
                pretrained(), finetuned(), loss, batches, sparsity=BASE, steps=steps, frozen=r"^4\.", progress=False
            )

    def region(kind: str) -> SparseMask:
        mask, old, new = learned().mask, dict(pretrained().named_parameters()), dict(finetuned().named_parameters())
        moved = {name: (new[name] - old[name]).detach() for name in old}
        if kind == "movement":
            return SparseMask.top(moved, mask.count, mask.total)
        rng = torch.Generator().manual_seed(int(generator("random region", seed).integers(2**31)))
        draws = {name: torch.rand(d.shape, generator=rng) * (d != 0) for name, d in moved.items()}
        return SparseMask.top(draws, mask.count, mask.total)

    def measured(name: str) -> list[Measurement]:
        whole = figures(finetuned(), data().test)
        if name == "learned":
            model: nn.Module = learned().apply(pretrained())
        elif name in ("movement", "random"):
            model = graft(pretrained(), finetuned(), region(name))
        else:
            model = finetuned() if name == "fine-tuned" else pretrained()
        accuracy, ece = figures(model, data().test)
        rows = [Measurement("accuracy", accuracy), Measurement("ece", ece, direction="lower")]
        if name in ("learned", "movement", "random"):
            rows.append(Measurement("share of the fine-tuned accuracy", accuracy / whole[0]))
            rows.append(Measurement("share of the parameters", learned().sparsity, direction="lower"))
        return rows

    for name in ("pretrained", "fine-tuned", "learned", "movement", "random"):
        yield Arm(name, functools.partial(measured, name))


def digits(seed: int) -> Digits:
    """700 upright images, 64 transposed ones, and the other transposed ones."""
    found = load_digits()
    x, y = torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target)
    order = torch.from_numpy(generator("grafted digits", seed).permutation(len(x)))
    x, y = x[order], y[order]
    turned = x.transpose(1, 2).flatten(1)
    return Digits((x[:700].flatten(1), y[:700]), (turned[700:764], y[700:764]), (turned[764:], y[764:]))


def fit(model: nn.Sequential, data: tuple[Tensor, Tensor], epochs: int, batch: int, frozen: Any) -> nn.Sequential:
    """SGD with a learning rate of 0.05, in place."""
    x, y = data
    learnt = [p for name, p in model.named_parameters() if name not in frozen]
    optimiser = torch.optim.SGD(learnt, lr=0.05)
    for _ in range(epochs):
        for places in torch.randperm(len(x)).split(batch):
            optimiser.zero_grad()
            F.cross_entropy(model(x[places]), y[places]).backward()
            optimiser.step()
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def figures(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy and expected calibration error in ten bins."""
    probabilities = model(data[0]).softmax(1)
    sure, chosen = probabilities.max(1)
    right = (chosen == data[1]).float()
    bins = (sure * 10).long().clamp(max=9)
    gaps = [abs(float((right - sure)[bins == b].sum())) for b in range(10)]
    return float(right.mean()), sum(gaps) / len(right)


studies = (reproduction,)
