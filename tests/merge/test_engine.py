"""The streamed merge: the same numbers as in memory, a checkpoint that loads, and its memory bound."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from downriver.core.errors import DownriverError, InputError
from downriver.merge import TaskArithmetic, Ties, merge, ties
from downriver.merge.plan import depths, plan

State = dict[str, Tensor]


def folder(path: Path, state: State) -> Path:
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    return path


def noisy(state: State, seed: int, scale: float = 0.1) -> State:
    g = torch.Generator().manual_seed(seed)
    return {
        n: t + (scale * torch.randn(t.shape, generator=g)).to(t.dtype) if t.is_floating_point() else t
        for n, t in state.items()
    }


@pytest.fixture
def base() -> State:
    g = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (500, 32), "h.0.w": (90, 80), "h.1.w": (90, 80), "h.2.w": (90, 80), "norm": (32,)}
    return {n: torch.randn(s, generator=g) for n, s in shapes.items()} | {"ids": torch.arange(9)}


@pytest.fixture
def states(base: State) -> list[State]:
    return [noisy(base, i) for i in (1, 2, 3)]


def tiny_llama(tie: bool = True) -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tie)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "method", [Ties(), Ties(scope="tensor", elect="normmass"), Ties(compat="mergekit"), TaskArithmetic()]
)
@pytest.mark.parametrize("max_bytes", [2**20, 2**30])
def test_streamed_equals_in_memory(
    tmp_path: Path, base: State, states: list[State], method: Ties, max_bytes: int
) -> None:
    from downriver.merge.engine import combine

    models = [folder(tmp_path / str(i), s) for i, s in enumerate(states)]
    report = merge(models, folder(tmp_path / "base", base), method, tmp_path / "out", max_bytes=max_bytes, workers=2)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = combine(states, base, method)
    assert written.keys() == expected.keys() and all(torch.equal(written[n], expected[n]) for n in expected)
    assert report.copied == ("ids",) and report.bytes_written == sum(t.nbytes for t in base.values())


def test_cancelled_votes_are_settled_over_blocks(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(30_000), "v": torch.zeros(3)}
    signs = torch.randint(-1, 2, (2, 30_000), generator=g).float()
    models = [{"w": s, "v": torch.full((3,), -1.0)} for s in signs]
    merge(models, base, Ties(density=1.0), tmp_path / "out", max_bytes=2**20)
    total = signs.sum(0)
    gamma = total.sign()
    gamma[total == 0] = (gamma.sum() - 3).sign()
    agree = signs * gamma > 0
    expected = (signs * agree).sum(0) / agree.sum(0).clamp(min=1)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], expected)
    assert torch.equal(ties(models, base, density=1.0)["w"], expected)


def test_shards_have_an_index_and_load(tmp_path: Path) -> None:
    model = tiny_llama(tie=False)
    model.save_pretrained(tmp_path / "base")
    other = tiny_llama(tie=False)
    other.save_pretrained(tmp_path / "a")
    report = merge([tmp_path / "a"], tmp_path / "base", Ties(density=1.0), tmp_path / "out", shard_size=4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in merged.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "density: `1.0`" in card and all(entry["fingerprint"] in card for entry in report.inputs)
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize("doubled", [False, True])
def test_a_tied_output_layer_is_counted_and_written_once(tmp_path: Path, doubled: bool) -> None:
    models = [tiny_llama() for _ in range(3)]
    for name, model in zip(("base", "a", "b"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        if doubled:  # older checkpoints keep both copies
            stored = load_file(tmp_path / name / "model.safetensors")
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
            save_file(stored, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "base", Ties(), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    in_memory = ties(models[1:], models[0])
    assert in_memory.lm_head.weight is in_memory.model.embed_tokens.weight
    assert all(torch.equal(v, in_memory.state_dict()[n]) for n, v in merged.state_dict().items())


def test_equal_layers_of_an_untied_model_are_both_written(tmp_path: Path) -> None:
    model = tiny_llama(tie=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    for name in ("base", "a"):
        model.save_pretrained(tmp_path / name)
    merge([tmp_path / "a"], tmp_path / "base", Ties(), tmp_path / "out")
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_vocabularies_of_different_size(tmp_path: Path, base: State, states: list[State]) -> None:
    states[0]["embed.weight"] = states[0]["embed.weight"][:480]
    states[1]["embed.weight"] = torch.cat([states[1]["embed.weight"], torch.ones(7, 32)])
    with pytest.raises(InputError, match=r"embed\.weight' has shape \(480, 32\).*\(507, 32\)"):
        ties(states, base)
    merged = ties(states, base, density=1.0, on_mismatch="slice-embed")["embed.weight"]
    assert merged.shape == (500, 32) and torch.equal(merged[480:], base["embed.weight"][480:])
    assert (merged[:480] != base["embed.weight"][:480]).all()
    states[2]["h.1.w"] = torch.zeros(80, 80)
    with pytest.raises(InputError, match=r"h\.1\.w"):
        ties(states, base, on_mismatch="slice-embed")


def test_types(tmp_path: Path, base: State, states: list[State]) -> None:
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in states[0].items()}
    merge([half], base, Ties(density=1.0), tmp_path / "mixed")  # float32 minus bfloat16, in float32
    assert torch.equal(load_file(tmp_path / "mixed" / "model.safetensors")["norm"], half["norm"].float())
    merge(states, base, Ties(), tmp_path / "half", out_dtype="bfloat16")
    written = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(written["h.0.w"], ties(states, base)["h.0.w"].bfloat16()) and written["ids"].dtype == torch.int64
    with pytest.raises(InputError, match="dtype 'bfloat17'"):
        merge(states, base, Ties(), tmp_path / "no", dtype="bfloat17")


def test_include_exclude_and_parameters_by_tensor(base: State, states: list[State], tmp_path: Path) -> None:
    merged = ties(states, base, include=r"^h\.", exclude=[r"h\.1"])
    changed = {n for n in base if not torch.equal(merged[n], base[n])}
    assert changed == {"h.0.w", "h.2.w"}
    params = {r"h\.": {"lam": [0.0, 2.0]}, "norm": {"density": 1.0}}
    merge(states[:1], base, Ties(density=1.0), tmp_path / "out", params=params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["h.0.w"], base["h.0.w"]) and torch.equal(written["h.1.w"], states[0]["h.1.w"])
    assert torch.allclose(written["h.2.w"], 2 * states[0]["h.2.w"] - base["h.2.w"])
    for wrong, message in (({"hh": {"lam": 1}}, "matches no tensor"), ({"h": {"lamb": 1}}, "did you mean 'lam'")):
        with pytest.raises(InputError, match=message):
            merge(states, base, Ties(), tmp_path / "no", params=wrong)
    with pytest.raises(InputError, match="no tensor is left"):
        ties(states, base, include="nothing like it")


def test_densities_by_tensor_rank_together_where_they_are_equal(base: State, states: list[State]) -> None:
    job = plan(states, base, Ties(), params={r"h\.": {"density": 0.5}})
    cuts = {name: known.cuts for name, known in job.known().items()}
    assert cuts["h.0.w"] == cuts["h.2.w"] != cuts["norm"] == cuts["embed.weight"]


def test_depths_of_two_stacks() -> None:
    names = ["enc.layer.0.w", "enc.layer.4.w", "dec.0.w", "dec.2.w", "dec.1.w", "head"]
    assert list(depths(names).values()) == [0, 1, 0, 1, 0.5, 0]


def test_the_report(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4)}
    models = [{"w": torch.tensor([3.0, 4, 0, 0])}, {"w": torch.tensor([-1.0, 0, 0, 2])}]
    t = merge(models, base, Ties(density=1.0), tmp_path / "out").total
    assert t.kept == (0.5, 0.5) and t.conflict == pytest.approx(1 / 3) and t.agreement == 0.75
    assert t.norms == pytest.approx((5.0, 5**0.5)) and t.merged_norm == pytest.approx(29**0.5)


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path, base: State, states: list[State]) -> None:
    out = folder(tmp_path / "out", {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="exists already"):
        merge(states, base, Ties(), out)
    assert list(load_file(out / "model.safetensors")) == ["x"]
    merge(states, base, Ties(), out, overwrite=True)
    assert "norm" in load_file(out / "model.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(
    tmp_path: Path, base: State, states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    states[2]["norm"][0] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        merge(states, base, Ties(), tmp_path / "out")
    states[2]["norm"][0] = 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DownriverError, match="disk full"):
        merge(states, base, Ties(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_bound_that_is_too_small_names_the_smallest(tmp_path: Path, base: State, states: list[State]) -> None:
    with pytest.raises(InputError, match=r"at least \d+ bytes") as error:
        merge(states, base, Ties(), tmp_path / "out", max_bytes=1000)
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    merge(states, base, Ties(), tmp_path / "out", max_bytes=smallest)


def test_damaged_inputs_are_named(tmp_path: Path, base: State) -> None:
    whole = folder(tmp_path / "base", base)
    (tmp_path / "empty").mkdir()
    cut = folder(tmp_path / "cut", base)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    for broken, message in ((tmp_path / "empty", "no weights"), (cut, "truncated")):
        with pytest.raises(InputError, match=message):
            merge([broken], whole, Ties(), tmp_path / "out")
    with pytest.raises(InputError, match="list of models"):
        merge(whole, whole, Ties(), tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="did you mean 'ties'"):
        merge([whole], whole, "tie", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_on_disk_needs_a_folder_for_the_result(tmp_path: Path, base: State, states: list[State]) -> None:
    where = folder(tmp_path / "base", base)
    with pytest.raises(InputError, match="out="):
        ties(states, where)
    assert ties(states, where, out=tmp_path / "out") == tmp_path / "out"


PEAK = """
    import sys
    from pathlib import Path
    import torch
    from downriver.merge import Ties, merge

    def peak():  # of this process alone: ru_maxrss would start from that of pytest
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

    root, bound = Path(sys.argv[1]), int(sys.argv[2])
    small = {"w": torch.zeros(10, 10)}
    merge([small, small], small, Ties(), root / "warm")
    before = peak()
    merge([root / "a", root / "b"], root / "base", Ties(), root / "out", max_bytes=bound)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_stays_below_the_declared_bound(tmp_path: Path) -> None:
    names = {f"h.{i}.w": (1_000, 4_000) for i in range(4)} | {"embed.weight": (14_000, 1_000)}  # 120 MB a model
    for i, model in enumerate(("base", "a", "b")):
        g = torch.Generator().manual_seed(i)
        folder(tmp_path / model, {n: torch.randn(s, generator=g) for n, s in names.items()})
    bound = 48 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", dedent(PEAK), str(tmp_path), str(bound)], capture_output=True, text=True, check=True
    )
    assert 2**20 < int(run.stdout) < bound


def test_two_perturbed_minilm_merge_and_load(tmp_path: Path, asset: Callable[[str], Path]) -> None:
    source = asset("all-MiniLM-L6-v2")
    original = transformers.AutoModel.from_pretrained(source)
    for i in range(2):
        torch.manual_seed(i)
        copy = transformers.AutoModel.from_pretrained(source)
        with torch.no_grad():
            for p in copy.parameters():
                p.add_(0.001 * torch.randn_like(p))
        copy.save_pretrained(tmp_path / str(i))
    report = merge([tmp_path / "0", tmp_path / "1"], "all-MiniLM-L6-v2", "ties", tmp_path / "out", max_bytes=2**26)
    merged, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and report.total.kept == pytest.approx((0.2, 0.2), abs=1e-4)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(["a river"], return_tensors="pt")
    with torch.no_grad():
        a, b = (m.eval()(**tokens).last_hidden_state.mean(1) for m in (original, merged))
    assert torch.cosine_similarity(a, b).item() > 0.99 and not torch.equal(a, b)
