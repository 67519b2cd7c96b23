"""Mixtures of attentions and FFNs: the function, its cache, its routers' losses, and what is kept on disk."""

import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn import functional as F

from downriver.core.errors import InputError
from downriver.models import load, small
from downriver.models import mixture as module
from downriver.models.mixture import MixtureConfig, MixtureForCausalLM
from downriver.models.mixture_export import export_mixture
from downriver.models.model import Model
from downriver.nn.moe import Routed, load_balance_loss, route, routing_context
from downriver.tasks.task import Task
from downriver.training.engine import fine_tune

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
KINDS = {
    "experts": {"attention": "experts"},
    "shared": {"attention": "kv_shared", "ffn_top_k": 2},
    "average": {"attention": "average", "ffn_top_k": 3},
    "sparse attention": {"attn_top_k": 2, "sliding_window": 5},
    "parallel": {"parallel": True, "norm": "layer", "attention_bias": True, "output_bias": True},
    "normed heads": {"attention": "kv_shared", "qk_norm": True, "tie_word_embeddings": True},
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]])


def mixture(**settings):
    torch.manual_seed(0)
    model = MixtureForCausalLM(MixtureConfig(**SIZES | settings)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return model


def attention_by_hand(model, layer, x):
    """One attention after the other, as the formula says it, without heads lying side by side."""
    c, a = model.config, model.model.layers[layer].self_attn
    n, heads, keys, h = c.num_experts, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    cos, sin = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    gates = route(x @ a.router.T, c.attn_top_k).dense()
    y = 0
    for e in range(n):

        def rows(weight, count, own, e=e):
            if c.attention == "experts":
                return weight.view(n, count, h, -1)[e]
            return weight.view(keys, n, count // keys, h, -1)[:, e].flatten(0, 1) if own else weight.view(keys, h, -1)

        q = torch.einsum("btd,chd->bcth", x, rows(a.q_proj.weight, heads, True))
        k = torch.einsum("btd,chd->bcth", x, rows(a.k_proj.weight, keys, False))
        v = torch.einsum("btd,chd->bcth", x, rows(a.v_proj.weight, keys, False))
        q, k = module.apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (part.repeat_interleave(heads // keys, 1) for part in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y + gates[..., e, None] * torch.einsum("bcth,chd->btd", o, rows(a.o_proj, heads, True))
    return y


@pytest.mark.parametrize("settings", [{}, {"attention": "kv_shared"}, {"attn_top_k": 2}], ids=str)
def test_attention_is_the_formula(settings):
    model = mixture(**settings)
    x = torch.randn(2, 8, 24)
    position = model.model.rotary_emb(x, torch.arange(8)[None])
    found, _ = model.model.layers[1].self_attn(x, position)
    torch.testing.assert_close(found, attention_by_hand(model, 1, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generating_with_a_cache_equals_the_whole_pass(kind):
    model = mixture(**KINDS[kind])
    out = model.generate(IDS, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = model(out.sequences).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 7:-1], atol=1e-5, rtol=1e-4)
    caches = out.past_key_values.layers[0].keys.shape[1]
    assert caches == (6 if model.config.attention == "experts" else 2)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing(kind, attention):
    model = mixture(**KINDS[kind])
    model.set_attn_implementation(attention)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    padded = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, :5], model(IDS[1:, :5]).logits[0], atol=1e-5, rtol=1e-4)


def test_gates_sum_to_one_and_the_chosen_are_scaled():
    for settings in KINDS.values():
        model = mixture(**settings)
        with routing_context() as routing:
            model(IDS)
        for name, routed in routing.layers.items():
            k = model.config.ffn_top_k if name.endswith("mlp") else model.config.attn_top_k or 3
            assert routed.gates.shape == (2, 8, k)
            torch.testing.assert_close(routed.gates.sum(-1), torch.ones(2, 8))
            p = routed.logits.softmax(-1)
            largest = p.topk(k, -1).values
            scaled = largest / largest.sum(-1, keepdim=True)
            torch.testing.assert_close(routed.gates.sort(-1, descending=True).values, scaled)


def test_the_loss_has_the_balance_of_the_ffn_routers_in_training_only():
    model = mixture(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    plain = model(IDS, attention_mask=mask, labels=IDS).loss
    model.train()
    with routing_context() as routing:
        out = model(input_ids=IDS, attention_mask=mask, labels=IDS)
    ffn = [routed for name, routed in routing.layers.items() if name.endswith(".mlp")]
    assert len(ffn) == 2 and len(routing.layers) == 4
    z = [float(routed.logits.detach().logsumexp(-1).square()[mask.bool()].mean()) for routed in ffn]
    expected = (
        sum(0.5 * float(load_balance_loss(r, mask).detach()) + 0.25 * value for r, value in zip(ffn, z, strict=True))
        / 2
    )
    assert out.router_loss.item() == pytest.approx(expected, rel=1e-5)
    assert (out.loss - plain).item() == pytest.approx(expected, rel=1e-4)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    frozen = mixture(router_aux_loss_coef=0.5).train()
    for layer in frozen.model.layers:
        layer.mlp.router.requires_grad_(False)
    frozen(input_ids=IDS, labels=IDS).loss.backward()


def test_the_balance_is_least_when_the_load_is_even():
    even = route(20 * torch.eye(4).repeat(5, 1), 1)
    assert float(load_balance_loss(even)) == pytest.approx(1.0)
    for seed in range(5):
        tilted = route(torch.randn(40, 4, generator=torch.Generator().manual_seed(seed)) + torch.tensor([1.0, 0, 0, 0]))
        chosen = Routed(*route(tilted.logits, 1))
        assert float(load_balance_loss(chosen)) > 1


def test_one_chosen_ffn_still_teaches_its_router():
    """The gate is 1 exactly, and its gradient that of log p."""
    model = mixture(router_aux_loss_coef=0.0)
    with routing_context() as routing:
        model(IDS, labels=IDS).loss.backward()
    assert (routing.layers["layers.0.mlp"].gates == 1).all()
    mlp = model.model.layers[0].mlp
    x = torch.randn(6, 24)
    mlp.router.grad = None
    y = mlp(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    logits = (x @ mlp.router.T).detach().requires_grad_()
    chosen = logits.argmax(-1)
    (logits.log_softmax(-1)[range(6), chosen] * (y * weight).sum(-1).detach()).sum().backward()
    torch.testing.assert_close(mlp.router.grad, logits.grad.T @ x, atol=1e-5, rtol=1e-4)


def test_downriver_trains_with_the_balance():
    tokenizer = small("causal-lm", "nano").processor
    backbone = mixture(vocab_size=260, router_aux_loss_coef=1.0, eos_token_id=2)
    model = Model(backbone, kind="causal-lm", processor=tokenizer, pooling="last", max_length=32)
    rows = Dataset.from_dict({"text": ["the river runs", "to the sea and on", "boats", "go up and down"] * 4})
    task = Task("river", "language-modelling", {"train": rows}, ("text",), None)
    batch = model.collate(task)(list(rows.select(range(4))))
    low = model.eval()(**batch)["loss"]
    extra = backbone.train()(**batch).router_loss.item()
    assert (model.train()(**batch)["loss"] - low).item() == pytest.approx(extra, rel=1e-3)
    tuned = fine_tune(model, task, "6 steps", learning_rate=5e-3, batch_size=8)
    assert float(tuned.eval()(**batch)["loss"]) < float(low)
    again = MixtureForCausalLM.from_pretrained(
        None, config=model.backbone.config, state_dict=model.backbone.state_dict()
    )
    again.gradient_checkpointing_enable()
    again.train()(**batch).loss.backward()  # activations are made again, and routed as before
    reference = model.backbone.train()
    reference.zero_grad()
    reference(**batch).loss.backward()
    torch.testing.assert_close(again.model.layers[0].mlp.router.grad, reference.model.layers[0].mlp.router.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_through_the_auto_classes(kind, tmp_path):
    model = mixture(**KINDS[kind], expert_names=["a", "b", "c"], provenance=[{"model": "x", "fingerprint": "0"}])
    model.save_pretrained(tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is MixtureForCausalLM and again.config.expert_names == ["a", "b", "c"]
    assert again.config.provenance == model.config.provenance and again.config.attention == model.config.attention
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)  # kernels may differ by where memory begins
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "m")) is module.MixtureModel


def test_a_model_of_it_is_saved_and_loaded(tmp_path):
    tokenizer = small("causal-lm", "nano").processor
    backbone = mixture(vocab_size=260, eos_token_id=2)
    Model(backbone, kind="causal-lm", processor=tokenizer, pooling="last", max_length=32).save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.kind == "causal-lm"
    torch.testing.assert_close(again.backbone(IDS).logits, backbone(IDS).logits)


def test_half_precision_routes_in_float32():
    model = mixture().bfloat16()
    with routing_context() as routing:
        logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert all(routed.gates.dtype == torch.float32 for routed in routing.layers.values())


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"ffn_top_k": 2, "sliding_window": 4}, "MixtralForCausalLM"),
        ({"ffn_top_k": 1, "tie_word_embeddings": True}, "MixtralForCausalLM"),
        ({"ffn_top_k": 2, "qk_norm": True}, "Qwen3MoeForCausalLM"),
        ({"qk_norm": True, "attention_bias": True, "output_bias": True}, "Qwen3MoeForCausalLM"),
    ],
    ids=str,
)
def test_exported_to_transformers(settings, kind, tmp_path):
    model = mixture(attention="average", **settings)
    exported = export_mixture(model)
    assert type(exported).__name__ == kind
    torch.testing.assert_close(exported(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    exported.save_pretrained(tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again).__name__ == kind
    torch.testing.assert_close(again(IDS).logits, exported(IDS).logits)


def test_exported_with_its_tokenizer(tmp_path):
    tokenizer = small("causal-lm", "nano").processor
    backbone = mixture(vocab_size=260, attention="average", eos_token_id=2)
    export_mixture(Model(backbone, kind="causal-lm", processor=tokenizer, pooling="last", max_length=32)).save(
        tmp_path / "m"
    )
    assert load(tmp_path / "m").backbone.config.model_type == "mixtral"


def test_what_is_refused():
    for settings, why in [
        ({}, 'build it with attention="average"'),
        ({"attention": "average", "parallel": True}, "a parallel block"),
        ({"attention": "average", "norm": "layer"}, "layer norms"),
        ({"attention": "average", "attention_bias": True}, "biases of queries"),
    ]:
        with pytest.raises(InputError, match=why):
            export_mixture(mixture(**settings))
    with pytest.raises(InputError, match="is no mixture"):
        export_mixture(torch.nn.Linear(2, 2))
    with pytest.raises(Exception, match="attention"):
        MixtureConfig(**SIZES, attention="soft")
    with pytest.raises(InputError, match="top_k is 4"):
        mixture(ffn_top_k=4)(IDS)
