"""TIES against what the card says of it: exact cases, a naive reference, and the arithmetic of two libraries."""

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from torch import Tensor, nn

from downriver.core.errors import InputError
from downriver.merge import ties

SHAPES = {"a.weight": (60, 40), "a.bias": (60,), "b.weight": (3, 5, 7), "scale": ()}
State = dict[str, Tensor]


def state(seed: int, scale: float = 1.0, around: State | None = None) -> State:
    g = torch.Generator().manual_seed(seed)
    around = around or {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return {name: around[name] + scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def flat(of: State) -> Tensor:
    return torch.cat([of[name].reshape(-1) for name in SHAPES])


@pytest.fixture
def base() -> State:
    return state(0)


@pytest.fixture
def models(base: State) -> list[State]:
    return [state(i, 0.1, base) for i in (1, 2, 3)]


def reference(models: list[State], base: State, density: float, lam: float) -> Tensor:
    """The paper's three steps on whole flattened models: kthvalue in float32, sums in float64."""
    origin = flat(base)
    taus = torch.stack([flat(m) - origin for m in models])
    size = origin.numel()
    cuts = taus.abs().kthvalue(size - int(density * size), dim=1, keepdim=True).values
    hats = taus * (taus.abs() >= cuts)
    gamma = hats.double().sum(0).sign()
    gamma[gamma == 0] = gamma.sum().sign()
    agree = hats * gamma > 0
    exact = torch.stack([flat(m).double() for m in models]) - origin.double()
    return (origin + lam * (exact * agree).sum(0) / agree.sum(0).clamp(min=1)).float()


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_equals_a_naive_reference_bit_for_bit(models: list[State], base: State, density: float, lam: float) -> None:
    assert torch.equal(flat(ties(models, base, density=density, lam=lam)), reference(models, base, density, lam))


def test_one_ranking_over_the_whole_model_differs_from_one_a_tensor(models: list[State], base: State) -> None:
    models[0]["a.weight"] = base["a.weight"] + 100 * (models[0]["a.weight"] - base["a.weight"])
    whole, each = (ties(models[:1], base, scope=scope) for scope in ("model", "tensor"))
    assert torch.equal(whole["a.bias"], base["a.bias"])  # crowded out
    assert (each["a.bias"] != base["a.bias"]).sum() == int(0.2 * 60) + 1


def test_a_lone_untrimmed_model_comes_back_exactly(models: list[State], base: State) -> None:
    assert torch.equal(flat(ties(models[:1], base, density=1.0)), flat(models[0]))


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_identical_models_give_that_model(models: list[State], base: State, count: int) -> None:
    assert torch.equal(flat(ties(models[:1] * count, base, density=1.0)), flat(models[0]))
    assert torch.equal(flat(ties(models[:1] * count, base)), flat(ties(models[:1], base)))


def test_the_order_of_models_does_not_matter(models: list[State], base: State) -> None:
    a, b, c = models
    assert torch.equal(flat(ties([a, b, c], base)), flat(ties([c, a, b], base)))


def test_disjoint_supports_give_the_union_not_divided_by_n() -> None:
    base = {"w": torch.zeros(6)}
    a, b = {"w": torch.tensor([1.0, 2, 0, 0, 0, 0])}, {"w": torch.tensor([0, 0, 0, -3.0, 0, 4])}
    assert ties([a, b], base, density=1.0)["w"].tolist() == [1, 2, 0, -3, 0, 4]


def test_mass_wins_not_the_count() -> None:
    base = {"w": torch.zeros(1)}
    models = [{"w": torch.tensor([v])} for v in (5.0, -1.0, -2.0)]
    assert ties(models, base, density=1.0)["w"].item() == 5.0
    assert ties(models, base, density=1.0, elect="count")["w"].item() == -1.5


def test_norm_shares_elect_what_a_small_model_is_sure_of() -> None:
    base = {"w": torch.zeros(3)}
    loud, sure = {"w": torch.tensor([2.0, 9, 9])}, {"w": torch.tensor([-1.0, 0, 0])}
    assert ties([loud, sure], base, density=1.0)["w"][0].item() == 2.0
    for elect in ("normmass", "normfrac"):
        assert ties([loud, sure], base, density=1.0, elect=elect)["w"].tolist() == [-1, 9, 9]


def test_aggregates() -> None:
    base = {"w": torch.ones(1)}
    models = [{"w": torch.tensor([1 + v])} for v in (1.0, 3.0, -2.0)]
    found = {agg: ties(models, base, density=1.0, agg=agg)["w"].item() for agg in ("mean", "sum", "max")}
    assert found == {"mean": 3.0, "sum": 5.0, "max": 4.0}


def test_weights_vote_and_average() -> None:
    base = {"w": torch.zeros(2)}
    models = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([-3.0, 4.0])}]
    assert ties(models, base, density=1.0, weights=[2, 1])["w"].tolist() == [2.0, 2.0]
    assert ties(models, base, density=1.0, weights=[1, 0])["w"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("majority", [1, -1])
def test_cancelled_votes_take_the_global_majority_or_plus(majority: int) -> None:
    base = {"w": torch.zeros(4)}
    a = {"w": torch.tensor([1.0, 2.0 * majority, 2.0 * majority, 0])}
    b = {"w": torch.tensor([-1.0, 2.0 * majority, 0, 0])}
    assert ties([a, b], base, density=1.0)["w"].tolist() == [majority, 2 * majority, 2 * majority, 0]
    assert ties([a, b], base, density=1.0, majority_zero="positive")["w"][0].item() == 1


def test_a_further_model_may_give_the_signs() -> None:
    base = {"w": torch.zeros(3)}
    models = [{"w": torch.tensor([5.0, 1, 1])}, {"w": torch.tensor([-1.0, 1, -2])}]
    oracle = {"w": torch.tensor([-0.1, 0.1, 0.1])}
    assert ties(models, base, density=1.0, signs=oracle)["w"].tolist() == [-1, 1, 1]


@pytest.mark.parametrize(("elect", "method"), [("mass", "total"), ("count", "frequency")])
@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("density", [0.3, 0.8, 1.0])
def test_compat_peft_equals_peft(elect: str, method: str, density: float) -> None:
    base, taus, weights = {n: torch.zeros(s) for n, s in SHAPES.items()}, [state(i) for i in range(3)], [0.3, 1.2, 0.7]
    merged = ties(taus, base, density=density, compat="peft", elect=elect, weights=weights)  # type: ignore[arg-type]
    for name in ("a.weight", "a.bias", "b.weight"):
        expected = peft_merge.ties([t[name] for t in taus], torch.tensor(weights), density, method)  # type: ignore[arg-type]
        assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, -0.3]])
@pytest.mark.parametrize("agg", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compat_mergekit_equals_its_formula(
    models: list[State], base: State, weights: list[float], agg: str, dtype: torch.dtype
) -> None:
    base, *models = ({n: t.to(dtype) for n, t in m.items()} for m in (base, *models))
    density = 0.4 if dtype == torch.float32 else 1.0  # 16-bit values tie, and mergekit keeps any of those that do
    merged = ties(models, base, density=density, lam=0.7, compat="mergekit", agg=agg, weights=weights)  # type: ignore[arg-type]
    for name in SHAPES:
        deltas = []
        for model, weight in zip(models, weights, strict=True):
            delta = model[name] - base[name]
            kept = max(1, int(density * delta.numel()))
            mask = torch.zeros(delta.numel(), dtype=dtype)
            mask[delta.abs().float().reshape(-1).argsort(descending=True)[:kept]] = 1
            deltas.append(delta * mask.reshape(delta.shape) * torch.tensor(weight, dtype=dtype))
        stacked = torch.stack(deltas)
        majority = (stacked.sum(0) >= 0).to(dtype) * 2 - 1
        mask = stacked.sign() == majority
        mixed = (stacked * mask).sum(0)
        if agg == "mean":
            column = torch.tensor(weights, dtype=dtype).reshape(-1, *[1] * base[name].ndim)
            divisor = (column * mask).sum(0)
            divisor[divisor == 0] = 1
            mixed = mixed / divisor
        assert torch.equal(merged[name], base[name] + mixed * 0.7), name


def test_bfloat16_is_subtracted_in_float32() -> None:
    base = {"w": torch.tensor([1.0, 256.0], dtype=torch.bfloat16)}
    model = {"w": torch.tensor([1.0078125, 258.0], dtype=torch.bfloat16)}
    merged = ties([model, base], base, density=1.0)
    assert merged["w"].dtype == torch.bfloat16 and torch.equal(merged["w"], model["w"])


def test_integers_and_buffers_are_the_bases() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 4))
    merged = ties([model], base, density=1.0)
    assert torch.equal(merged[0].weight, model[0].weight)
    assert merged[1].running_mean.eq(0).all() and merged[1].num_batches_tracked == 0
    assert merged is not base and not torch.equal(base[0].weight, model[0].weight)


def test_inputs_are_left_as_they_are(models: list[State], base: State) -> None:
    before = [flat(m).clone() for m in (base, *models)]
    ties(models, base)
    assert all(torch.equal(b, flat(m)) for b, m in zip(before, (base, *models), strict=True))


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_density_outside_its_range(models: list[State], base: State, density: float) -> None:
    with pytest.raises(InputError, match=r"density.*\(0, 1\]"):
        ties(models, base, density=density)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weights": [1.0]}, "1 values for 3 models"),
        ({"weights": [1.0, -1.0, 1.0]}, "none may be negative"),
        ({"elect": "mas"}, "did you mean 'mass'"),
        ({"density": [0.1, 0.2]}, "2 values for 3 models"),
        ({"lam": float("inf")}, "lam is inf"),
        ({"compat": "peft", "agg": "max"}, "peft has no"),
    ],
)
def test_parameters_that_do_not_fit(models: list[State], base: State, parameters: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ties(models, base, **parameters)


def test_no_models(base: State) -> None:
    with pytest.raises(InputError, match="no models to merge"):
        ties([], base)


def test_all_differences_are_listed(models: list[State], base: State) -> None:
    models[0].pop("a.bias")
    models[1]["b.weight"] = torch.zeros(2, 2)
    models[1]["extra"] = torch.zeros(1)
    with pytest.raises(InputError) as error:
        ties(models, base)
    for part in ("lacks 'a.bias'", "'b.weight' has shape (2, 2) instead of (3, 5, 7)", "has 'extra'"):
        assert part in str(error.value)
    merged = ties(models, base, on_mismatch="skip")
    assert torch.equal(merged["a.bias"], base["a.bias"]) and not torch.equal(merged["a.weight"], base["a.weight"])


def test_values_that_are_not_finite_name_their_tensor(models: list[State], base: State) -> None:
    models[1]["a.weight"][3, 3] = float("nan")
    with pytest.raises(InputError, match=r"a\.weight.*not finite"):
        ties(models, base)
