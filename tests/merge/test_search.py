import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from downriver.core.errors import InputError
from downriver.merge import Average, TaskArithmetic, Ties, search_lambda, task_arithmetic, ties
from downriver.merge.plan import Plan


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(23, 11, generator=g).to(dtype),
        "b": torch.randn(9, generator=g).to(dtype),
        "n": torch.tensor(seed),
    }


BASE, A, B, C = (state(seed) for seed in range(4))


def closeness(target):
    return lambda found: -float((found["w"].double() - target["w"].double()).norm())


@pytest.mark.parametrize("lam", [0.8, 1.3, 2.5])
def test_finds_the_lam_of_a_ties_merge(lam):
    found = search_lambda([A, B, C], BASE, "ties", closeness(ties([A, B, C], BASE, lam=lam)))
    assert found.best == lam
    assert list(found.scores) == [round(0.8 + 0.1 * i, 1) for i in range(18)]
    assert found.scores[lam] == max(found.scores.values())


def test_every_candidate_is_the_merge_at_that_lam():
    seen = []
    method = Ties(density=0.5, weights=[1, 2], lam=7.0)  # its own lam is not used
    search_lambda([A, B], BASE, method, lambda m: seen.append(m) or 0.0, [0.0, 0.5, 1.7])
    for found, lam in zip(seen, (0.0, 0.5, 1.7), strict=True):
        torch.testing.assert_close(
            found, ties([A, B], BASE, density=0.5, weights=[1, 2], lam=lam), rtol=1e-6, atol=1e-6
        )
    assert torch.equal(seen[0]["w"], BASE["w"]) and all(m["n"] == BASE["n"] for m in seen)


def test_the_task_vector_is_computed_once(monkeypatch):
    calls = []
    execute = Plan.execute
    monkeypatch.setattr(Plan, "execute", lambda self, *a, **k: calls.append(1) or execute(self, *a, **k))
    search_lambda([A, B], BASE, TaskArithmetic(), closeness(A))
    assert len(calls) == 1


def test_default_grids_and_methods():
    grids = {m: list(search_lambda([A], BASE, m, closeness(A)).scores) for m in ("task_arithmetic", "average")}
    assert grids["task_arithmetic"] == grids["average"] == [round(0.1 * i, 1) for i in range(1, 11)]
    assert search_lambda([A, A], BASE, Average(), closeness(A)).best == 1.0
    assert search_lambda([A, A], BASE, "task_arithmetic", closeness(A)).best == 0.5


def test_direction_and_the_first_of_equal_scores():
    low = search_lambda([A], BASE, "ties", lambda m: float(m["w"].abs().sum()), [0.0, 1.0, 2.0], direction="lower")
    high = search_lambda([A], BASE, "ties", lambda m: float(m["w"].abs().sum()), [0.0, 1.0, 2.0])
    assert low.best == min(low.scores, key=low.scores.get) and high.best == max(high.scores, key=high.scores.get)
    assert low.best != high.best and low.scores == high.scores
    assert search_lambda([A], BASE, "ties", lambda m: 1.0, [0.9, 0.3]).best == 0.9


def test_a_module_gives_modules_and_stays_as_it_was():
    torch.manual_seed(0)
    base, a, b = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(3))
    before = {n: t.clone() for n, t in base.state_dict().items()}

    def score(model: nn.Module) -> float:
        value = -float(model(torch.ones(2, 4)).norm()) - float((model[0].weight - a[0].weight).norm())
        nn.init.zeros_(model[0].weight)  # a candidate is its own copy
        return value

    found = search_lambda([a, b], base, "task_arithmetic", score, [0.2, 0.9])
    expected = task_arithmetic([a, b], base, lam=found.best)
    assert isinstance(found.merged, nn.Sequential) and found.merged is not base
    torch.testing.assert_close(found.merged[0].weight, expected[0].weight)
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())


def test_tied_weights_stay_tied_and_models_may_be_folders(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.lm_head.weight = self.embed.weight

    base, a = Tied(), Tied()
    save_file({"embed.weight": a.embed.weight.detach().clone()}, tmp_path / "model.safetensors")
    merged = search_lambda([tmp_path], base, TaskArithmetic(), lambda m: 0.0, [1.0]).merged
    assert merged.lm_head.weight is merged.embed.weight
    torch.testing.assert_close(merged.embed.weight, a.embed.weight)


def test_bfloat16_is_rounded_once():
    base, a = state(0, torch.bfloat16), state(1, torch.bfloat16)
    merged = search_lambda([a], base, TaskArithmetic(), lambda m: 0.0, [0.3]).merged
    tau = a["w"].float() - base["w"].float()
    assert torch.equal(merged["w"], (base["w"].double() + 0.3 * tau.double()).bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": []}, "grid of λ for ties is empty"),
        ({"grid": [1.0, math.inf]}, "finite numbers"),
        ({"evaluate": lambda m: math.nan}, "score at λ = 0.8 is nan"),
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"direction": "up"}, "direction"),
        ({"models": []}, "no models"),
        ({"base": "folder"}, "not in memory"),
        ({"models": [A | {"b": torch.zeros(3)}]}, "'b' has shape"),
    ],
)
def test_bad_input(changes, message):
    settings = {"models": [A], "base": BASE, "method": "ties", "evaluate": closeness(A), "grid": None} | changes
    with pytest.raises(InputError, match=message):
        search_lambda(**settings)
