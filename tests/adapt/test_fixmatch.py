"""FixMatch: which rows count, what is learnt from them, and that they help."""

import copy

import pytest
import torch
from torch import nn

from downriver.adapt import MultiSourceDistiller, fixmatch
from downriver.core import InputError, metered
from downriver.models import Model


@pytest.fixture
def data():
    """Two far blobs, of which the labelled rows show one corner each."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 2, generator=generator) * torch.tensor([1.0, 3.0]) + torch.tensor([[-2.5, 0.0], [2.5, 0.0]])[y]
    few = torch.tensor([[-2.0, 2.0], [2.0, -2.0], [-2.2, 2.5], [2.1, -2.4]]), torch.tensor([0, 1, 0, 1])
    return few, x[:120], (x[120:], y[120:])


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Linear(2, 16), nn.Tanh()), head=nn.Linear(16, 2))


def jitter(x):
    return x + torch.randn_like(x) * torch.tensor([0.3, 2.0])


def accuracy(model, test):
    with torch.no_grad():
        return (model(inputs=test[0])["logits"].argmax(1) == test[1]).float().mean().item()


SETTINGS = {"batch_size": 4, "ratio": 7, "optimizer": "adam", "learning_rate": 1e-2, "weight_decay": 0.0}


def test_unlabelled_rows_help(student, data):
    few, many, test = data
    with metered() as meter:
        tuned = fixmatch(student, few, "150 steps", unlabelled=many, strong=jitter, threshold=0.8, **SETTINGS)
    alone = MultiSourceDistiller(student, [], lam=1.0, **SETTINGS).fit(few, many, "150 steps").student_
    assert accuracy(tuned, test) > accuracy(alone, test) + 0.03
    assert meter.cost.examples == 150 * 4 * 8


def test_without_weight_or_below_the_threshold_it_is_supervised_training(student, data):
    few, many, _ = data
    plain = fixmatch(student, few, "5 steps", unlabelled=many, strong=lambda x: x, weight=0.0, **SETTINGS)
    unsure = fixmatch(student, few, "5 steps", unlabelled=many, strong=lambda x: x, threshold=1.0, **SETTINGS)
    alone = MultiSourceDistiller(student, [], lam=1.0, **SETTINGS).fit(few, many, "5 steps").student_
    for model in (plain, unsure):
        assert all(
            torch.allclose(a, b, atol=1e-7)
            for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True)
        )


def test_views_are_augmented_as_asked(student, data):
    few, many, _ = data
    seen = {"weak": 0, "strong": 0}

    def count(name):
        def view(rows):
            seen[name] += len(rows)
            return rows

        return view

    before = copy.deepcopy(student.state_dict())
    fixmatch(student, few, "2 steps", unlabelled=many, weak=count("weak"), strong=count("strong"), **SETTINGS)
    assert seen == {"weak": 2 * 4 * 8, "strong": 2 * 4 * 7}
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_bad_parameters_are_named(student, data):
    few, many, _ = data
    with pytest.raises(InputError, match=r"threshold is 1.5 and weight 1"):
        fixmatch(student, few, "2 steps", unlabelled=many, strong=jitter, threshold=1.5)
    with pytest.raises(InputError, match="the student has no head"):
        fixmatch(Model(nn.Linear(2, 2)), few, "2 steps", unlabelled=many, strong=jitter)
