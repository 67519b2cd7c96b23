"""The reproduction of paper 52: it runs at tiny scale, its language is what it says, and its claims can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.adapt import unsupervised_prompts as module
from downriver.study.claims import verdicts

ARMS = ["zero-shot", "examples alone", "prompt alone", "prompt and examples"]


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("unsupervised_prompts")
    assert (listed.number, listed.room, listed.title) == (52, "adapt", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    assert found["examples alone", "working words"] == 0
    assert all(0 <= found[arm, "accuracy"] <= 1 for arm in ARMS)
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_a_third_of_the_texts_mislead():
    rng = np.random.default_rng(0)
    texts = [module.text(rng) for _ in range(1000)]
    assert 0.28 < np.mean([topic != tone for _, topic, tone in texts]) < 0.39
    for words, topic, tone in texts[:50]:
        assert sum(word in module.TOPICS[topic] for word in words.split()) == module.WORDS
        assert sum(word in module.TONES[tone] for word in words.split()) == module.WORDS


def test_a_working_word_makes_labels_right():
    rng = np.random.default_rng(1)
    right = {True: [], False: []}
    for _ in range(1000):
        said = module.lesson(rng)
        bar = said.index("|")
        works = any(word in module.WORKING for word in said[:bar])
        words, label = said[bar + 1 : said.index("=>")], said[said.index("=>") + 1]
        right[works].append(any(word in module.TOPICS[label] for word in words))
    assert np.mean(right[True]) == 1 and 0.5 < np.mean(right[False]) < 0.85


def test_the_claims_fail_when_the_prompt_misleads():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": "accuracy", "value": value, "direction": "higher"}
        for arm, value in zip(ARMS, (0.7, 0.8, 0.75, 0.5), strict=True)
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 3
