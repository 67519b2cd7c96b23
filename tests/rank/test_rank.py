"""Models come in the order of their scores, with intervals that mean something, and are held against truth."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import weightedtau

from downriver import models
from downriver.core import InputError
from downriver.rank import PED, FeatureBank, agreement, fine_tuning_seconds, logme, rank_models, score, with_plasticity
from downriver.tasks import Task

WORDS = ["aaaa", "zzzz", "aab", "zzy", "aba", "zyz", "baa", "yzz", "abab", "zyzy"]


@pytest.fixture
def task():
    rows = Dataset.from_dict({"text": WORDS, "label": [0, 1] * 5})
    return Task("letters", "text-classification", {"train": rows}, ("text",), "label")


def bank(name, noise, seed=0, n=120, classes=4, parameters=1):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    X = np.eye(classes, 8)[y] + noise * rng.normal(size=(n, 8))
    return FeatureBank(name, "t", X.astype(np.float32), y, parameters=parameters)


@pytest.fixture
def hub():
    return [bank("poor", 3.0, 1, parameters=300), bank("good", 0.5, 2, parameters=200), bank("fair", 1.2, 3)]


def test_the_best_score_comes_first(hub):
    found = rank_models(hub)
    assert found.models == ["good", "fair", "poor"] and found.table["rank"].to_list() == [1, 2, 3]
    by_name = {b.model: b for b in hub}
    for row in found.table.to_dicts():
        expected = logme(by_name[row["model"]].X, by_name[row["model"]].y)
        assert row["score"] == expected and row["low"] < expected < row["high"] and row["features"] == 8
    assert found.table["first"].sum() == pytest.approx(1) and found.table["first"][0] == 1
    assert found.resampled.shape == (3, 40) and found.rows == 120


def test_halves_are_of_every_class_and_the_same_for_every_model(hub):
    seen = []

    class Spy(PED):
        def transform(self, X, y, general=None):
            seen.append(np.bincount(y))
            return X

    first = rank_models([hub[0], bank("twin", 3.0, 1)], pre=Spy(rescale=False), resamples=5)
    assert len(seen) == 12 and seen[0].tolist() == [30] * 4
    assert all(counts.sum() == 60 and set(counts) == {15} for counts in seen[1:6])
    np.testing.assert_array_equal(first.resampled[0], first.resampled[1])


def test_intervals_are_as_wide_as_scores_of_fresh_samples_scatter():
    fresh = [logme(b.X, b.y) for b in (bank("b", 1.0, seed) for seed in range(100, 160))]
    tables = [rank_models([bank("b", 1.0, seed)], level=0.9).table for seed in range(20)]
    widths = [(t["high"][0] - t["low"][0]) / (2 * 1.645) for t in tables]
    assert 0.7 < np.mean(widths) / np.std(fresh, ddof=1) < 1.4
    centre = np.mean(fresh)
    assert sum(t["low"][0] < centre < t["high"][0] for t in tables) >= 15  # 18 expected


def test_without_resamples_or_with_small_classes_there_are_no_intervals(hub):
    found = rank_models(hub, resamples=0)
    assert found.table["low"].null_count() == 3 and not found.notes
    few = rank_models([bank("few", 1.0, n=12)])
    assert few.table["low"][0] is None and few.notes == ("no intervals: a class has 3 rows, four at least are needed",)


def test_ped_goes_first_with_the_general_statistics(hub):
    with pytest.warns(UserWarning, match="no general features"):
        found = rank_models(hub, pre=PED(n_sigma=3.0), resamples=2)
    assert "no general features" in found.notes[0]
    general = (np.zeros(8), np.full(8, 2.0))
    b = hub[0]
    with_general = FeatureBank(b.model, b.task, b.X, b.y, general=general)
    found = rank_models([with_general], pre=PED(n_sigma=3.0), resamples=2)
    assert found.table["score"][0] == score(b.X, b.y, pre=PED(n_sigma=3.0), general=general) != logme(b.X, b.y)
    assert not found.notes


def test_parameters_reach_the_score(hub):
    found = rank_models(hub, score="knn", neighbours=7, resamples=0)
    by_name = {b.model: b for b in hub}
    for row in found.table.to_dicts():
        assert row["score"] == score(by_name[row["model"]].X, by_name[row["model"]].y, "knn", neighbours=7)


def test_agreement_with_truth(hub):
    found = rank_models(hub)
    said = found.agreement({"good": 0.9, "fair": 0.8, "poor": 0.5, "unused": 1.0}, top=(1, 2))
    assert said.weighted_tau == pytest.approx(1) and said.regret == 0 and said.top == {1: 1.0, 2: 1.0}
    assert said.pearson == pytest.approx(np.corrcoef(found.table["score"], [0.9, 0.8, 0.5])[0, 1])
    assert said.tau_low is not None and said.tau_high is not None and said.tau_low <= said.tau_high <= 1
    sizes, reached = [200, 1, 300], [0.9, 0.8, 0.5]
    assert said.size_tau == pytest.approx(weightedtau(sizes, reached).statistic)
    wrong = found.agreement({"good": 0.5, "fair": 0.8, "poor": 0.9}, top=(1, 2))
    assert wrong.weighted_tau == pytest.approx(-1) and wrong.regret == pytest.approx(0.4)
    assert wrong.top == {1: pytest.approx(5 / 9), 2: pytest.approx(8 / 9)}
    with pytest.raises(InputError, match="unknown model in truth 'good'"):
        found.agreement({"god": 0.9, "fair": 0.8, "poor": 0.5})
    assert rank_models(hub, resamples=0).agreement({"good": 1, "fair": 2, "poor": 3}).tau_low is None


def test_weighted_tau_counts_the_top_most():
    truth = np.arange(6.0)
    top_swapped, last_swapped = truth.copy(), truth.copy()
    top_swapped[[4, 5]] = top_swapped[[5, 4]]
    last_swapped[[0, 1]] = last_swapped[[1, 0]]
    assert agreement(top_swapped, truth).weighted_tau < agreement(last_swapped, truth).weighted_tau < 1
    for scores, reached, message in [
        ([1.0], [1.0], "two at least"),
        ([1.0, 2.0], [1.0], "as many of both"),
        ([1.0, np.nan], [1.0, 2.0], "scores, model 2: the value is not finite"),
    ]:
        with pytest.raises(InputError, match=message):
            agreement(scores, reached)


def test_models_by_name_end_to_end(task, tmp_path, monkeypatch):
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path))
    named = {"a": "small:text-encoder:nano:0", "b": models.small("text-encoder", "tiny")}
    found = rank_models(named, task, epochs=2.0, resamples=4)
    assert sorted(found.models) == ["a", "b"] and (found.table["fine_tuning_seconds"] > 0).all()
    assert found.table["features"].sort().to_list() == [32, 128]
    assert len(list(tmp_path.glob("banks/*"))) == 2
    with pytest.raises(InputError, match="small:text-encoder:nano:0: leep reads the probabilities"):
        rank_models(["small:text-encoder:nano:0"], task, "leep")
    headed = models.small("text-encoder", "nano").with_head(task)
    assert rank_models([headed], task, "leep", resamples=0).table["score"][0] < 0


def test_one_real_step_is_measured_and_leaves_no_trace(task):
    model = models.small("text-encoder", "nano")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert fine_tuning_seconds(model, task, epochs=1.0, batch_size=4) > 0
    assert torch.equal(torch.rand(1), expected) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="epochs 0"):
        fine_tuning_seconds(model, task, epochs=0)


def test_the_estimate_is_the_step_times_the_steps(task, monkeypatch):
    from downriver.rank import rank as module

    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    model = models.small("text-encoder", "nano")
    assert fine_tuning_seconds(model, task, epochs=3.0, batch_size=4) == 8.0  # 3 · 10 / 4 rows a step, rounded up


def test_bad_input_is_named(hub, task):
    nan = bank("bad", 1.0)
    for message, call in [
        ("a list of models is expected", lambda: rank_models("all-MiniLM-L6-v2", task)),
        ("no models", lambda: rank_models([], task)),
        ("two models are called 'good'", lambda: rank_models([hub[1], hub[1]])),
        ("a task is expected", lambda: rank_models(["small:text-encoder:nano:0"])),
        ("unknown score 'logem'", lambda: rank_models(hub, score="logem")),
        ("resamples -1 and level 0.9", lambda: rank_models(hub, resamples=-1)),
        ("hold different rows", lambda: rank_models([hub[0], bank("short", 1.0, n=100)])),
        ("fair: unknown parameter of knn 'k'", lambda: rank_models(hub[2:], score="knn", k=3)),
        (
            "class '3' has one row",
            lambda: rank_models([FeatureBank("m", "t", nan.X[:8], np.array([0, 0, 1, 1, 2, 2, 2, 3]))]),
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_plasticity_prefers_depth_where_scores_are_alike():
    scores, layers = np.array([0.50, 0.52, 0.90]), np.array([152, 18, 18])
    found = with_plasticity(scores, layers)
    np.testing.assert_allclose(found, (scores - scores.mean()) / scores.std() + layers / 50)
    np.testing.assert_allclose(with_plasticity(3 * scores - 7, layers), found)  # the score's unit drops out
    assert found.argsort()[::-1].tolist() == [0, 2, 1]
    np.testing.assert_allclose(with_plasticity([1.0, 1.0], [50, 18]), [1.0, 0.36])
    for wrong in (([0.1, 0.2], [50]), ([0.1], [50])):
        with pytest.raises(InputError, match="as many of both"):
            with_plasticity(*wrong)
    with pytest.raises(InputError, match="positive layers"):
        with_plasticity([0.1, np.nan], [50, 18])
    with pytest.raises(InputError, match="positive layers"):
        with_plasticity([0.1, 0.2], [50, 0])
