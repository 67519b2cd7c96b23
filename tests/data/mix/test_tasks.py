"""Task mixtures: the formula of the public code, fixed shares, draws that follow them, refusals."""

import math

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.data.mix.tasks import OPT_IML, TaskMixture
from downriver.tasks.generalization import InstructionTask, Template

SIZES = {"a": ("flan", 3), "b": ("flan", 40), "c": ("t5", 200), "d": ("text", 25), "e": ("t5", 7)}


def tasks(sizes=SIZES):
    return [
        InstructionTask(name, "c", bench, [{"x": f"{name}{i}"} for i in range(n)], (Template("{x}", "{x}"),))
        for name, (bench, n) in sizes.items()
    ]


def metaseq(sizes, maximum):
    """The public code's formula, by its definition: min(n, maximum), normalised."""
    capped = [min(n, maximum) for n in sizes]
    return [n / sum(capped) for n in capped]


@pytest.mark.parametrize("cap", [1, 2.5, 10, 40, 4096, math.inf])
def test_the_cap_is_the_formula(cap):
    found = TaskMixture(tasks(), cap=cap).probabilities
    assert list(found) == list(SIZES)
    assert list(found.values()) == pytest.approx(metaseq([n for _, n in SIZES.values()], cap), abs=1e-15)


def test_no_cap_is_proportional_and_a_cap_of_one_uniform():
    sizes = np.array([n for _, n in SIZES.values()])
    for open_ended in (None, math.inf):
        assert list(TaskMixture(tasks(), cap=open_ended).probabilities.values()) == pytest.approx(sizes / sizes.sum())
    assert list(TaskMixture(tasks(), cap=1).probabilities.values()) == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_exponent(alpha):
    sizes = np.array([n for _, n in SIZES.values()], dtype=float)
    found = TaskMixture(tasks(), cap=None, alpha=alpha).probabilities
    assert list(found.values()) == pytest.approx(sizes**alpha / (sizes**alpha).sum())


def test_benchmarks_get_their_shares_and_tasks_theirs_within():
    mixture = TaskMixture(tasks(), cap=30, proportions={"flan": 0.3, "t5": 0.7}, extra={"text": 0.05})
    p = mixture.probabilities
    assert sum(p.values()) == pytest.approx(1, abs=1e-12) and p["d"] == pytest.approx(0.05)
    assert p["a"] + p["b"] == pytest.approx(0.95 * 0.3) and p["c"] + p["e"] == pytest.approx(0.95 * 0.7)
    assert p["a"] / (p["a"] + p["b"]) == pytest.approx(3 / 33) and p["e"] / p["c"] == pytest.approx(7 / 30)
    free = TaskMixture(tasks(), cap=30, extra={"text": 0.05}).probabilities
    assert free["d"] == pytest.approx(0.05) and free["b"] == pytest.approx(0.95 * 30 / 70)
    off = TaskMixture(tasks(), proportions={"flan": 1.0, "t5": 0.0, "text": 0.0})
    assert off.probabilities["c"] == 0 and {off.example(v)[0].benchmark for v in range(300)} == {"flan"}
    assert sum(OPT_IML.values()) == pytest.approx(1)


def test_draws_follow_the_probabilities():
    draws = 100_000
    mixture = TaskMixture(tasks(), cap=30, seed=3)
    counts = dict.fromkeys(SIZES, 0)
    starts = np.cumsum([0] + [n for _, n in SIZES.values()])
    rows = np.array([mixture.row(visit) for visit in range(draws)])
    for name, low, high in zip(SIZES, starts, starts[1:], strict=False):
        counts[name] = int(((rows >= low) & (rows < high)).sum())
    for name, p in mixture.probabilities.items():
        assert abs(counts[name] - draws * p) < 4 * math.sqrt(draws * p * (1 - p)), name
    again = TaskMixture(tasks(), cap=30, seed=3)
    assert [again.row(v) for v in (99, 5, 1234)] == rows[[99, 5, 1234]].tolist()
    assert [TaskMixture(tasks(), cap=30, seed=4).row(v) for v in range(50)] != rows[:50].tolist()


def test_every_example_comes_once_before_any_comes_again():
    mixture = TaskMixture(tasks(), cap=10)
    seen = {name: [] for name in SIZES}
    for visit in range(10_000):
        task, number = mixture.example(visit)
        seen[task.name].append(number)
    for name, (_, n) in SIZES.items():
        whole = len(seen[name]) // n
        assert whole > 2
        epochs = np.array(seen[name][: whole * n]).reshape(whole, n)
        assert (np.sort(epochs, axis=1) == np.arange(n)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1, "a new order every time"
    with pytest.raises(InputError, match="visit -1"):
        mixture.row(-1)


def test_an_example_is_the_one_that_its_row_counts():
    mixture = TaskMixture(tasks())
    everything = [e["x"] for task in mixture.tasks for e in task.examples]
    for visit in range(200):
        task, number = mixture.example(visit)
        assert task.examples[number]["x"] == everything[mixture.row(visit)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proportions": {"flan": 0.5, "t5": 0.4, "text": 0.2}}, "proportions sum to 1.1"),
        ({"proportions": {"flan": 0.5, "t5": 0.5}}, "proportions say nothing of benchmark 'text'"),
        ({"proportions": {"flam": 1.0}}, "unknown benchmark in proportions 'flam': did you mean 'flan'"),
        ({"proportions": {"flan": 1.5, "t5": -0.5, "text": 0.0}}, "proportions of 't5' is -0.5"),
        ({"extra": {"reasoning": 0.01}}, "unknown benchmark in extra 'reasoning'"),
        ({"extra": {"text": 1.0}}, "extra sums to 1: less than 1"),
        (
            {"extra": {"text": 0.1}, "proportions": {"flan": 0.5, "t5": 0.3, "text": 0.2}},
            "stands in proportions and in extra",
        ),
        ({"cap": 0}, "cap is 0"),
        ({"alpha": 0.5}, "cap 4096 and alpha 0.5: one of them"),
        ({"cap": None, "alpha": -1.0}, "alpha is -1.0"),
        ({"cap": math.nan}, "cap is nan"),
    ],
)
def test_bad_mixtures(settings, message):
    with pytest.raises(InputError, match=message):
        TaskMixture(tasks(), **settings)


def test_mixtures_of_nothing_and_of_twins():
    with pytest.raises(InputError, match="a mixture of no tasks"):
        TaskMixture([])
    with pytest.raises(InputError, match="two tasks are named 'a'"):
        TaskMixture([tasks()[0], tasks()[0]])
