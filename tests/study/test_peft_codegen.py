"""The study of code generation: arms, kept outputs, tests in the sandbox, bad input."""

import json

import pytest

from downriver.core.errors import InputError
from downriver.domains.codegen import CodeTask
from downriver.models import small
from downriver.study.peft_codegen import METHODS, codegen_study


def pairs(seed):
    rows = [{"intent": f"give {i}", "code": f"x = {i}", "tests": f"assert x == {i}"} for i in range(8)]
    return CodeTask("numbers", {"train": rows[:4], "validation": rows[4:6], "test": rows[6:]})


def model(seed):
    return small("causal-lm", "tiny", seed)


def test_a_study_and_its_outputs(tmp_path):
    settings = {"budget": "2 steps", "seeds": 1, "beams": 2, "max_new_tokens": 4, "outputs": tmp_path / "outputs"}
    study = codegen_study("numbers", model, pairs, ["zero", "icl2", "rag1", "lora"], **settings)
    result = study.run(tmp_path / "runs", executor="serial", progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == {"zero", "icl2", "rag1", "lora"}
    assert {m for _, m in found} >= {"target loss", "EM@1", "EM@2", "EM@1, trees", "likeness", "pass@1"}
    lines = (tmp_path / "outputs" / "numbers-icl2-0.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len(kept) == 2 and all(len(each["outputs"]) == 2 for each in kept)

    # what was kept is scored again, without generating: right programs now
    file = tmp_path / "outputs" / "numbers-zero-0.jsonl"
    right = [{"prompt": "", "outputs": [f"x = {i}", "while True: pass" if i == 6 else "x = 0"]} for i in (6, 7)]
    file.write_text("\n".join(json.dumps(each) for each in right) + "\n")
    again = codegen_study("numbers", model, pairs, ["zero"], **settings)
    result = again.run(tmp_path / "other", executor="serial", progress=False)
    scores = dict(result.rows().select("metric", "value").iter_rows())
    assert scores["EM@1"] == 1 and scores["pass@1"] == 0.5
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert "take another folder" in str(again.run(tmp_path / "third", executor="serial", progress=False).failures)


def test_bad_input():
    assert {"zero", "icl1", "rag3", "lora", "full"} <= set(METHODS)
    with pytest.raises(InputError, match="icl9"):
        codegen_study("x", model, pairs, ["icl9"])
    with pytest.raises(InputError, match="beams"):
        codegen_study("x", model, pairs, beams=0)
