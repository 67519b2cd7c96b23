"""BAM: what a mixture computes at its start, what is written on the way, routers, families, and what is refused."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from torch.nn import functional as F

from downriver.core.errors import InputError
from downriver.merge import Ties, average, bam, bam_tensors, open_store, ties
from downriver.models import load, small
from downriver.models import mixture as module
from downriver.models.mixture import MixtureForCausalLM
from downriver.models.mixture_export import export_mixture
from downriver.models.model import Model
from downriver.nn.moe import route
from downriver.study.compose import load as compose

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [13, 14, 15, 16, 17, 18]])
SMALL = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Llama with biases": {"attention_bias": True},
    "Mistral": {"sliding_window": 3},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8, "attention_bias": True},
    "Cohere": {"logit_scale": 0.25, "attention_bias": True},
}
WIDE = {"rtol": 1e-4, "atol": 1e-5}


def dense(family="Llama", seed=0, **extra):
    torch.manual_seed(seed)
    name = family.split()[0]
    config = getattr(transformers, f"{name}Config")(**SMALL | FAMILIES[family] | extra)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for key, weight in model.named_parameters():
        if "norm" in key or "bias" in key:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return model


def wrapped(backbone, source="x"):
    tokenizer = small("causal-lm", "nano").processor
    settings = {"processor": tokenizer, "pooling": "last", "source": source, "max_length": 32}
    return Model(backbone, kind="causal-lm", **settings)


def one_hot(monkeypatch, expert):
    """Every router sends everything to one expert."""

    def routed(logits, top_k=None):
        return route(torch.full_like(logits, -1e4).index_fill(-1, torch.tensor(expert), 1e4), top_k)

    monkeypatch.setattr(module, "route", routed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["experts", "kv_shared", "average"])
def test_equal_experts_are_the_dense_model_for_any_router(family, attention):
    model = dense(family)
    for ffn_top_k, attn_top_k in ((1, None), (2, 1), (3, 2)):
        settings = {"ffn_top_k": ffn_top_k, "attn_top_k": None if attention == "average" else attn_top_k}
        mixture = bam([model] * 3, model, attention=attention, router_std=3.0, **settings)
        torch.testing.assert_close(mixture(IDS).logits, model(IDS).logits, **WIDE)
        assert not mixture.training and mixture.config.parallel == (family == "Cohere")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_that_expert(family):
    base, other = dense(family), dense(family, 1)
    torch.testing.assert_close(bam([other], base)(IDS).logits, other(IDS).logits, **WIDE)
    assert not torch.allclose(base(IDS).logits, other(IDS).logits, atol=0.1)


def shared_parts_averaged(models, which, shared):
    """Dense model number ``which`` with the named parts as means over all the models."""
    mixed = copy.deepcopy(models[which])
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, value in mixed.state_dict().items():
            if any(part in name for part in shared):
                value.copy_(torch.stack([state[name] for state in states]).double().mean(0))
    return mixed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["experts", "kv_shared", "average"])
def test_a_one_hot_router_gives_one_dense_model(family, attention, monkeypatch):
    """Its attention and its FFN; embeddings, norms of the stream and what experts share are means."""
    models = [dense(family, seed) for seed in range(3)]
    shared = ["embed_tokens", "layernorm", "model.norm", "lm_head"]
    shared += {"experts": [], "kv_shared": ["k_proj", "v_proj", "k_norm"], "average": ["self_attn"]}[attention]
    one_hot(monkeypatch, 1)
    mixture = bam(models, models[0], attention=attention)
    expected = shared_parts_averaged(models, 1, shared)(IDS).logits
    torch.testing.assert_close(mixture(IDS).logits, expected, **WIDE)
    assert not torch.allclose(expected, models[1](IDS).logits, atol=1e-2)


def test_shared_keys_are_the_same_when_keys_and_values_are():
    base = dense()
    models = []
    for seed in range(3):
        other = dense(seed=seed)
        for i, layer in enumerate(other.model.layers):
            for part in ("k_proj", "v_proj"):
                getattr(layer.self_attn, part).load_state_dict(
                    getattr(base.model.layers[i].self_attn, part).state_dict()
                )
        models.append(other)
    whole, shared = (bam(models, base, attention=kind, router_std=2.0) for kind in ("experts", "kv_shared"))
    torch.testing.assert_close(shared(IDS).logits, whole(IDS).logits, **WIDE)
    cached = [m(IDS, use_cache=True).past_key_values.layers[0].keys.shape[1] for m in (base, shared, whole)]
    assert cached == [2, 2, 6]


def test_soft_attention_is_the_gated_sum_of_the_dense_attentions():
    models = [dense(seed=seed) for seed in range(2)]
    mixture = bam(models, models[0], router_std=1.0)
    x = torch.randn(2, 6, 16)
    layer = mixture.model.layers[1].self_attn
    position = mixture.model.rotary_emb(x, torch.arange(6)[None])
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    gates = F.softmax(x @ layer.router.T, -1)
    parts = [m.model.layers[1].self_attn(x, position_embeddings=position, attention_mask=mask)[0] for m in models]
    expected = sum(gates[..., n, None] * part for n, part in enumerate(parts))
    torch.testing.assert_close(layer(x, position, mask)[0], expected, **WIDE)


def test_branch_train_mix_is_mixtral(tmp_path):
    """Built on its own from the dense weights, without the export."""
    models = [dense(seed=seed, tie_word_embeddings=False) for seed in range(3)]
    mixture = bam(models, models[0], attention="average", ffn_top_k=2, router_std=1.0)
    moe = {"num_local_experts": 3, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6}
    config = transformers.MixtralConfig(**SMALL, **moe, rope_parameters=models[0].config.rope_parameters)
    reference = transformers.MixtralForCausalLM(config).eval()
    mean = average(models, models[0]).state_dict()
    state = {name: value for name, value in mean.items() if ".mlp." not in name}
    for i in range(2):
        parts = [m.model.layers[i].mlp for m in models]
        to = f"model.layers.{i}.mlp"
        state[f"{to}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([p.gate_proj.weight, p.up_proj.weight]) for p in parts]
        )
        state[f"{to}.experts.down_proj"] = torch.stack([p.down_proj.weight for p in parts])
        state[f"{to}.gate.weight"] = mixture.model.layers[i].mlp.router
    reference.load_state_dict(state)
    torch.testing.assert_close(mixture(IDS).logits, reference(IDS).logits, **WIDE)
    torch.testing.assert_close(export_mixture(mixture)(IDS).logits, reference(IDS).logits)


def test_copies_of_the_base_and_other_ways_to_share():
    base, one, two = (dense(seed=seed) for seed in range(3))
    sparse = bam([one, two], base, attention="average", ffn="copy")
    gate = base.model.layers[0].mlp.gate_proj.weight
    assert all(torch.equal(part[:24], gate) for part in sparse.model.layers[0].mlp.gate_up)
    kept = bam([one, two], base, others="seed")
    assert torch.equal(kept.model.embed_tokens.weight, base.model.embed_tokens.weight)
    elected = bam([one, two], base, attention="average", others=Ties(density=0.3))
    rule = {"density": 0.3, "exclude": r"\.mlp\."}
    expected = ties([one, two], base, **rule).state_dict()
    found = elected.model.layers[0].self_attn
    assert torch.equal(found.q_proj.weight, expected["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(found.o_proj.T, expected["model.layers.0.self_attn.o_proj.weight"])


def test_routers_at_the_start():
    models = [dense(seed=seed) for seed in range(3)]
    zero = bam(models, models[0], router_init="zero")
    assert not zero.model.layers[0].mlp.router.any() and not zero.model.layers[1].self_attn.router.any()
    first, again, other = (bam(models, models[0], seed=seed).model.layers[0].mlp.router for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    wide = bam(models, models[0], router_std=5.0).model.layers[1].self_attn.router
    assert 3 < wide.std() < 7


def test_routers_from_texts_send_domains_to_their_experts():
    texts = [["aaaa abab", "bbab aab"], ["1234 5678", "99 100 31"], ["(x, y)[z]", "{(a)}"]]
    base = wrapped(dense())
    models = [base] * 3
    for init in ("prompts", "domain_centroids"):
        mixture = bam(models, base, router_init=init, texts=texts)
        for layer in mixture.backbone.model.layers:
            for part in (layer.mlp, layer.self_attn):
                torch.testing.assert_close(part.router.norm(dim=-1), torch.ones(3))
    caught = []
    mlp = mixture.backbone.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda m, arguments: caught.append(arguments[0]))
    own = [["baba", "abba ab"], ["271 828", "31 415"], ["[(k)]", "(q){r}"]]
    for n, held in enumerate(own):
        ids = base.processor(held[0], return_tensors="pt")["input_ids"]
        mixture.backbone(ids)
        assert int((caught.pop() @ mlp.router.T).mean((0, 1)).argmax()) == n
    with pytest.raises(InputError, match="need a tokenizer"):
        bam([dense()] * 3, dense(), router_init="prompts", texts=texts)


@pytest.mark.parametrize("family", ["Llama", "Cohere"])
def test_a_folder_is_written_piece_by_piece(family, tmp_path):
    """The same weights as in memory; loaded with its tokenizer by downriver and by transformers."""
    folders, models = [], []
    for seed in range(3):
        models.append(wrapped(dense(family, seed)))
        models[-1].save(tmp_path / f"m{seed}")
        folders.append(tmp_path / f"m{seed}")
    settings = {"attention": "kv_shared", "others": Ties(density=0.4), "balance": 0.02}
    out = bam(folders[1:], folders[0], out=tmp_path / "out", **settings)
    assert out == tmp_path / "out"
    assert not [p for p in out.iterdir() if p.is_dir()] and len(list(tmp_path.iterdir())) == 4
    loaded = load(out)
    memory = bam(models[1:], models[0], **settings)
    assert type(loaded.backbone) is MixtureForCausalLM and loaded.processor.get_vocab() == memory.processor.get_vocab()
    state = memory.backbone.state_dict()
    for name, value in loaded.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    config = json.loads((out / "config.json").read_text())
    assert config["expert_names"] == ["m1", "m2"] and config["router_aux_loss_coef"] == 0.02
    assert [entry["model"] for entry in config["provenance"]] == [str(folder) for folder in folders]
    assert config["provenance"][0]["fingerprint"] == open_store(folders[0]).fingerprint()
    with pytest.raises(InputError, match="exists already"):
        bam(folders[1:], folders[0], out=out)
    again = bam([models[1], folders[2]], str(folders[0]), out=out, overwrite=True, router_init="prompts",
                texts=[["a"], ["b"]])  # fmt: skip
    assert again == str(out)
    memory.save(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(load(tmp_path / "saved").backbone(ids).logits, memory.eval().backbone(ids).logits)


def test_what_is_read_at_once_stays_small(tmp_path, monkeypatch):
    """Never two tensors of models at a time, and no more than one projection of one model."""
    for seed in range(3):
        dense(seed=seed).save_pretrained(tmp_path / f"m{seed}")
    read = []
    original = bam_tensors.Store.read

    def spied(self, name, start, stop):
        read.append((name, stop - start))
        return original(self, name, start, stop)

    monkeypatch.setattr(bam_tensors.Store, "read", spied)
    monkeypatch.setattr(bam_tensors, "_BLOCK", 100)
    folders = [tmp_path / f"m{seed}" for seed in range(3)]
    bam(folders, folders[0], out=tmp_path / "out", others="seed")
    largest = {name: max(size for other, size in read if other == name) for name, _ in read}
    assert all(size <= 256 for name, size in largest.items() if "self_attn" in name)
    assert all(size <= 100 for name, size in largest.items() if ".mlp." in name)


PEAK = """
import re, sys
from pathlib import Path
from downriver.merge import bam

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path(sys.argv[1])
warm = [folder / "tiny"] * 2
bam(warm, warm[0], out=folder / "warm")
before = peak()
models = [folder / f"m{n}" for n in range(3)]
bam(models, models[0], out=folder / "out")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_is_below_two_models(tmp_path):
    dense().save_pretrained(tmp_path / "tiny")
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 2000}
    for n in range(3):
        model = dense(seed=n, **large)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(tmp_path / f"m{n}")
        del model
    run = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert written > 2.8 * size
    assert int(run.stdout) < 2 * size


def test_adapters_and_types(tmp_path):
    import peft

    base = dense(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    tuned.save_pretrained(tmp_path / "adapter")
    pair = (tmp_path / "base", tmp_path / "adapter")
    out = bam([tmp_path / "base", pair], tmp_path / "base", out=tmp_path / "out")
    mixture = transformers.AutoModelForCausalLM.from_pretrained(out)
    merged = copy.deepcopy(tuned).merge_and_unload()
    down = mixture.model.layers[1].mlp.down
    assert torch.equal(down[0], base.model.layers[1].mlp.down_proj.weight)
    torch.testing.assert_close(down[1], merged.model.layers[1].mlp.down_proj.weight)
    in_memory = bam([base, tuned], base)
    torch.testing.assert_close(in_memory(IDS).logits, mixture(IDS).logits, **WIDE)
    half = bam([base, merged], copy.deepcopy(base).bfloat16())
    assert half.dtype == torch.bfloat16 and half.config.dtype == torch.bfloat16


def test_parallel_blocks_of_a_sequential_seed_are_warned_of():
    model = dense()
    with pytest.warns(UserWarning, match="trained with sequential blocks"):
        mixture = bam([model] * 2, model, parallel=True)
    assert mixture.config.parallel and not torch.allclose(mixture(IDS).logits, model(IDS).logits, atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bam([model] * 2, model, parallel=False)


def test_generating_with_a_cache_equals_the_whole_pass():
    models = [wrapped(dense(seed=seed)) for seed in range(3)]
    mixture = bam(models, models[0], router_std=1.0, ffn_top_k=2).backbone
    out = mixture.generate(IDS, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = mixture(out.sequences).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, : len(out.logits)], **WIDE)


def test_what_is_refused(tmp_path):
    model = dense()
    for settings, why in [
        ({"attention": "soft"}, "unknown bam: attention 'soft'"),
        ({"ffn": "copies"}, "unknown bam: ffn"),
        ({"router_init": "random"}, "unknown bam: router_init"),
        ({"others": "ties"}, "mean, seed or a merging method"),
        ({"ffn_top_k": 3}, "ffn_top_k is 3: 1 to 2"),
        ({"attn_top_k": 3}, "attn_top_k is 3"),
        ({"attention": "average", "attn_top_k": 1}, "several attentions"),
        ({"router_std": 0.0}, "a positive number"),
        ({"router_init": "prompts"}, "need texts"),
        ({"texts": [["a"], ["b"]]}, "no others, need texts"),
        ({"router_init": "prompts", "texts": [["a"]]}, "1 entries for 2 experts"),
        ({"expert_names": ["a"]}, "1 expert_names for 2 models"),
        ({"out": tmp_path / "out"}, "for a base on disk"),
    ]:
        with pytest.raises(InputError, match=why):
            bam([model, model], model, **settings)
    with pytest.raises(InputError, match="no models"):
        bam([], model)
    with pytest.raises(InputError, match="a whole causal language model is expected"):
        bam([model], model.model)
    with pytest.raises(InputError, match=r"gate_proj.weight \(24, 16\) / \(32, 16\)"):
        bam([dense(intermediate_size=32)], model)
    with pytest.raises(InputError, match="num_key_value_heads is 4, and 2"):
        bam([dense(num_key_value_heads=4)], model)
    with pytest.raises(InputError, match="model_type is 'mistral', and 'llama'"):
        bam([dense("Mistral", tie_word_embeddings=True)], model)
    with pytest.raises(InputError, match="unknown family to upcycle 'gpt2'"):
        tiny = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        gpt = transformers.GPT2LMHeadModel(tiny)
        bam([gpt], gpt)
    with pytest.raises(InputError, match="without biases are expected"):
        biased = dense(mlp_bias=True)
        bam([biased], biased)
    with pytest.raises(InputError, match="norms of whole heads"):
        normed = dense("Cohere", use_qk_norm=True)
        bam([normed], normed)
    with pytest.raises(InputError, match="windows in some layers only"):
        some = dense("Qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)
        bam([some], some)
    with pytest.raises(InputError, match="is a text-encoder model"):
        bam([model], small("text-encoder", "nano"))
    with pytest.raises(InputError, match="has no configuration"):
        bam([model.state_dict()], model)
    with pytest.raises(InputError, match="a Model, a transformers module or a folder"):
        bam([model], model.state_dict())
    other = wrapped(dense())
    other.processor = copy.deepcopy(other.processor)
    other.processor.add_tokens(["river"])
    with pytest.raises(InputError, match="another vocabulary than the base"):
        bam([other], wrapped(model))
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="name the folder to be written"):
        bam([model], tmp_path / "m")
    with pytest.raises(InputError, match="other tensors than the base"):
        bam([dense(intermediate_size=32)], tmp_path / "m", out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_in_a_study(tmp_path):
    """Two arms tuned apart, made one mixture, which is then trained."""
    for name in ("train", "test"):
        lines = [json.dumps({"text": f"the river number {i} runs to the {name}"}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    study = compose(
        {
            "name": "mixture",
            "model": "small:causal-lm:nano:0",
            "task": {**files, "text": "text", "kind": "language-modelling"},
            "budget": "64 examples",
            "seeds": 1,
            "arms": {
                "one": {"adapt": {"method": "full", "seed": 1}},
                "two": {"adapt": {"method": "full", "seed": 2}},
                "mixed": {"merge": {"method": "bam", "models": ["one", "two"], "attention": "kv_shared"}},
                "trained": [{"from": "mixed"}, {"adapt": {"method": "full", "learning_rate": 1e-3}}],
            },
        }
    )
    result = study.run(tmp_path / "runs", executor="serial", progress=False)
    assert not result.failures, result.failures
    losses = {a: v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows() if m == "loss"}
    assert losses["trained"] < losses["mixed"]
