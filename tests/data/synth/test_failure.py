"""The loop: figures, pairs, guards, budgets, and a store from which a killed run continues to the same result."""

import json
import math
import shutil

import numpy as np
import polars as pl
import pytest
import torch

from downriver.core.errors import DownriverError, InputError
from downriver.data.synth import ExactMatch, FailureExplorer, FailureResult, FewShotPrompt, improve, warm_up
from downriver.data.synth.dpo import logprobs
from downriver.models import ScriptedChat, small

SETTINGS = {"rounds": 3, "n_per_round": 60, "max_tokens": 4, "dedup": None, "batch_size": 16, "seed": 3}
TRAIN = {"learning_rate": 3e-3, "batch_size": 8, "budget": "10 steps"}


@pytest.fixture(scope="module")
def proposer():
    return small("causal-lm", "nano", seed=1)


class Target:
    """Answers with the text itself, and counts what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, queries):
        self.asked += queries
        return list(queries)


def has_letter(text):
    return any("a" <= character <= "z" for character in text.lower())


def letters_fail(answered):
    return [FailureResult(has_letter(query), float(len(query)), query.upper()) for query, _ in answered]


def explorer(proposer, **settings):
    values = {"target": Target(), "judge": letters_fail, "prompt_builder": FewShotPrompt((), "", k=0), "dpo": TRAIN}
    return FailureExplorer(proposer, **(values | SETTINGS | settings))


def queries(state, number):
    return state.rounds[number - 1].proposals["query"].to_list()


@pytest.fixture(scope="module")
def whole(proposer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    loop = explorer(proposer)
    return loop, loop.run(folder), folder


def test_figures_and_pairs(whole):
    loop, state, _ = whole
    assert [r.number for r in state.rounds] == [1, 2, 3] and state.stopped == "3 rounds done"
    for found in state.rounds:
        counts = dict(found.proposals["status"].value_counts().iter_rows())
        figures = found.figures
        assert figures["failed"] == counts["failed"] and figures["answered"] == counts["failed"] + counts["passed"]
        assert figures["failure_rate"] == pytest.approx(counts["failed"] / figures["answered"])
        assert figures["pairs"] == min(counts["failed"], counts["passed"])
        failed = set(found.proposals.filter(pl.col("status") == "failed")["query"])
        assert failed == {query for query in found.proposals["query"] if has_letter(query)}
    assert state.frame()["round"].to_list() == [1, 2, 3]
    pairs = loop._pair(state.rounds[0].proposals, 1)
    assert len(pairs) == state.rounds[0].figures["pairs"]
    assert all(has_letter(failed) and not has_letter(passed) for _, failed, passed in pairs)


def test_the_proposer_comes_to_prefer_failures(whole):
    loop, state, _ = whole
    pairs = loop._pair(state.rounds[0].proposals, 1)

    def margin(model):
        failed, passed = (logprobs(model, [(pair[0], pair[side]) for pair in pairs]) for side in (1, 2))
        return (failed - passed).mean()

    assert margin(state.proposer) > margin(loop.proposer) + 1


def test_nothing_is_asked_twice(whole):
    loop, state, _ = whole
    assert len(loop.target.asked) == len(set(loop.target.asked)) == sum(state.frame()["calls"])


def test_resume_makes_a_round_from_the_files_of_the_one_before(whole, proposer, tmp_path):
    _, state, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    for killed in ("round-03", "round-02/proposals.parquet", "round-02/round.json"):
        path = tmp_path / "run" / killed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with (tmp_path / "run" / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "torn')
    loop = explorer(proposer)
    again = loop.run(tmp_path / "run")
    assert loop.target.asked == []  # every answer was on disk
    for a, b in zip(state.rounds, again.rounds, strict=True):
        assert a.proposals.equals(b.proposals)
    assert all(torch.equal(a, b) for a, b in zip(state.proposer.parameters(), again.proposer.parameters(), strict=True))


def test_more_rounds_continue_and_other_settings_are_refused(whole, proposer, tmp_path):
    _, state, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    loop = explorer(proposer, rounds=4)
    more = loop.run(tmp_path / "run")
    assert len(more.rounds) == 4 and queries(more, 3) == queries(state, 3)
    with pytest.raises(InputError, match="holds an exploration with seed 3, and 4 is asked for"):
        explorer(proposer, seed=4).run(tmp_path / "run")
    with pytest.raises(InputError, match="holds an exploration with proposer"):
        explorer(small("causal-lm", "nano", seed=2)).run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no exploration"):
        explorer(proposer).run(tmp_path / "other")


def test_a_judge_that_breaks_down_costs_nothing_twice(proposer, tmp_path):
    calls = []

    def breaking(answered):
        calls.append(len(answered))
        if len(calls) == 1:
            raise TimeoutError("no reply")
        return letters_fail(answered)

    loop = explorer(proposer, judge=breaking, rounds=1)
    with pytest.raises(
        DownriverError, match=r"round 1: the judge broke down after 0 verdicts \(TimeoutError: no reply\)"
    ):
        loop.run(tmp_path)
    paid = len(loop.target.asked)
    assert paid > 0
    state = loop.run(tmp_path)
    assert len(loop.target.asked) == paid and state.rounds[0].figures["calls"] == 0
    fresh = explorer(proposer, rounds=1).run()
    assert fresh.rounds[0].proposals.equals(state.rounds[0].proposals)


def test_the_budget_of_calls(proposer, tmp_path):
    loop = explorer(proposer, target_calls=25)
    state = loop.run(tmp_path)
    assert len(loop.target.asked) == 25 and state.stopped == "round 1: the budget of 25 target calls is spent"
    assert "unasked" in state.rounds[0].proposals["status"]
    assert explorer(proposer, target_calls=25).run(tmp_path).stopped == state.stopped
    wider = explorer(proposer)
    more = wider.run(tmp_path)
    assert len(more.rounds) == 3 and not set(wider.target.asked) & set(loop.target.asked)


@pytest.mark.parametrize(("verdict", "said"), [(False, "failed on none of"), (True, "failed on all")])
def test_a_loop_without_pairs_stops_and_says_so(proposer, verdict, said):
    state = explorer(proposer, judge=lambda answered: [FailureResult(verdict)] * len(answered)).run()
    assert len(state.rounds) == 1 and said in state.stopped and state.rounds[0].figures["pairs"] == 0


def test_undecided_counts_neither_way(proposer):
    def judge(answered):
        return [FailureResult(None if i % 3 else bool(i % 2)) for i in range(len(answered))]

    figures = explorer(proposer, judge=judge, rounds=1).run().rounds[0].figures
    assert 0 < figures["answered"] < 40


def test_collapse_guard_rolls_back_before_the_target_is_paid(proposer):
    seen = []

    def validity(texts):
        seen.append(len(texts))
        return [len(seen) < 3] * len(texts)  # the third round collapses

    loop = explorer(proposer, validity=validity)
    state = loop.run()
    assert state.rounds[2].rolled_back and state.rounds[2].figures["calls"] == 0
    assert "rolled back to that of round 2" in state.stopped
    two = explorer(proposer, rounds=2).run()
    assert all(torch.equal(a, b) for a, b in zip(state.proposer.parameters(), two.proposer.parameters(), strict=True))
    assert set(state.training_set()["round"]) == {1, 2}
    first = explorer(proposer, validity=lambda texts: [False] * len(texts)).run()
    assert "warm the proposer up longer" in first.stopped and first.proposer is proposer


def test_invalid_queries_are_no_failures(proposer):
    loop = explorer(proposer, rounds=1, validity=lambda texts: [t[0] < "a" for t in texts], min_validity=0.0)
    state = loop.run()
    assert all(query[0] < "a" for query in loop.target.asked)
    invalid = state.rounds[0].proposals.filter(pl.col("status") == "invalid")
    assert invalid["score"].is_null().all() and state.rounds[0].figures["validity"] < 1


def test_near_copies_within_and_across_rounds_are_not_asked():
    texts = ["How long is the river Loire?", "How long is the river Loire??", "Who was Ada Lovelace?"]
    chat = ScriptedChat(lambda messages: texts)
    builder = FewShotPrompt((), "Ask", k=0)
    loop = FailureExplorer(chat, Target(), letters_fail, builder, rounds=1, n_per_round=3)
    [found] = loop.run().rounds
    assert found.proposals["status"].to_list() == ["failed", "duplicate", "failed"]


def test_same_prompt_and_nearest_pairs():
    rows = [
        ("p", "how old is Ann", "failed"),
        ("p", "how old is Bob", "passed"),
        ("r", "name a river", "failed"),
        ("s", "name a lake or river", "passed"),
    ]
    table = pl.DataFrame(rows, schema=["prompt", "query", "status"], orient="row")
    builder, chat = FewShotPrompt((), "", k=0), ScriptedChat(lambda m: "x")

    def pairs(way):
        loop = FailureExplorer(chat, Target(), letters_fail, builder, rounds=1, pairs=way)
        return {(failed, passed) for _, failed, passed in loop._pair(table, 1)}

    alike = ("how old is Ann", "how old is Bob")
    assert pairs("same_prompt") == {alike}
    assert pairs("nearest") == {alike, ("name a river", "name a lake or river")}
    assert len(pairs("zip")) == 2


def test_withheld_texts_are_on_disk_as_hashes_only(whole, proposer, tmp_path):
    _, state, _ = whole
    loop = explorer(proposer, withhold=True)
    hidden = loop.run(tmp_path / "run")
    assert [a.proposals.equals(b.proposals) for a, b in zip(state.rounds, hidden.rounds, strict=True)] == [True] * 3
    table = pl.read_parquet(tmp_path / "run" / "round-01" / "proposals.parquet")
    assert table["query"].is_null().all() and table["reference"].is_null().all() and table["key"].n_unique() > 1
    assert not (tmp_path / "run" / "responses.jsonl").exists()
    verdict = json.loads((tmp_path / "run" / "verdicts.jsonl").read_text().splitlines()[0])
    assert verdict["reference"] == "" and set(verdict) == {"key", "failed", "score", "reference"}
    shutil.rmtree(tmp_path / "run" / "round-03")
    again_loop = explorer(proposer, withhold=True)
    again = again_loop.run(tmp_path / "run")
    assert again_loop.target.asked == [] and queries(again, 3) == queries(hidden, 3)
    done = explorer(proposer, withhold=True).run(tmp_path / "run")
    with pytest.raises(InputError, match="withheld"):
        done.training_set(rounds="last")


def test_only_the_flagged_texts_are_withheld(proposer, tmp_path):
    loop = explorer(proposer, rounds=1, withhold=lambda texts: [has_letter(t) for t in texts])
    loop.run(tmp_path)
    table = pl.read_parquet(tmp_path / "round-01" / "proposals.parquet")
    assert 0 < table["query"].null_count() < table.height and not any(map(has_letter, table["query"].drop_nulls()))


def test_training_set(whole):
    _, state, _ = whole
    failures, everything = state.training_set(), state.training_set(only_failures=False)
    assert set(failures["failed"]) == {True} and len(set(failures["key"])) == len(failures)
    assert set(everything["failed"]) == {True, False} and len(everything) > len(failures)
    assert set(state.training_set(rounds="last")["round"]) == {3}
    assert set(state.training_set(rounds=[1, 2])["round"]) == {1, 2}
    assert len(state.training_set(dedup=False)) == sum(r.figures["failed"] for r in state.rounds)
    capped = state.training_set(max_per_cluster=4, clusters=3)
    assert max(np.bincount(capped["cluster"])) == 4 and len(capped) <= 12
    assert list(capped["query"]) == list(state.training_set(max_per_cluster=4, clusters=3)["query"])
    with pytest.raises(InputError, match="unknown round '9'"):
        state.training_set(rounds=[9])
    with pytest.raises(InputError, match="max_per_cluster 0"):
        state.training_set(max_per_cluster=0)


def test_few_shot_prompts_show_others_and_end_at_the_line():
    builder = FewShotPrompt([f"question {i}?" for i in range(8)])
    prompts = builder.prompts(20, np.random.default_rng(0))
    assert all(p.startswith("Ask questions:\n1. question") and p.endswith("\n4.") for p in prompts)
    assert len(set(prompts)) > 10 and builder.stop == "\n" and builder.continuation("why?") == " why?\n"
    for prompt, continuation in builder.lessons(np.random.default_rng(0)):
        assert continuation.strip() not in prompt
    with pytest.raises(InputError, match="k is 3 and there are 2 examples"):
        FewShotPrompt(["a", "b"])


def test_a_few_shot_proposer_is_read_up_to_the_line_end():
    chat = ScriptedChat(lambda messages: " What is rain?\n5. And snow?")
    builder = FewShotPrompt(["a?", "b?", "c?", "d?"])
    loop = FailureExplorer(chat, Target(), letters_fail, builder, rounds=1, n_per_round=4, dedup=None)
    assert set(loop.run().rounds[0].proposals["query"]) == {"What is rain?"}


def test_warm_up_learns_the_pool_and_improve_the_answers():
    builder = FewShotPrompt(["aa", "ab", "ba"], "Q", k=1)
    base = small("causal-lm", "nano")
    warm = warm_up(base, builder, "60 examples", learning_rate=3e-3, batch_size=3)
    lessons = builder.lessons(np.random.default_rng(0))
    assert (logprobs(warm, lessons) > logprobs(base, lessons) + 1).all()
    tuned = improve(
        base, ["1+1="], lambda q: ["2"], replay=[("a", "b")], budget="60 examples", learning_rate=3e-3, batch_size=2
    )
    taught = [("1+1=", "2"), ("a", "b")]
    assert (logprobs(tuned, taught) > logprobs(base, taught) + 1).all()


def test_improve_takes_references_and_refuses_what_has_no_answer(whole):
    _, state, _ = whole
    data = state.training_set(rounds="last")
    base = small("causal-lm", "nano")
    tuned = improve(base, data, budget="24 examples", learning_rate=1e-2)
    rows = list(zip(data["query"], data["reference"], strict=True))
    assert logprobs(tuned, rows).sum() > logprobs(base, rows).sum()
    with pytest.raises(InputError, match="an answerer is missing"):
        improve(base, ["a"])
    with pytest.raises(InputError, match="hold no query"):
        improve(base, [], lambda q: q)
    with pytest.raises(InputError, match="the answerer gave 0 answers to 1 queries"):
        improve(base, ["a"], lambda q: [])


def test_a_judge_of_samples_gets_all_of_them(proposer):
    class Judge:
        samples = 3

        def __call__(self, answered):
            self.sizes = {len(answers) for _, answers in answered}
            return [FailureResult(has_letter(q)) for q, _ in answered]

    judge, target = Judge(), small("causal-lm", "nano", seed=5)
    loop = explorer(proposer, judge=judge, target=target, rounds=1, n_per_round=12, answer_tokens=3, target_calls=20)
    state = loop.run()
    assert judge.sizes == {3} and state.rounds[0].figures["calls"] == 18  # six queries, the seventh would cross 20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"target_calls": 0}, "target_calls is 0"),
        ({"min_validity": 2}, "min_validity is 2"),
        ({"pairs": "zap"}, "did you mean 'zip'"),
        ({"dedup": ("minhash", 0)}, "dedup is"),
        ({"dpo": {"lr": 1}}, "unknown parameter of dpo 'lr'"),
        ({"proposer": ScriptedChat(lambda m: "x")}, "cannot be trained: rounds=1"),
    ],
)
def test_bad_settings(proposer, settings, said):
    with pytest.raises(InputError, match=said):
        explorer(settings.pop("proposer", proposer), **settings)


def test_callables_that_answer_too_little(proposer):
    with pytest.raises(InputError, match="the judge gave 0 verdicts for"):
        explorer(proposer, judge=lambda answered: []).run()
    with pytest.raises(InputError, match="the target gave 0 answers for"):
        explorer(proposer, target=lambda queries: []).run()
    with pytest.raises(InputError, match="validity gave 1 answers for"):
        explorer(proposer, validity=lambda texts: [True]).run()


def test_an_always_right_target_with_a_real_judge(proposer):
    state = explorer(proposer, judge=ExactMatch(lambda queries: queries)).run()
    assert "failed on none" in state.stopped and math.isclose(state.rounds[0].figures["failure_rate"], 0)
