"""FISH masks: the Fisher information by hand, which entries learn, what it costs, bad input."""

import pytest
import torch
from datasets import Dataset

from downriver.adapt import fish_mask
from downriver.adapt.fish_mask import train_fish_mask
from downriver.core import InputError, metered
from downriver.models import small
from downriver.tasks import Task


@pytest.fixture(scope="module")
def headed(letters):
    torch.manual_seed(0)
    return small("text-encoder", "nano").with_head(letters)


def test_the_mask_is_the_top_of_the_summed_squared_gradients(letters, headed):
    """Against gradients of one row after the other, by autograd."""
    few = letters.sample("train", 6, seed=0)
    rows, collate = few.rows("train"), headed.collate(few)
    weights = dict(headed.backbone.named_parameters())
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    for row in rows:
        headed.zero_grad()
        headed(**collate([row]))["loss"].backward()
        for name, w in weights.items():
            squares[name] += w.grad.square() if w.grad is not None else 0
    headed.zero_grad(set_to_none=True)
    for keep in (0.005, 0.1):
        mask = fish_mask(headed, few, keep, samples=100)
        everything = torch.cat([s.flatten() for s in squares.values()])
        count = round(keep * len(everything))
        least = everything.sort(descending=True).values[count - 1]
        assert mask.count == count and mask.total == len(everything)
        for name, square in squares.items():
            inside = mask.dense(name, square.shape)
            assert (square[inside] >= least * (1 - 1e-5)).all() and (square[~inside] <= least * (1 + 1e-5)).all()
    assert all(p.grad is None and p.requires_grad for p in headed.parameters())


def test_only_the_mask_learns(letters, headed):
    tuned = train_fish_mask(headed, letters, "160 examples", head="keep", keep=0.02, samples=32, learning_rate=1e-2)
    mask = fish_mask(headed, letters, 0.02, samples=32)
    before = dict(headed.named_parameters())
    moved = {name: value != before[name] for name, value in tuned.named_parameters()}
    inside = {f"backbone.{name}" for name in mask.indices}
    assert {name for name, m in moved.items() if m.any()} <= inside | {"head.weight", "head.bias"}
    for name in inside:
        allowed = mask.dense(name.removeprefix("backbone."), moved[name].shape)
        assert not moved[name][~allowed].any() and moved[name][allowed].float().mean() > 0.9
    assert moved["head.weight"].all()


def test_what_the_mask_costs(letters, headed):
    with metered() as meter:
        fish_mask(headed, letters, samples=8)
    assert meter.cost.examples == 8 and meter.cost.flops > 0


def test_the_model_is_left_as_it_was_by_an_error(headed):
    rows = Dataset.from_dict({"text": ["aa", "zz"], "label": [0, 9]})  # there is no class 9
    wrong = Task("wrong", "text-classification", {"train": rows}, ("text",), "label")
    headed.train()
    with pytest.raises((IndexError, RuntimeError)):
        fish_mask(headed, wrong, samples=2)
    assert headed.training and all(p.requires_grad for p in headed.parameters())
    headed.eval()


def test_bad_masks(letters, headed):
    with pytest.raises(InputError, match=r"keep is 0: a share"):
        fish_mask(headed, letters, 0)
    with pytest.raises(InputError, match="samples is 0"):
        fish_mask(headed, letters, samples=0)


def test_a_language_model():
    rows = Dataset.from_dict({"text": ["the river runs to the sea"] * 8})
    task = Task("river", "language-modelling", {"train": rows}, ("text",), None)
    mask = fish_mask(small("causal-lm", "nano"), task, 0.01, samples=2)
    assert mask.share == pytest.approx(0.01, rel=0.01)
