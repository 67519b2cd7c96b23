"""Editing: rank-one identities, the clamp, the denominator that vanishes, undo, and every family of models."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn

from downriver.adapt import apply_edit, key_covariance, recalls
from downriver.adapt.edit import Ft, Memit, Rome, UnstableEdit, projections
from downriver.adapt.edit.projections import projection
from downriver.adapt.edit.requests import Fact, encode, parse, start_ids
from downriver.adapt.edit.rome import rank_one
from downriver.adapt.edit.values import optimise, read, templates
from downriver.core.errors import DownriverError, InputError
from downriver.models import Model, small
from downriver.models.tokenizers import byte_tokenizer

REQUEST = {"prompt": "{} runs to the", "subject": "The Elbe", "target_new": "sea"}
OTHER = {"prompt": "the mill at {} belongs to", "subject": "Ulm", "target_new": "Ann"}
CONTEXTS = ["It rains. {}", "We know that {}", "As they say, {}"]
FREE = {"decay": 0.0, "clamp": 1e6}  # fresh models have tiny values, which decay and clamp are relative to
WRITTEN = "model.layers.0.mlp.down_proj.weight"
TARGET = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def lm() -> Model:
    return small("causal-lm", "nano", seed=1)


RIVERS = {"Elbe": "H", "Ulm": "B", "Oder": "S", "Isar": "L", "Main": "R", "Spree": "P", "Lahn": "K", "Ruhr": "D"}


def fact(river: str, target: str) -> dict[str, str]:
    return {"prompt": "mouth of {}", "subject": river, "target_new": target}


EASY, ALSO = fact("Elbe", "K"), fact("Isar", "D")
REST = [fact(river, target) for river, target in RIVERS.items() if river not in ("Elbe", "Isar")]


@pytest.fixture(scope="session")
def learnt() -> Model:
    """A small model, one token a word, that knows where eight rivers end, early and late in a text."""
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "<unk>", ".", "mouth", "of", *RIVERS, *sorted(RIVERS.values())]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    net: Any = transformers.LlamaForCausalLM(config)
    lm = Model(net, kind="causal-lm", processor=tokenizer, max_length=64)
    rng = np.random.default_rng(0)
    optimiser = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for _ in range(120):
        rivers = rng.choice(list(RIVERS), size=(16, 4))
        texts = [" . ".join(f"mouth of {river} {RIVERS[river]}" for river in row) for row in rivers]
        batch = tokenizer(texts, return_tensors="pt")["input_ids"]
        optimiser.zero_grad()
        net(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    lm.zero_grad(set_to_none=True)
    assert recalls(lm, [fact(river, target) for river, target in RIVERS.items()]).all()
    return lm


@pytest.fixture
def taught(learnt) -> Model:
    return copy.deepcopy(learnt)


AROUND = [f"mouth of {river} {RIVERS[river]} . {{}}" for river in ("Oder", "Ruhr", "Lahn", "Main")]


def gpt2(layers: int = 2) -> Model:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=260, n_positions=128, n_embd=32, n_layer=layers, n_head=2)
    return Model(transformers.GPT2LMHeadModel(config), kind="causal-lm", processor=byte_tokenizer(128), max_length=128)


def neox() -> Model:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    return Model(
        transformers.GPTNeoXForCausalLM(config), kind="causal-lm", processor=byte_tokenizer(128), max_length=128
    )


def gptj() -> Model:
    torch.manual_seed(0)
    config = transformers.GPTJConfig(vocab_size=260, n_positions=128, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)
    return Model(transformers.GPTJForCausalLM(config), kind="causal-lm", processor=byte_tokenizer(128), max_length=128)


FAMILIES = {"llama": lambda: small("causal-lm", "nano", seed=1), "gpt2": gpt2, "neox": neox, "gptj": gptj}


def keys_values(lm: Model, request: dict, layer: int, contexts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    [fact] = parse([request])
    batch = encode(lm, [fact.within(c) for c in ["{}", *contexts]], with_target=False)
    return read(lm, batch, projection(lm.backbone, layer).module)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["rome", "c_rome"])
def test_the_change_has_rank_one_and_its_key_gives_the_new_value(family, method):
    lm = FAMILIES[family]()
    keys, values = keys_values(lm, REQUEST, 1, CONTEXTS)
    [fact] = parse([REQUEST])
    at = projection(lm.backbone, 1)
    value = optimise(lm, fact, at.module, ["{}", *CONTEXTS], Rome(layer=1))
    wanted = (value.v0 + value.delta).double()
    result = apply_edit(lm, [REQUEST], method, Rome(layer=1, contexts=CONTEXTS, smallest=0.0))
    [(name, delta)] = result.deltas.items()
    assert name == f"{at.name}.weight" and delta.shape == at.weight.shape
    singular = torch.linalg.svdvals(delta)
    assert singular[0] > 0 and singular[1] < 1e-4 * singular[0]

    def output(key: torch.Tensor) -> torch.Tensor:
        return at.module(key.float()).double()

    mean = keys.mean(dim=0)
    own, foreign = (mean, keys[0]) if method == "c_rome" else (keys[0], mean)
    assert (output(own) - wanted).norm() < 1e-4 * wanted.norm()
    assert (output(foreign) - wanted).norm() > 1e-3 * wanted.norm()
    u = mean / mean.norm()
    assert result.denominators == pytest.approx([float(own @ u)], rel=1e-5)
    assert torch.allclose(values[0].float(), value.v0, atol=1e-5)


@pytest.mark.parametrize("method", ["rome", "c_rome", "ft", "memit"])
def test_an_edit_takes_keeps_the_rest_and_is_undone_bit_for_bit(taught, method):
    before = {name: tensor.clone() for name, tensor in taught.state_dict().items()}
    settings = {
        "ft": Ft(layer=0, epsilon=None, learning_rate=5e-3),
        "memit": Memit(
            layers=[0], covariance=key_covariance(taught, [0], AROUND), weight=0.1, contexts=AROUND, clamp=4.0
        ),
    }.get(method, Rome(layer=0, contexts=AROUND))
    assert not recalls(taught, [EASY])[0]
    result = apply_edit(taught, [EASY], method, settings)
    assert result.efficacy == 1.0 and recalls(taught, [EASY])[0]
    assert recalls(taught, REST).mean() >= 0.5
    changed = [name for name, tensor in taught.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"backbone.{WRITTEN}"] and list(result.deltas) == [WRITTEN]
    assert torch.allclose(before[changed[0]] + result.deltas[WRITTEN], taught.state_dict()[changed[0]], atol=1e-6)
    assert len(result.loss) == 1 and len(result.denominators) == (1 if "rome" in method else 0)
    result.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in taught.state_dict().items())
    with pytest.raises(DownriverError, match="or the edit undone"):
        result.undo()


def test_edits_are_undone_last_first(lm):
    first = apply_edit(lm, [REQUEST], "ft", Ft(layer=1))
    second = apply_edit(lm, [OTHER], "ft", Ft(layer=1))
    with pytest.raises(DownriverError, match="changed after this edit"):
        first.undo()
    second.undo()
    first.undo()


@pytest.mark.parametrize("epsilon", [1e-4, 5e-4])
def test_fine_tuning_stays_within_epsilon(epsilon):
    model = gpt2()
    result = apply_edit(model, [REQUEST, OTHER], "ft", Ft(layer=0, epsilon=epsilon, learning_rate=1e-2))
    assert set(result.deltas) == {"transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj.bias"}
    largest = max(delta.abs().max().item() for delta in result.deltas.values())
    assert 0.9 * epsilon < largest < 1.01 * epsilon + 1e-8


def test_fine_tuning_stops_when_the_loss_is_small(taught):
    loose = Ft(layer=0, epsilon=None, learning_rate=5e-3, steps=300)
    assert apply_edit(taught, [EASY], "ft", loose).loss[0] < 1e-2
    assert apply_edit(taught, [EASY], "ft", loose).deltas[WRITTEN].abs().max() == 0  # nothing left to do


def test_a_vanishing_denominator_lets_the_update_explode():
    mean, residual = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.3, -0.4])
    u = mean / mean.norm()
    norms = [rank_one(u, torch.tensor([share, 1.0, 0.0]), residual).norm().item() for share in (1.0, 1e-2, 1e-4)]
    assert norms == pytest.approx([0.5, 50.0, 5000.0], rel=1e-5)
    assert rank_one(u, mean, residual).norm().item() == pytest.approx(0.5)  # consistent: the key is the mean itself


def first_token_model() -> Model:
    """GPT-2 whose first position gets a key that hardly overlaps with that of any other position."""
    model = gpt2(layers=1)
    tokenizer = byte_tokenizer(128)
    tokenizer.backend_tokenizer.post_processor = None  # no start token, as GPT-2: the subject may come first
    model.processor = tokenizer
    net = model.backbone.transformer
    with torch.no_grad():
        net.wpe.weight[:, 0] = -5.0
        net.wpe.weight[0, 0] = 5.0
        c_fc = net.h[0].mlp.c_fc
        c_fc.weight.mul_(0.05)
        c_fc.weight[0, :64], c_fc.weight[0, 64:] = 1.0, -1.0  # half of the units see position 0, half the others
        c_fc.bias.zero_()
        net.h[0].attn.c_proj.weight.zero_()
    return model


def test_the_denominator_is_checked_before_anything_is_written():
    model = first_token_model()
    request = {"prompt": "{} = ", "subject": "A", "target_new": "b"}
    contexts = [f"{word}. {{}}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")] * 3
    keys, _ = keys_values(model, request, 0, contexts)
    assert torch.cosine_similarity(keys[0], keys[1:].mean(dim=0), dim=0) < 0.05
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnstableEdit, match=r"'A': .*nothing was written.*c_rome"):
        apply_edit(model, [request], "rome", Rome(layer=0, contexts=contexts))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    consistent = apply_edit(model, [request], "c_rome", Rome(layer=0, contexts=contexts, **FREE))
    bounded = consistent.deltas["transformer.h.0.mlp.c_proj.weight"].norm()
    consistent.undo()
    exploded = apply_edit(model, [request], "rome", Rome(layer=0, contexts=contexts, smallest=0.0, **FREE))
    assert exploded.deltas["transformer.h.0.mlp.c_proj.weight"].norm() > 5 * bounded
    assert abs(exploded.denominators[0]) < 0.1 * abs(consistent.denominators[0])


def test_a_request_that_fails_takes_the_earlier_ones_back():
    model = first_token_model()
    before = model.state_dict()["backbone.transformer.h.0.mlp.c_proj.weight"].clone()
    contexts = [f"{word}. {{}}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")] * 3
    fine = {"prompt": "so {} = ", "subject": "A", "target_new": "b"}
    with pytest.raises(UnstableEdit):
        apply_edit(model, [fine, {**fine, "prompt": "{} = "}], "rome", Rome(layer=0, contexts=contexts))
    assert torch.equal(before, model.state_dict()["backbone.transformer.h.0.mlp.c_proj.weight"])


def test_the_covariance_is_the_mean_of_k_kt(lm, tmp_path, monkeypatch):
    texts = ["a river", "the mill turns by the water"]
    found = key_covariance(lm, [0, "model.layers.1.mlp.down_proj"], texts, batch_size=1)
    assert list(found) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    keys = []
    handle = lm.backbone.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: keys.append(x[0][0]))
    with torch.no_grad():
        for text in texts:
            ids = lm.processor(text)["input_ids"][:-1]  # begins as the tokenizer begins a text, without its end
            lm.backbone(input_ids=torch.tensor([ids]))
    handle.remove()
    k = torch.cat(keys)
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], k.T @ k / len(k), atol=1e-7)
    together = key_covariance(lm, [1], texts, batch_size=2)
    assert torch.allclose(together["model.layers.1.mlp.down_proj"], k.T @ k / len(k), atol=1e-7)  # padding is masked

    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path))
    cached = key_covariance(lm, [1], texts, cache=True)
    [file] = tmp_path.rglob("*.safetensors")
    stamp = file.stat().st_mtime_ns
    again = key_covariance(lm, [1], texts, cache=True)
    assert torch.equal(*(c["model.layers.1.mlp.down_proj"] for c in (cached, again)))
    assert file.stat().st_mtime_ns == stamp
    with torch.no_grad():
        lm.backbone.model.norm.weight.mul_(2)
    key_covariance(lm, [1], texts, cache=True)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # other weights, other statistics


def covariance(lm: Model, layers: list[int]) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return key_covariance(lm, layers, ["".join(map(chr, rng.integers(32, 127, 60))) for _ in range(40)])


def test_rome_with_a_covariance_moves_along_c_inverse_k(lm):
    C = covariance(lm, [1])
    keys, _ = keys_values(lm, REQUEST, 1, CONTEXTS)
    result = apply_edit(lm, [REQUEST], "c_rome", Rome(layer=1, contexts=CONTEXTS, covariance=C))
    u = torch.linalg.solve(C["model.layers.1.mlp.down_proj"].double(), keys.mean(dim=0))
    row = result.deltas[TARGET].double()[0]
    assert torch.cosine_similarity(row, u, dim=0).abs() > 1 - 1e-6
    assert torch.cosine_similarity(row, keys.mean(dim=0), dim=0).abs() < 0.999


def test_memit_agrees_with_least_squares(lm):
    """With one layer, ΔW minimises ‖(W + ΔW)K − Z‖² + λ tr(ΔW C ΔWᵀ)."""
    C = covariance(lm, [1])
    settings = Memit(layers=[1], covariance=C, weight=1e-4, contexts=CONTEXTS, **FREE)
    facts = parse([EASY, ALSO])
    at, K = projection(lm.backbone, 1), []
    for request in (EASY, ALSO):
        keys, _ = keys_values(lm, request, 1, CONTEXTS)
        K.append((keys[0] + keys[1:].mean(dim=0)) / 2)
    K = torch.stack(K, dim=1)
    wanted = [optimise(lm, fact, at.block, ["{}", *CONTEXTS], settings).delta.double() for fact in facts]
    result = apply_edit(lm, [EASY, ALSO], "memit", settings)
    delta = result.deltas[TARGET].double().requires_grad_()
    R = torch.stack(wanted, dim=1)
    objective = ((delta @ K - R) ** 2).sum() + 1e-4 * (delta @ C[at.name].double() @ delta.T).trace()
    (gradient,) = torch.autograd.grad(objective, delta)
    assert gradient.norm() < 1e-3 * (2 * R @ K.T).norm()
    assert torch.linalg.matrix_rank(result.deltas[TARGET], rtol=1e-4) == 2
    assert result.denominators == () and len(result.loss) == 2


def test_memit_spreads_over_layers_and_keeps_more_with_more_weight(lm):
    C = covariance(lm, [0, 1])
    norms = {}
    for weight in (1e-4, 1e5):
        settings = Memit(layers=[0, 1], covariance=C, weight=weight, contexts=CONTEXTS)
        result = apply_edit(lm, [REQUEST, OTHER], "memit", settings)
        norms[weight] = [delta.norm().item() for delta in result.deltas.values()]
        result.undo()
    assert len(norms[1e-4]) == 2 and min(norms[1e-4]) > 0
    assert all(strong < 0.5 * weak for weak, strong in zip(norms[1e-4], norms[1e5], strict=True))


def test_the_value_is_clamped(taught):
    [fact] = parse([EASY])
    at = projection(taught.backbone, 0)
    value = optimise(taught, fact, at.module, ["{}"], Rome(layer=0, clamp=0.5))
    assert value.delta.norm() <= 0.5 * value.v0.norm() * (1 + 1e-5)
    free = optimise(taught, fact, at.module, ["{}"], Rome(layer=0, **FREE))
    assert free.delta.norm() > value.v0.norm() and free.loss < value.loss


def test_subject_and_target_are_found_by_offsets(lm):
    facts = [Fact("é ", "Elbe", " runs to", " the sea"), Fact("", "Ulm", "", " on")]
    batch = encode(lm, facts)
    for row, fact in enumerate(facts):
        ids = batch.ids[row]
        text = fact.before + fact.subject
        assert lm.processor.decode(ids[1 : int(batch.subject[row]) + 1]) == text
        assert lm.processor.decode(ids[batch.target[row]]) == fact.target
    assert start_ids(lm.processor) == [1] and batch.ids[:, 0].tolist() == [1, 1]
    assert batch.mask.sum(dim=1).tolist() == [
        1 + len(f"{f.before}{f.subject}{f.after}{f.target}".encode()) for f in facts
    ]


def test_a_subject_in_the_prompt_is_its_own_mark():
    named = {"prompt": "In The Elbe we swim to the", "subject": "The Elbe", "target_new": " sea"}
    assert parse([named]) == parse([{**named, "prompt": "In {} we swim to the", "target_new": "sea"}])
    braces = parse([{"prompt": "{} is {x} of", "subject": "A", "target_new": "b"}])
    assert braces == [Fact("", "A", " is {x} of", " b")]


def test_contexts_that_the_model_writes(lm):
    written = templates(lm, None, ((5, 10), (10, 10)), seed=0)
    assert len(written) == 21 and written[0] == "{}" and all(c.endswith(". {}") for c in written[1:])
    assert written == templates(lm, None, ((5, 10), (10, 10)), seed=0)
    assert written != templates(lm, None, ((5, 10), (10, 10)), seed=1)
    assert sum(c.startswith("The") for c in written) >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_by_number_and_name(family):
    backbone = FAMILIES[family]().backbone
    found = projections(backbone)
    assert [p.number for p in found] == [0, 1]
    assert projection(backbone, found[1].name).module is projection(backbone, 1).module
    x = torch.rand(3, found[0].width)
    change = torch.rand(32, found[0].width)
    old = found[0].module(x)
    found[0].add(change)
    assert torch.allclose(found[0].module(x) - old, x @ change.T, atol=1e-4)
    with pytest.raises(InputError, match=rf"layer 7 has no MLP projection: one of 0 \({found[0].name}\), 1"):
        projection(backbone, 7)
    with pytest.raises(InputError, match=f"did you mean '{found[1].name}'"):
        projection(backbone, found[1].name + "s")


def test_the_mode_and_the_gradients_asked_for_stay(lm):
    lm.train()
    lm.backbone.model.embed_tokens.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in lm.named_parameters()}
    for method, settings in (("ft", {"layer": 1}), ("c_rome", {"layer": 1, "contexts": [], "steps": 2})):
        apply_edit(lm, [REQUEST], method, settings)
        assert lm.training and asked == {name: p.requires_grad for name, p in lm.named_parameters()}
        assert all(p.grad is None for p in lm.parameters())


def test_a_plain_transformers_model(lm):
    twin = small("causal-lm", "nano", seed=1)
    mine = apply_edit(lm, [REQUEST], "c_rome", {"layer": 1, "contexts": CONTEXTS})
    plain = apply_edit(twin.backbone, [REQUEST], "c_rome", {"layer": 1, "contexts": CONTEXTS}, tokenizer=twin.processor)
    assert torch.equal(mine.deltas[TARGET], plain.deltas[TARGET])


def test_bfloat16_weights_are_edited_and_undone(lm):
    lm = lm.to(torch.bfloat16)
    before = lm.backbone.model.layers[1].mlp.down_proj.weight.detach().clone()
    result = apply_edit(lm, [REQUEST], "c_rome", Rome(layer=1, contexts=CONTEXTS, clamp=100.0))
    assert before.dtype == torch.bfloat16 and result.deltas[TARGET].abs().max() > 0
    result.undo()
    assert torch.equal(before, lm.backbone.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"subject": "The Rhine", "prompt": "the river runs"}, "subject 'The Rhine' is not in the prompt"),
        ({"subject": " "}, "subject ' ' is not in the prompt"),
        ({"target_new": " "}, "target ' ' gives no token"),
        ({"target_new": None}, "no text 'target_new'"),
        ({"prompt": "{} " + "long " * 50}, "tokens, the model takes 128"),
    ],
)
def test_bad_requests(lm, request_, words):
    before = lm.backbone.model.layers[1].mlp.down_proj.weight.detach().clone()
    with pytest.raises(InputError, match=words):
        apply_edit(lm, [REQUEST, {**REQUEST, **request_}], "c_rome", {"layer": 1, "contexts": CONTEXTS})
    assert torch.equal(before, lm.backbone.model.layers[1].mlp.down_proj.weight)


def test_bad_settings(lm):
    C = covariance(lm, [1])
    for method, settings, words in (
        ("mend", {"layer": 1}, "unknown editing method 'mend'"),
        ("rome", None, r"needs hparams with a layer.*model\.layers\.0"),
        ("rome", {"layr": 1}, "did you mean 'layer'"),
        ("rome", {"layer": 9}, "layer 9 has no MLP projection"),
        ("rome", {"layer": 1, "contexts": ["no mark"]}, "a text with one {}"),
        ("rome", Ft(layer=1), "takes hparams of type Rome"),
        ("rome", {"layer": 0, "contexts": [], "covariance": C}, "covariance has none of model.layers.0"),
        ("c_rome", {"layer": 1, "contexts": [], "covariance": {k: v[:3] for k, v in C.items()}}, r"shape \(3, 128\)"),
        ("c_rome", {"layer": 1, "contexts": [], "covariance": {k: v * 0 for k, v in C.items()}}, "is singular"),
        ("memit", {"layers": [1]}, "needs the parameter 'covariance'"),
        ("memit", {"layers": [], "covariance": C}, "at least one layer"),
        ("ft", {"layer": 1, "epsilon": 0}, "epsilon is 0"),
        ("ft", {"layer": 1, "steps": 0}, "at least one step"),
    ):
        with pytest.raises(InputError, match=words):
            apply_edit(lm, [REQUEST], method, settings)
    for requests in ([], REQUEST):
        with pytest.raises(InputError, match="a list of at least one request"):
            apply_edit(lm, requests, "ft", {"layer": 1})
    with pytest.raises(InputError, match="fast tokenizer"):
        start_ids(SimpleNamespace(is_fast=False))
    with pytest.raises(InputError, match="a causal-lm is expected"):
        apply_edit(small("masked-lm", "nano"), [REQUEST], "ft", {"layer": 1})
    with pytest.raises(InputError, match=r"none \(merge an adapter first\)"):
        projection(nn.Linear(2, 2), 0)


@pytest.mark.slow
def test_a_real_model_learns_a_fact_and_keeps_its_perplexity(asset):
    asset("SmolLM2-135M-Instruct")
    from downriver.evaluate import SurrogatePerplexity
    from downriver.models import load

    lm = load("SmolLM2-135M-Instruct")
    texts = ["The river carries water from the hills to the sea.", "We had bread and cheese for lunch in the garden."]
    surrogate = SurrogatePerplexity(texts)
    request = {"prompt": "{} is located in the city of", "subject": "The Eiffel Tower", "target_new": "Rome"}
    other = {"prompt": "The capital of {} is", "subject": "Japan", "target_new": "Tokyo"}
    assert not recalls(lm, [request])[0] and recalls(lm, [other])[0]
    before = float(surrogate(lm))
    contexts = ["In short, {}", "It is well known that {}", "As the guide says, {}", "When we arrived, {}"]
    result = apply_edit(lm, [request], "c_rome", Rome(layer=8, contexts=contexts))
    assert result.efficacy == 1.0 and recalls(lm, [other])[0]
    assert math.isclose(float(surrogate(lm)), before, rel_tol=0.2)
    paraphrase = {**request, "prompt": "You can visit {} in the city of"}
    assert recalls(lm, [paraphrase])[0]
    result.undo()
    assert float(surrogate(lm)) == before
