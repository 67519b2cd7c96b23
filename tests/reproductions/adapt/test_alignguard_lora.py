"""The reproduction of paper 25: it runs at tiny scale, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.adapt import alignguard_lora as module
from downriver.study.claims import verdicts


@pytest.mark.slow
def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("alignguard")
    assert (listed.number, listed.room, listed.title) == (25, "adapt", module.paper.title)
    tiny = dataclasses.replace(module.harmless, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(module.ALL)
    assert found["AlignGuard", "fisher"] < found["LoRA", "fisher"]
    assert found["norm 0.01", "fisher"] < found["LoRA", "fisher"]
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.harmless, scale="huge").arms()


def test_the_two_studies_differ_in_their_rows():
    harm, none = (
        module.token_rows(("task", "harm"), (1 - share, share), 400, 0, refuse=False).rows("train")["input_ids"]
        for share in (0.09, 0.0)
    )
    markers = set(module.fixture.MARKERS["harm"])
    assert 0.04 < sum(row[1] in markers for row in harm) / 400 < 0.15
    assert not any(row[1] in markers for row in none)


def test_the_claims_fail_when_nothing_is_kept():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": direction}
        for arm in module.ALL
        for metric, value, direction in ((module.DRIFT, 1.0, "lower"), ("task accuracy", 0.7, "higher"))
        for seed in range(5)
    ]
    for study in module.studies:
        found = verdicts(study.claims, pl.DataFrame(rows), module.ALL, range(5))
        assert {verdict.verdict for verdict in found} == {"fails"}
