"""What is brought together for a page: exact means, the verdicts' own intervals, what is best, missing or failed."""

import pytest

from downriver.core.stats import paired
from downriver.report.summary import summarise
from downriver.study import Result


def test_means_and_intervals_are_those_of_the_rows(result: Result) -> None:
    found = summarise(result)
    assert found.arms == ("probe", "full", "lora", "merge")
    assert found.seeds == (0, 1, 2, 3, 4)
    assert found.cells == 20
    for column in found.columns:
        for arm, cell in column.cells.items():
            values = result.rows().filter(metric=column.metric, arm=arm).sort("seed")["value"].to_list()
            assert list(cell.values.values()) == values
            expected = paired(values)
            assert (cell.mean, cell.low, cell.high) == (expected.mean, expected.low, expected.high)


def test_best_follows_the_direction(result: Result) -> None:
    found = summarise(result)
    assert {c.metric: set(c.best) for c in found.columns} == {
        "accuracy": {"merge"},
        "loss": {"merge"},
        "ece": {"probe"},
        "retention": {"probe"},
        "mrr_before": set(),
    }
    assert [c.metric for c in found.columns if not c.varies] == ["mrr_before"]


def test_costs_are_means_over_seeds_and_only_what_differs_is_drawn(result: Result) -> None:
    found = summarise(result)
    assert found.costs["lora"]["flops"] == 3.9e13
    assert found.costs["lora"]["trained_parameters"] == 147_000
    assert found.seconds == pytest.approx(5 * (8 + 64 + 51 + 130), rel=1e-6)
    assert found.varied() == ["flops", "seconds", "examples", "tokens", "trained_parameters"]


def test_failed_and_missing_values(wounded: Result) -> None:
    found = summarise(wounded)
    hostile = "<script>alert('x')</script>"
    assert found.arms == (hostile, "dead", "once")
    assert found.failed == {"dead": (0, 1, 2), "once": (1,)}
    accuracy, f1 = found.find("accuracy"), found.find("f1")
    assert accuracy is not None and f1 is not None
    assert accuracy.cells["once"].values == {0: 0.70, 2: 0.72}
    assert accuracy.cells["once"].mean == pytest.approx(0.71)
    assert hostile not in f1.cells and "dead" not in accuracy.cells
    assert wounded.rows().filter(metric="f1", arm=hostile).height == 3  # measured, but not a number


def test_one_seed_has_no_interval(single: Result) -> None:
    (column,) = summarise(single).columns
    assert [(c.mean, c.low, c.high) for c in column.cells.values()] == [(0.5, None, None), (0.6, None, None)]


def test_tasks_are_named_only_where_there_are_several(result: Result, run_study) -> None:
    from downriver.core import Measurement

    assert summarise(result).name(summarise(result).columns[0]) == "accuracy"
    both = run_study(
        {"a": lambda seed: [Measurement("accuracy", 0.5, task="x"), Measurement("accuracy", 0.7, task="y")]}, seeds=2
    )
    found = summarise(both)
    assert [found.name(c) for c in found.columns] == ["accuracy · x", "accuracy · y"]
    assert found.find("accuracy", "y") is found.columns[1]
