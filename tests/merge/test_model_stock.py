from itertools import combinations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from downriver.core.errors import InputError
from downriver.merge import average, model_stock


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(19, 7, generator=g), "b": torch.randn(30, generator=g)}


BASE = state(0)
SHARED = state(9)
MODELS = [{n: BASE[n] + SHARED[n] + v for n, v in state(i).items()} for i in (1, 2, 3)]


def test_it_is_the_papers_formula():
    found = model_stock(MODELS, BASE)
    for name in BASE:
        taus = [(m[name] - BASE[name]).flatten().double() for m in MODELS]
        cosine = sum(cosine_similarity(a, b, dim=0) for a, b in combinations(taus, 2)) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        expected = t * torch.stack([m[name].double() for m in MODELS]).mean(0) + (1 - t) * BASE[name]
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-6)


def test_limits():
    same = model_stock([MODELS[0]] * 3, BASE)
    for name in BASE:
        torch.testing.assert_close(same[name], MODELS[0][name], rtol=1e-5, atol=1e-6)
    e1, e2 = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    zero = {"w": torch.zeros(2)}
    assert torch.equal(model_stock([e1, e2], zero)["w"], zero["w"])
    opposite = {"w": torch.tensor([-1.0, 0.0])}  # 1 + (N − 1) cos θ = 0: no finite estimate
    assert torch.equal(model_stock([e1, opposite], zero)["w"], zero["w"])
    between = model_stock(MODELS, BASE)["w"] - BASE["w"]
    mean = average(MODELS, BASE)["w"] - BASE["w"]
    assert 0 < float(between.norm() / mean.norm()) < 1


def test_every_filter_has_its_own_angle(monkeypatch):
    whole = model_stock(MODELS, BASE, filter_wise=True)
    for row in range(19):
        alone = model_stock([{"w": m["w"][row]} for m in MODELS], {"w": BASE["w"][row]})
        torch.testing.assert_close(whole["w"][row], alone["w"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole["b"], model_stock(MODELS, BASE)["b"], rtol=1e-6, atol=1e-6)
    monkeypatch.setattr("downriver.merge.plan.LARGEST", 16)  # blocks of few rows
    monkeypatch.setattr("downriver.merge.plan.SMALLEST", 1)
    in_pieces = model_stock(MODELS, BASE, filter_wise=True)
    assert all(torch.equal(in_pieces[name], whole[name]) for name in BASE)


def test_one_model_is_refused():
    with pytest.raises(InputError, match="model_stock: one model, two at least"):
        model_stock([MODELS[0]], BASE)
