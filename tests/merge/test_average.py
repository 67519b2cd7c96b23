import itertools

import pytest
import torch
from torch import nn

from downriver.core.errors import InputError
from downriver.merge import Average, average, merge, open_store


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(33, 7, generator=g).to(dtype),
        "b": torch.randn(5, generator=g).to(dtype),
        "count": torch.tensor(seed),
        "running_mean": torch.full((2,), float(seed)),
    }


BASE, A, B, C = (state(seed) for seed in range(4))


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_is_the_mean_in_float64_and_takes_buffers_from_the_base():
    merged = average([A, B, C], BASE)
    for name in ("w", "b"):
        assert torch.equal(merged[name], torch.stack([m[name].double() for m in (A, B, C)]).mean(0).float())
    assert merged["count"] == 0 and torch.equal(merged["running_mean"], torch.zeros(2))


def test_the_order_of_models_changes_nothing():
    merged = average([A, B, C], BASE, weights=[0.2, 0.3, 0.5])
    for order in itertools.permutations(zip((A, B, C), (0.2, 0.3, 0.5), strict=True)):
        models, weights = zip(*order, strict=True)
        found = average(list(models), BASE, weights=weights)
        torch.testing.assert_close(found, merged, rtol=2e-7, atol=1e-9)


def test_identical_models_give_that_model_and_leave_inputs_alone():
    before = {n: t.clone() for n, t in A.items()}
    merged = average([A, A, A], BASE)
    assert torch.equal(merged["w"], A["w"]) and torch.equal(merged["b"], A["b"])
    assert same(A, before)


def test_weights_are_shares_unless_not_normalised():
    assert same(average([A, B], BASE, weights=[2, 6]), average([A, B], BASE, weights=[0.25, 0.75]))
    summed = average([A, B], BASE, weights=[2, -1], normalize=False)
    assert torch.equal(summed["w"], (2 * A["w"].double() - B["w"].double()).float())
    assert torch.equal(average([A, B], BASE, weights=[1, 0])["w"], A["w"])


def test_bfloat16_models_are_averaged_exactly_and_rounded_once():
    models = [state(seed, torch.bfloat16) for seed in (1, 2, 3)]
    merged = average(models, state(0, torch.bfloat16))
    exact = torch.stack([m["w"].double() for m in models]).mean(0)
    assert merged["w"].dtype == torch.bfloat16
    assert torch.equal(merged["w"], exact.float().bfloat16())


def test_modules_are_copied():
    base, a, b = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    before = base.weight.detach().clone()
    merged = average([a, b], base)
    assert isinstance(merged, nn.Linear) and merged is not base
    torch.testing.assert_close(merged.weight, (a.weight + b.weight) / 2)
    assert torch.equal(base.weight, before)


def test_lam_goes_a_part_of_the_way_and_disk_agrees_with_memory(tmp_path):
    report = merge([A, B], BASE, Average(lam=0.25), tmp_path / "out", max_bytes=2**20)
    expected = 0.75 * BASE["w"] + 0.25 * (A["w"] + B["w"]) / 2
    torch.testing.assert_close(open_store(report.out).read("w", 0, 231).view(33, 7), expected)
    merge([A, B], BASE, "average", tmp_path / "whole")
    assert torch.equal(open_store(tmp_path / "whole").read("w", 0, 231).view(33, 7), average([A, B], BASE)["w"])


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "no models"),
        ([A], {"weights": [1, 2]}, "2 values for 1 models"),
        ([A, B], {"weights": [1, -1]}, "sum to zero"),
        ([A, B], {"weights": [1, float("nan")]}, "finite"),
        ([{"w": A["w"], "b": torch.zeros(6)}], {}, r"'b' has shape \(6,\)"),
        ([{"w": A["w"]}], {}, "lacks 'b'"),
        ([A | {"new": torch.zeros(1)}], {}, "'new', which the base lacks"),
        ([A | {"b": torch.full((5,), float("inf"))}], {}, "'b'.*not finite"),
        ([A], {"include": "nothing"}, "no tensor is left"),
        ([A], {"out": "somewhere"}, "out="),
    ],
)
def test_bad_input(models, options, message):
    with pytest.raises(InputError, match=message):
        average(models, BASE, **options)
