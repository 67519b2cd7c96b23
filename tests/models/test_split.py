"""A split model is the whole one bit by bit, goes on from any state, and says where it cannot."""

import pytest
import torch
import transformers
from torch import nn

from downriver.core import InputError
from downriver.models import small
from downriver.models.split import SplitModel, split_layers

IMAGES = {"pixel_values": torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def texts(model):
    return dict(model.processor(["a river", "the sea is wide", "x"], return_tensors="pt", padding=True))


@pytest.mark.parametrize("kind", ["text-encoder", "masked-lm", "causal-lm", "vit"])
@pytest.mark.parametrize("layer", range(4))
def test_both_parts_make_the_whole_bit_by_bit(kind, layer):
    model = small(kind)
    inputs = IMAGES if kind == "vit" else texts(model)
    stack = split_layers(model)[1].rpartition(".")[0]
    split = SplitModel(model.backbone, f"{stack}.{layer}")
    with torch.no_grad():
        assert torch.equal(split.hi(split.lo(inputs), inputs)[0], model.backbone(**inputs)[0])


@pytest.mark.parametrize("at", ["encoder.stages.0", "encoder.stages.1", "encoder.stages.1.layers.0"])
def test_a_convolutional_net_can_be_split_after_stages_and_blocks(at):
    model = small("resnet")
    split = SplitModel(model, at)
    with torch.no_grad():
        assert torch.equal(split.hi(split.lo(IMAGES), IMAGES), model.features(**IMAGES))


def test_other_families_mixed_layers_and_sequentials():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    llama = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]])}
    ids["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    special = {"bos_token_id": 1, "eos_token_id": 2}
    for config in (
        transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, **special),
        transformers.Gemma3TextConfig(**llama, layer_types=kinds, sliding_window=2, **special),
        transformers.Qwen2Config(**llama, **special),
    ):
        model = transformers.AutoModel.from_config(config).eval()
        split = SplitModel(model, split_layers(model)[0].rpartition(".")[0] + ".1")
        with torch.no_grad():
            assert torch.equal(split.hi(split.lo(ids), ids)[0], model(**ids)[0])
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x, split = torch.randn(5, 2), SplitModel(net, "1", "3")
    low, high = split.read(x)
    assert torch.equal(low, net[:2](x)) and torch.equal(high, net[:4](x))
    assert torch.equal(split.hi(low, x), high) and torch.equal(split.lo(x), low)


def test_the_upper_part_reads_the_state_and_not_what_lies_below():
    model = small("text-encoder")
    inputs = texts(model)
    split = SplitModel(model, *split_layers(model))
    low, high = split.read(inputs)
    runs = []
    handle = model.backbone.encoder.layer[0].attention.register_forward_hook(lambda *a: runs.append(1))
    full = {"input_ids": inputs["input_ids"]}  # no padding: rows can be exchanged
    with torch.no_grad():
        exchanged = split.hi(SplitModel(model, split_layers(model)[0]).lo(full).flip(0), full)
        runs.clear()
        assert torch.equal(exchanged, split.hi(split.lo(full).flip(0), full))
        assert len(runs) == 1  # by lo alone
        assert torch.allclose(exchanged.flip(0), split.read(full)[1], atol=1e-6)
    handle.remove()
    assert low.shape == high.shape


def test_gradients_reach_the_state_and_the_model_is_left_as_it_was():
    model = small("causal-lm").train()
    inputs = texts(model)
    split = SplitModel(model, *split_layers(model))
    state = split.read(inputs)[0].detach().requires_grad_()
    split.hi(state, inputs).square().sum().backward()
    assert state.grad is not None and state.grad.abs().sum() > 0
    lower, upper = model.backbone.model.layers[0], model.backbone.model.layers[3]
    assert all(p.grad is None for p in lower.parameters()) and any(p.grad is not None for p in upper.parameters())
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_functions_split_what_has_no_layers():
    weight = torch.randn(3, 3)
    split = SplitModel(nn.Identity(), lambda x: x @ weight, lambda state, x: state.relu())
    x = torch.randn(2, 3)
    low, high = split.read(x)
    assert torch.equal(low, x @ weight) and torch.equal(split.hi(split.lo(x), x), high)
    with pytest.raises(InputError, match="two of them"):
        SplitModel(nn.Identity(), lambda x: x)


@pytest.mark.parametrize("at", ["encoder.layer.0.attention", "encoder.layer.2.output.dense"])
def test_a_layer_inside_a_block_is_refused_by_name(at):
    with pytest.raises(InputError, match=r"inside the block encoder\.layer\.\d: split after"):
        SplitModel(small("text-encoder"), at)


@pytest.mark.parametrize("at", ["encoder.stages.0.layers.0.layer.0", "encoder.stages.1.layers.1.layer.0"])
def test_a_layer_with_a_residual_round_it_is_found_out(at):
    model = small("resnet")
    split = SplitModel(model, at)
    with pytest.raises(InputError, match="cannot be continued from the state at"):
        split.hi(split.lo(IMAGES), IMAGES)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_model_whose_layers_pass_more_than_a_state_is_refused():
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_kv=16, num_heads=2, num_layers=3, d_ff=32, vocab_size=50)
    ).eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    split = SplitModel(t5, "encoder.block.0")
    with pytest.raises(InputError, match="give two functions"):
        split.hi(split.lo(ids), ids)


def test_unknown_layers_and_short_stacks_are_named():
    with pytest.raises(InputError, match=r"no layer 'encoder\.layer\.9' \(there are: "):
        SplitModel(small("text-encoder"), "encoder.layer.9")
    with pytest.raises(InputError, match="has no stack of layers"):
        split_layers(nn.Linear(1, 1))
