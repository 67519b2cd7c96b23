"""TIES on handwritten digits: where it beats task arithmetic and averaging, and a setting where averaging wins.

The paper merges T5, T0 and CLIP models. Here a small trunk, pretrained by denoising, is fine-tuned on tasks that share
one input domain and keep a frozen head each, as CLIP's text heads are in the paper. The second study gives the tasks
different input domains, one shared head and Adam: there the paper's advantage is not found.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from downriver.core import Budget, charge
from downriver.merge import Method, TaskArithmetic, Ties, average, search_lambda, task_arithmetic, ties
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, better, keeps, shared, study

paper = Paper(
    number=53,
    slug="ties",
    title="Resolving Interference When Merging Models",
    date="2023-06",
    room="merge",
    claim="Resetting small changes, electing one sign for every parameter and averaging only what agrees with it "
    "merges fine-tuned models of one ancestor better than task arithmetic and plain averaging, without training.",
)

LABELS: dict[str, Callable[[int], int]] = {
    "digit": lambda d: d,
    "parity": lambda d: d % 2,
    "five or more": lambda d: int(d >= 5),
    "prime": lambda d: int(d in (2, 3, 5, 7)),
    "loop": lambda d: int(d in (0, 4, 6, 8, 9)),
}
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "quarter turn": lambda x: x.rot90(1, (1, 2)),
    "half turn": lambda x: x.rot90(2, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "upside down": lambda x: x.flip(1),
    "negative": lambda x: 1 - x,
    "transposed": lambda x: x.transpose(1, 2),
}
WIDTH, EPOCHS, BATCH = 512, 8, 32
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Digits:
    """Images (n, 8, 8) in [0, 1] and digits (n,), to train and to test."""

    train: Tensor
    test: Tensor
    train_digits: np.ndarray
    test_digits: np.ndarray


@study(
    "ties",
    title="Five tasks on one input domain, a frozen head each",
    claims=[
        better("TIES", than="task arithmetic", on="accuracy"),
        better("TIES", than="average", on="accuracy"),
        better("TIES, λ searched", than="task arithmetic, λ searched", on="accuracy"),
        keeps("trimmed to 20 %", than="fine-tuned", on="accuracy", within=0.01),
    ],
    seeds=8,
)
def one_domain(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A trunk for five questions about a digit: density 0.2 and λ 1, λ 0.4 for arithmetic, or λ searched for each.

    A searched λ is chosen on one half of the test images and measured on the other, both ways round.
    """

    @shared
    def data() -> Digits:
        return digits(seed)

    @shared
    def trunk() -> dict[str, Tensor]:
        return denoise(data().train.flatten(1))

    @shared
    def heads() -> dict[str, nn.Linear]:
        return {task: fit_head(trunk(), data().train, labels(task, data().train_digits)) for task in LABELS}

    @shared
    def tuned() -> dict[str, State]:
        def optimiser(parameters: object) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)  # type: ignore[arg-type]

        return {
            task: fine_tune(trunk(), heads()[task], data().train, labels(task, data().train_digits), optimiser)[0]
            for task in LABELS
        }

    def score(state_of: Callable[[str], State], images: slice = slice(None)) -> float:
        x, digits = data().test[images], data().test_digits[images]
        return float(np.mean([accuracy(state_of(task), heads()[task], x, labels(task, digits)) for task in LABELS]))

    def measured(state_of: Callable[[str], State]) -> dict[str, float]:
        return {"accuracy": score(state_of)}

    def searched(method: Method) -> dict[str, float]:
        def score_on(half: slice) -> Callable[[dict[str, Tensor]], float]:
            return lambda state: score(lambda task: state, half)

        odd, even, found = score_on(slice(1, None, 2)), score_on(slice(0, None, 2)), []
        for choose, measure in ((odd, even), (even, odd)):
            best = search_lambda(list(tuned().values()), trunk(), method, choose)
            found.append((measure(best.merged), best.best))
        accuracies, lams = zip(*found, strict=True)
        return {"accuracy": float(np.mean(accuracies)), "λ": float(np.mean(lams))}

    def merged(method: Any, **parameters: float) -> dict[str, float]:
        state = method(list(tuned().values()), trunk(), **parameters)
        return measured(lambda task: state)

    yield Arm("pretrained", lambda: measured(lambda task: trunk()))
    yield Arm("fine-tuned", lambda: measured(lambda task: tuned()[task]))
    yield Arm("trimmed to 20 %", lambda: measured(lambda task: ties([tuned()[task]], trunk(), density=0.2)))
    yield Arm("average", lambda: merged(average))
    yield Arm("task arithmetic", lambda: merged(task_arithmetic, lam=0.4))
    yield Arm("TIES", lambda: merged(ties, density=0.2, lam=1.0))
    yield Arm("task arithmetic, λ searched", lambda: searched(TaskArithmetic()), directions={"λ": "none"})
    yield Arm("TIES, λ searched", lambda: searched(Ties(density=0.2)), directions={"λ": "none"})


@study(
    "ties-domains",
    title="The limit: seven input domains, one shared head, Adam",
    claims=[better("average", than="TIES", on="accuracy")],
    seeds=8,
)
def seven_domains(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """The same digits turned, mirrored or inverted; the claim is that here averaging wins, against the paper."""

    @shared
    def data() -> Digits:
        return digits(seed)

    @shared
    def start() -> tuple[dict[str, Tensor], nn.Linear]:
        trunk = denoise(data().train.flatten(1))
        return trunk, fit_head(trunk, data().train, data().train_digits)

    @shared
    def tuned() -> list[State]:
        trunk, head = start()
        states: list[State] = []
        for view in DOMAINS.values():
            state, own_head = fine_tune(
                trunk, head, view(data().train), data().train_digits, torch.optim.Adam, train_head=True
            )
            states.append({**state, **head_state(own_head)})
        return states

    def merged(method: Any, **parameters: float) -> dict[str, float]:
        trunk, head = start()
        return measured(method(tuned(), {**trunk, **head_state(head)}, **parameters))

    def measured(state: State) -> dict[str, float]:
        head = nn.Linear(WIDTH, 10)
        head.load_state_dict({"weight": state["head.weight"], "bias": state["head.bias"]})
        found = [accuracy(state, head, view(data().test), data().test_digits) for view in DOMAINS.values()]
        return {"accuracy": float(np.mean(found))}

    yield Arm("pretrained", lambda: measured({**start()[0], **head_state(start()[1])}))
    yield Arm("average", lambda: merged(average))
    yield Arm("task arithmetic", lambda: merged(task_arithmetic, lam=0.4))
    yield Arm("TIES", lambda: merged(ties, density=0.2, lam=1.0))


studies: tuple[Study, ...] = (one_domain, seven_domains)


def digits(seed: int) -> Digits:
    bundle = load_digits()
    images = torch.tensor(bundle.images / 16, dtype=torch.float32)
    train, test = train_test_split(np.arange(len(images)), test_size=0.3, random_state=seed, stratify=bundle.target)
    return Digits(images[train], images[test], bundle.target[train], bundle.target[test])


def labels(task: str, of: np.ndarray) -> np.ndarray:
    return np.array([LABELS[task](int(d)) for d in of])


def features(state: State, x: Tensor) -> Tensor:
    """Two ReLU layers of width 512 on the 64 pixels."""
    hidden = F.relu(F.linear(x.flatten(1), state["0.weight"], state["0.bias"]))
    return F.relu(F.linear(hidden, state["1.weight"], state["1.bias"]))


def denoise(pixels: Tensor, epochs: int = 30, noise: float = 0.3) -> dict[str, Tensor]:
    """Pretrain the trunk to give back clean pixels from noisy ones; the linear decoder is thrown away."""
    first, second, decoder = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64)
    state = {"0.weight": first.weight, "0.bias": first.bias, "1.weight": second.weight, "1.bias": second.bias}
    optimiser = torch.optim.Adam([*state.values(), *decoder.parameters()], lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH):
            clean = pixels[rows]
            loss = F.mse_loss(decoder(features(state, clean + noise * torch.randn_like(clean))), clean)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    charge(examples=epochs * len(pixels))
    return {name: p.detach().clone() for name, p in state.items()}


def fit_head(state: State, x: Tensor, y: np.ndarray, steps: int = 200) -> nn.Linear:
    """A linear head fitted on the pretrained features, to stay frozen."""
    with torch.no_grad():
        z = features(state, x)
    head, target = nn.Linear(WIDTH, int(y.max()) + 1), torch.tensor(y)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(head(z), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.requires_grad_(False)


def fine_tune(
    state: State,
    head: nn.Linear,
    x: Tensor,
    y: np.ndarray,
    optimiser: Callable[..., torch.optim.Optimizer],
    train_head: bool = False,
) -> tuple[dict[str, Tensor], nn.Linear]:
    """A copy of the trunk (and of the head, where it learns too) after eight epochs on one task."""
    mine = {name: p.clone().requires_grad_() for name, p in state.items()}
    own = nn.Linear(head.in_features, head.out_features)
    own.load_state_dict(head.state_dict())
    own.requires_grad_(train_head)
    step, target = optimiser([*mine.values(), *(own.parameters() if train_head else [])]), torch.tensor(y)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(own(features(mine, x[rows])), target[rows])
            step.zero_grad()
            loss.backward()
            step.step()
    charge(examples=EPOCHS * len(x), parameters=sum(p.numel() for p in mine.values()))
    return {name: p.detach() for name, p in mine.items()}, own.requires_grad_(False)


def head_state(head: nn.Linear) -> dict[str, Tensor]:
    return {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}


def accuracy(state: State, head: nn.Linear, x: Tensor, y: np.ndarray) -> float:
    with torch.no_grad():
        return float((head(features(state, x)).argmax(dim=1).numpy() == y).mean())
