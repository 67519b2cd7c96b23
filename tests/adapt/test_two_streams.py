"""The loop: rows a step, budgets, what is charged, the best step by validation, and that only the seed decides."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from downriver.adapt.multi_teacher import Examples, encode, labelled, unlabelled
from downriver.adapt.two_streams import Recipe, cross_entropy, forward, train
from downriver.core import Budget, DownriverError, InputError, metered
from downriver.models import Model


@pytest.fixture
def few():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return labelled((x, (x[:, 0] > 0).long()))


@pytest.fixture
def many(few):
    return unlabelled(torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), few)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), head=nn.Linear(6, 2))


def run(student, few, many, budget, recipe, draws=None, **settings):
    def loss(draw):
        if draws is not None:
            draws.append(draw)
        batch = encode(student, few.take(draw.labelled), None)
        own = F.cross_entropy(forward(student, batch)[1], few.targets[draw.labelled])
        return {"loss": own}, [batch]

    return train(student, nn.ModuleList(), (few, many), loss, Budget.parse(budget), recipe, **settings)


def test_a_step_draws_whole_batches_and_every_row_once_an_epoch(student, few, many):
    draws = []
    run(student, few, many, "6 steps", Recipe(batch_size=4, ratio=5), draws)
    assert all(len(d.labelled) == 4 and len(d.unlabelled) == 20 for d in draws)
    assert sorted(i for d in draws[:3] for i in d.labelled) == list(range(12))
    assert sorted(i for d in draws[3:] for i in d.labelled) == list(range(12))
    assert [d.labelled for d in draws[:3]] != [d.labelled for d in draws[3:]]
    assert sorted(i for d in draws[:2] for i in d.unlabelled) == list(range(40))


@pytest.mark.parametrize(
    ("budget", "steps"),
    [("5 steps", 5), ("120 examples", 5), ("1 examples", 1), (f"{7.5 * 3 * 2 * 4 * (24 + 12)} flops", 8)],
)
def test_a_budget_buys_steps(student, few, many, budget, steps):
    with metered() as meter:
        history = run(student, few, many, budget, Recipe(batch_size=4, ratio=5))
    if "flops" in budget:  # forward and backward: less than three forward passes, for the input needs no gradient
        steps = int(Budget.parse(budget).amount / (meter.cost.flops / len(history)))
        assert steps >= 7
    assert len(history) == steps
    assert meter.cost.examples == 24 * steps
    assert meter.cost.parameters == meter.cost.trained_parameters == 4 * 6 + 6 + 6 * 2 + 2


def test_seconds_end_a_run(student, few, many):
    with metered() as meter:
        history = run(student, few, many, "0.05 s", Recipe(batch_size=4, ratio=5))
    assert history and meter.cost.examples == 24 * len(history)


def test_the_rate_falls_to_nothing_as_a_cosine(few):
    """With plain gradients of a linear loss the steps are the learning rates themselves."""
    student = Model(nn.Identity(), head=nn.Linear(4, 2, bias=False))
    weight = student.head.weight
    seen = []

    def loss(draw):
        seen.append(weight.detach()[0, 0].item())
        return {"loss": weight.sum()}, []

    recipe = Recipe(batch_size=4, optimizer="adam", learning_rate=0.1)
    train(student, nn.ModuleList(), (few, None), loss, Budget(4, "steps"), recipe)
    seen.append(weight.detach()[0, 0].item())
    steps = -torch.diff(torch.tensor(seen))
    expected = 0.05 * (1 + torch.cos(torch.pi * torch.arange(4) / 4))
    torch.testing.assert_close(steps, expected, atol=1e-6, rtol=1e-5)


def test_only_the_seed_decides(student, few, many):
    found = []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)  # whatever was drawn before
        one = copy.deepcopy(student)
        run(one, few, many, "4 steps", Recipe(batch_size=4, learning_rate=0.05, seed=seed))
        found.append(one.head.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_learns(student, few, many, optimizer):
    before = cross_entropy(student, few)
    run(student, few, many, "60 steps", Recipe(batch_size=12, learning_rate=0.1, optimizer=optimizer))
    assert cross_entropy(student, few) < before / 3


def test_validation_gives_back_the_best_step(student, few, many):
    wrong = Examples(few.rows, None, 1 - few.targets, 2)  # the more is learnt, the worse
    history = run(student, few, many, "50 steps", Recipe(batch_size=12, learning_rate=0.05), validation=wrong)
    held = [entry["validation loss"] for entry in history if "validation loss" in entry]
    assert len(held) == 10 and held[-1] > held[0]
    assert cross_entropy(student, wrong) == pytest.approx(min(held), abs=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(student, few, many):
    def loss(draw):
        return {"loss": student.head.weight.sum() * torch.inf}, []

    with pytest.raises(DownriverError, match="at step 1"):
        train(student, nn.ModuleList(), (few, many), loss, Budget(3, "steps"), Recipe())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"ratio": 0}, "ratio is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"optimizer": "adma"}, "did you mean 'adam'"),
    ],
)
def test_a_bad_recipe_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        Recipe(**settings)


def test_a_student_without_a_head_or_with_nothing_to_train_is_refused(student, few, many):
    with pytest.raises(InputError, match="the student has no head"):
        forward(Model(nn.Linear(4, 2)), {"inputs": few.rows})
    with pytest.raises(InputError, match="no parameter"):
        run(student.requires_grad_(False), few, many, "2 steps", Recipe())
    with pytest.raises(InputError, match="needs the tokens"):
        run(student.requires_grad_(True), few, many, "20 tokens", Recipe())
