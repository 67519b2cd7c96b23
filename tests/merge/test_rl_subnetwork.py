"""What an update changed: shares, ranks, overlaps, streamed as in memory, and on the command line."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from downriver.cli.merge import app
from downriver.core.errors import InputError
from downriver.merge import delta_stats, subnetwork
from downriver.models import small


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.mlp.weight": (40, 30), "layers.1.mlp.weight": (40, 30), "norm.weight": (50,)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def planted(base, share, seed, size=0.5):
    g = torch.Generator().manual_seed(seed)
    return {n: v + size * (torch.rand(v.shape, generator=g) < share) for n, v in base.items()}


BASE = state(0)


def test_equal_models():
    report = delta_stats(BASE, BASE, rank="exact")
    assert report.share("unchanged") == report.share() == report.share("below_ulp") == 1
    assert report.rank == 0 and (report.tensors["norm"] == 0).all()
    assert subnetwork(BASE, BASE).count == 0


def test_a_planted_update():
    after = planted(BASE, 0.2, 1)
    after["norm.weight"] = BASE["norm.weight"] + 5e-6
    report = delta_stats(BASE, after, rank="exact")
    changed = sum(int((after[n] != BASE[n]).sum()) for n in BASE)
    total = sum(v.numel() for v in BASE.values())
    assert report.share("unchanged") == pytest.approx(1 - changed / total)
    close = sum(int(torch.isclose(after[n] - BASE[n], torch.zeros(()), atol=1e-5).sum()) for n in BASE)
    assert report.share() == pytest.approx(close / total)  # the formula of the public script
    mask = subnetwork(BASE, after)
    assert mask.count == changed and mask.total == total and mask.overlap(mask).of_first == 1
    assert subnetwork(BASE, after, tol=1e-5).count == total - close
    layers = report.by("layer")
    assert layers["layer"].to_list() == [-1, 0, 1] and layers["elements"].to_list() == [50, 1200, 1200]
    assert report.tensors.filter(tensor="norm.weight")["rank"].item() is None
    assert report.rank > 0.9  # sparse, and yet of nearly full rank


def test_independent_updates_overlap_by_chance():
    found = subnetwork(BASE, planted(BASE, 0.3, 1)).overlap(subnetwork(BASE, planted(BASE, 0.3, 2)))
    assert abs(found.of_first - found.chance_of_first) < 0.06


def test_ranks():
    g = torch.Generator().manual_seed(3)
    u, v = torch.randn(40, 3, generator=g), torch.randn(3, 30, generator=g)
    name = "layers.0.mlp.weight"
    after = BASE | {name: BASE[name] + u @ v}
    exact = delta_stats(BASE, after, rank="exact", include=name).rank
    assert exact == pytest.approx(3 / 30)
    singular = torch.linalg.svdvals((after[name] - BASE[name]).double())
    stable = delta_stats(BASE, after, rank="stable", include=name).rank
    assert stable == pytest.approx(float((singular**2).sum() / singular[0] ** 2) / 30, rel=1e-4)


def test_changes_below_a_bfloat16():
    after = {name: value * (1 + 2.0**-10) for name, value in BASE.items()}
    report = delta_stats(BASE, after)
    assert report.share("below_ulp") == 1 and report.share("unchanged") < 0.01
    rounded = delta_stats({n: v.bfloat16() for n, v in BASE.items()}, {n: v.bfloat16() for n, v in after.items()})
    assert rounded.share("unchanged") > 0.5


def test_changes_in_units_of_the_last_place():
    base = {"w": torch.tensor([1.0, 1.5, 2.0, 0.0, -3.0, 1.0, 8.0])}
    last = torch.tensor([2.0**-7, 2.0**-7, 2.0**-6, 1.0, 2.0**-6, 2.0**-7, 2.0**-4])  # of a bfloat16 at these values
    steps = torch.tensor([0.5, 1.0, 3.0, 1e-9, -0.25, 0.0, 1000.0])
    report = delta_stats(base, {"w": base["w"] + steps * last})
    found = {row["at_least"]: row["entries"] for row in report.ulps.iter_rows(named=True) if row["entries"]}
    assert found == {0.25: 1, 0.5: 1, 1.0: 1, 2.0: 1, 128.0: 2}  # beyond 128, and what was 0
    assert report.ulps["share"].sum() == pytest.approx(6 / 7)
    assert report.share("below_ulp") == pytest.approx(3 / 7) and report.ulps["below"][-1] == float("inf")


def test_what_makes_checkpoints_unlike_is_said():
    assert delta_stats(BASE, BASE).notes == ()
    halves = {n: v.bfloat16() for n, v in BASE.items()}
    [note] = delta_stats(halves, BASE).notes
    assert note.startswith("3 tensors are bfloat16 before and float32 after")
    old, new = {"embed_tokens.weight": torch.ones(5, 3)}, {"embed_tokens.weight": torch.ones(7, 3)}
    report = delta_stats(old, new, on_mismatch="slice-embed")
    assert report.notes == ("'embed_tokens.weight': the 5 rows that both have are compared, of 5 and 7",)
    assert report.tensors["elements"].to_list() == [15]
    report = delta_stats(BASE | {"x": torch.ones(2)}, BASE | {"x": torch.ones(3)}, on_mismatch="skip")
    assert report.notes == ("'x' is left out",)
    nothing = BASE | {"norm.weight": torch.full((50,), float("nan"))}
    with pytest.raises(InputError, match=r"'norm\.weight' holds values that are not finite"):
        delta_stats(BASE, nothing)


def test_an_adapter_is_its_scaled_product(tmp_path):
    model = small("causal-lm", "nano")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    model.save(tmp_path / "base")
    adapted = peft.get_peft_model(model.backbone, config)
    name = "model.layers.0.self_attn.q_proj"
    layer = adapted.get_submodule(f"base_model.model.{name}")
    expected = layer.get_delta_weight("default").norm().item()
    adapted.save_pretrained(tmp_path / "adapter")
    report = delta_stats(tmp_path / "base", (tmp_path / "base", tmp_path / "adapter"), rank="exact")
    rows = {row["tensor"]: row for row in report.tensors.iter_rows(named=True)}
    assert rows[f"{name}.weight"]["norm"] == pytest.approx(expected, rel=1e-4)
    assert rows["model.layers.0.mlp.up_proj.weight"]["unchanged"] == 1
    mask = subnetwork(tmp_path / "base", (tmp_path / "base", tmp_path / "adapter"))
    assert all("q_proj" in changed for changed in mask.indices)


def test_streamed_and_from_the_command_line(tmp_path):
    big = {"w": torch.randn(300, 500, generator=torch.Generator().manual_seed(0))}
    after = planted(big, 0.1, 1)
    small = delta_stats(big, after, max_bytes=2**20)
    whole = delta_stats(big, after)
    assert small.tensors.drop("norm").equals(whole.tensors.drop("norm"))
    assert torch.equal(subnetwork(big, after, max_bytes=2**20).indices["w"], subnetwork(big, after).indices["w"])
    for name, tensors in (("before", big), ("after", after)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = CliRunner().invoke(app, ["delta", str(tmp_path / "before"), str(tmp_path / "after"), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)[0]["unchanged"] == whole.share("unchanged")


def test_what_is_refused():
    with pytest.raises(InputError, match="lacks 'norm"):
        delta_stats(BASE, {n: v for n, v in BASE.items() if n != "norm.weight"})
    with pytest.raises(InputError, match="unknown rank 'full'"):
        delta_stats(BASE, BASE, rank="full")
    with pytest.raises(InputError, match="unknown column"):
        delta_stats(BASE, BASE).share("sparse")
    with pytest.raises(InputError, match="tol is -1"):
        subnetwork(BASE, BASE, tol=-1)
