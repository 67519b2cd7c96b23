"""CATS: thresholds, what is zero, what is kept on disk, families, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from downriver.adapt import lora
from downriver.compress import cats, gate_sparsity
from downriver.compress.cats import _activations
from downriver.core.errors import InputError
from downriver.models import load, small
from downriver.models.model import Model
from downriver.models.surgery import gated_mlps, set_thresholds
from downriver.nn.thresholded import CATSActivation
from downriver.tasks.task import Task
from downriver.training.engine import clone


@pytest.fixture(scope="module")
def task():
    def text(first, last):
        return [" ".join(f"word{(i * j) % 37} river{i % 7}" for j in range(3 + i % 9)) for i in range(first, last)]

    splits = {
        "train": Dataset.from_dict({"text": text(0, 60)}),
        "validation": Dataset.from_dict({"text": text(60, 90)}),
    }
    return Task("river", "language-modelling", splits, ("text",), None)


@pytest.fixture(scope="module")
def model():
    return small("causal-lm", "nano")


def gates(model, task, split="train"):
    """All gate values of every block."""
    found = {}
    for block, values, _ in _activations(model, task, split, 10**9, 8, 0, False):
        found.setdefault(block, []).append(values)
    return [torch.cat(found[block]).abs().flatten() for block in sorted(found)]


def thresholds(model):
    return [float(getattr(block, attribute).threshold) for _, block, attribute in gated_mlps(model.backbone)]


def test_the_activation():
    z = torch.linspace(-6, 6, 101, requires_grad=True)
    sparse, silu = CATSActivation(nn.SiLU(), 0.2), nn.functional.silu(z)
    assert torch.equal(sparse(z), torch.where(silu.abs() > 0.2, silu, torch.zeros(())))
    assert (sparse(z)[z < 0] < 0).any()  # large negative values stay
    sparse(z).sum().backward()
    assert (z.grad[silu.abs() <= 0.2] == 0).all() and (z.grad[silu.abs() > 1] != 0).all()
    assert not sparse.state_dict()


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_the_threshold_is_the_quantile_of_the_magnitudes(model, task, p):
    exact = thresholds(cats(model, task, sparsity=p, estimator="exact"))
    binned = thresholds(cats(model, task, sparsity=p))
    for values, found, near in zip(gates(model, task), exact, binned, strict=True):
        assert found == np.quantile(values.numpy(), p, method="inverted_cdf")
        assert found <= near < found * 1.008
        assert abs(float((values <= near).float().mean()) - p) < 0.01


def test_measured_sparsity_and_traffic(model, task):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    last = -1.0
    for p in (0.3, 0.5, 0.7):
        sparse = cats(model, task, sparsity=p)
        held = gate_sparsity(sparse, task)
        assert abs(gate_sparsity(sparse, task, split="train").sparsity - p) < 0.01
        assert abs(held.sparsity - p) < 0.05 and held.sparsity > last
        assert held.traffic == pytest.approx((1 + 2 * (1 - held.sparsity)) / 3)
        assert 0 <= held.union < held.sparsity and held.tokens > 100
        last = held.sparsity
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    several = cats(model, task, sparsity=[0.2, 0.8])
    found = list(gate_sparsity(several, task, split="train").blocks.values())
    assert found == pytest.approx([0.2, 0.8], abs=0.01)


def test_no_sparsity_changes_nothing(model, task):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(cats(model, task, sparsity=0.0).backbone(ids).logits, model.backbone(ids).logits)


def test_saved_and_loaded(model, task, tmp_path):
    sparse = cats(model, task, sparsity=0.6)
    sparse.save(tmp_path / "sparse")
    again = load(tmp_path / "sparse")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(again.backbone(ids).logits, sparse.eval().backbone(ids).logits)
    assert not torch.equal(again.backbone(ids).logits, model.backbone(ids).logits)
    assert thresholds(again) == thresholds(sparse)
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["downriver_cats"] == thresholds(sparse)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    assert torch.equal(plain(ids).logits, model.backbone(ids).logits)  # the dense model, weights untouched
    assert sparse.backbone.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_an_adapter_is_tuned_with_the_thresholds_in_place_and_keeps_them(model, task, tmp_path):
    model.save(tmp_path / "base")
    sparse = cats(load(tmp_path / "base"), task, sparsity=0.6)
    tuned = lora(sparse, task, "2 steps", rank=2, learning_rate=1e-2)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert thresholds(tuned) == thresholds(sparse)
    tuned.save(tmp_path / "tuned")
    again = load(tmp_path / "tuned")
    assert thresholds(again) == thresholds(sparse)
    assert torch.equal(again.backbone(ids).logits, tuned.eval().backbone(ids).logits)
    assert not torch.allclose(again.backbone(ids).logits, sparse.backbone(ids).logits)
    lora(load(tmp_path / "base"), task, "2 steps", rank=2).save(tmp_path / "dense")
    assert (tmp_path / "tuned" / "base").is_dir() and not (tmp_path / "dense" / "base").exists()


def test_padding_does_not_count(model, task):
    alone = gates(model, Task("one", "language-modelling", {"train": task.rows("train").select([3])}, ("text",), None))
    [whole, *_] = gates(model, task)
    lengths = [len(model.processor(text)["input_ids"]) for text in task.rows("train")["text"]]
    width = gated_mlps(model.backbone)[0][1].gate_proj.out_features
    assert len(whole) == sum(min(n, model.max_length) for n in lengths) * width
    assert len(alone[0]) == min(lengths[3], model.max_length) * width


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3"])
def test_families(family, model, task, tmp_path):
    extra = {"head_dim": 8} if family in ("Gemma", "Qwen3") else {}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**SMALL, **extra, **tokens, num_key_value_heads=2, vocab_size=300)
    backbone = transformers.AutoModelForCausalLM.from_config(config)
    other = Model(backbone, kind="causal-lm", processor=model.processor, pooling="last", max_length=64)
    sparse = cats(other, task, sparsity=0.5)
    assert abs(gate_sparsity(sparse, task, split="train").sparsity - 0.5) < 0.02
    sparse.save(tmp_path / "m")
    assert thresholds(load(tmp_path / "m")) == thresholds(sparse)


MIXTURES = {
    "Mixtral": {"num_local_experts": 3, "sliding_window": None},
    "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
}


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts(family, experts, model, task, tmp_path):
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{family}Config")(
        **SMALL, **tokens, **MIXTURES[family], num_key_value_heads=2, vocab_size=300, initializer_range=0.3
    )
    torch.manual_seed(0)
    backbone = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    mixture = Model(backbone, kind="causal-lm", processor=model.processor, pooling="last", max_length=64)
    sparse = cats(mixture, task, sparsity=0.5)
    report = gate_sparsity(sparse, task, split="train", tokens=10**6)
    assert list(report.blocks.values()) == pytest.approx([0.5] * len(report.blocks), abs=0.02)
    lengths = [len(model.processor(text)["input_ids"]) for text in task.rows("train")["text"]]
    assert report.tokens == sum(min(n, 64) for n in lengths)
    [values, *_] = gates(mixture, task)
    assert len(values) == 2 * report.tokens * (12 if family == "Qwen2Moe" else 24)  # each token has two experts
    assert np.isnan(report.union) == (family == "Mixtral")  # the other has a shared, plain block besides
    sparse.save(tmp_path / "m")
    assert thresholds(load(tmp_path / "m")) == thresholds(sparse)


def test_rows_that_are_not_flagged_are_not_needed(model, task):
    """The bytes of the report: from the flagged rows alone comes what the dense model with its zeros gives."""
    sparse = cats(model, task, sparsity=0.7)
    seen = []
    blocks = [block for _, block, _ in gated_mlps(sparse.backbone)]
    hooks = [b.register_forward_hook(lambda m, i, o: seen.append((i[0][0], o[0]))) for b in blocks]
    ids = torch.tensor([model.processor(task.rows("train")["text"][5])["input_ids"]])
    with torch.no_grad():
        sparse.backbone(ids)
    read = dense = 0
    for block, (states, expected), hook in zip(blocks, seen, hooks, strict=True):
        hook.remove()
        up, down = block.up_proj.weight.detach(), block.down_proj.weight.detach().T.contiguous()
        for x, y in zip(states, expected, strict=True):
            g = block.act_fn(block.gate_proj(x)).detach()
            flagged = g.nonzero()[:, 0]
            assert torch.allclose((g[flagged] * (up[flagged] @ x)) @ down[flagged], y, atol=1e-5)
            read += block.gate_proj.weight.nbytes + up[flagged].nbytes + down[flagged].nbytes
            dense += 3 * up.nbytes
    one = Task("one", "language-modelling", {"train": task.rows("train").select([5])}, ("text",), None)
    assert read / dense == pytest.approx(gate_sparsity(sparse, one, split="train").traffic)


def test_what_is_refused(model, task):
    with pytest.raises(InputError, match="no gated feed-forward blocks"):
        cats(small("masked-lm", "nano"), task)
    with pytest.raises(InputError, match="shares from 0 to below 1"):
        cats(model, task, sparsity=1.0)
    with pytest.raises(InputError, match="3 values for 2 gated blocks"):
        cats(model, task, sparsity=[0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="unknown estimator 'p2'"):
        cats(model, task, estimator="p2")
    broken = clone(model)
    broken.backbone.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="gated block 1 gives activations that are not finite"):
        cats(broken, task)
    nothing = Task(
        "none", "language-modelling", {"train": task.rows("train"), "test": task.rows("train")}, ("text",), None
    )
    with pytest.raises(InputError, match="validation"):
        cats(model, nothing, split="validation")
    with pytest.raises(InputError, match="has thresholds already"):
        cats(cats(model, task), task)
    with pytest.raises(InputError, match="has no thresholds"):
        gate_sparsity(model, task)
    with pytest.raises(InputError, match="1 thresholds for 2 gated blocks"):
        set_thresholds(model.backbone, [0.1])
