"""The study of code generation: arms, kept outputs, tests in the sandbox, bad input."""

import copy
import json

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.domains.codegen import CodeTask, lacking, tune
from downriver.models import small
from downriver.study import better
from downriver.study.peft_codegen import METHODS, codegen_study, read_outputs, score_outputs


def pairs(seed):
    rows = [{"intent": f"give {i}", "code": f"x = {i}", "tests": f"assert x == {i}"} for i in range(8)]
    return CodeTask("numbers", {"train": rows[:4], "validation": rows[4:6], "test": rows[6:]})


def model(seed):
    return small("causal-lm", "tiny", seed)


SETTINGS = {"budget": "2 steps", "seeds": 1, "beams": 2, "max_new_tokens": 4}


def table(study, folder):
    result = study.run(folder, executor="serial", progress=False)
    assert not result.failures, result.failures
    return {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}


def test_a_study_and_its_outputs(tmp_path):
    methods = ["zero", "icl2", "rag1", "lora"]
    study = codegen_study("numbers", model, pairs, methods, **SETTINGS, outputs=tmp_path / "outputs")
    found = table(study, tmp_path / "runs")
    assert {arm for arm, _ in found} == set(methods)
    metrics = {"target loss", "EM@1", "EM@2", "EM@1, trees", "EM@2, trees", "likeness", "pass@1", "pass@2"}
    assert {m for arm, m in found if arm == "zero"} == metrics
    assert found["lora", "disk"] == 4 * sum(
        p.numel() for n, p in tune(model(0), pairs(0), "lora", "2 steps").named_parameters() if "lora_" in n
    )
    # the same seed gives the same table, kept outputs or not
    plain = codegen_study("numbers", model, pairs, methods, **SETTINGS)
    assert table(plain, tmp_path / "plain") == found

    # the metrics come from what was kept alone
    file = next((tmp_path / "outputs").glob("numbers-icl2-0-*.jsonl"))
    kept = read_outputs(file)
    assert len(kept) == 2 and all(len(each["outputs"]) == 2 for each in kept)
    assert {m.metric: m.value for m in score_outputs(kept)} == {m: v for (arm, m), v in found.items() if arm == "icl2"}


def test_kept_outputs_are_scored_without_a_model(tmp_path):
    def none(seed):
        raise AssertionError("a model is not needed")

    table(codegen_study("numbers", model, pairs, ["zero", "lora"], **SETTINGS, outputs=tmp_path), tmp_path / "runs")
    for file in tmp_path.glob("*.jsonl"):
        rows = read_outputs(file)
        for row, outputs in zip(rows, (["x = 6", "x = -1"], ["x = 7", "x = 0"]), strict=True):
            row["outputs"] = outputs
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    again = codegen_study("numbers", none, pairs, ["zero", "lora"], **SETTINGS, outputs=tmp_path)
    found = table(again, tmp_path / "other")
    for method in ("zero", "lora"):
        assert found[method, "EM@1"] == 1 and found[method, "pass@1"] == 0.5 and found[method, "pass@2"] == 1
    file = next(tmp_path.glob("numbers-zero-*.jsonl"))
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert "for other items" in str(again.run(tmp_path / "third", executor="serial", progress=False).failures)
    for text, said in (("", "is empty"), ("{", "line 1"), ('{"code": "x"}', "outputs, nats, tokens missing")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            read_outputs(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_outputs(tmp_path / "nowhere.jsonl")


def test_other_settings_are_generated_again(tmp_path):
    for settings in (SETTINGS, SETTINGS | {"beams": 1}, SETTINGS | {"version": "2"}):
        study = codegen_study("numbers", model, pairs, ["zero"], **settings, outputs=tmp_path / "outputs")
        table(study, tmp_path / "runs")
    assert len(list((tmp_path / "outputs").iterdir())) == 3


def test_what_a_machine_lacks_is_skipped_and_run_later(tmp_path, monkeypatch):
    claim = better("qlora4", than="zero", on="target loss")
    study = codegen_study("numbers", model, pairs, ["zero", "qlora4"], **SETTINGS, claims=[claim])
    monkeypatch.setattr("downriver.study.peft_codegen.lacking", lambda name: "no bits" if name == "qlora4" else None)
    result = study.run(tmp_path, executor="serial", progress=False)
    rows = result.rows().filter(pl.col("arm") == "qlora4")
    assert not result.failures and rows.row(0, named=True)["metric"] == "skipped" and rows["unit"][0] == "no bits"
    verdict = result.verdicts()[0]
    assert verdict.verdict == "undecided" and verdict.n == 0
    monkeypatch.undo()
    if why := lacking("qlora4"):
        pytest.skip(why)
    result = study.run(tmp_path, executor="serial", progress=False)
    rows = result.rows().filter(pl.col("arm") == "qlora4")
    assert not result.failures and "skipped" not in rows["metric"] and result.verdicts()[0].n == 1


def test_chats(tmp_path):
    def talking(seed):
        found = model(seed)
        found.processor = copy.deepcopy(found.processor)
        found.processor.chat_template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
        return found

    settings = SETTINGS | {"style": "chat", "outputs": tmp_path / "outputs"}
    found = table(codegen_study("chats", talking, pairs, ["icl1", "lora"], **settings), tmp_path / "runs")
    assert found["lora", "target loss"] > 0
    roles = [turn["role"] for turn in read_outputs(next(settings["outputs"].glob("chats-icl1-*")))[0]["prompt"]]
    assert roles == ["user", "assistant", "user"]


def test_bad_input():
    assert {"zero", "icl1", "rag3", "lora", "full", "qlora8", "qlora4"} <= set(METHODS)
    with pytest.raises(InputError, match="icl9"):
        codegen_study("x", model, pairs, ["icl9"])
    with pytest.raises(InputError, match="beams"):
        codegen_study("x", model, pairs, beams=0)
