"""The built-in study, end to end on the real encoder and real posts."""

import numpy as np
import pytest

from downriver.study import quickstart

ARMS = ["linear probe", "LoRA", "full fine-tuning", "average of two halves", "TIES of two halves"]


def test_the_arms_are_declared_without_running_anything():
    assert [arm.name for arm in quickstart.quickstart.arms()] == ARMS
    assert len(quickstart.quickstart.cells()) == 5 * len(ARMS)
    assert [arm.name for arm in quickstart.curve.arms()][-2:] == ["all posts", "forecast"]


@pytest.mark.assets
@pytest.mark.slow
def test_the_built_in_study_runs_resumes_and_forecasts(asset, tmp_path):
    asset("all-MiniLM-L6-v2")
    asset("20newsgroups")
    results, forecast = quickstart.run(tmp_path, "serial", seeds=2, scale="tiny", progress=False)
    compared, measured = results
    assert compared.failures == measured.failures == []
    rows = compared.rows()
    accuracy = {arm: rows.filter(metric="accuracy", arm=arm)["value"].mean() for arm in ARMS}
    assert min(accuracy.values()) > 0.3, f"chance is 0.2: {accuracy}"
    assert rows.filter(metric="retention", arm="linear probe")["value"].to_list() == [1.0, 1.0]
    assert {"accuracy", "ece", "loss", "retention"} <= set(rows["metric"])
    probe, full = (rows.filter(metric="accuracy", arm=arm)["trained_parameters"][0] for arm in (ARMS[0], ARMS[2]))
    assert probe == 384 * 5 + 5
    assert full > 22_000_000
    examples = {arm: rows.filter(metric="accuracy", arm=arm)["examples"][0] for arm in ARMS}
    assert max(examples.values()) <= 64, f"an arm saw more than the budget: {examples}"
    assert forecast.fit_x.tolist() == [20, 40, 80]
    assert forecast.held_x.tolist() == [160]
    assert np.isfinite(forecast.predicted).all()
    assert [v.claim.arm for v in measured.verdicts()] == ["forecast"]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again, _ = quickstart.run(tmp_path, "serial", seeds=2, scale="tiny", progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before
    assert again[0].rows().equals(rows)
