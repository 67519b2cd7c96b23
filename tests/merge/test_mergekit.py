"""mergekit's YAML: what each setting means here, and what is refused."""

import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from downriver.core.errors import InputError
from downriver.merge import (
    Average,
    TaskArithmetic,
    Ties,
    average,
    breadcrumbs,
    dare,
    della,
    open_store,
    read_mergekit,
    slerp,
    task_arithmetic,
    ties,
)
from downriver.merge.stores import Store
from downriver.models import small_language_model, word_tokenizer

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
        ({"slices": []}, "one of models and slices"),
        ({"chat_template": "x"}, "'chat_template'"),
        ({"merge_method": "karcher"}, "'karcher'"),
        ({"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]}, "slerp: 3 models"),
        ({"merge_method": "model_stock", "parameters": {"filter_wise": 1}}, "filter_wise is 1"),
        ({"merge_method": "della", "parameters": {"epsilon": 0.6}}, "epsilon is 0.6"),
        ({"merge_method": "dare_ties", "models": [entry("a", t=0.5)]}, "'t'"),
        ({"merge_method": "sce", "parameters": {"select_topk": 3}}, "select_topk is 3"),
        ({"merge_method": "passthrough", "models": [entry("a"), entry("b")]}, "passthrough: 2 models"),
        ({"merge_method": "tie"}, "did you mean 'ties'"),
        ({"tokenizer_source": "other"}, "tokenizer_source .other."),
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


def test_the_methods_of_other_names(tmp_path: Path, states: dict[str, State]) -> None:
    two = [entry("a", weight=0.5), entry("b")]
    base, models = states["base"], [states["a"], states["b"]]
    expected = {
        "dare_linear": dare(models, base, density=0.3, weights=[0.5, 1]),
        "dare_ties": dare(models, base, density=0.3, weights=[0.5, 1], consensus="ties"),
        "della": della(models, base, density=0.3, weights=[0.5, 1]),
        "breadcrumbs": breadcrumbs(models, base, density=0.3, weights=[0.5, 1]),
        "breadcrumbs_ties": breadcrumbs(models, base, density=0.3, weights=[0.5, 1], consensus="ties"),
    }
    for number, (name, result) in enumerate(expected.items()):
        (tmp_path / str(number)).mkdir()
        config = {"merge_method": name, "base_model": "base", "models": two, "parameters": {"density": 0.3}}
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        out = read_mergekit(file).merge(tmp_path / str(number) / "out").out
        assert same(load_file(out / "model.safetensors"), result), name


def test_slerp_goes_from_the_base(tmp_path: Path, states: dict[str, State]) -> None:
    t = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    found = written(tmp_path, merge_method="slerp", base_model="base", models=[{"model": "a"}], parameters={"t": t})
    torch.testing.assert_close(found["h.0.mlp"], states["base"]["h.0.mlp"])
    torch.testing.assert_close(found["h.2.mlp"], states["a"]["h.2.mlp"])
    half = slerp([states["base"], states["a"]], states["base"])
    for name in ("emb.weight", "h.1.mlp", "h.1.attn"):
        torch.testing.assert_close(found[name], half[name])


@pytest.fixture
def llamas(tmp_path: Path) -> dict[str, Path]:
    """Three-layer Llamas with equal tensors in every layer."""
    found = {}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        found[name] = tmp_path / name
    return found


def test_layers_are_stacked_and_the_result_loads(tmp_path: Path, llamas: dict[str, Path]) -> None:
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "b", "layer_range": [1, 3]}]},
    ]
    scale = [{"filter": "o_proj", "value": 0.0}]
    config = {"merge_method": "passthrough", "slices": slices, "parameters": {"scale": scale}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    read_mergekit(tmp_path / "run.yaml").merge(tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    a, b = (LlamaForCausalLM.from_pretrained(llamas[name]) for name in "ab")
    for place, (source, layer) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        mine, theirs = model.model.layers[place], source.model.layers[layer]
        assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        assert not mine.self_attn.o_proj.weight.any()
    assert torch.equal(model.model.embed_tokens.weight, a.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, b.lm_head.weight)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_slices_that_do_not_fit_are_named(llamas: dict[str, Path]) -> None:
    def sliced(*slices: list[tuple[str, list[int]]], method: str = "passthrough") -> dict[str, Any]:
        made = [{"sources": [{"model": str(llamas[m]), "layer_range": r} for m, r in part]} for part in slices]
        return {"merge_method": method, "slices": made, "base_model": str(llamas["base"])}

    with pytest.raises(InputError, match=r"layer_range \[2, 4\], part of 0 to 3"):
        read_mergekit(sliced([("a", [2, 4])]))
    with pytest.raises(InputError, match="one source a slice"):
        read_mergekit(sliced([("a", [0, 1]), ("b", [0, 1])]))
    with pytest.raises(InputError, match="different length"):
        read_mergekit(sliced([("a", [0, 1]), ("b", [0, 2])], method="ties"))
    with pytest.raises(InputError, match="same sources in every slice"):
        read_mergekit(sliced([("a", [0, 1])], [("b", [1, 3])], method="ties"))
    config = read_mergekit(sliced([("base", [0, 2]), ("a", [0, 2])], method="slerp"))
    assert len(config.models) == 2 and config.models[0] is config.base


WEIGHTS = {"models": [entry("a", weight=0.6), entry("b", weight=0.4)]}
SHARED: dict[str, dict[str, Any]] = {
    "linear": WEIGHTS,
    "task_arithmetic": WEIGHTS | {"parameters": {"lambda": 0.7}},
    "ties": WEIGHTS | {"parameters": {"density": 0.4, "lambda": 0.8}},
    "breadcrumbs": WEIGHTS | {"parameters": {"density": 0.5, "gamma": 0.1}},
    "breadcrumbs_ties": WEIGHTS | {"parameters": {"density": 0.5, "gamma": 0.1, "rescale": True, "normalize": True}},
    "dare_linear": WEIGHTS | {"parameters": {"density": 1.0}},  # draws cannot agree: without any the rest must
    "dare_ties": WEIGHTS | {"parameters": {"density": 1.0}},
    "della": WEIGHTS | {"parameters": {"density": 1.0}},
    "model_stock": {"models": [entry("a"), entry("b")]},
    "model_stock by filter": {"models": [entry("a"), entry("b")], "parameters": {"filter_wise": True}},
    "sce": {"models": [entry("a"), entry("b")], "parameters": {"select_topk": 0.3}},
    "slerp": {"models": [entry("base"), entry("a")], "parameters": {"t": [0.2, 0.8]}},
    "passthrough": {
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3]}]},
        ]
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_mergekit_itself_gives_the_same(tmp_path: Path, llamas: dict[str, Path], name: str) -> None:
    """With DOWNRIVER_MERGEKIT naming a python that has mergekit 0.1.x installed."""
    python = os.environ.get("DOWNRIVER_MERGEKIT")
    if not python:
        pytest.skip("DOWNRIVER_MERGEKIT names no python with mergekit")
    config = {"merge_method": name.split()[0], "dtype": "float32"} | SHARED[name]
    if name not in ("linear", "passthrough"):
        config["base_model"] = "base"
    found, expected = both(tmp_path, python, config, "--no-copy-tokenizer")
    assert set(found.names()) == set(expected.names())
    for tensor in expected.names():
        size = math.prod(expected.shape(tensor))
        ours, theirs = (store.read(tensor, 0, size) for store in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7, msg=f"{name}, {tensor}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "ties"])
@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_mergekit_aligns_vocabularies_alike(tmp_path: Path, name: str, vocabulary: str) -> None:
    """Token by token: the two number the tokens of a union differently."""
    python = os.environ.get("DOWNRIVER_MERGEKIT")
    if not python:
        pytest.skip("DOWNRIVER_MERGEKIT names no python with mergekit")
    weights = {"base": 0.2, "a": 0.3, "b": 0.5}
    words = {"base": "red square and circle", "a": "a red red line", "b": "line and square square of blue"}
    for seed, (folder, text) in enumerate(words.items()):
        lm = small_language_model("causal-lm", word_tokenizer([text]), width=8, heads=2, seed=seed)
        lm.save(tmp_path / folder)
    config = {"merge_method": name, "base_model": "base", "dtype": "float32", "tokenizer_source": vocabulary}
    config |= SHARED["ties"] if name == "ties" else {"models": [entry(m, weight=w) for m, w in weights.items()]}
    found, expected = both(tmp_path, python, config)
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / which).get_vocab() for which in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and ("blue" in ours) == (vocabulary == "union")
    for tensor in expected.names():
        shape = expected.shape(tensor)
        mine, its = (s.read(tensor, 0, math.prod(shape)).view(shape) for s in (found, expected))
        if shape[0] == len(theirs):
            mine, its = (torch.stack([t[v[token]] for token in ours]) for t, v in ((mine, ours), (its, theirs)))
        torch.testing.assert_close(mine, its, rtol=2e-6, atol=2e-7, msg=f"{name}, {tensor}")


def both(folder: Path, python: str, config: dict[str, Any], *options: str) -> tuple[Store, Store]:
    """What we and mergekit make of a file."""
    for file, text in {"ours": config | {"compat": "mergekit"}, "theirs": config}.items():
        paths = re.sub(r"(model: )(a|b|base)\n", rf"\1{folder}/\2\n", yaml.safe_dump(text))
        (folder / f"{file}.yaml").write_text(paths)
    command = [str(Path(python).parent / "mergekit-yaml"), *options, "theirs.yaml", "theirs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read_mergekit(folder / "ours.yaml").merge(folder / "ours")
    return open_store(folder / "ours"), open_store(folder / "theirs")


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
