"""Hedgehog: conversion of families, training of the maps alone, cache, padding, saving, and what is refused."""

import json

import pytest
import torch
import transformers
from datasets import Dataset

from downriver.compress import attention_fidelity, hedgehog
from downriver.core.errors import InputError
from downriver.models import load, small
from downriver.models.linear_attention import INTERFACE, PART, LinearCache, convert, parts
from downriver.models.surgery import attention_blocks
from downriver.tasks.task import Task
from downriver.training.engine import clone


@pytest.fixture(scope="module")
def task():
    def text(first, last):
        return [" ".join(f"word{(i * j) % 37} river{i % 7}" for j in range(1 + i % 4)) for i in range(first, last)]

    splits = {
        "train": Dataset.from_dict({"text": text(0, 60)}),
        "validation": Dataset.from_dict({"text": text(60, 90)}),
    }
    return Task("river", "language-modelling", splits, ("text",), None)


@pytest.fixture(scope="module")
def model():
    return small("causal-lm", "nano")


@pytest.fixture(scope="module")
def linear(model, task):
    return hedgehog(model, task, "10 steps", batch_size=4)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "GPT2": {},
    "Bert": {"initializer_range": 0.3},
    "Roberta": {"initializer_range": 0.3},
}


def build(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SMALL | TOKENS | FAMILIES[family]))
    return getattr(transformers, f"{family}Model")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    module = build(family)
    ids = torch.tensor([[5, 9, 11, 3, 20, 7], [8, 4, 33, 6, 0, 0]])
    mask = (ids != 0).long()
    before = module(ids, attention_mask=mask).last_hidden_state
    convert(module, "hedgehog", chunk=2)
    assert [len(parts(module)), module.config._attn_implementation] == [2, INTERFACE]
    found = module(ids, attention_mask=mask).last_hidden_state
    assert torch.isfinite(found).all() and not torch.allclose(found, before, atol=1e-4)
    alone = module(ids[1:, :4]).last_hidden_state  # padding changes nothing
    assert torch.allclose(found[1, :4], alone[0], atol=1e-5)
    causal = family not in ("Bert", "Roberta")
    other = ids.clone()
    other[0, 5] = 40
    changed = module(other, attention_mask=mask).last_hidden_state
    assert torch.allclose(changed[0, :5], found[0, :5], atol=1e-6) == causal
    caught = []  # softmax in charge gives what the model gave
    for _, part in parts(module):
        part.watch = caught.append
    assert torch.allclose(module(ids, attention_mask=mask).last_hidden_state[mask == 1], before[mask == 1], atol=1e-5)
    assert len(caught) == 2 and torch.allclose(caught[0].teacher[0].sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(caught[0].student[0].sum(-1), torch.ones(()), atol=1e-5)


def test_only_the_maps_learn_and_the_distance_falls(model, task):
    plain = clone(model)
    convert(plain.backbone, "hedgehog")
    before = attention_fidelity(plain, task, progress=False)
    for loss in ("xent", "both"):
        tuned = hedgehog(model, task, "40 steps", batch_size=4, loss=loss)
        own = dict(model.backbone.named_parameters())
        for name, value in tuned.backbone.named_parameters():
            assert (name not in own) == (f".{PART}." in name)
            assert f".{PART}." in name or torch.equal(value, own[name])
        after = attention_fidelity(tuned, task, progress=False)
        assert (after["kl"] < 0.8 * before["kl"]).all() and (after["output_mse"] < before["output_mse"]).all()
        assert after.columns == ["layer", "entropy_softmax", "entropy", "kl", "output_mse", "monotonicity"]
        assert after["layer"].to_list() == [name for name, _ in attention_blocks(model.backbone)]
        assert torch.allclose(
            torch.tensor(after["entropy_softmax"]), torch.tensor(before["entropy_softmax"]), atol=1e-5
        )
    assert (after["monotonicity"] > before["monotonicity"] - 0.05).all() and (after["kl"] >= 0).all()
    assert model.backbone.config._attn_implementation == "sdpa"


def test_the_loss_is_the_cross_entropy_of_the_weights(model, task):
    linear = clone(model)
    convert(linear.backbone, "hedgehog")
    caught = []
    for _, part in parts(linear.backbone):
        part.watch = caught.append
    batch = model.collate(task)([task.rows("train")[5]])
    linear.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for _, part in parts(linear.backbone):
        part.watch = None
    eager = small("causal-lm", "nano").backbone.eval()
    eager.set_attn_implementation("eager")
    weights = eager(batch["input_ids"], output_attentions=True).attentions
    for seen, expected in zip(caught, weights, strict=True):
        assert torch.allclose(seen.teacher, expected, atol=1e-6)
    table = attention_fidelity(
        linear,
        Task("one", "language-modelling", {"validation": task.rows("train").select([5])}, ("text",), None),
        progress=False,
    )
    kl = [(s.teacher * (s.teacher.clamp(min=1e-12) / s.student.clamp(min=1e-12)).log()).sum(-1).mean() for s in caught]
    assert table["kl"].to_list() == pytest.approx(torch.stack(kl).tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["hedgehog", "cosformer", "taylor"])
def test_a_state_of_constant_size_generates_the_same(kind, task):
    lm = small("causal-lm", "nano", seed=3).backbone.eval()
    convert(lm, kind, layers=[1] if kind == "taylor" else "all", chunk=4)
    ids, mask = torch.tensor([[0, 0, 65, 66, 67], [68, 69, 70, 71, 72]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "min_new_tokens": 12}
    cache = LinearCache(lm)
    constant = lm.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(constant, lm.generate(ids, use_cache=False, **settings))
    assert torch.equal(constant, lm.generate(ids, **settings))  # an ordinary cache
    layer = cache.layers[1]
    assert layer.keys is None and layer.state.s.shape == (2, 2, parts(lm)[-1][1].query.features, 16)
    beams = lm.generate(ids, past_key_values=LinearCache(lm), num_beams=3, **settings)
    assert torch.equal(beams, lm.generate(ids, num_beams=3, use_cache=False, **settings))


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3"])
def test_a_softmax_window_as_long_as_the_text_is_softmax(family):
    module = build(family)
    ids = torch.tensor([[5, 9, 11, 3, 20, 7], [0, 0, 33, 6, 8, 4]])
    mask = (ids != 0).long()
    before = module(ids, attention_mask=mask).last_hidden_state
    short, long = build(family), build(family)
    convert(short, "hedgehog", chunk=2, keep_softmax_window=2)
    convert(long, "hedgehog", chunk=2, keep_softmax_window=6)
    found = [each(ids, attention_mask=mask).last_hidden_state for each in (short, long)]
    assert torch.allclose(found[1][mask == 1], before[mask == 1], atol=1e-5)
    assert not torch.allclose(found[0][mask == 1], before[mask == 1], atol=1e-4)
    alone = short(ids[1:, 2:], position_ids=None if family != "GPT2" else torch.arange(2, 6)[None])
    if family == "GPT2":  # its positions are absolute
        assert torch.allclose(found[0][1, 2:], alone.last_hidden_state[0], atol=1e-5)
    caught = []
    for _, part in parts(short):
        part.watch = caught.append
    short(ids, attention_mask=mask)
    for seen in caught:
        assert torch.allclose(seen.student[0].sum(-1), torch.ones(()), atol=1e-5)
    first = caught[0].student_output  # the first layer's input is the same in both modes
    with torch.no_grad():
        caught.clear()
        part = parts(short)[0][1]
        part.watch, outputs = None, []
        hook = part.register_forward_hook(lambda module, arguments, output: outputs.append(output))
        short(ids, attention_mask=mask)
        hook.remove()
    assert torch.allclose(outputs[0][0], first[0], atol=1e-5)
    assert torch.allclose(outputs[0][1, :, 2:], first[1, :, 2:], atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 40])
def test_a_window_and_a_state_generate_the_same(window):
    for lm in (small("causal-lm", "nano", seed=3).backbone.eval(), small_grouped()):
        convert(lm, "hedgehog", chunk=4, keep_softmax_window=window)
        ids, mask = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
        settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask, "min_new_tokens": 9}
        cache = LinearCache(lm)
        constant = lm.generate(ids, past_key_values=cache, **settings)
        assert torch.equal(constant, lm.generate(ids, use_cache=False, **settings))
        assert torch.equal(constant, lm.generate(ids, **settings))  # an ordinary cache
        recent = cache.layers[0].recent[0]
        assert recent.shape[1:3] == (lm.config.num_key_value_heads, min(window, 13))
        beams = lm.generate(ids, past_key_values=LinearCache(lm), num_beams=3, **settings)
        assert torch.equal(beams, lm.generate(ids, num_beams=3, use_cache=False, **settings))
        cache.reset()
        assert torch.equal(lm.generate(ids, past_key_values=cache, **settings), constant)


def small_grouped():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SMALL | TOKENS | {"num_key_value_heads": 1, "initializer_range": 0.3})
    return transformers.LlamaForCausalLM(config).eval()


def test_a_window_is_nearer_to_softmax_trained_saved_and_loaded(model, task, tmp_path):
    model = clone(model)
    for name, weight in model.backbone.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 10  # weights that are far from equal
    plain, windowed = (
        hedgehog(model, task, "20 steps", batch_size=4, keep_softmax_window=window) for window in (0, 24)
    )
    near, far = (attention_fidelity(each, task, progress=False) for each in (windowed, plain))
    assert (near["kl"] < 0.8 * far["kl"]).all() and (near["kl"] >= 0).all()
    before = clone(model)
    convert(before.backbone, "hedgehog", keep_softmax_window=24)
    factors = [parts(each.backbone)[0][1].factor() for each in (before, windowed)]
    assert torch.allclose(factors[0], torch.tensor(32.0)) and not torch.allclose(*factors, rtol=1e-3)
    windowed.save(tmp_path / "windowed")
    again, ids = load(tmp_path / "windowed"), torch.arange(65, 90)[None]
    assert torch.equal(again.backbone(ids).logits, windowed.eval().backbone(ids).logits)
    assert parts(again.backbone)[0][1].window == 24
    with pytest.raises(InputError, match="keep_softmax_window is -1"):
        hedgehog(model, task, keep_softmax_window=-1)
    with pytest.raises(InputError, match=r"keep_softmax_window: a \w+ looks both ways"):
        hedgehog(small("masked-lm", "nano"), task, keep_softmax_window=8)


def test_images_are_attended_in_linear_time_too():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**SMALL, "image_size": 16, "patch_size": 4, "initializer_range": 0.3})
    vit, pixels = transformers.ViTModel(config).eval(), torch.randn(2, 3, 16, 16)
    before = vit(pixels).last_hidden_state
    convert(vit, "hedgehog")
    found = vit(pixels).last_hidden_state
    assert len(parts(vit)) == 2 and found.isfinite().all() and not torch.allclose(found, before, atol=1e-3)


def test_some_layers_keep_softmax(model, task):
    ids = torch.tensor([[65, 66, 67, 68]])
    first = hedgehog(model, task, "1 steps", batch_size=2, layers=[1])
    assert [name for name, _ in parts(first.backbone)] == ["model.layers.1.self_attn"]
    hidden = first.backbone(ids, output_hidden_states=True).hidden_states
    plain = model.backbone(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(hidden[1], plain[1], atol=1e-6) and not torch.allclose(hidden[2], plain[2], atol=1e-4)


def test_saved_and_loaded(linear, model, tmp_path):
    linear.save(tmp_path / "linear")
    again = load(tmp_path / "linear")
    ids = torch.tensor([[65, 66, 67, 68, 69]])
    assert torch.equal(again.backbone(ids).logits, linear.eval().backbone(ids).logits)
    again.save(tmp_path / "twice")
    assert torch.equal(load(tmp_path / "twice").backbone(ids).logits, again.backbone(ids).logits)
    stored = json.loads((tmp_path / "linear" / "config.json").read_text())["downriver_linear_attention"]
    assert stored == {"feature_map": "hedgehog", "layers": [0, 1], "chunk": 64, "eps": 1e-12, "keep_softmax_window": 0}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "linear").eval()
    assert torch.allclose(plain(ids).logits, model.backbone(ids).logits, atol=1e-5)  # softmax, the weights untouched


def test_a_masked_model_with_a_head(tmp_path):
    rows = Dataset.from_dict({"text": ["good boat", "bad boat", "a fine river", "poor"], "label": [1, 0, 1, 0]})
    task = Task("mood", "text-classification", {"train": rows, "validation": rows}, ("text",), "label")
    model = small("masked-lm", "nano").with_head(task)
    linear = hedgehog(model, task, "4 steps", batch_size=4)
    linear.save(tmp_path / "bert")
    batch = model.collate(task)(list(rows))
    again = load(tmp_path / "bert")
    assert torch.allclose(again.eval()(**batch)["logits"], linear.eval()(**batch)["logits"], atol=1e-6)


def test_maps_without_parameters_and_the_choice_for_half_precision(model, task):
    relu = hedgehog(model, task, feature_map="relu")
    assert not list(parts(relu.backbone)[0][1].parameters())
    with pytest.raises(InputError, match="nothing to train"):
        hedgehog(model, task, "5 steps", feature_map="relu")
    half = small("causal-lm", "nano")
    half.backbone.bfloat16()
    assert hedgehog(half, task, "1 steps", batch_size=2).backbone.config.downriver_linear_attention["feature_map"] == (
        "hedgehog_softmax"
    )


def test_what_is_refused(model, linear, task):
    with pytest.raises(InputError, match="loss"):
        hedgehog(model, task, loss="kl")
    with pytest.raises(InputError, match="layers"):
        hedgehog(model, task, layers=[0, 2])
    with pytest.raises(InputError, match="already"):
        hedgehog(linear, task)
    with pytest.raises(InputError, match="no linear attention"):
        attention_fidelity(model, task)
    with pytest.raises(InputError, match="without linear attention"):
        LinearCache(model.backbone)
    with pytest.raises(InputError, match="four dimensions"):
        linear.backbone(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="output_attentions: linear attention makes no weights"):
        linear.backbone(torch.tensor([[1, 2]]), output_attentions=True)
    for other in ("Bloom", "Falcon"):  # with ALiBi's biases
        more = {"n_head": 2, "n_layer": 2} if other == "Bloom" else {"alibi": True, "num_attention_heads": 2}
        config = getattr(transformers, f"{other}Config")(hidden_size=16, vocab_size=64, **more)
        with pytest.raises(InputError, match=f"{other}Model adds ALiBi's biases"):
            convert(getattr(transformers, f"{other}Model")(config), "hedgehog")
    config = transformers.MistralConfig(**(SMALL | TOKENS))
    with pytest.raises(InputError, match="sliding window"):
        convert(transformers.MistralModel(config), "hedgehog")
    t5 = transformers.T5Config(d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=24, vocab_size=64)
    with pytest.raises(InputError, match="encoder–decoder"):
        convert(transformers.T5Model(t5), "hedgehog")
    with pytest.raises(InputError, match="attention interface"):
        convert(torch.nn.Linear(2, 2), "hedgehog")
    capped = transformers.Gemma2Config(**(SMALL | TOKENS), head_dim=8, layer_types=["full_attention"] * 2)
    with pytest.raises(InputError, match="caps"):
        convert(transformers.Gemma2Model(capped), "hedgehog")


def test_damaged_maps_are_named(linear, tmp_path):
    from safetensors.torch import load_file, save_file

    linear.save(tmp_path / "linear")
    file = tmp_path / "linear" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if f".{PART}." in name)
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=PART):
        load(tmp_path / "linear")
