"""The advisor: public runs, the Pareto set against brute force, constraints, a ledger of one's own, bad input."""

import itertools
import json

import polars as pl
import pytest

from downriver.adapt.peft_advisor import OBJECTIVES, advise, method_of, read_comparison, read_ledger
from downriver.adapt.peft_catalogue import known
from downriver.core import InputError, Measurement
from downriver.study.ledger import Ledger


@pytest.fixture(scope="module")
def public(shared_data):
    return read_comparison(shared_data("peft_method_comparison"))


@pytest.fixture(scope="module")
def maths(public):
    return public.filter(pl.col("benchmark").str.starts_with("MetaMathQA"))


def run_file(folder, name, **changes):
    """A file in the form of the public ones."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "score": 0.5,
        "memory": 10,
        "type": {"peft_type": "LORA"},
        "forgetting": 0.1,
        "status": "success",
    } | changes
    metrics = [{"step": 1, "test accuracy": given["score"], "forgetting": given["forgetting"]}]
    content = {
        "run_info": {
            "peft_config": given["type"],
            "total_time": 5.0,
            "train_config": {"model_id": "m", "optimizer_kwargs": {"lr": 1e-4}},
        },
        "train_info": {
            "status": given["status"],
            "metrics": metrics,
            "num_trainable_params": 10,
            "accelerator_memory_max": given["memory"],
            "file_size": 100,
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(content))


def brute_force(rows, names):
    """Names of the runs that no other one beats, by the definition."""

    def values(row):
        return [-row[n] if OBJECTIVES[n] == "higher" else row[n] for n in names]

    kept = []
    for row in rows:
        mine, beaten = values(row), False
        for other in rows:
            theirs = values(other)
            worse = any(a > b for a, b in zip(theirs, mine, strict=True))
            beaten |= not worse and theirs != mine
        if not beaten:
            kept.append(row["run"])
    return set(kept)


def test_the_figures_of_the_public_table(maths):
    """As the files have them: score, GB of memory, seconds, forgetting."""
    rows = {row["run"].replace("llama-3.2-3B-", ""): row for row in maths.to_dicts()}
    assert len(rows) == 63
    scores = {
        "lily--rank140-mlp-a2-b2-s8.0": 0.526,
        "hira--rank32-lr4.5e-3": 0.513,
        "lora--rank64-rslora": 0.513,
        "shira--lr_0.0003-random_seed_42": 0.510,
        "lora--rank32": 0.478,
        "lora--rank64": 0.474,
        "full-finetuning--lr_0.00001": 0.472,
        "lora--rank32-dora": 0.469,
        "ia3--all-attn-5k-lr0.005": 0.455,
        "ia3--default": 0.311,
        "osf--rank128": 0.427,
        "adalora--rank32": 0.373,
        "prefixtuning--tokens50-init_prefix-lr_0.005": 0.416,
        "prefixtuning--lr_0.001": 0.186,
        "ptuning--default": 0.350,
        "boft--default": 0.343,
        "prompt_tuning--default": 0.057,
        "prompt_tuning--sample_vocab-lr_0.001": 0.343,
    }
    assert {name: round(rows[name]["score"], 3) for name in scores} == pytest.approx(scores, abs=6e-4)
    lora = rows["lora--rank32"]
    assert round(lora["parameters"] / 1e6, 2) == 9.18 and round(lora["memory"] / 1e9, 1) == 22.3
    assert round(lora["seconds"]) == 1153 and round(rows["boft--default"]["seconds"]) == 9702
    assert round(rows["full-finetuning--lr_0.00001"]["memory"] / 1e9, 1) == 38.9
    kept = {"full-finetuning--lr_0.00001": 0.030, "lora--rank32": 0.050, "miss--default": 0.197}
    assert {name: round(rows[name]["forgetting"], 3) for name in kept} == kept


def test_methods_of_the_public_table(public):
    assert public.height == 94 and public["benchmark"].n_unique() == 2
    assert set(public["method"]) <= {*known(), "full"}
    named = dict(zip(public["run"], public["method"], strict=True))
    assert named["lora--llama-3.2-3B-rank32-dora"] == named["dora--flux2-klein-rank64"] == "dora"
    assert named["lora--llama-3.2-3B-rank64-rslora"] == "rslora"
    assert named["lora--llama-3.2-3B-rank14-target-mlp-bdlora"] == "bdlora"
    assert named["full-finetuning--llama-3.2-3B-lr_0.00001"] == "full"
    assert method_of({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}) == "pissa"


@pytest.mark.parametrize(
    "objectives",
    [
        ("score", "memory"),
        ("score", "parameters"),
        ("score", "forgetting"),
        ("score",),
        ("score", "memory", "forgetting", "seconds", "parameters", "disk"),
    ],
)
def test_the_pareto_set_is_that_of_brute_force(public, objectives):
    advice = advise(public, objectives=objectives)
    for (_,), group in public.group_by(["benchmark"]):
        rows = [row for row in group.to_dicts() if all(row[n] is not None and row[n] == row[n] for n in objectives)]
        chosen = advice.chosen.filter(pl.col("run").is_in(group["run"].implode()))
        assert set(chosen["run"]) == brute_force(rows, objectives)
    assert advice.chosen.height + advice.left_out.height == public.height
    assert advice.chosen["reason"].str.len_chars().min() > 0 and advice.left_out["reason"].str.len_chars().min() > 0


def test_reasons_are_true(maths):
    """Every run that was left out names one that is chosen or beats it, with its numbers."""
    advice = advise(maths, objectives=("score", "forgetting"))
    rows = {row["run"]: row for row in maths.to_dicts()}
    for row in advice.left_out.to_dicts():
        other = rows[row["reason"].split(" has no less")[0]]
        assert other["score"] >= row["score"] and other["forgetting"] <= row["forgetting"]
    top = advice.chosen.row(0, named=True)
    assert top["run"].startswith("lily") and top["reason"].startswith("the highest score (0.5262)")
    last = advice.chosen.row(-1, named=True)
    assert "the lowest forgetting (0.000155)" in last["reason"] and "beside lily" in last["reason"]
    assert str(advice).startswith(f"{top['benchmark']}: {advice.chosen.height} runs that no other beats on score and")


def test_constraints(maths, public):
    bounded = advise(maths, most={"memory": 22e9, "disk": 1e9}, least_score=0.3, tasks=20)
    assert bounded.chosen.height and (bounded.chosen["memory"] <= 22e9).all() and (bounded.chosen["disk"] <= 5e7).all()
    why = dict(zip(bounded.left_out["run"], bounded.left_out["reason"], strict=True))
    assert why["full-finetuning--llama-3.2-3B-lr_0.00001"].startswith("memory 3.887e+10 is above 2.2e+10")
    assert why["tinylora--llama-3.2-3B-default"].startswith("score 0.01")
    merged = advise(maths, merge=True, quantised=True)
    facts = {name: entry for name, entry in known().items() if entry.mergeable and entry.quantised}
    assert set(merged.chosen["method"]) <= set(facts)
    assert any("lily does not merge" in reason for reason in merged.left_out["reason"])
    assert advise(maths, merge=True, least_score=0.47, most={"memory": 4e10}).chosen.height
    only = advise(public, benchmark="MetaMathQA")
    assert only.chosen["benchmark"].n_unique() == 1 and only.chosen.height + only.left_out.height == 63
    assert advise(maths, least_score=0.99).chosen.is_empty()
    assert str(advise(maths, least_score=0.99)) == "no run meets the constraints"


def test_what_was_not_measured_is_not_advised(public):
    advice = advise(public, objectives=("score", "forgetting"))
    why = dict(zip(advice.left_out["run"], advice.left_out["reason"], strict=True))
    assert why["full-finetuning--flux2-klein-default"] == "forgetting was not measured"


def test_equal_runs_are_both_chosen():
    table = pl.DataFrame({"run": ["a", "b"], "score": [0.5, 0.5], "memory": [1.0, 1.0]})
    table = table.with_columns(benchmark=pl.lit("demo"), method=pl.lit("lora"))
    assert advise(table).chosen["run"].to_list() == ["a", "b"]


def test_benchmarks_are_not_mixed(tmp_path):
    run_file(tmp_path / "one", "good", score=0.9, memory=1)
    run_file(tmp_path / "two", "bad", score=0.1, memory=9)
    run_file(tmp_path / "two", "dead", status="failed")
    advice = advise(read_comparison(tmp_path))
    assert advice.chosen["run"].to_list() == ["good", "bad"] and advice.left_out.is_empty()


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "runs")
    for arm, seed in itertools.product(("lora", "full"), range(2)):
        good = 0.8 if arm == "lora" else 0.7
        values = {"accuracy": good + seed / 100, "retained loss": 0.2 if arm == "lora" else 0.5, "parameters": 50}
        rows = [
            Measurement(name, value, task="t", study="mine", arm=arm, seed=seed, direction=way)
            for (name, value), way in zip(values.items(), ("higher", "lower", "lower"), strict=True)
        ]
        ledger.write("mine", f"{arm}{seed}", rows)
    return ledger


def test_a_ledger_of_ones_own(ledger):
    runs = read_ledger(ledger.rows(), "accuracy", forgetting="retained loss")
    found = {row["run"]: row for row in runs.to_dicts()}
    assert found["lora"]["score"] == pytest.approx(0.805) and found["lora"]["seeds"] == 2
    assert found["lora"]["benchmark"] == "mine, t" and found["full"]["method"] == "full"
    advice = advise(runs, objectives=("score", "forgetting"))
    assert advice.chosen["run"].to_list() == ["lora"]
    assert found["lora"]["forgetting"] == pytest.approx(0.2) and found["lora"]["disk"] is None
    assert found["lora"]["parameters"] == 50  # a metric of that name, before the arm's cost
    assert read_ledger(ledger.rows(), "accuracy", disk="parameters")["disk"].to_list() == [50, 50]
    lower = read_ledger(ledger.rows(), "retained loss")
    assert lower.sort("run")["score"].to_list() == [-0.5, -0.2]


def test_with_the_public_runs_together(ledger, public):
    both = pl.concat([public, read_ledger(ledger.rows(), "accuracy", forgetting="retained loss")])
    advice = advise(both, objectives=("score", "forgetting"))
    assert "lora" in advice.chosen["run"].to_list() and advice.chosen["benchmark"].n_unique() == 3


def test_bad_input(tmp_path, ledger):
    with pytest.raises(InputError, match="holds no JSON files"):
        read_comparison(tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json cannot be read as JSON"):
        read_comparison(tmp_path / "bad")
    (tmp_path / "bad" / "a.json").write_text('{"run_info": {}}')
    with pytest.raises(InputError, match=r"a\.json is no run of peft's comparison: 'train_info'"):
        read_comparison(tmp_path / "bad")
    run_file(tmp_path / "dead", "a", status="failed")
    with pytest.raises(InputError, match="none of 1 runs has finished"):
        read_comparison(tmp_path / "dead")
    run_file(tmp_path / "runs2", "a")
    runs = read_comparison(tmp_path / "runs2")
    with pytest.raises(InputError, match="unknown objective 'speed'"):
        advise(runs, objectives=("speed",))
    with pytest.raises(InputError, match="objectives is empty"):
        advise(runs, objectives=())
    with pytest.raises(InputError, match="tasks is 0"):
        advise(runs, tasks=0)
    with pytest.raises(InputError, match="unknown benchmark 'GPT-9'"):
        advise(runs, benchmark="GPT-9")
    with pytest.raises(InputError, match="unknown column 'speed'"):
        read_ledger(ledger.rows(), "accuracy", speed="accuracy")
    with pytest.raises(InputError, match="unknown metric 'f1'"):
        read_ledger(ledger.rows(), "f1")
    with pytest.raises(InputError, match="column of the ledger"):
        read_ledger(pl.DataFrame({"arm": ["a"]}), "accuracy")
