"""Training a subnetwork: what is outside stays bit by bit, a full mask is ordinary training, and what is refused."""

import copy

import pytest
import torch
from datasets import Dataset

from downriver.adapt import fine_tune, subnetwork_only, train_subnetwork
from downriver.core.errors import InputError
from downriver.merge import subnetwork
from downriver.models import small
from downriver.nn.sparse_patch import SparseMask
from downriver.tasks.task import Task

SETTINGS = {"learning_rate": 1e-2, "batch_size": 4, "weight_decay": 0.1, "seed": 3}


@pytest.fixture(scope="module")
def task():
    rows = Dataset.from_dict({"text": [f"the river number {i} runs to the sea" for i in range(16)]})
    return Task("river", "language-modelling", {"train": rows}, ("text",), None)


@pytest.fixture(scope="module")
def model():
    return small("causal-lm", "nano")


def whole(model):
    return SparseMask.of({name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})


def test_what_is_outside_stays_bit_by_bit(model, task):
    g = torch.Generator().manual_seed(0)
    dense = {n: torch.rand(p.shape, generator=g) < 0.3 for n, p in model.named_parameters() if "layers" in n}
    mask = SparseMask.of(dense)
    tuned = train_subnetwork(model, task, "32 examples", mask=mask, **SETTINGS)
    for (name, before), after in zip(model.named_parameters(), tuned.parameters(), strict=True):
        inside = dense.get(name, torch.zeros(before.shape, dtype=torch.bool))
        assert torch.equal(before[~inside], after[~inside])
        assert not inside.any() or (before[inside] != after[inside]).any()


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.5),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("inside", [False, True])
def test_no_optimiser_moves_what_is_outside(model, kind, inside):
    """Made before the block with all parameters, or in it; momentum from steps before does not leak in either."""
    learner = copy.deepcopy(model)
    ids = torch.tensor([[1, 7, 8, 9], [1, 10, 11, 12]])
    dense = {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters() if "layers.0" in n}
    optimiser = OPTIMISERS[kind](learner.parameters())

    def steps():
        for _ in range(3):
            optimiser.zero_grad()
            learner(input_ids=ids, labels=ids)["loss"].backward()
            optimiser.step()

    steps()
    before = {n: p.detach().clone() for n, p in learner.named_parameters()}
    optimiser.zero_grad()
    with subnetwork_only(learner, SparseMask.of(dense)):
        optimiser = OPTIMISERS[kind](p for p in learner.parameters() if p.requires_grad) if inside else optimiser
        steps()
    for name, p in learner.named_parameters():
        own = dense.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.equal(p[~own], before[name][~own]) and (not own.any() or (p[own] != before[name][own]).any())
        assert p.requires_grad
    steps()  # after the block all learn again
    name = "backbone.model.layers.0.mlp.up_proj.weight"
    assert (learner.get_parameter(name) != before[name])[~dense[name]].any()


def test_a_full_mask_is_ordinary_training(model, task):
    masked = train_subnetwork(model, task, "32 examples", mask=whole(model), **SETTINGS)
    plain = fine_tune(model, task, "32 examples", **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), plain.parameters(), strict=True))


def test_the_subnetwork_of_a_run_trained_alone(model, task):
    """Names of checkpoints are understood, and the run is the same where the mask is that of all that it changed."""
    settings = SETTINGS | {"weight_decay": 0.0}
    full = fine_tune(model, task, "32 examples", **settings)
    mask = subnetwork(model, full)
    assert all(not name.startswith("backbone.") for name in mask.indices)
    again = train_subnetwork(model, task, "32 examples", mask=mask, **settings)
    near = [(a - b).abs() <= 1e-4 for a, b in zip(full.parameters(), again.parameters(), strict=True)]
    assert sum(int(n.sum()) for n in near) / sum(n.numel() for n in near) > 0.99


def test_what_is_refused(model, task):
    with pytest.raises(InputError, match="'nothing' is no parameter"):
        train_subnetwork(model, task, "8 examples", mask=SparseMask({"nothing": torch.tensor([0])}, 1), **SETTINGS)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match="has an entry 99999, the model's is of"):
        train_subnetwork(model, task, "8 examples", mask=SparseMask({name: torch.tensor([99999])}, 1), **SETTINGS)
    with pytest.raises(InputError, match="mask is empty"):
        train_subnetwork(model, task, "8 examples", mask=SparseMask({}, 1), **SETTINGS)
