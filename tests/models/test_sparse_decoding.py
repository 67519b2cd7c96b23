"""Decoding that skips neurons gives what the dense model gives, in the families, saved and switched off again."""

import copy
import importlib

import pytest
import torch
import transformers

from downriver.core.errors import InputError
from downriver.models import Model, load, small, sparse_decoding
from downriver.models.surgery import gated_mlps, set_thresholds
from downriver.nn import sparse_mlp

pytest.importorskip("numba", reason="the extra fast is not installed")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, **SPECIAL, intermediate_size=70),
    "qwen3": transformers.Qwen3Config(**SIZES, **SPECIAL, intermediate_size=70, head_dim=8),
    "gemma": transformers.GemmaConfig(**SIZES, **SPECIAL, intermediate_size=70, head_dim=8),
    "phi3": transformers.Phi3Config(**SIZES, **SPECIAL, intermediate_size=70),
}


def thresholded(family, threshold=0.02):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()
    set_thresholds(model, [threshold] * 2)
    return model


@pytest.fixture
def counted(monkeypatch):
    """How many tokens each sparse product had."""
    calls = []

    def spy(x, a, *weights):
        calls.append(len(x))
        assert 0 < int((a != 0).sum()) < a.numel()
        return plain(x, a, *weights)

    plain = sparse_mlp.sparse_gated_mlp
    module = importlib.import_module("downriver.models.sparse_decoding")  # the name is the function's in the room
    monkeypatch.setattr(module, "sparse_gated_mlp", spy)
    return calls


@pytest.mark.parametrize("family", CONFIGS)
def test_generates_what_the_dense_model_does(family, counted):
    dense, sparse = thresholded(family), thresholded(family)
    assert sparse_decoding(sparse) == [name for name, _, _ in gated_mlps(dense)]
    prompt = torch.arange(3, 21).view(2, 9)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, found = (model.generate(prompt, **settings) for model in (dense, sparse))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)
    assert counted == [2] * 10  # two layers, five steps after the prompt, which is dense


def test_gradients_training_and_long_inputs_are_dense(counted):
    model = thresholded("llama")
    sparse_decoding(model)
    with torch.no_grad():
        model(torch.arange(3, 8)[None])
        model.train()(torch.tensor([[3]]))
    model.eval()(torch.tensor([[3]])).logits.sum().backward()
    assert counted == []
    assert all(block.down_proj.weight.grad.abs().sum() > 0 for _, block, _ in gated_mlps(model))
    with torch.no_grad():
        model(torch.arange(3, 7)[None])
    assert counted == [4, 4]


def test_switched_off_copied_saved_and_loaded(tmp_path, counted):
    lm = small("causal-lm", "nano")
    set_thresholds(lm.backbone, [0.01, 0.01])
    lm.eval()
    ids = torch.tensor([[5]])
    with torch.no_grad():
        expected = lm.backbone(ids).logits
        classes = [type(block) for _, block, _ in gated_mlps(lm.backbone)]
        sparse_decoding(lm)
        torch.testing.assert_close(copy.deepcopy(lm).backbone(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert len(counted) == 2
        lm.save(tmp_path / "sparse")
        sparse_decoding(lm)  # twice changes nothing
        assert sparse_decoding(lm, on=False) == []
        assert [type(block) for _, block, _ in gated_mlps(lm.backbone)] == classes
        assert torch.equal(lm.backbone(ids).logits, expected)
        loaded = load(tmp_path / "sparse").eval()
        assert torch.equal(loaded.backbone(ids).logits, expected)
        assert len(counted) == 2
        sparse_decoding(loaded)
        loaded.backbone(ids)
        assert len(counted) == 4


def test_what_is_refused():
    with pytest.raises(InputError, match=r"without thresholds: what compress\.cats gives"):
        sparse_decoding(small("causal-lm", "nano"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **SPECIAL, intermediate_size=70, mlp_bias=True)
    biased = transformers.LlamaForCausalLM(config)
    set_thresholds(biased, [0.1, 0.1])
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp' \(LlamaMLP\): plain projections"):
        sparse_decoding(Model(biased, kind="causal-lm", pooling="last"))
