"""Weights in few bits: what transformers gives for the same file, adapters on them, saving, bad input."""

import sys

import peft
import pytest
import torch
import transformers

from downriver.core.errors import InputError, MissingExtra
from downriver.models import load, small
from downriver.models.quantised import missing, quantised


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="pip install 'downriver[quantised]'")


@pytest.mark.parametrize("bits", [4, 8])
def test_as_transformers_loads_it(bitsandbytes, tmp_path, bits):
    model = small("causal-lm", "nano")
    before = {name: weight.clone() for name, weight in model.backbone.named_parameters()}
    found = quantised(model, bits)
    model.backbone.save_pretrained(tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = settings | {"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    config = transformers.BitsAndBytesConfig(**settings)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    expected.requires_grad_(False)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.backbone(ids).logits, expected(ids).logits)
    exact = model.backbone(ids).logits.detach()
    assert 0 < float((found.backbone(ids).logits - exact).abs().max()) < 0.3 * float(exact.std())
    assert all(torch.equal(weight, before[name]) for name, weight in model.backbone.named_parameters())
    assert not any(weight.requires_grad for weight in found.backbone.parameters())
    layer, plain = (each.backbone.model.layers[0].self_attn.q_proj.weight for each in (found, model))
    assert layer.nbytes * 32 == plain.nbytes * bits  # two weights of 4 bits a byte


def test_a_convolution_of_gpt2_is_turned(bitsandbytes):
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model = load(transformers.GPT2LMHeadModel(config).eval(), kind="causal-lm")
    ids = torch.arange(10)[None]
    exact, found = (each.backbone(ids).logits.detach() for each in (model, quantised(model, 8)))
    assert 0 < float((found - exact).abs().max()) < 0.05 * float(exact.std())


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_it_is_saved(bitsandbytes, tmp_path, bits):
    model = quantised(small("causal-lm", "nano"), bits)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model.backbone = peft.get_peft_model(model.backbone, config)
    ids = torch.arange(3, 20)[None]
    expected = model.eval().backbone(input_ids=ids).logits
    again = load(model.save(tmp_path / "adapted"))
    assert torch.equal(again.backbone(input_ids=ids).logits, expected)


def test_what_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    missing.cache_clear()
    assert missing(4) == "bitsandbytes is not installed: pip install 'downriver[quantised]'"
    missing.cache_clear()
    with pytest.raises(MissingExtra, match="quantised"):
        quantised(small("causal-lm", "nano"))


def test_bad_input(bitsandbytes):
    with pytest.raises(InputError, match="bits is 2"):
        quantised(small("causal-lm", "nano"), 2)
    with pytest.raises(InputError, match="quantised already"):
        quantised(quantised(small("causal-lm", "nano")))
    with pytest.raises(InputError, match="Sequential"):
        quantised(load(torch.nn.Sequential(torch.nn.Linear(2, 2))))
