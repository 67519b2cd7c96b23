"""The reproduction of paper 69: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.domains.code import SubtokenGrouper
from downriver.models import byte_tokenizer
from downriver.reproductions import find
from downriver.reproductions.compress import code_token_merging as module
from downriver.study.claims import verdicts

ARMS = ["none", "mean", "learned", "random", "truncation"]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("token merging code")
    assert (listed.number, listed.room, listed.title) == (69, "compress", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, metric in found if metric == "accuracy"} == set(ARMS)
    assert 0.5 < found["mean", "positions"] < 1 and 0 < found["mean", "FLOP saving, median"] < 0.5
    assert found["learned", "FLOP saving"] < found["mean", "FLOP saving"] < found["mean", "FLOP saving, 95 %"]
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_baselines_have_the_same_length():
    texts = ["long_name = other_name + 1", "f(small)"]
    proper, drawn, cut = (
        make(byte_tokenizer(64), SubtokenGrouper())(texts, padding=True, return_tensors="pt")
        for make in (module.GroupingTokenizer, module.RandomMerging, module.Truncating)
    )
    lengths = proper["group_ids"].amax(1) + 1
    assert (drawn["group_ids"].amax(1) + 1).equal(lengths) and not drawn["group_ids"].equal(proper["group_ids"])
    for row, tokens in enumerate(proper["attention_mask"].sum(1)):
        groups = drawn["group_ids"][row][:tokens].tolist()
        assert groups[:2] == [0, 1] and groups[-1] == groups[-2] + 1  # special tokens stay single
    assert cut["attention_mask"].sum(1).equal(lengths) and "group_ids" not in cut
    assert cut["input_ids"][0][: lengths[0]].equal(proper["input_ids"][0][: lengths[0]])


def test_functions_are_split_by_file():
    task, texts = module.functions(0, 20, 10)
    assert len(task.labels) == 10 and len(task.rows("train")) == 200
    held = set(task.rows("test")["text"])
    assert held and not held & set(task.rows("train")["text"])
    joined = "\n".join(texts)
    assert sum(text in joined for text in held) <= len(held) // 20  # but for copies of a function in another file
    assert all(text in joined for text in task.rows("train")["text"])


def test_the_claims_fail_when_merging_costs_accuracy():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "higher"}
        for arm in ARMS
        for metric, value in (("accuracy", 0.3 if arm == "mean" else 0.5), ("FLOP saving", 0.05))
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 3
