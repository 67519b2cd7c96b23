"""The difference between two models as an adapter: exact at full rank, optimal below, loaded by peft."""

import copy

import peft
import pytest
import torch
from typer.testing import CliRunner

from downriver.cli.merge import app
from downriver.core.errors import InputError
from downriver.merge import extract_adapter, open_store
from downriver.models import load, small


@pytest.fixture
def models(tmp_path):
    base = small("causal-lm", "nano")
    tuned = copy.deepcopy(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "proj" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    base.save(tmp_path / "base")
    tuned.save(tmp_path / "tuned")
    return base, tuned, tmp_path


def test_full_rank_is_exact_for_peft_and_for_merge(models):
    base, tuned, folder = models
    found = extract_adapter(folder / "tuned", folder / "base", folder / "adapter", rank=32)
    assert min(found.kept.values()) == pytest.approx(1, abs=1e-6) and not found.left_out
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base.backbone), folder / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, tuned.backbone(ids).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        load(folder / "adapter").backbone(ids).logits, tuned.backbone(ids).logits, rtol=1e-4, atol=1e-4
    )
    both, whole = open_store((folder / "base", folder / "adapter")), open_store(folder / "tuned")
    for name in found.kept:
        size = whole.tensors.read(name).numel()
        torch.testing.assert_close(both.read(name, 0, size), whole.read(name, 0, size), rtol=1e-4, atol=1e-5)


def test_a_lower_rank_is_the_best_of_its_kind(models):
    _, _, folder = models
    name = "model.layers.0.self_attn.q_proj.weight"
    whole, base = (open_store(folder / which) for which in ("tuned", "base"))
    delta = (whole.tensors.read(name) - base.tensors.read(name)).double()
    singular = torch.linalg.svdvals(delta).square()
    last = 0.0
    for rank in (1, 4, 16):
        found = extract_adapter(folder / "tuned", folder / "base", folder / f"r{rank}", rank=rank)
        assert found.kept[name] == pytest.approx(float(singular[:rank].sum() / singular.sum()), rel=1e-4)
        assert found.kept[name] > last
        last = found.kept[name]
    both = open_store((folder / "base", folder / "r4"))
    error = (both.read(name, 0, delta.numel()).view(delta.shape).double() - whole.tensors.read(name)).square().sum()
    assert float(error) == pytest.approx(float(singular[4:].sum()), rel=1e-3)


def test_transposed_weights_and_what_is_left_out(tmp_path):
    g = torch.Generator().manual_seed(0)
    base = {"h.0.c_attn.weight": torch.zeros(6, 4), "h.0.c_attn.bias": torch.zeros(4), "wte.weight": torch.zeros(9, 6)}
    model = {name: torch.randn(value.shape, generator=g) for name, value in base.items()}
    found = extract_adapter(model, base, tmp_path / "a", rank=8, fan_in_fan_out=True, base_name="gpt2")
    assert set(found.left_out) == {"h.0.c_attn.bias", "wte.weight"} and set(found.kept) == {"h.0.c_attn.weight"}
    both = open_store((base, tmp_path / "a"))
    torch.testing.assert_close(both.read("h.0.c_attn.weight", 0, 24), model["h.0.c_attn.weight"].flatten())


def test_the_command_line_and_what_is_refused(models):
    _, _, folder = models
    arguments = ["extract", str(folder / "tuned"), str(folder / "base"), str(folder / "cli"), "--rank", "4"]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert said.exit_code == 0 and "14 matrices of rank 4" in said.stdout
    with pytest.raises(InputError, match="no matrix differs"):
        extract_adapter(folder / "base", folder / "base", folder / "none")
    with pytest.raises(InputError, match="rank is 0"):
        extract_adapter(folder / "tuned", folder / "base", folder / "none", rank=0)
    assert not (folder / "none").exists()
