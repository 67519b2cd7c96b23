"""What an activation function does to the geometry that a network learns: tanh keeps targets, ReLU keeps inputs.

The paper's networks at a small size: one hidden layer of 64 neurons on 16 points that are equally far apart in 32
dimensions, with noise, and one or four binary targets. Geometry is measured on the noise-free points. Two more
activations say which of tanh's traits counts: a hard tanh saturates on both sides, softplus on one, as ReLU does.

Seen here: softplus, which bends only gently at the origin, aligns with one target as tanh does, so saturation on one
side is not all there is to ReLU. Cross-condition generalisation of one target is 1 for both tanh and ReLU: at this size
the claim about it has no room to hold. Networks are compared after as many steps, where ReLU's training loss is lower.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from downriver.core import Budget, InputError, Measurement, charge, generator, seeded
from downriver.core.measurement import Direction
from downriver.evaluate.geometry import geometry_report
from downriver.evaluate.geometry_task import GeometryTask, random_task
from downriver.reproductions.paper import Paper
from downriver.study import Arm, better, shared, study

paper = Paper(
    number=63,
    slug="representation_geometry",
    title="Task structure and nonlinearity jointly determine learned representational geometry",
    date="2024-01",
    room="evaluate",
    claim="The representation that a network with tanh learns reflects its targets, that of one with ReLU keeps more "
    "of its inputs; with few targets tanh's generalises better to conditions that were held out.",
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "ReLU": torch.relu,
    "hard tanh": F.hardtanh,
    "softplus": F.softplus,
}
POINTS, DIM, WIDTH, NOISE = 16, 32, 64, 0.5
TARGETS = (1, 4)
STEPS = {"small": 600, "tiny": 30}
BATCH, LEARNING_RATE = 64, 3e-3
PROBE, TESTED = 200, 2000  # noisy rows for the linear probe of a new dichotomy, and to test it


@study(
    "representation-geometry",
    title="Tanh and ReLU on one and on four targets",
    claims=[
        *(better("tanh", than="ReLU", on="target alignment", task=f"{k} target{'s' * (k > 1)}") for k in TARGETS),
        *(better("ReLU", than="tanh", on="input alignment", task=f"{k} target{'s' * (k > 1)}") for k in TARGETS),
        better("tanh", than="ReLU", on="ccgp", task="1 target"),
        better("ReLU", than="tanh", on="new dichotomy", task="1 target"),
    ],
    seeds=6,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """Within a seed all activations start from the same weights and see the same noise."""
    if scale not in STEPS:
        raise InputError(f"scale {scale!r} is not one of {', '.join(STEPS)}")

    @shared
    def task(k: int) -> GeometryTask:
        return random_task(POINTS, k, signal=1.0, spectrum="flat", dim=DIM, noise=NOISE, seed=seed)

    def measure(name: str) -> list[Measurement]:
        rows = []
        for k in TARGETS:
            network, loss = train(task(k), ACTIVATIONS[name], seed, STEPS[scale])
            found = measured(task(k), network, seed) | {"training loss": loss}
            where = f"{k} target{'s' * (k > 1)}"
            for metric, value in found.items():
                direction: Direction = "lower" if metric == "training loss" else "higher"
                rows.append(Measurement(metric, value, task=where, direction=direction))
        return rows

    for name in ACTIVATIONS:
        yield Arm(name, functools.partial(measure, name))


studies = (reproduction,)


class Network(nn.Module):
    """Inputs to a hidden layer with the activation, and from there a logit a target."""

    def __init__(self, targets: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.out, self.activation = nn.Linear(DIM, WIDTH), nn.Linear(WIDTH, targets), activation

    def hidden(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.activation(self.first(torch.tensor(x, dtype=torch.float32))).double().numpy()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.first(x)))


def train(task: GeometryTask, activation: Callable[[Tensor], Tensor], seed: int, steps: int) -> tuple[Network, float]:
    """Adam on the logistic loss of every target, with fresh noise in every batch; the loss of the last fifty steps."""
    with seeded("representation-geometry", "weights", seed):
        network = Network(task.targets.shape[1], activation)
    x, y, _ = task.sample(steps * BATCH, draw="train")
    inputs, targets = (torch.tensor(a, dtype=torch.float32).view(steps, BATCH, -1) for a in (x, y))
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    losses = []
    for row, target in zip(inputs, targets, strict=True):
        loss = F.binary_cross_entropy_with_logits(network(row), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    charge(examples=steps * BATCH, parameters=sum(p.numel() for p in network.parameters()))
    return network, float(np.mean(losses[-50:]))


def measured(task: GeometryTask, network: Network, seed: int) -> dict[str, float]:
    """The geometry of the hidden layer at the noise-free points, and how well it serves another split of them."""
    report = geometry_report(network.hidden(task.means), inputs=task.means, targets=task.targets)
    assert report.target_alignment is not None and report.input_alignment is not None
    split = generator("representation-geometry", "split", seed).permutation(POINTS) % 2
    x, _, condition = task.sample(PROBE + TESTED, draw="probe")
    z = network.hidden(x)
    probe = LogisticRegression(max_iter=1000).fit(z[:PROBE], split[condition[:PROBE]])
    return {
        "target alignment": report.target_alignment,
        "input alignment": report.input_alignment,
        "participation ratio": report.participation_ratio,
        "parallelism": float(np.mean(list(report.parallelism.values()))),
        "ccgp": float(np.mean(list(report.ccgp.values()))),
        "new dichotomy": float(probe.score(z[PROBE:], split[condition[PROBE:]])),
    }
