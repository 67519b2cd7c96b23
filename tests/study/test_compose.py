"""Studies from YAML: what may stand in a file, what is refused, and what comes out."""

import polars as pl
import pytest
import yaml

from downriver import models, tasks
from downriver.adapt import full
from downriver.core import Budget, InputError
from downriver.study import load
from downriver.study.config import chain, read

WINE = {
    "name": "wines",
    "model": "small:mlp:nano:0",
    "task": "wine",
    "budget": "640 examples",
    "seeds": 2,
    "metrics": ["accuracy", "loss"],
}
PROBE = {"probe": {"adapt": "linear_probe"}}


def run(study, folder):
    result = study.run(folder / "runs", executor="serial", progress=False)
    assert result.failures == [], result.failures[0].traceback
    return result


def value(rows, arm, metric):
    return rows.filter(arm=arm, metric=metric)["value"].mean()


def test_arms_of_every_kind_from_a_file_of_the_users(tmp_path):
    lines = [
        f"{' '.join(('warm sunny bright' if i % 2 else 'cold rainy dark', str(i)) * 6)},{i % 2}" for i in range(60)
    ]
    (tmp_path / "days.csv").write_text("\n".join(["note,mood", *lines]))
    (tmp_path / "days.yaml").write_text(
        f"""
        title: Which way for notes?
        model: {{source: "small:text-encoder:nano:0", max_length: 16}}
        task: {{train: {tmp_path}/days.csv, text: note, label: mood, kind: text-classification}}
        sample: {{train: 32}}
        budget: 64 examples
        seeds: 2
        metrics: [accuracy, loss]
        retention: {{train: {tmp_path}/days.csv, text: note, label: mood, kind: text-classification}}
        save: {tmp_path}/saved
        arms:
          probe: {{adapt: linear_probe}}
          one: [from: probe, adapt: {{method: full, head: keep, learning_rate: 1e-3, seed: 1}}]
          two: [from: probe, adapt: {{method: full, head: keep, learning_rate: 1e-3, seed: 2, budget: 32 examples}}]
          soup: {{merge: {{method: average, models: [one, two], base: probe}}}}
          ties: [from: probe, merge: {{method: ties, models: [one, two], density: 0.5}}]
        claims:
          - keeps: {{arm: soup, than: one, on: accuracy, within: 1.5}}
          - better: {{arm: one, than: probe, on: retention}}
        """
    )
    study = load(tmp_path / "days.yaml")
    assert study.name == "days" and study.budget == Budget(64) and study.seeds == 2
    result = run(study, tmp_path)
    rows = result.rows()
    assert result.arms == ["probe", "one", "two", "soup", "ties"]
    assert set(rows["metric"]) == {"accuracy", "loss", "mrr_before", "mrr_after", "retention_change", "retention"}
    assert (
        result.verdicts()[0].mean > -1.5 and result.verdicts()[1].claim.text == "one is better than probe on retention"
    )
    # the probe changes no weight of the encoder, so it keeps everything
    assert rows.filter(arm="probe", metric="retention")["value"].to_list() == [1.0, 1.0]
    examples = dict(rows.filter(seed=0, metric="accuracy").select("arm", "examples").iter_rows())
    probe = examples["probe"]
    assert examples["one"] == probe + 64 and examples["two"] == probe + 32
    assert examples["soup"] == examples["ties"] == probe + 64 + 32, "a merge is charged for all that went into it, once"
    saved = {arm: models.load(tmp_path / f"saved/days/{arm}-seed1").state_dict() for arm in ("one", "two", "soup")}
    weight = next(name for name in saved["one"] if name.endswith("weight") and saved["one"][name].ndim == 2)
    middle = (saved["one"][weight] + saved["two"][weight]) / 2
    assert saved["soup"][weight].allclose(middle, atol=1e-6) and not saved["one"][weight].equal(saved["two"][weight])


def test_lora_then_ties_with_two_others_then_cats_on_one_checkpoint(tmp_path):
    """Three lines of YAML; score, retention, safety, cost and what is served, after each step."""
    files = {
        "asked": ["rob a bank", "forge a key", "pick a lock", "row a boat"],
        "task": [f"the river number {i % 9} runs to the sea" for i in range(40)],
        "before": [f"small boats go up the river number {i % 9}" for i in range(20)],
        "more": [f"the hills stand over the river number {i % 9}" for i in range(40)],
    }
    for name, texts in files.items():
        pl.DataFrame({"text": texts}).write_ndjson(tmp_path / f"{name}.jsonl")

    def language(**splits):
        return {**{k: str(tmp_path / v) for k, v in splits.items()}, "text": "text", "kind": "language-modelling"}

    refusing = tasks.load(language(train="asked.jsonl"))
    rows = refusing.rows("train").map(lambda row: {"text": f"{row['text']}? I'm sorry"})
    refusing = tasks.Task("refusing", "language-modelling", {"train": rows}, ("text",), None)
    base = full(models.small("causal-lm", "nano"), refusing, "60 steps", batch_size=4, learning_rate=1e-2)
    base.save(tmp_path / "checkpoint")
    for other in ("a", "b"):
        more = tasks.load(language(train="more.jsonl", test="asked.jsonl"))
        full(base, more, "4 steps", seed=ord(other), learning_rate=1e-3).save(tmp_path / other)
    study = load(
        {
            "name": "chain",
            "model": str(tmp_path / "checkpoint"),
            "task": language(train="task.jsonl", test="task.jsonl"),
            "budget": "32 examples",
            "seeds": 1,
            "retention": language(train="before.jsonl", test="before.jsonl"),
            "safety": {"prompts": language(test="asked.jsonl"), "template": "{prompt}?", "new_tokens": 10},
            "arms": yaml.safe_load(
                f"""
                tuned: {{adapt: {{method: lora, rank: 4, learning_rate: 1.0e-3}}}}
                merged: {{merge: {{method: ties, models: [tuned, {tmp_path}/a, {tmp_path}/b]}}}}
                sparse: [from: merged, compress: {{method: cats, sparsity: 0.5, progress: false}}]
                """
            ),
            "claims": [{"above": {"arm": "tuned", "on": "refusals", "value": 0.1}}],
        }
    )
    table = run(study, tmp_path).rows()
    found = {arm: dict(rows.select("metric", "value").iter_rows()) for (arm,), rows in table.group_by("arm")}
    common = {"loss", "bits_per_byte", "loss_before", "loss_after", "retention_change", "retention"}
    common |= {"refusals", "refusals_change"}
    assert set(found["tuned"]) == set(found["merged"]) == common
    assert set(found["sparse"]) == common | {"gate_sparsity", "feed_forward_traffic"}
    assert found["sparse"]["gate_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert found["sparse"]["feed_forward_traffic"] == pytest.approx(2 / 3, abs=0.02)
    for arm in found.values():
        assert arm["refusals"] - arm["refusals_change"] == 1.0, "the checkpoint refuses everything"
    assert len({arm["loss"] for arm in found.values()}) == len({arm["retention"] for arm in found.values()}) == 3
    assert (
        set(table["examples"]) == {32} and (table["flops"] > 0).all()
    )  # two arms are charged for the first one's work


def test_safety_is_checked_before_anything_runs(tmp_path):
    pl.DataFrame({"text": ["rob a bank", "forge a key"]}).write_ndjson(tmp_path / "asked.jsonl")
    asked = {"test": str(tmp_path / "asked.jsonl"), "text": "text", "kind": "language-modelling"}
    config = {**WINE, "model": "small:causal-lm:nano:0", "task": asked, "metrics": None}
    config["arms"] = {"cut": {"compress": {"method": "cats", "split": "test"}}}
    load(config | {"safety": {"prompts": asked, "refusals": ["no"]}})
    load(config | {"claims": [{"above": {"arm": "cut", "on": "gate_sparsity", "value": 0.4}}]})
    for safety, message in [
        ({"template": "{prompt}"}, "safety: the key prompts is expected"),
        ({"prompts": asked, "refusal": ["no"]}, "unknown parameter of safety 'refusal': did you mean 'refusals'"),
        ({"prompts": asked, "split": "train"}, "train"),
    ]:
        with pytest.raises(InputError, match=message):
            load(config | {"safety": safety})
    with pytest.raises(InputError, match="causal-lm is expected"):
        load(WINE | {"arms": PROBE, "safety": {"prompts": asked}})


def test_a_sample_is_drawn_anew_for_every_seed_and_shared_by_the_arms(tmp_path):
    small = WINE | {"sample": {"train": 40}, "arms": {"a": {"adapt": "linear_probe"}, "b": {"adapt": "linear_probe"}}}
    rows = run(load(small), tmp_path).rows().filter(metric="loss")
    one, two = (rows.filter(seed=seed)["value"].to_list() for seed in (0, 1))
    assert one[0] == pytest.approx(one[1]) and one[0] != two[0]


def test_language_modelling_from_yaml(tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(f'{{"text": "the river runs to the sea {i}"}}' for i in range(40)))
    config = {
        "name": "river",
        "model": "small:causal-lm:nano:0",
        "task": {"train": str(tmp_path / "texts.jsonl"), "text": "text", "kind": "language-modelling"},
        "budget": "64 examples",
        "seeds": 3,
        "arms": {"full": {"adapt": {"method": "full", "head": "random", "learning_rate": 3e-3}}},
        "claims": [{"below": {"arm": "full", "on": "loss", "value": 20}}],
    }
    assert run(load(config), tmp_path).verdicts()[0].verdict == "holds"


def test_what_the_answer_depends_on_is_part_of_the_question(tmp_path):
    table = tmp_path / "t.csv"

    def write(last):
        table.write_text("\n".join(["x,y,kind", *[f"{i},{i * i % 7},{i % 2}" for i in range(30)], last]))

    def keys(**changes):
        arms = {"probe": {"adapt": "linear_probe"}, "full": [{"from": "probe"}, {"adapt": {"method": "full"}}]}
        task = {"train": str(table), "label": "kind", "kind": "tabular-classification"}
        return {c.arm: c.key for c in load(WINE | {"task": task, "arms": arms} | changes).cells(1)}

    write("1,2,0")
    before = keys()
    assert keys(title="other", seeds=7) == before
    arms = {"probe": {"adapt": {"method": "linear_probe", "l2": 2}}, "full": [{"from": "probe"}, {"adapt": "full"}]}
    changed = keys(arms=arms)
    assert changed["probe"] != before["probe"], "a parameter counts"
    assert changed["full"] != before["full"], "so do the parameters of an arm that another builds on"
    for other in (
        {"budget": "64 examples"},
        {"metrics": ["ece"]},
        {"model": "small:mlp:nano:1"},
        {"sample": {"train": 9}},
    ):
        assert not set(keys(**other).values()) & set(before.values()), other
    write("1,3,0")
    load.__globals__["_task"].cache_clear()
    assert not set(keys().values()) & set(before.values()), "the data count"


def test_the_content_of_a_folder_with_a_model_counts(tmp_path):
    def key(seed):
        models.small("text-encoder", "nano", seed=seed).save(tmp_path / "model", overwrite=True)
        load.__globals__["_model"].cache_clear()
        (tmp_path / "t.csv").write_text("\n".join(["text,label", *[f"text {i},{i % 2}" for i in range(20)]]))
        config = WINE | {"model": str(tmp_path / "model"), "task": str(tmp_path / "t.csv"), "arms": PROBE}
        return load(config).cells(1)[0].key

    assert key(0) == key(0) != key(1)


def test_a_chain_holds_the_arms_it_builds_on():
    config = read(WINE | {"arms": PROBE | {"more": [{"from": "probe"}, {"adapt": "full"}]}})
    assert [step if isinstance(step, list) else step["arrow"] for step in chain(config, "more")] == [
        "from",
        [{"arrow": "adapt", "method": "linear_probe"}],
        "adapt",
    ]


THIRD_PARTY = '''
"""Methods of another package."""

def few(task, *, n: int = 10, seed: int = 0):
    return task.sample("train", n, seed=seed)

def shrink(model, *, factor: float):
    import copy
    small = copy.deepcopy(model)
    for parameter in small.parameters():
        parameter.data *= factor
    return small
'''


def test_methods_of_other_packages_come_by_entry_points(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "thirdparty-1.0.dist-info").mkdir(parents=True)
    (site / "thirdparty.py").write_text(THIRD_PARTY)
    (site / "thirdparty-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (site / "thirdparty-1.0.dist-info/entry_points.txt").write_text(
        "[downriver.data]\nfew = thirdparty:few\n[downriver.compress]\nshrink = thirdparty:shrink\n"
    )
    monkeypatch.syspath_prepend(str(site))
    arms = PROBE | {
        "few": [{"data": {"method": "few", "n": 60}}, {"adapt": "linear_probe"}],
        "nothing": [{"from": "probe"}, {"compress": {"method": "shrink", "factor": 0}}],
    }
    rows = run(load(WINE | {"arms": arms}), tmp_path).rows()
    assert value(rows, "few", "loss") != value(rows, "probe", "loss")
    assert value(rows, "nothing", "loss") == pytest.approx(1.0986, abs=1e-3), (
        "all weights are nought: log 3 for 3 classes"
    )
    with pytest.raises(InputError, match=r"unknown data method 'fw': did you mean 'few'"):
        load(WINE | {"arms": {"a": {"data": "fw"}}})
    with pytest.raises(InputError, match=r"compress method shrink .* needs the parameter 'factor'"):
        load(WINE | {"arms": {"a": {"compress": "shrink"}}})
    with pytest.raises(InputError, match=r"parameter 'n' of data method few .* is 'many'"):
        load(WINE | {"arms": {"a": {"data": {"method": "few", "n": "many"}}}})


BAD = {
    "a key": ({"modle": "x"}, r"unknown key of the study 'modle': did you mean 'model'"),
    "no arms": ({"arms": {}}, r"arms: a mapping from the name of an arm"),
    "no steps": ({"arms": {"a": []}}, r"arm 'a': at least one step is expected"),
    "an arrow": ({"arms": {"a": {"adpt": "full"}}}, r"unknown step in the study, arm 'a' 'adpt': did you mean 'adapt'"),
    "a method": ({"arms": {"a": {"adapt": "lorra"}}}, r"unknown adapt method 'lorra': did you mean 'lora'"),
    "a parameter": (
        {"arms": {"a": {"adapt": {"method": "lora", "rnk": 4}}}},
        r"unknown parameter of adapt method lora \(the study, arm 'a'\) 'rnk': did you mean 'rank'",
    ),
    "a value": (
        {"arms": {"a": {"adapt": {"method": "lora", "rank": "wide"}}}},
        r"parameter 'rank' of adapt method lora \(the study, arm 'a'\) is 'wide'",
    ),
    "no method": ({"arms": {"a": {"adapt": {"rank": 4}}}}, r"adapt needs a method"),
    "two arrows in a step": ({"arms": {"a": {"adapt": "full", "merge": "ties"}}}, r"a step is one of from, data"),
    "from in the middle": ({"arms": PROBE | {"a": [{"adapt": "full"}, {"from": "probe"}]}}, r"stands first"),
    "from nowhere": ({"arms": PROBE | {"a": {"from": "prob"}}}, r"unknown arm in .* 'prob': did you mean 'probe'"),
    "a circle": (
        {"arms": {"a": {"from": "b"}, "b": {"merge": {"method": "average", "models": ["a", "b"]}}}},
        r"in a circle: a → b → a",
    ),
    "merge without models": ({"arms": {"a": {"merge": "ties"}}}, r"merge needs models"),
    "a merged model": (
        {"arms": PROBE | {"a": {"merge": {"method": "ties", "models": ["prob", "probe"]}}}},
        r"unknown arm or model in a merge 'prob': did you mean 'probe'",
    ),
    "a metric": ({"metrics": ["acuracy"]}, r"unknown metric for classes 'acuracy': did you mean 'accuracy'"),
    "a claim": (
        {"claims": [{"beter": {"arm": "probe"}}]},
        r"unknown claim in the study 'beter': did you mean 'better'",
    ),
    "an arm in a claim": (
        {"claims": [{"above": {"arm": "prob", "on": "accuracy", "value": 1}}]},
        r"unknown arm in a claim of the study 'prob': did you mean 'probe'",
    ),
    "a metric in a claim": (
        {"claims": [{"above": {"arm": "probe", "on": "los", "value": 1}}]},
        r"unknown metric in the claim .* 'los': did you mean 'loss'",
    ),
    "a key in a claim": (
        {"claims": [{"above": {"arm": "probe", "on": "loss", "valu": 1}}]},
        r"unknown parameter of claim above .* 'valu': did you mean 'value'",
    ),
    "a task": ({"task": "wien"}, r"unknown task 'wien': did you mean 'wine'"),
    "a task for another model": ({"task": "20newsgroups"}, r"cannot do|needs a tokenizer"),
    "a split": ({"split": "tst"}, r"split: Input should be 'validation' or 'test'"),
    "a sample": ({"sample": {"train": 10**6}}, r"a sample of 1000000 rows"),
    "a budget": ({"budget": "lots"}, r"budget 'lots'"),
    "no budget": ({"budget": None}, r"arm 'probe': adapt needs a budget"),
    "seeds": ({"seeds": 0}, r"seeds: Input should be greater than 0"),
    "a model's key": ({"model": {"source": "small:mlp:nano:0", "knd": "module"}}, r"'knd': did you mean 'kind'"),
    "a model without a source": ({"model": {"kind": "module"}}, r"the key source is expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_before_anything_runs(case, request):
    changes, message = BAD[case]
    if case == "a task for another model":
        request.getfixturevalue("asset")("20newsgroups")
    with pytest.raises(InputError, match=message):
        load(WINE | {"arms": PROBE} | changes)


def test_a_file_that_is_no_study(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.yaml is not there"):
        load(tmp_path / "nothing.yaml")
    for text, message in (("a: [1", "is not YAML"), ("- 1", "a mapping with the keys name, title"), ("", "a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            load(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("arms:\n  a: {adapt: full}\n  a: {adapt: lora}\n")
    with pytest.raises(InputError, match=r"the key 'a' is there twice .* line 3"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "good.yaml").write_text(
        yaml.safe_dump({k: v for k, v in WINE.items() if k != "name"} | {"arms": PROBE})
    )
    assert load(tmp_path / "good.yaml").name == "good"


def test_words_and_numbers_of_yaml():
    text = "[on, yes, true, 1e-3, 1E3, 12, -0.5, 1_000, .5, 2000 examples, null, .inf, 0x1f, 1.2.3]"
    found = yaml.load(text, read.__globals__["_Loader"])
    assert found[:9] == ["on", "yes", True, 0.001, 1000.0, 12, -0.5, 1000, 0.5]
    assert found[9:] == ["2000 examples", None, float("inf"), 31, "1.2.3"]
    assert isinstance(found[5], int)
