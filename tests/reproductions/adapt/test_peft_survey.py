"""The reproduction of paper 38: its functions, a tiny run, and claims that can fail."""

import functools

import polars as pl
import pytest

from downriver.reproductions import find
from downriver.reproductions.adapt import peft_survey as module
from downriver.study.claims import verdicts
from downriver.study.compare_peft import compare_peft

ARMS = ["full", *module.METHODS, "best PEFT"]


def test_paper_and_claims():
    [listed] = find("peft_survey")
    assert (listed.number, listed.room, listed.title, listed.date) == (38, "adapt", module.paper.title, "2025-01")
    assert listed.module == module.__name__
    assert [arm.name for arm in module.reproduction.arms()] == ARMS and module.reproduction.seeds == 3
    assert module.reproduction.claims[0].text.startswith("full is above 0.3")


def test_the_functions():
    task = module.function_origins(0, 12)
    texts = {split: set(task.texts(split)) for split in task.splits}
    assert len(task.rows("train")) == 72 and len(task.rows("test")) == len(task.rows("validation")) == 24
    assert all(text.startswith(("def ", "async def ")) for text in texts["train"])
    rows = [row for split in task.splits.values() for row in split]
    assert not any(module.PACKAGES[row["label"]] in row["text"] for row in rows)
    assert task.fingerprint == module.function_origins(0, 12).fingerprint != module.function_origins(1, 12).fingerprint


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path):
    tiny = compare_peft(
        "tiny",
        functools.partial(module.masked_model, steps=10, width=32),
        functools.partial(module.function_origins, each=12),
        (module.FULL, *module.METHODS),
        budget="3 steps",
        retained=functools.partial(module.passages, steps=10),
        share=0.08,
        settings={"prompt_tuning": {"num_virtual_tokens": module.PROMPTS}},
        claims=module.reproduction.claims,
    )
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    rows = result.rows()
    assert not result.failures and set(rows["arm"]) == set(ARMS)
    shares = {row["arm"]: row["value"] for row in rows.filter(metric="trained share").to_dicts()}
    assert shares["full"] > 0.9 and all(0 < shares[arm] < 0.1 for arm in ARMS[1:])


def test_the_claims_fail_where_tuning_less_is_worse():
    def row(arm, seed, metric, value):
        way = "higher" if metric == "accuracy" else "lower"
        return {"arm": arm, "seed": seed, "task": "t", "metric": metric, "value": value + seed / 1e3, "direction": way}

    values = {"accuracy": (0.2, 0.1), "forgetting": (0.1, 0.3), "trained share": (1.0, 0.2)}
    rows = [
        row(arm, seed, metric, value[arm != "full"])
        for arm in ARMS
        for seed in range(6)
        for metric, value in values.items()
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(6))
    assert [v.verdict for v in found] == ["fails"] * 5
