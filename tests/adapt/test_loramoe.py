import copy
import json

import datasets
import numpy as np
import peft
import polars as pl
import pytest
import torch
from torch import nn

from downriver.adapt import (
    LoRAMoE,
    LoRAMoEConfig,
    add_loramoe,
    load_loramoe,
    lora,
    loramoe,
    merge_static,
    routing_report,
    to_peft_adapters,
)
from downriver.adapt.loramoe import ExpertLinear, balance_loss, experts_of, without_experts
from downriver.core import InputError
from downriver.models import Model, small
from downriver.nn.moe import report, route, routing_context
from downriver.tasks import Task
from downriver.training import TokenRows

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def nano(seed: int = 0) -> Model:
    return small("causal-lm", "nano", seed)


def stirred(model: LoRAMoE) -> LoRAMoE:
    """With experts that do something."""
    g = torch.Generator().manual_seed(0)
    for _, layer in experts_of(model.backbone):
        with torch.no_grad():
            layer.loramoe_B.copy_(torch.randn(layer.loramoe_B.shape, generator=g) / 10)
    return model


def rows(n: int = 12) -> TokenRows:
    """Questions of type 1 in low ids, of type 0 in high ones."""
    g = torch.Generator().manual_seed(0)
    types = [i % 2 for i in range(n)]
    ids = [(torch.randint(4, 100, (6,), generator=g) + 120 * (1 - t)).tolist() for t in types]
    return TokenRows("mix", {"train": datasets.Dataset.from_dict({"input_ids": ids, "data_types": types})})


def test_a_new_mixture_is_the_base_bit_for_bit_and_the_base_is_frozen():
    base = nano()
    model = LoRAMoE(nano(), LoRAMoEConfig(), seed=3)
    assert torch.equal(model(input_ids=IDS)["logits"], base(input_ids=IDS)["logits"])
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "loramoe_A",
        "loramoe_B",
        "loramoe_router",
    }
    assert len(experts_of(model.backbone)) == 6
    model(input_ids=IDS, attention_mask=MASK, labels=IDS)["loss"].backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "loramoe" not in n)
    assert model.backbone.model.layers[0].mlp.up_proj.loramoe_B.grad.abs().sum() > 0


def test_without_experts_restores_them():
    model = stirred(LoRAMoE(nano(), LoRAMoEConfig()))
    mixed = model(input_ids=IDS)["logits"]
    with without_experts(model.backbone):
        assert torch.equal(model(input_ids=IDS)["logits"], nano()(input_ids=IDS)["logits"])
    assert torch.equal(model(input_ids=IDS)["logits"], mixed)


def test_experts_are_the_formula_of_the_paper():
    torch.manual_seed(0)
    config = LoRAMoEConfig(r=3, alpha=6, num_experts=4, dropout=0.0)
    layer = ExpertLinear(nn.Linear(5, 7), config, "x")
    nn.init.normal_(layer.loramoe_B)
    x = torch.randn(2, 3, 5)
    gates = (x @ layer.loramoe_router.T).softmax(-1)
    expected = layer.base(x)
    for i in range(4):
        a, b = layer.loramoe_A[3 * i : 3 * i + 3], layer.loramoe_B[:, 3 * i : 3 * i + 3]
        expected = expected + 6 / 3 * gates[..., i : i + 1] * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)
    layer.config = LoRAMoEConfig(r=3, alpha=6, num_experts=4, dropout=0.0, top_k=1)
    best = gates.argmax(-1)[0, 0]
    a, b = layer.loramoe_A[3 * best : 3 * best + 3], layer.loramoe_B[:, 3 * best : 3 * best + 3]
    torch.testing.assert_close(layer(x)[0, 0], layer.base(x)[0, 0] + 2 * (x[0, 0] @ a.T @ b.T))


def test_one_expert_is_peft_lora(tmp_path):
    model = stirred(LoRAMoE(nano(), LoRAMoEConfig(num_experts=1, r=4, alpha=8)))
    to_peft_adapters(model, tmp_path / "experts")
    adapted = peft.PeftModel.from_pretrained(nano().backbone, tmp_path / "experts" / "expert_0")
    torch.testing.assert_close(model(input_ids=IDS)["logits"], adapted(input_ids=IDS).logits, rtol=1e-6, atol=1e-6)


def test_an_exported_expert_is_the_model_with_all_gates_on_it(tmp_path):
    model = stirred(LoRAMoE(nano(), LoRAMoEConfig(num_experts=4)))
    to_peft_adapters(model, tmp_path / "experts")
    adapted = peft.PeftModel.from_pretrained(nano().backbone, tmp_path / "experts" / "expert_2")
    one_hot = merge_static(model, [0, 0, 1, 0])
    torch.testing.assert_close(one_hot(input_ids=IDS)["logits"], adapted(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "experts" / "router.safetensors").is_file()


def gates_of(logits, types, mask=None, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    config = LoRAMoEConfig(num_experts=logits.shape[-1], **settings)
    with routing_context(types, mask) as routing:
        report("layer", route(logits))
    return balance_loss(routing, config), routing.layers["layer"].gates


@pytest.mark.parametrize(("norm", "match"), [("var_mean", "1+delta"), ("cv2", "1-delta")])
def test_the_constraint_by_hand_on_two_samples_and_two_experts(norm, match):
    logits = torch.tensor([[[0.3, -0.2], [1.0, 0.4]], [[-0.5, 0.1], [9.0, 9.0]]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    loss, gates = gates_of(logits, torch.tensor([1, 0]), mask, norm=norm, match=match, delta=0.25)
    g = gates.detach().double().numpy()
    q = np.array([g[0, 0] + g[0, 1], g[1, 0]])  # the second token of sample 1 is padding
    same, other = (1.25, 0.75) if match == "1+delta" else (0.75, 1.25)
    z = q * np.array([[same, other], [other, same]])  # expert 0 is of type 1, as sample 0 is
    expected = z.var(ddof=1) / (z.mean() if norm == "var_mean" else z.mean() ** 2 + 1e-10)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_delta_it_is_plain_balance_and_even_gates_cost_nothing():
    even = torch.zeros(3, 5, 4, requires_grad=True)
    assert gates_of(even, torch.tensor([1, 0, 0]), delta=0.0)[0].item() == pytest.approx(0, abs=1e-12)
    skewed = torch.randn(3, 5, 4, requires_grad=True)
    left = gates_of(skewed, torch.tensor([1, 0, 0]), delta=0.0)[0]
    assert torch.equal(left, gates_of(skewed, torch.tensor([0, 1, 1]), delta=0.0)[0])
    assert left > 0


@pytest.mark.parametrize("match", ["1-delta", "1+delta"])
def test_descent_on_the_constraint_alone_gives_matched_experts_the_predicted_share(match):
    torch.manual_seed(0)
    types, delta = torch.tensor([1, 0, 1, 0]), 0.2
    logits = torch.randn(4, 6, 4).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(500):
        loss, gates = gates_of(logits, types, delta=delta, match=match)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    q = gates.sum(1)
    expert = torch.tensor([1, 1, 0, 0])
    same = q[types[:, None] == expert].mean() / q[types[:, None] != expert].mean()
    ratio = (1 + delta) / (1 - delta)  # the intended way; with the paper's coefficients it is the inverse
    assert loss < 1e-4
    assert same.item() == pytest.approx(ratio if match == "1-delta" else 1 / ratio, rel=0.02)


def test_the_loss_is_collected_once_a_layer_also_under_checkpointing():
    model = stirred(LoRAMoE(nano(), LoRAMoEConfig(dropout=0.0))).train()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "data_types": torch.tensor([1, 0])}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**batch)["loss"] + model.aux_loss()
        assert model.routing is not None and len(model.routing.layers) == 6
        loss.backward()
        return [layer.loramoe_router.grad.clone() for _, layer in experts_of(model.backbone)]

    plain = gradients()
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain)


def test_padding_changes_neither_loss_nor_report():
    model = stirred(LoRAMoE(nano(), LoRAMoEConfig()))
    types, more = torch.tensor([1, 0]), torch.cat([IDS, torch.full((2, 3), 77)], 1)
    model(input_ids=IDS, attention_mask=MASK, data_types=types)
    short = model.aux_loss().item()
    model(input_ids=more, attention_mask=nn.functional.pad(MASK, (0, 3)), data_types=types)
    assert model.aux_loss().item() == pytest.approx(short, rel=1e-5)


def test_training_moves_the_experts_only_and_repeats():
    base = nano()
    before = copy.deepcopy(base.state_dict())
    tuned, again = (
        loramoe(base, rows(), "6 steps", batch_size=4, learning_rate=5e-3, num_experts=4, r=2, seed=1) for _ in range(2)
    )
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    with without_experts(tuned.backbone):
        assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())
    assert all(layer.loramoe_B.abs().sum() > 0 for _, layer in experts_of(tuned.backbone))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tuned.state_dict().items())
    assert tuned.routing is None and not tuned.training


def test_types_get_their_experts_and_the_report_says_so():
    settings = {"batch_size": 12, "learning_rate": 2e-2, "num_experts": 4, "r": 1, "balance": 5.0, "delta": 0.5}
    tuned = loramoe(nano(), rows(), "60 steps", **settings)
    table = routing_report(tuned, rows(), batch_size=5)
    whole = routing_report(tuned, rows())
    assert table.equals(whole) or np.allclose(table["gate"], whole["gate"], atol=1e-6)
    assert set(table.columns) == {"layer", "data_type", "expert", "expert_type", "gate", "entropy"}
    total = table.group_by("layer", "data_type").agg(pl.col("gate").sum())
    assert total.height == 12 and np.allclose(total["gate"], 1)
    reserved = (
        table.filter(pl.col("expert_type") == 1)
        .group_by("layer", "data_type")
        .agg(pl.col("gate").sum())
        .group_by("data_type")
        .agg(pl.col("gate").mean())
        .sort("data_type")["gate"]
    )
    assert reserved[1] > 0.6 > 0.4 > reserved[0]


def test_groups_of_a_task_become_types():
    table = datasets.Dataset.from_dict({"text": ["Rome Italy", "sort b a", "Oslo Norway"], "domain": ["f", "s", "f"]})
    task = Task("mix", "language-modelling", {"train": table}, ("text",), None, group="domain")
    tuned = loramoe(nano(), task, "2 steps", types={"f": 1}, batch_size=3)
    assert isinstance(tuned, LoRAMoE)
    with pytest.raises(InputError, match="group of 'mix'"):
        loramoe(nano(), task, "2 steps", types={"facts": 1})


def test_a_classifier_gets_experts_without_the_constraint():
    table = datasets.Dataset.from_dict({"text": ["aaaa", "zzzz"] * 4, "label": [0, 1] * 4})
    task = Task("letters", "text-classification", {"train": table}, ("text",), "label", labels=("a", "z"))
    with pytest.raises(InputError, match="'letters' has no types"):
        loramoe(nano(), task, "16 examples", batch_size=4)
    tuned = loramoe(nano(), task, "16 examples", batch_size=4, balance=0)
    assert tuned.head.out_features == 2


@pytest.mark.parametrize("source", ["small:causal-lm:nano:0", "changed"])
def test_saved_and_loaded_it_gives_the_same_numbers(tmp_path, source):
    base = nano()
    if source == "changed":
        with torch.no_grad():
            base.backbone.model.norm.weight.mul_(1.5)
    config = LoRAMoEConfig(num_experts=3, expert_types=(1, 0, 0), top_k=2)
    model = stirred(LoRAMoE(base, config, seed=5))
    folder = model.save(tmp_path / "experts")
    assert (folder / "base").is_dir() == (source == "changed")
    loaded = load_loramoe(folder)
    assert loaded.experts == config and loaded.processor is not None
    assert torch.equal(loaded(input_ids=IDS)["logits"], model(input_ids=IDS)["logits"])
    with pytest.raises(InputError, match="exists already"):
        model.save(folder)


def test_a_wrong_base_or_folder_is_refused(tmp_path):
    folder = LoRAMoE(nano(), LoRAMoEConfig()).save(tmp_path / "experts")
    with pytest.raises(InputError, match="another base"):
        load_loramoe(folder, nano(1))
    with pytest.raises(InputError, match="other layers than its base"):
        load_loramoe(folder, small("causal-lm", "tiny"))
    with pytest.raises(InputError, match=r"loramoe\.json cannot be read"):
        load_loramoe(tmp_path)
    settings = json.loads((folder / "loramoe.json").read_text())
    settings["config"]["num_experts"] = 4
    (folder / "loramoe.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has the shape"):
        load_loramoe(folder)


def test_a_head_is_saved_too(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    task = Task("two", "text-classification", {"train": table}, ("text",), "label", labels=("a", "b"))
    model = stirred(LoRAMoE(nano().with_head(task), LoRAMoEConfig()))
    loaded = load_loramoe(model.save(tmp_path / "experts"))
    assert torch.equal(loaded(input_ids=IDS)["logits"], model(input_ids=IDS)["logits"])
    assert loaded.labels == ("a", "b")


def test_a_static_merge_is_exact_for_equal_gates_and_plain():
    model = stirred(LoRAMoE(nano(), LoRAMoEConfig()))
    for _, layer in experts_of(model.backbone):
        nn.init.zeros_(layer.loramoe_router)
    plain = merge_static(model)
    assert not experts_of(plain.backbone) and not isinstance(plain, LoRAMoE)
    torch.testing.assert_close(plain(input_ids=IDS)["logits"], model(input_ids=IDS)["logits"], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="2 weights for 8 experts"):
        merge_static(model, [1, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 3}, "even number"),
        ({"r": 0}, "r is 0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"top_k": 9}, "top_k is 9"),
        ({"expert_types": (1, 0)}, "8 numbers"),
        ({"norm": "var"}, "norm 'var'"),
        ({"match": "delta"}, "match 'delta'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LoRAMoEConfig(**settings)


def test_targets_must_be_linear_layers():
    with pytest.raises(InputError, match=r"linear layers there are: .*down_proj"):
        add_loramoe(nano().backbone, LoRAMoEConfig(targets=("fc1",)))
    with pytest.raises(InputError, match=r"'model\.embed_tokens' is a Embedding"):
        add_loramoe(nano().backbone, LoRAMoEConfig(targets=("embed_tokens",)))
    with pytest.raises(InputError, match="is a Conv2d"):
        add_loramoe(nn.Sequential(nn.Conv2d(1, 1, 1)), LoRAMoEConfig(targets=("0",)))
    with pytest.raises(InputError, match="is a ExpertLinear"):
        add_loramoe(LoRAMoE(nano(), LoRAMoEConfig()).backbone, LoRAMoEConfig())


def test_missing_and_unknown_types_are_refused():
    untyped = TokenRows("plain", {"train": rows().rows("train").remove_columns("data_types")})
    with pytest.raises(InputError, match="'plain' has no types"):
        loramoe(nano(), untyped, "2 steps")
    assert loramoe(nano(), untyped, "1 steps", batch_size=2, balance=0).experts.balance == 0
    strange = TokenRows("odd", {"train": datasets.Dataset.from_dict({"input_ids": [[1, 2]], "data_types": [7]})})
    with pytest.raises(InputError, match="type 7 has no expert"):
        loramoe(nano(), strange, "2 steps")
    model = LoRAMoE(nano(), LoRAMoEConfig())
    model(input_ids=IDS)
    with pytest.raises(InputError, match="type of every sample"):
        model.aux_loss()
    model(input_ids=IDS, data_types=torch.tensor([0, 7]))
    with pytest.raises(InputError, match="data type 7"):
        model.aux_loss()


def test_an_adapter_must_be_merged_first():
    task = Task("t", "language-modelling", {"train": datasets.Dataset.from_dict({"text": ["ab"]})}, ("text",), None)
    with pytest.raises(InputError, match="merge it first"):
        loramoe(lora(nano(), task, "1 steps", batch_size=1), rows(), "1 steps")
