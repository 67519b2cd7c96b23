"""AlignGuard: every term against its formula, what vanishes and why, training, files, and what is refused."""

import peft
import pytest
import torch
from datasets import Dataset

from downriver.adapt import AlignGuard, FisherSubspace, alignguard_lora, alignment_drift, lora, update_norm
from downriver.adapt.alignguard_lora import (
    ALIGNMENT,
    TASK,
    _fold,
    _side_by_side,
    _updates,
    geodesic,
    overlap,
    task_fisher,
)
from downriver.adapt.fisher import Directions
from downriver.adapt.lora import add_adapter
from downriver.core.errors import InputError
from downriver.merge import diagonal_fisher
from downriver.models import load, small
from downriver.tasks.task import Task
from downriver.training.trainer import Term

NAME = "model.layers.0.self_attn.q_proj"


def texts(*rows):
    splits = {"train": Dataset.from_dict({"text": list(rows)})}
    return Task("texts", "language-modelling", splits, ("text",), None)


@pytest.fixture(scope="module")
def kept():
    return texts("I refuse to do that.", "That I cannot do.", "No.", "I will not help with it.")


@pytest.fixture(scope="module")
def new():
    return texts("Rivers run to the sea.", "Boats go up and down.", "Fish swim.", "Water is wet.")


@pytest.fixture(scope="module")
def subspace(kept):
    return FisherSubspace.estimate(small("causal-lm", "nano"), kept, rank=3)


def adapted(targets=(NAME,), seed=0, zero=False):
    """A model with an adapter on one layer whose B is not zero."""
    model = small("causal-lm", "nano")
    add_adapter(model, rank=4, alpha=8, target_modules=list(targets), seed=seed)
    if not zero:
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = 0.1 * torch.randn(p.shape)
    return model


def delta(model):
    [(_, _, [found])] = _updates(model, None)
    return found


def directions(*matrices, values=None):
    u = torch.stack(matrices)
    values = torch.ones(len(u)) if values is None else torch.tensor(values)
    return FisherSubspace({NAME: Directions((32, 32), values, dense=u)})


def test_without_an_update_every_term_and_gradient_is_zero(subspace):
    model = adapted(targets=tuple(subspace), zero=True)
    guard = AlignGuard(subspace, split="project")
    found = guard(model)
    assert all(float(value) == 0 for value in found.values())
    found["total"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_an_update_inside_the_subspace_and_one_orthogonal_to_it():
    model = adapted()
    d = delta(model).detach()
    unit = d / d.norm()
    inside = AlignGuard(directions(unit, values=[3.0]), normalize=False)(model)
    assert float(inside["stability"]) == pytest.approx(0, abs=1e-8)
    assert float(inside["fisher"]) == pytest.approx(3.0 * float(d.norm()) ** 2, rel=1e-5)
    other = torch.randn(32, 32)
    other -= (other * unit).sum() * unit
    outside = AlignGuard(directions(other / other.norm()))(model)
    assert float(outside["fisher"]) == pytest.approx(0, abs=1e-9)
    assert float(outside["stability"]) == pytest.approx(float(d.norm()) ** 2, rel=1e-5)


def test_terms_equal_their_formulas(subspace):
    model = adapted()
    d, weight = delta(model).detach(), model.backbone.get_submodule(f"base_model.model.{NAME}").weight
    u = subspace[NAME]
    c = torch.stack([(m * d).sum() for m in u.dense])
    part_a = sum(x * m for x, m in zip(c, u.dense, strict=True))
    part_t = d - part_a
    values = u.eigenvalues / u.eigenvalues.mean()
    found = AlignGuard(subspace)(model)
    assert float(found["fisher"]) == pytest.approx(float((values * c**2).sum()), rel=1e-4)
    assert float(found["stability"]) == pytest.approx(float(part_t.norm() ** 2), rel=1e-4)
    eta = 1 + 4 * torch.sigmoid((weight + d).abs() - 0.01)
    assert float(found["overlap"]) == pytest.approx(float((eta * (part_a * part_t).abs()).mean()), rel=1e-4)
    expected = 0.25 * found["fisher"] + 0.5 * found["stability"] + 0.05 * found["overlap"]
    assert float(found["total"]) == pytest.approx(float(expected), rel=1e-6)
    raw = AlignGuard(subspace, normalize=False)(model)
    assert float(raw["fisher"]) == pytest.approx(float((u.eigenvalues * c**2).sum()), rel=1e-4)
    h = torch.rand(32, 32)
    weighted = AlignGuard(subspace, h={NAME: h})(model)
    assert float(weighted["stability"]) == pytest.approx(float((h * part_t**2).sum()), rel=1e-4)
    assert float(update_norm(model)) == pytest.approx(float(d.norm() ** 2), rel=1e-5)


def test_collisions_vanish_by_algebra_where_the_parts_are_orthogonal():
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(100, 8, dtype=torch.float64))[0]
    d = torch.randn(100, dtype=torch.float64)
    part = u @ (u.T @ d)
    assert float(geodesic(part, d - part)) < 1e-12  # any orthogonal projector
    assert float(overlap(part, d - part, d)) > 1e-3
    mask = torch.rand(100) < 0.5  # a diagonal one: not even entries meet
    assert float(overlap(d * mask, d * ~mask, d)) == 0
    assert float(geodesic(d, -3 * d)) == pytest.approx(1)
    assert 0 < float(geodesic(d, torch.randn(100, dtype=torch.float64))) < 1
    assert float(overlap(part, d, d)) == float(overlap(d, part, d)) >= 0


def test_two_adapters(subspace):
    model = adapted(targets=tuple(subspace))
    _side_by_side(model, seed=0)
    for number, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    guard = AlignGuard(subspace, split="dual")
    found = guard(model)
    assert 0 < float(found["geodesic"]) < 1 and float(found["overlap"]) > 0
    found["geodesic"].backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(ALIGNMENT in name for name in grads) and any(TASK in name for name in grads)
    ids = torch.tensor([[1, 7, 8, 9]])
    before = model.eval().backbone(input_ids=ids).logits
    sums = {name: a + t for name, _, (a, t) in _updates(model, (ALIGNMENT, TASK))}
    _fold(model)
    assert list(model.backbone.peft_config) == ["default"]
    assert torch.allclose(model.backbone(input_ids=ids).logits, before, atol=1e-5)
    for name, _, [d] in _updates(model, None):
        assert torch.allclose(d, sums[name], atol=1e-6)


def test_the_formulas_of_two_adapters(subspace):
    model = adapted()
    _side_by_side(model, seed=0)
    for number, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    [(_, weight, (a, t))] = _updates(model, (ALIGNMENT, TASK))
    found = AlignGuard(subspace, split="dual")(model)
    values = subspace[NAME].eigenvalues / subspace[NAME].eigenvalues.mean()
    c = torch.stack([(u * a).sum() for u in subspace[NAME].dense])
    assert float(found["fisher"]) == pytest.approx(float((values * c**2).sum()), rel=1e-4)
    assert float(found["stability"]) == pytest.approx(float(t.norm() ** 2), rel=1e-4)
    cosine = float((a * t).sum() / a.norm() / t.norm())
    assert float(found["geodesic"]) == pytest.approx(cosine**2, rel=1e-4)
    assert float(found["overlap"]) == pytest.approx(float(overlap(a, t, weight + a + t)), rel=1e-5)


def test_weight_zero_is_plain_lora_bit_for_bit(new, subspace):
    settings = {"batch_size": 2, "learning_rate": 1e-2, "rank": 2, "alpha": 4, "weight_decay": 0.0}
    plain = lora(small("causal-lm", "nano"), new, "3 steps", **settings)
    free = alignguard_lora(
        small("causal-lm", "nano"), new, "3 steps", alignment=subspace, lam_a=0, lam_t=0, lam_nc=0, **settings
    )
    for (name, a), (_, b) in zip(plain.named_parameters(), free.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    guarded = alignguard_lora(small("causal-lm", "nano"), new, "3 steps", alignment=subspace, lam_a=10.0, **settings)
    norms = [float(AlignGuard(subspace)(model)["fisher"]) for model in (plain, guarded)]
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize("split", ["project", "dual"])
def test_trained_saved_and_loaded(new, kept, tmp_path, split):
    tuned = alignguard_lora(
        small("causal-lm", "nano"), new, "3 steps", alignment=kept, fisher_rank=2, batch_size=2, rank=2, split=split
    )
    ids = torch.tensor([[1, 7, 8, 9]])
    expected = tuned.eval().backbone(input_ids=ids).logits
    assert not torch.equal(expected, small("causal-lm", "nano").eval().backbone(ids).logits)
    tuned.save(tmp_path / "tuned")
    assert torch.allclose(load(tmp_path / "tuned").eval().backbone(input_ids=ids).logits, expected, atol=1e-6)


def test_terms_are_logged_one_by_one_and_computed_once(subspace):
    guard = AlignGuard(subspace, lam_nc=0.0)
    terms = guard.terms()
    assert [(term.name, term.weight) for term in terms] == [("alignguard fisher", 0.25), ("alignguard stability", 0.5)]
    model, outputs = adapted(), {}
    first = terms[0].fn(model, {}, outputs)
    assert terms[0].fn(model, {}, outputs) is first and terms[0].fn(model, {}, dict(outputs)) is not first
    assert isinstance(terms[0], Term) and len(AlignGuard(subspace, split="dual").terms()) == 4


def test_other_tuners_of_peft():
    base = small("causal-lm", "nano").backbone
    model = peft.get_peft_model(base, peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    found = AlignGuard(directions(torch.eye(32) / 32**0.5))
    with pytest.raises(InputError, match="lacks"):
        found(model)
    one = peft.get_peft_model(
        small("causal-lm", "nano").backbone,
        peft.LoHaConfig(r=2, target_modules=r".*layers\.0\.self_attn\.q_proj", init_weights=False),
    )
    assert float(found(one)["total"]) > 0
    turned = peft.get_peft_model(
        small("causal-lm", "nano").backbone, peft.HRAConfig(r=2, target_modules=r".*layers\.0\.self_attn\.q_proj")
    )
    with pytest.raises(InputError, match="hra multiplies the weight"):
        found(turned)
    split = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(InputError, match="'pissa' changes the weights themselves"):
        found(peft.get_peft_model(small("causal-lm", "nano").backbone, split))
    sparse = peft.ShiraConfig(r=2, target_modules=r".*layers\.0\.self_attn\.q_proj", init_weights=False)
    terms = found(peft.get_peft_model(small("causal-lm", "nano").backbone, sparse))
    assert float(terms["stability"]) > 0 and terms["total"].requires_grad
    layer = one.get_submodule(f"base_model.model.{NAME}")
    given = layer.get_delta_weight
    layer.get_delta_weight = lambda adapter: given(adapter).detach()
    with pytest.raises(InputError, match="without gradients"):
        found(one)
    with torch.no_grad():
        assert float(found(one)["total"]) > 0


def test_dora_is_penalised_for_what_it_changes(subspace):
    """Direction and length: what merging the adapter adds to the weights."""
    base = small("causal-lm", "nano").backbone
    settings = peft.LoraConfig(r=4, target_modules=[NAME], use_dora=True)
    model = peft.get_peft_model(base, settings)
    assert float(AlignGuard(subspace)(model)["total"]) < 1e-10
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data + 0.1 * torch.randn(p.shape)
    before = model.get_submodule(f"base_model.model.{NAME}").base_layer.weight.detach().clone()
    d = delta(model)
    AlignGuard(subspace)(model)["total"].backward()
    grads = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("magnitude" in name for name in grads) and any("lora_A" in name for name in grads)
    merged = model.merge_and_unload().get_submodule(NAME).weight
    assert torch.allclose(d, merged - before, atol=1e-5) and d.norm() > 0.1


def test_the_tasks_own_fisher_as_h(subspace, new):
    model = small("causal-lm", "nano")
    even = texts("Fish swim.", "We float.!", "It is wet.")  # of one length: then sums and means over tokens agree
    by_weight = diagonal_fisher(model, even)
    h = task_fisher(model, even, targets=[NAME])[NAME]
    expected = by_weight[f"{NAME}.weight"] / by_weight[f"{NAME}.weight"].mean()
    assert torch.allclose(h, expected, rtol=1e-3, atol=1e-6)
    guarded = adapted()
    found = [AlignGuard(subspace, h=one)(guarded)["stability"] for one in ({NAME: h}, {f"{NAME}.weight": expected})]
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-3)
    settings = {"alignment": subspace, "batch_size": 2, "learning_rate": 1e-2, "lam_t": 5.0}
    a, b = (
        alignguard_lora(small("causal-lm", "nano"), new, "3 steps", h=h, **settings)
        for h in ("identity", "task_fisher")
    )
    assert not torch.equal(delta_of(a), delta_of(b))


def delta_of(model):
    return next(d for name, _, [d] in _updates(model, None) if name == NAME)


def test_over_a_quantised_base(new, kept):
    """The subspace comes from inputs and outputs; W + ΔW is read from what is stored."""
    plain, quantised = small("causal-lm", "nano"), small("causal-lm", "nano")
    layer = quantised.backbone.get_submodule(NAME)
    eight = Eight(layer)
    parent, _, last = NAME.rpartition(".")
    setattr(quantised.backbone.get_submodule(parent), last, eight)
    plain.backbone.get_submodule(NAME).weight.data = eight.stored.float() * eight.scale
    found = [FisherSubspace.estimate(model, kept, rank=2) for model in (plain, quantised)]
    assert list(found[0]) == list(found[1])
    for name in found[0]:
        assert torch.allclose(found[0][name].eigenvalues, found[1][name].eigenvalues, rtol=1e-3)
    u, v = (f[NAME].dense.flatten(1) for f in found)
    assert torch.allclose(u.T @ u, v.T @ v, atol=1e-3)


def test_over_four_bits_of_bitsandbytes(kept):
    bnb = pytest.importorskip("bitsandbytes")
    model = small("causal-lm", "nano")
    layer = model.backbone.get_submodule(NAME)
    four = bnb.nn.Linear4bit(32, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    four.load_state_dict({"weight": layer.weight.data})
    parent, _, last = NAME.rpartition(".")
    setattr(model.backbone.get_submodule(parent), last, four.to("cpu"))
    subspace = FisherSubspace.estimate(model, kept, rank=2, targets=[NAME])
    stored = bnb.functional.dequantize_4bit(four.weight.data, four.weight.quant_state)
    add_adapter(model, rank=2, target_modules=[NAME], seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    [(_, weight, _)] = _updates(model, None)
    assert torch.equal(weight, stored) and weight.shape == (32, 32)
    assert all(float(term) >= 0 for term in AlignGuard(subspace)(model).values())


class Eight(torch.nn.Linear):
    """A linear layer stored in 8 bits, in another shape than its matrix has."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.detach().abs().max() / 127
        self.stored = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(self.stored.view(-1, 1), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.stored.float() * self.scale)


def test_drift():
    answers = {"a": "No.", "b": "Yes.", "c": "No.", "d": "Yes."}
    found = alignment_drift(
        lambda prompts: ["No." for _ in prompts],
        lambda prompts: [answers[prompt] for prompt in prompts],
        unsafe=["a", "b"],
        safe=["c", "d"],
        refuses=lambda prompt, answer: answer == "No.",
    )
    assert (found.unsafe_before, found.unsafe_after, found.safe_before, found.safe_after) == (1, 0.5, 1, 0.5)
    assert found.drift == 0.5
    with pytest.raises(InputError, match="unsafe"):
        alignment_drift(list, list, [], ["a"], lambda p, a: True)
    with pytest.raises(InputError, match="answers"):
        alignment_drift(lambda p: [], list, ["a"], ["a"], lambda p, a: True)


def test_what_is_refused(subspace, new, kept):
    for name in ("lam_a", "lam_t", "lam_nc"):
        with pytest.raises(InputError, match=name):
            AlignGuard(subspace, **{name: -1.0})
    with pytest.raises(InputError, match="alpha"):
        AlignGuard(subspace, alpha=1.5)
    with pytest.raises(InputError, match="split"):
        AlignGuard(subspace, split="both")
    with pytest.raises(InputError, match="without adapters"):
        AlignGuard(subspace)(small("causal-lm", "nano"))
    with pytest.raises(InputError, match="no adapters named 'alignment'"):
        AlignGuard(subspace, split="dual")(adapted())
    wrong = FisherSubspace({NAME: Directions((2, 2), torch.ones(1), dense=torch.ones(1, 2, 2))})
    with pytest.raises(InputError, match="of shape"):
        AlignGuard(wrong)(adapted())
    with pytest.raises(InputError, match="h: a tensor"):
        AlignGuard(subspace, h={})(adapted())
    with pytest.raises(InputError, match="unknown h 'task'"):
        alignguard_lora(small("causal-lm", "nano"), new, "2 steps", alignment=kept, h="task")
    with pytest.raises(InputError, match="empty"):
        alignguard_lora(small("causal-lm", "nano"), new, "2 steps", alignment=kept, samples=0)
