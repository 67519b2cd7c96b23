"""Hidden states by layer: they are transformers' own, pooled over real tokens, and images and tables are told apart."""

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Value

from downriver.core import InputError
from downriver.evaluate import geometry_report, layer_features
from downriver.models import small
from downriver.models.features import extract
from downriver.tasks import Task

TEXTS = ["a river", "the sea is very wide", "rain", "snow"]


@pytest.mark.parametrize("kind", ["text-encoder", "masked-lm", "causal-lm"])
def test_layers_are_those_of_transformers(kind):
    model = small(kind, "nano")
    found = layer_features(model, TEXTS, batch_size=3)
    assert list(found) == [0, 1, 2]
    encoded = model.processor([TEXTS[1]], return_tensors="pt")
    with torch.no_grad():
        states = model.backbone(**encoded, output_hidden_states=True).hidden_states
    for layer, state in enumerate(states):  # alone and without padding
        np.testing.assert_allclose(found[layer][1], state[0].mean(dim=0).numpy(), atol=1e-5)
    if kind == "text-encoder":
        np.testing.assert_allclose(found[2], extract(model, TEXTS), atol=1e-5)


def test_only_the_layers_asked_for(tmp_path):
    found = layer_features(small("text-encoder", "nano"), TEXTS, layers=[-1, 1])
    assert sorted(found) == [1, 2]
    report = geometry_report(found[2], inputs=found[1], targets=[0, 0, 1, 1])
    assert 0 < report.input_alignment <= 1


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_have_layers_too(kind):
    layout = Features({"image": Array2D((8, 8), "uint8"), "label": Value("int64")})
    pixels = np.random.default_rng(0).integers(255, size=(4, 8, 8)).astype(np.uint8)
    rows = Dataset.from_dict({"image": pixels, "label": [0, 1, 0, 1]}, features=layout)
    task = Task("noise", "image-classification", {"train": rows}, ("image",), "label")
    found = layer_features(small(kind, "nano"), rows, task)
    assert len(found) > 2 and all(z.shape[0] == 4 and np.isfinite(z).all() for z in found.values())


def test_bad_input_is_named():
    with pytest.raises(InputError, match="layer 3: from 0 to 2"):
        layer_features(small("text-encoder", "nano"), TEXTS, layers=[3])
    with pytest.raises(InputError, match="no hidden states to show"):
        layer_features(small("mlp", "nano"), TEXTS)
    with pytest.raises(InputError, match="of no rows"):
        layer_features(small("text-encoder", "nano"), [])
