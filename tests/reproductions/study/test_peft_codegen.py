"""The reproduction of paper 85: its parts run at a small size, and its claims can fail."""

import polars as pl

from downriver.domains.codegen import generate_code, prompts, target_loss
from downriver.reproductions import find
from downriver.reproductions.study import peft_codegen as module
from downriver.study.claims import verdicts


def test_its_parts_run():
    [listed] = find("peft_codegen")
    assert (listed.number, listed.room, listed.title) == (85, "study", module.paper.title)
    model, task = module.language_model(0, 4, 32), module.functions(0)
    assert len(task.splits["test"]) >= module.ITEMS and len(task.splits["train"]) > 500
    rows = task.splits["test"][:2]
    asked = prompts([row["intent"] for row in rows], task.splits["train"], shots=3)
    assert max(len(model.processor(text)["input_ids"]) for text in asked) < 384  # three examples fit
    assert target_loss(model, asked, [row["code"] for row in rows]) > 1
    assert [len(each) for each in generate_code(model, asked, k=2, max_new_tokens=4, progress=False)] == [2, 2]
    assert [arm.name for arm in module.reproduction.arms()] == list(module.METHODS)


def test_the_claims_fail_when_tuning_hurts():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": "target loss", "value": value, "direction": "lower"}
        for arm in module.METHODS
        for seed in range(3)
        for value in [(9.0 if arm == "lora" else 3.0) + 0.01 * seed]
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), list(module.METHODS), range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 4
