"""mergekit's YAML: what each setting means here, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge import Average, TaskArithmetic, Ties, average, read_mergekit, task_arithmetic, ties

State = dict[str, Tensor]


@pytest.fixture
def states(tmp_path: Path) -> dict[str, State]:
    g = torch.Generator().manual_seed(0)
    names = {"emb.weight": (20, 6), "h.0.mlp": (9, 7), "h.1.mlp": (9, 7), "h.1.attn": (9, 7), "h.2.mlp": (9, 7)}
    found = {}
    for model in ("base", "a", "b"):
        found[model] = {n: torch.randn(s, generator=g) for n, s in names.items()}
        (tmp_path / model).mkdir()
        save_file(found[model], tmp_path / model / "model.safetensors")
    return found


def written(tmp_path: Path, **config: Any) -> State:
    """Run a file that names its folders relative to itself."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    read_mergekit(file).merge(tmp_path / "out")
    return load_file(tmp_path / "out" / "model.safetensors")


def entry(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": parameters}


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def test_ties_with_mergekits_arithmetic(tmp_path: Path, states: dict[str, State]) -> None:
    found = written(
        tmp_path,
        merge_method="ties",
        base_model="base",
        compat="mergekit",
        models=[entry("base"), entry("a", weight=0.5, density=0.5), entry("b", weight=1.5)],
        parameters={"lambda": 0.8, "int8_mask": True},
    )
    models, weights = [states["a"], states["b"]], [0.5, 1.5]
    assert same(found, ties(models, states["base"], density=[0.5, 1.0], weights=weights, lam=0.8, compat="mergekit"))


def mergekits_formula(base: Tensor, models: list[Tensor], weights: list[float], density: list[float], normalize: bool):
    """The arithmetic that the libraries' table states, on one tensor: ranked alone, weighted before the vote."""
    hats = []
    for model, weight, share in zip(models, weights, density, strict=True):
        delta = (model - base).flatten()
        kept = delta.abs().argsort(descending=True)[: int(share * delta.numel())]
        hat = torch.zeros_like(delta)
        hat[kept] = delta[kept] * weight
        hats.append(hat)
    stacked, w = torch.stack(hats), torch.tensor(weights)[:, None]
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == elected
    mixed, divisor = (stacked * agree).sum(0), (w * agree).sum(0)
    divisor[divisor == 0] = 1
    return (mixed / divisor if normalize else mixed).view_as(base)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[0.5, 1.5], [1.0, -0.4]])
def test_compat_is_mergekits_formula(
    tmp_path: Path, states: dict[str, State], weights: list[float], normalize: bool
) -> None:
    shares = {"h.0.mlp": [0.2, 0.5], "h.1.mlp": [0.5, 0.5], "h.2.mlp": [0.8, 0.5]}  # the first model's is a gradient
    density = [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.4}]
    found = written(
        tmp_path,
        merge_method="ties",
        base_model="base",
        compat="mergekit",
        models=[entry("a", weight=weights[0], density=density), entry("b", weight=weights[1])],
        parameters={"lambda": 0.7, "density": 0.5, "normalize": normalize},
    )
    for name, base in states["base"].items():
        models = [states["a"][name], states["b"][name]]
        tau = mergekits_formula(base, models, weights, shares.get(name, [0.4, 0.5]), normalize)
        torch.testing.assert_close(found[name], base + 0.7 * tau, msg=name)


def test_ties_is_the_papers_by_default(tmp_path: Path, states: dict[str, State]) -> None:
    found = written(tmp_path, merge_method="ties", base_model="base", models=[entry("a"), entry("b")])
    assert same(found, ties([states["a"], states["b"]], states["base"]))


def test_not_normalised_is_a_sum(tmp_path: Path, states: dict[str, State]) -> None:
    parameters = {"normalize": False, "elect": "count", "density": 0.6}
    found = written(
        tmp_path, merge_method="ties", base_model="base", models=[entry("a"), entry("b")], parameters=parameters
    )
    assert same(found, ties([states["a"], states["b"]], states["base"], density=0.6, agg="sum", elect="count"))


def test_linear_and_task_arithmetic(tmp_path: Path, states: dict[str, State]) -> None:
    models = [entry("a", weight=1), entry("b", weight=3)]
    found = written(tmp_path, merge_method="linear", models=models, out_dtype="bfloat16")
    expected = average([states["a"], states["b"]], states["a"], weights=[1, 3])
    assert same(found, {n: t.bfloat16() for n, t in expected.items()})
    config = read_mergekit({"merge_method": "task_arithmetic", "base_model": "base", "models": models})
    assert config.method == TaskArithmetic(lam=1.0, weights=[1.0, 3.0])
    bare = read_mergekit({"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}]})
    assert bare.method == TaskArithmetic(lam=0.4, weights=[1.0])
    assert isinstance(read_mergekit({"merge_method": "average", "models": models}).method, Average)


def test_filters_and_gradients(tmp_path: Path, states: dict[str, State]) -> None:
    weight = [{"filter": "mlp", "value": [0, 1, 0.5]}, {"value": 0.25}]
    models = [entry("a", weight=weight)]
    found = written(tmp_path, merge_method="task_arithmetic", base_model="base", models=models)
    for name, w in {"emb.weight": 0.25, "h.0.mlp": 0, "h.1.mlp": 1, "h.1.attn": 0.25, "h.2.mlp": 0.5}.items():
        alone = task_arithmetic([states["a"]], states["base"], lam=1.0, weights=[w])
        assert torch.equal(found[name], alone[name]), name


def test_a_filter_that_misses_falls_back() -> None:
    density = [{"filter": "mlp", "value": 0.5}]
    models = [entry("a", density=density), entry("b")]
    config = read_mergekit(
        {"merge_method": "ties", "base_model": "c", "models": models, "parameters": {"density": 0.3}}
    )
    assert config.params("h.0.mlp", 0.0)["density"] == [0.5, 0.3]
    assert config.params("h.0.attn", 0.0)["density"] == [0.3, 0.3]
    assert isinstance(config.method, Ties) and config.method.density == (0.3, 0.3)


def test_lambda_by_layer(tmp_path: Path, states: dict[str, State]) -> None:
    parameters = {"lambda": [0.0, 1.0], "density": 1.0}
    found = written(tmp_path, merge_method="ties", base_model="base", models=[entry("a")], parameters=parameters)
    assert torch.equal(found["h.0.mlp"], states["base"]["h.0.mlp"]) and torch.equal(
        found["h.2.mlp"], states["a"]["h.2.mlp"]
    )


GOOD: dict[str, Any] = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slices": []}, "'slices'"),
        ({"chat_template": "x"}, "'chat_template'"),
        ({"merge_method": "slerp"}, "'slerp'"),
        ({"merge_method": "tie"}, "did you mean 'ties'"),
        ({"tokenizer_source": "union"}, "tokenizer_source"),
        ({"compat": "peft"}, "compat 'peft'"),
        ({"base_model": None}, "base_model"),
        ({"models": []}, "models: a list"),
        ({"models": [{"model": "base"}]}, "besides the base"),
        ({"models": [{"model": "a", "weight": 1}]}, "'weight'"),
        ({"models": [entry("a", densty=0.1)]}, "did you mean 'density'"),
        ({"models": [entry("a", density=0)]}, r"\(0, 1\]"),
        ({"models": [entry("a", weight="much")]}, "weight is 'much'"),
        ({"models": [entry("a", weight=[{"filter": "x"}])]}, "no setting"),
        ({"parameters": {"rescale": True}}, "rescale"),
        ({"parameters": {"normalize": "yes"}}, "normalize is 'yes'"),
        ({"compat": "mergekit", "parameters": {"scope": "tensor"}}, "'scope'"),
        ({"models": [{"model": 3}]}, "model is 3"),
        ({"merge_method": ["ties"]}, "merge_method"),
        ({"merge_method": "task_arithmetic", "models": [entry("a", density=0.5)]}, "'density'"),
        ({"merge_method": "linear", "models": [entry("a", density=0.5)]}, "'density'"),
        ({"dtype": 3}, "dtype is 3"),
        ({"out_dtype": "int8"}, "'int8'"),
    ],
)
def test_what_is_not_understood_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_mergekit(GOOD | change)


def test_the_file_at_fault_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(GOOD | {"base_modell": "base"}))
    with pytest.raises(InputError, match=r"run\.yaml: .*'base_modell': did you mean 'base_model'"):
        read_mergekit(file)
    with pytest.raises(InputError, match=r"none\.yaml"):
        read_mergekit(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["models: [", "- 1", ""])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=r"run\.yaml"):
        read_mergekit(file)
