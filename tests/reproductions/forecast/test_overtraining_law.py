"""The reproduction of paper 4: its machinery at tiny scale, and the public runs where they are."""

import dataclasses
import warnings

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import RunTable
from downriver.reproductions.forecast import overtraining_law as module


def test_paper_and_claims():
    assert (module.paper.number, module.paper.slug) == (4, "overtraining_law")
    assert module.reproduction.seeds == 3 and module.reproduction in module.studies
    assert [claim.kind for claim in module.reproduction.claims] == ["below", "better", "better"]
    assert [arm.name for arm in module.reproduction.arms()] == list(module.FORECASTS)


def test_the_large_runs_cost_at_least_eight_times_the_small_ones_together():
    def compute(width, hidden, multiplier):
        return 6 * multiplier * sum(p.numel() for p in module.CharacterModel(width, hidden).parameters()) ** 2

    small = sum(compute(*run) for run in module.SMALL)
    assert all(compute(*run) >= 8 * small for run in module.LARGE)


def test_forecasts_see_the_small_runs_only():
    N = np.array([3e3, 4e3, 6e3, 8e3, 3e3, 1e4, 6e4])
    D = N * [20, 20, 20, 20, 160, 320, 20]
    loss = 1.0 + 20 * N**-0.4 + 40 * D**-0.4
    small = np.arange(7) < 5
    off = {}
    for name in module.FORECASTS:
        rows = module.measured(name, RunTable(N, D, {"loss": loss}), small, ~small, "t")
        assert [row.metric for row in rows[1:]] == [
            "relative error at 320 tokens a parameter",
            "relative error at 20 tokens a parameter",
        ]
        assert all(row.direction == "lower" for row in rows)
        assert rows[0].value == pytest.approx(np.mean([row.value for row in rows[1:]]))
        off[name] = rows[0].value
    assert off["law"] < 1e-6 and off["robust law"] < 1e-6  # the points lie on the law
    assert off["best small run"] == pytest.approx(np.mean(loss[:5].min() / loss[5:] - 1))
    assert off["law of compute"] > 1e-3


def test_character_study_runs_end_to_end_at_tiny_scale(tmp_path):
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(module.FORECASTS) and rows["value"].is_finite().all()
    assert rows["flops"].n_unique() == 1 and rows["flops"][0] > 1e8  # every arm is charged the seven runs
    assert [verdict.verdict for verdict in result.verdicts()] == ["undecided"] * 3  # one seed decides nothing


def test_training_teaches():
    N, D, loss = module.train(4, 21, 20)
    assert N == 3029 and pytest.approx(20 * N, rel=0.01) == D
    assert loss < 0.8 * np.log(module.SYMBOLS)


def test_corpus_holds_out_what_it_tests():
    seen, tested = module.corpus()
    assert seen.shape[1] == tested.shape[1] == module.CONTEXT + 1 and len(seen) > 1e6
    assert int(seen.max()) < module.SYMBOLS and 10_000 < len(tested) < 50_000


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_public_runs(tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("DOWNRIVER_SHARED_DATA", str(shared_data("overtraining_testbed").parent))
    result = module.public.run(tmp_path, executor="serial", progress=False)
    assert not result.failures
    found = {
        (row["seed"], row["task"], row["metric"]): 100 * row["value"]
        for row in result.rows().filter(result.rows()["arm"] == "law").to_dicts()
    }
    assert found[0, "c4_val", "relative error at 640 tokens a parameter"] == pytest.approx(0.710, abs=5e-4)
    assert found[0, "c4_val", "relative error at 20 tokens a parameter"] == pytest.approx(0.732, abs=5e-4)
    assert found[1, "c4_val", "relative error at 80 tokens a parameter"] == pytest.approx(1.50, abs=5e-3)
    assert found[0, "paloma_redpajama", "relative error at 640 tokens a parameter"] == pytest.approx(15.4, abs=0.05)
    assert len({task for _, task, _ in found}) == 8


def test_public_runs_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DOWNRIVER_SHARED_DATA", raising=False)
    assert module._data() is None
    result = module.public.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert "DOWNRIVER_SHARED_DATA" in result.failures[0].error
    with pytest.raises(InputError, match="seed 2"):
        module.public.arms(2)
