import pytest
import torch
import transformers
from torch import nn

from downriver.core.errors import InputError
from downriver.models import small
from downriver.models.surgery import layer_stack, lower_part

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
FAMILIES = {
    "Llama": {**SMALL, "intermediate_size": 24},
    "Mistral": {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2},
    "Qwen2": {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2},
    "Gemma": {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoX": {**SMALL, "intermediate_size": 24},
    "GPT2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_families(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    name, stack = layer_stack(model)
    assert len(stack) == 3 and model.get_submodule(name) is stack
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    whole = model(ids, output_hidden_states=True)
    for layers in (1, 2):
        with lower_part(model, layers) as run:
            hidden = run(input_ids=ids)
        assert torch.equal(hidden, whole.hidden_states[layers])
    assert layer_stack(model)[1] is stack and torch.equal(model(ids).logits, whole.logits)


@pytest.mark.parametrize("kind", ["masked-lm", "text-encoder", "vit"])
def test_encoders(kind):
    assert len(layer_stack(small(kind, "nano").backbone)[1]) == 2


def test_gradients_end_at_the_cut():
    model = small("causal-lm", "nano").backbone
    with lower_part(model, 1) as run:
        run(input_ids=torch.tensor([[1, 2]])).sum().backward()
    layers = layer_stack(model)[1]
    assert layers[0].mlp.up_proj.weight.grad is not None and layers[1].mlp.up_proj.weight.grad is None


def test_an_error_inside_leaves_the_model_whole():
    model = small("causal-lm", "nano").backbone
    with pytest.raises(RuntimeError, match="inside"), lower_part(model, 1):
        raise RuntimeError("inside")
    assert len(layer_stack(model)[1]) == 2 and not layer_stack(model)[1][0]._forward_hooks


def test_what_is_refused():
    with pytest.raises(InputError, match="has no stack of layers"):
        layer_stack(nn.Linear(2, 2))
    with pytest.raises(InputError, match="layers is 3: 1 to 2"), lower_part(small("causal-lm", "nano").backbone, 3):
        pass
    two = transformers.T5Model(transformers.T5Config(d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=16))
    with pytest.raises(InputError, match="several stacks"):
        layer_stack(two)
