"""CATS: thresholds, what is zero, what is kept on disk, families, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from downriver.compress import cats, gate_sparsity
from downriver.compress.cats import _activations
from downriver.core.errors import InputError
from downriver.models import load, small
from downriver.models.model import Model
from downriver.models.surgery import gated_mlps, set_thresholds
from downriver.nn.thresholded import CATSActivation
from downriver.study.compose import load as compose
from downriver.tasks.task import Task


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
    for block, values in _activations(model, task, split, 10**9, 8, 0, False):
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


def test_what_is_refused(model, task):
    with pytest.raises(InputError, match="no gated feed-forward blocks"):
        cats(small("masked-lm", "nano"), task)
    with pytest.raises(InputError, match="shares from 0 to below 1"):
        cats(model, task, sparsity=1.0)
    with pytest.raises(InputError, match="3 values for 2 gated blocks"):
        cats(model, task, sparsity=[0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="unknown estimator 'p2'"):
        cats(model, task, estimator="p2")
    with pytest.raises(InputError, match="has thresholds already"):
        cats(cats(model, task), task)
    with pytest.raises(InputError, match="has no thresholds"):
        gate_sparsity(model, task)
    with pytest.raises(InputError, match="1 thresholds for 2 gated blocks"):
        set_thresholds(model.backbone, [0.1])


def test_three_lines_of_a_study(tmp_path):
    """Tune by LoRA, merge with another one, then make it sparse, measured after each step."""
    for name in ("train", "test"):
        lines = [json.dumps({"text": f"the river number {i} runs to the {name}"}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    one = {"adapt": {"method": "lora", "rank": 2, "seed": 1}}
    two = {"adapt": {"method": "lora", "rank": 2, "seed": 2}}
    study = compose(
        {
            "name": "chain",
            "model": "small:causal-lm:nano:0",
            "task": {**files, "text": "text", "kind": "language-modelling"},
            "budget": "32 examples",
            "seeds": 1,
            "arms": {
                "one": one,
                "two": two,
                "merged": {"merge": {"method": "ties", "models": ["one", "two"]}},
                "sparse": [{"from": "merged"}, {"compress": {"method": "cats", "sparsity": 0.5, "progress": False}}],
            },
        }
    )
    result = study.run(tmp_path / "runs", executor="serial", progress=False)
    assert not result.failures, result.failures
    losses = {a: v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows() if m == "loss"}
    assert set(losses) == {"one", "two", "merged", "sparse"} and losses["sparse"] != losses["merged"]
