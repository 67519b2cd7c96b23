import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from downriver.core.errors import InputError
from downriver.merge import Ties, conflicts, merge


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(301, 13, generator=g), "b": torch.randn(97, generator=g) * 3, "n": torch.tensor(seed)}


BASE, A, B, C = (state(seed) for seed in range(4))
MODELS = [A, B, C]


def naive(density: float, per_tensor: bool = False):
    """Task vectors, whole and trimmed, of all entries as two (models, entries) arrays."""
    parts = [torch.stack([(m[n] - BASE[n]).flatten() for m in MODELS]) for n in ("w", "b")]
    if not per_tensor:
        parts = [torch.cat(parts, 1)]
    trimmed = []
    for tau in parts:
        d = tau.shape[1]
        cut = tau.abs().kthvalue(d - int(density * d), dim=1, keepdim=True).values
        trimmed.append(torch.where(tau.abs() >= cut, tau, 0.0))
    return torch.cat(parts, 1).double().numpy(), torch.cat(trimmed, 1).double().numpy()


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("max_bytes", [2**30, 2**20])
def test_agrees_with_whole_arrays(scope, max_bytes):
    report = conflicts(MODELS, BASE, density=0.3, scope=scope, max_bytes=max_bytes)
    taus, hats = naive(0.3, scope == "tensor")
    kept = (hats != 0).sum(0)
    both = (hats > 0).any(0) & (hats < 0).any(0)
    total = report.total
    assert total.elements == taus.shape[1] == 301 * 13 + 97
    assert total.kept.tolist() == (hats != 0).mean(1).tolist()
    assert total.touched == (kept > 0).mean()
    assert total.overlap == (kept > 1).sum() / (kept > 0).sum()
    assert total.conflict == both.sum() / (kept > 0).sum()
    for found, x in ((total.norms, taus), (total.trimmed_norms, hats)):
        np.testing.assert_allclose(found, np.linalg.norm(x, axis=1), rtol=1e-12)
    for found, x in ((total.cosines, taus), (total.trimmed_cosines, hats)):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(found, unit @ unit.T, rtol=1e-12)
    shared = (hats[0] != 0) & (hats[2] != 0)
    assert total.disagreement[0, 2] == (hats[0] * hats[2] < 0).sum() / shared.sum()


def test_is_what_the_merge_then_meets(tmp_path):
    report = conflicts(MODELS, BASE, density=0.4)
    merged = merge(MODELS, BASE, Ties(density=0.4), tmp_path / "out")
    for before, after in zip((*report.tensors, report.total), (*merged.tensors, merged.total), strict=True):
        assert before.name == after.name and before.elements == after.elements
        assert before.kept.tolist() == pytest.approx(after.kept)
        assert before.conflict == pytest.approx(after.conflict)
        assert before.norms.tolist() == pytest.approx(after.norms)


def test_folders_are_read_in_pieces_and_give_the_same(tmp_path):
    for name, weights in zip(("base", "a", "b"), (BASE, A, B), strict=True):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    disk = conflicts([tmp_path / "a", tmp_path / "b"], tmp_path / "base", max_bytes=2**20, workers=2)
    memory = conflicts([A, B], BASE)
    assert disk.models == (str(tmp_path / "a"), str(tmp_path / "b"))
    pairs = zip(
        sorted(disk.table(), key=lambda r: r["tensor"]), sorted(memory.table(), key=lambda r: r["tensor"]), strict=True
    )
    for left, right in pairs:
        assert left == pytest.approx(right)


def test_identical_opposed_and_disjoint_models():
    same = conflicts([A, A], BASE).total
    assert same.conflict == 0 and same.overlap == 1 and same.cosines == pytest.approx(np.ones((2, 2)))
    zero = {"w": torch.zeros(4)}
    x, y = {"w": torch.tensor([1.0, -2, 0, 0])}, {"w": torch.tensor([0.0, 0, 3, 4])}
    opposed = conflicts([x, {"w": -x["w"]}], zero, density=0.25).total
    assert opposed.conflict == 1 and opposed.cosines[0, 1] == pytest.approx(-1) and opposed.disagreement[0, 1] == 1
    disjoint = conflicts([x, y], zero, density=0.25).total
    assert (disjoint.touched, disjoint.overlap, disjoint.conflict, disjoint.cosines[0, 1]) == (1, 0, 0, 0)
    assert math.isnan(disjoint.disagreement[0, 1])


def test_a_model_equal_to_the_base_is_named_as_such():
    report = conflicts([A, BASE], BASE)
    assert report.total.norms[1] == 0 and math.isnan(report.total.cosines[0, 1])
    assert "equal to the base" in report.text and "nan" not in report.text


def test_table_and_text():
    report = conflicts(MODELS, BASE)
    rows = report.table()
    assert [r["tensor"] for r in rows] == ["w", "b", "total"]
    assert rows[-1]["elements"] == rows[0]["elements"] + rows[1]["elements"]
    assert rows[-1]["conflict"] == report.total.conflict
    assert json.loads(json.dumps(rows)) == rows
    assert report.text.startswith("3 models, 2 tensors, 4,010 entries; trimmed to density 0.2 over the whole model.")
    assert f"{report.total.conflict:.1%} with opposite signs" in str(report)
    assert "opposite" not in conflicts([A], BASE).text


def test_density_one_a_model_and_excluded_tensors():
    total = conflicts([A, B], BASE, density=[1.0, 0.1]).total
    assert total.kept[0] == pytest.approx(1, abs=1e-3) and total.kept[1] == pytest.approx(0.1, abs=1e-3)
    assert [t.name for t in conflicts([A, B], BASE, exclude="^w$").tensors] == ["b"]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "no models"),
        ([A], {"density": 0}, "density is 0"),
        ([A, B], {"density": [0.2]}, "1 values for 2 models"),
        ([A], {"scope": "layer"}, "scope"),
        ([A | {"w": torch.zeros(2, 2)}], {}, r"'w' has shape \(2, 2\)"),
        ([A, A | {"b": torch.full((97,), math.nan)}], {}, "'b'.*not finite"),
        ([A], {"max_bytes": 10}, "too small"),
    ],
)
def test_bad_input(models, options, message):
    with pytest.raises(InputError, match=message):
        conflicts(models, BASE, **options)
