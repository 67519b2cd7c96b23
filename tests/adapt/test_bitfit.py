"""BitFit: exactly the biases learn, in any layer; a model without them."""

import pytest
import torch
from torch import nn

from downriver.adapt import bitfit
from downriver.adapt.bitfit import bias_names
from downriver.core import InputError, metered
from downriver.models import small


@pytest.fixture(scope="module")
def headed(letters):
    torch.manual_seed(0)
    return small("text-encoder", "nano").with_head(letters)


def changed(old, new):
    before = dict(old.named_parameters())
    return {name: (value != before[name]).cpu() for name, value in new.named_parameters()}


def test_exactly_the_biases_learn(letters, headed, score):
    with metered() as meter:
        tuned = bitfit(headed, letters, "640 examples", head="keep", learning_rate=2e-2)
    moved = changed(headed, tuned)
    biases = {f"backbone.{name}" for name in bias_names(headed.backbone)} | {"head.weight", "head.bias"}
    assert {name for name, mask in moved.items() if mask.any()} == biases
    by_hand = [m.bias for m in headed.backbone.modules() if getattr(m, "bias", None) is not None]
    assert len(by_hand) + 2 == len(biases)
    assert meter.cost.trained_parameters == sum(b.numel() for b in by_hand) + 32 * 2 + 2
    assert score(tuned, letters)[0] > 0.9


def test_a_model_without_biases(letters):
    with pytest.raises(InputError, match="has no biases"):
        bitfit(small("causal-lm", "nano"), letters, "64 examples")


def test_biases_of_any_layer():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2, bias=False))
    assert bias_names(net) == ["0.bias", "1.bias"]
