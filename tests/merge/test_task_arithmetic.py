import itertools

import pytest
import torch
from torch import nn

from downriver.core.errors import InputError
from downriver.merge import TaskArithmetic, average, merge, open_store, task_arithmetic


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(41, 5, generator=g).to(dtype), "b": torch.randn(3, generator=g).to(dtype)}


BASE, A, B, C = (state(seed) for seed in range(4))


def expected(models, weights, lam, name="w"):
    base = BASE[name].double()
    return (base + lam * sum(w * (m[name].double() - base) for m, w in zip(models, weights, strict=True))).float()


def test_one_model_at_lam_one_comes_back_exactly_and_at_zero_the_base():
    for name in BASE:
        assert torch.equal(task_arithmetic([A], BASE, lam=1.0)[name], A[name])
        assert torch.equal(task_arithmetic([A, B], BASE, lam=0.0)[name], BASE[name])


@pytest.mark.parametrize("lam", [0.4, 1.0, -0.5])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, -1.0]])
def test_formula(lam, weights):
    merged = task_arithmetic([A, B, C], BASE, lam=lam, weights=weights)
    torch.testing.assert_close(merged["w"], expected((A, B, C), weights or [1, 1, 1], lam), rtol=2e-7, atol=1e-7)


def test_default_lam_is_the_papers():
    assert TaskArithmetic().lam == 0.4
    assert torch.equal(task_arithmetic([A, B], BASE)["w"], task_arithmetic([A, B], BASE, lam=0.4)["w"])


def test_the_order_of_models_changes_nothing():
    results = [task_arithmetic(list(order), BASE, lam=0.3) for order in itertools.permutations((A, B, C))]
    for found in results:
        torch.testing.assert_close(found, results[0], rtol=2e-7, atol=1e-8)


def test_disjoint_changes_are_all_kept():
    base = {"w": torch.zeros(6)}
    a, b = {"w": torch.tensor([1.0, 2, 0, 0, 0, 0])}, {"w": torch.tensor([0.0, 0, 0, -3, 4, 0])}
    assert torch.equal(task_arithmetic([a, b], base, lam=1.0)["w"], a["w"] + b["w"])


def test_normalised_at_lam_one_is_the_average():
    merged = task_arithmetic([A, B], BASE, lam=1.0, weights=[1, 3], normalize=True)
    torch.testing.assert_close(merged, average([A, B], BASE, weights=[1, 3]), rtol=2e-7, atol=1e-8)


def test_a_negative_weight_undoes_a_task():
    both = task_arithmetic([A, B], BASE, lam=1.0)
    torch.testing.assert_close(task_arithmetic([both, B], BASE, lam=1.0, weights=[1, -1])["w"], A["w"])


def test_bfloat16_is_subtracted_and_summed_in_full_precision():
    base = {"w": torch.tensor([256.0, 1.0], dtype=torch.bfloat16)}
    a = {"w": torch.tensor([258.0, 1.0078125], dtype=torch.bfloat16)}  # one step each: λ·τ alone would be lost
    merged = task_arithmetic([a] * 5, base, lam=0.2)
    assert merged["w"].dtype == torch.bfloat16 and torch.equal(merged["w"], a["w"])


def test_what_is_no_weight_comes_from_the_base():
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        module(torch.randn(8 + seed, 2))
        return module

    base, a = net(0), net(1)
    a(torch.randn(4, 2))
    merged = task_arithmetic([a], base, lam=1.0)
    assert torch.equal(merged[0].weight, a[0].weight)
    assert torch.equal(merged[1].running_var, base[1].running_var)
    assert merged[1].num_batches_tracked == 1


def test_disk_agrees_with_memory_and_reports_norms(tmp_path):
    report = merge([A, B], BASE, TaskArithmetic(lam=0.7), tmp_path / "out", max_bytes=2**20)
    memory = task_arithmetic([A, B], BASE, lam=0.7)
    assert torch.equal(open_store(report.out).read("w", 0, 205).view(41, 5), memory["w"])
    w = next(t for t in report.tensors if t.name == "w")
    assert w.norms == pytest.approx([float((m["w"] - BASE["w"]).norm()) for m in (A, B)])
    assert w.merged_norm == pytest.approx(float((memory["w"] - BASE["w"]).norm()))
    assert w.kept is None and w.conflict is None


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "no models"),
        (A, {}, "a single model"),
        ([A], {"lam": float("inf")}, "lam is inf"),
        ([A, B], {"weights": [1]}, "1 values for 2 models"),
        ([{"w": A["w"].long(), "b": A["b"]}], {}, "'w' is int64"),
        ([3], {}, "int is no model"),
    ],
)
def test_bad_input(models, options, message):
    with pytest.raises(InputError, match=message):
        task_arithmetic(models, BASE, **options)
