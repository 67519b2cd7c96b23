"""The reproduction of paper 75: its tasks are what it says, it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.domains import sobert as module
from downriver.study.claims import verdicts


def test_paper_and_claims():
    [listed] = find("sobert")
    assert (listed.number, listed.room, listed.title) == (75, "domains", module.paper.title)
    assert [claim.text for claim in module.reproduction.claims] == [
        "domain is better than general on macro",
        "general is better than scratch on macro",
        "domain is better than domain, short on outdated",
    ]


def test_back_ticks_become_tags_and_markers_go():
    row = module.tagged("Use ``np.sum`` or `a b` here.")
    assert list(zip(row["words"], row["tags"], strict=True)) == [
        ("Use", "O"), ("np.sum", "B-name"), ("or", "O"), ("a", "B-name"), ("b", "I-name"), ("here.", "O"),
    ]  # fmt: skip
    assert module.unmarked("def f():\n    .. deprecated:: 1.2\n    return 1") == "def f():\n    return 1"


def test_no_file_is_in_pretraining_and_tasks():
    functions = module.functions(12)
    assert len({f.library for f in functions}) == 5
    held = {f.file for f in module.held(12)}
    assert held and not held & {f.file for f in functions if f.pretraining}
    texts = module.domain_texts(12)
    assert len(texts) > 100 and not any(module.OUTDATED.search(text) for text in texts)


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path, asset):
    asset("20newsgroups")
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["metric"]) == {"names", "outdated", "library", "macro"}
    assert rows["value"].is_between(0, 1).all() and (rows["tokens"] > 0).all()
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 3  # one seed decides nothing


def test_the_claims_fail_when_the_domain_teaches_nothing():
    values = {("domain", "macro"): 0.5, ("general", "macro"): 0.6, ("scratch", "macro"): 0.7}
    values |= {("domain", "outdated"): 0.5, ("domain, short", "outdated"): 0.6}
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "higher"}
        for (arm, metric), value in values.items()
        for seed in range(3)
    ]
    arms = ["domain", "general", "scratch", "domain, short"]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), arms, range(3))
    assert [verdict.verdict for verdict in found] == ["fails"] * 3


def test_an_unknown_scale_is_refused():
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()
