"""Levels of generalisation: what may stand where, templates, metrics, and the overlap of 13 words."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.core.minhash import word_runs
from downriver.tasks.generalization import (
    InstructionBench,
    InstructionTask,
    Levels,
    Template,
    overlap_report,
    rouge_l,
    shared_ngrams,
)

TELL = (Template("{x}", "{y}"),)


def task(name, category="c", n=10, benchmark="toy", text="{name} {i}", templates=TELL):
    examples = [{"x": text.format(name=name, i=i), "y": str(i)} for i in range(n)]
    return InstructionTask(name, category, benchmark, examples, templates)


@pytest.fixture
def bench():
    return InstructionBench([task(c + str(i), c, 20) for c in "abc" for i in range(3)])


def names(tasks):
    return {t.name for t in tasks}


@pytest.mark.parametrize("seed", range(5))
def test_every_task_is_in_one_level_and_every_example_on_one_side(bench, seed):
    levels = bench.split(["a"], ["b0"], instance_frac=0.3, seed=seed)
    assert names(levels.fully) == {"a0", "a1", "a2"} and names(levels.partially) == {"b0"}
    assert names(levels.train) == names(levels.supervised) == {"b1", "b2", "c0", "c1", "c2"}
    assert not names(levels.train) & (names(levels.fully) | names(levels.partially))
    for trained, held in zip(levels.train, levels.supervised, strict=True):
        assert len(trained) == 14 and len(held) == 6
        both = {e["x"] for e in trained.examples} | {e["x"] for e in held.examples}
        assert len(both) == 20
    assert [name for name, _ in levels.items()] == ["fully held-out", "partially supervised", "fully supervised"]


def test_the_split_is_drawn_by_the_seed(bench):
    held = [[e["x"] for e in bench.split(seed=s).supervised[0].examples] for s in (0, 0, 1, 2)]
    assert held[0] == held[1] and len({tuple(h) for h in held}) == 3


def test_equal_examples_stay_together():
    repeated = InstructionTask("r", "c", "toy", [{"x": str(i % 4), "y": "1"} for i in range(40)], TELL)
    levels = InstructionBench([repeated]).split(instance_frac=0.25)
    train, held = ({e["x"] for e in t.examples} for t in (levels.train[0], levels.supervised[0]))
    assert len(held) == 1 and not train & held
    two = InstructionBench([repeated.keep([0, 1])]).split(instance_frac=0.9)
    assert len(two.train[0]) == len(two.supervised[0]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out_categories": ["z"]}, "unknown category to hold out 'z'"),
        ({"held_out_tasks": ["a9"]}, "unknown task to hold out 'a9'"),
        ({"held_out_categories": ["a"], "held_out_tasks": ["a1"]}, "task 'a1' would be in two levels"),
        ({"held_out_tasks": ["a0", "a1", "a2"]}, "no task of its category 'a' is left in train"),
        ({"held_out_categories": ["a", "b", "c"]}, "no task is left to train on"),
        ({"instance_frac": 0.0}, "instance_frac is 0.0"),
    ],
)
def test_splits_that_do_not_mean_what_they_say(bench, settings, message):
    with pytest.raises(InputError, match=message):
        bench.split(**settings)


def test_levels_made_by_hand_are_checked():
    a0, a1, b0 = task("a0", "a"), task("a1", "a"), task("b0", "b")
    Levels((a0,), (b0,), (a1,), (a0,))
    with pytest.raises(InputError, match="category 'a' of held-out task 'a1' occurs in train"):
        Levels((a0,), (a1,), (), ())
    with pytest.raises(InputError, match="'a0' is held out and occurs in train"):
        Levels((a0,), (), (a0,), ())
    with pytest.raises(InputError, match="'b0' is measured as fully supervised"):
        Levels((a0,), (), (), (b0,))


def test_tasks_that_cannot_be_told():
    with pytest.raises(InputError, match="task 'a' has no example"):
        InstructionTask("a", "c", "toy", [], TELL)
    with pytest.raises(InputError, match="task 'a' has no template"):
        InstructionTask("a", "c", "toy", [{"x": "1"}], ())
    with pytest.raises(InputError, match="unknown metric of task 'a' 'bleu'"):
        InstructionTask("a", "c", "toy", [{"x": "1"}], TELL, "bleu")
    with pytest.raises(InputError, match=r"task 'a': unknown variable of template '\{word\}' 'word'"):
        InstructionBench([task("a", templates=(Template("{word}", "{y}"),))])
    with pytest.raises(InputError, match="two tasks are named 'a'"):
        InstructionBench([task("a"), task("a", "b")])
    with pytest.raises(InputError, match="one distinct example"):
        InstructionBench([task("a", text="same", n=1)]).split()
    with pytest.raises(InputError, match="target is empty"):
        Template("{x}", " ")
    with pytest.raises(InputError, match="gives an empty target"):
        TELL[0].render({"x": "1", "y": " "})
    with pytest.raises(InputError, match="not the name of a field"):
        Template("{x[0]}", "{y}")
    with pytest.raises(InputError, match="for a brace"):
        Template("{x", "{y}")


def test_values_with_braces_are_not_filled_again():
    assert TELL[0].render({"x": "{y} {z}", "y": "{x}"}) == ("{y} {z}", "{x}")


def test_rouge_l_and_exact_match():
    assert rouge_l(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == 1 and rouge_l([], ["a"]) == 0 and rouge_l([], []) == 1
    assert rouge_l(["the", "cat", "sat"], ["sat", "the", "cat"]) == pytest.approx(2 / 3)
    exact = task("a")
    assert exact.score(" YES ", "yes") == 1 and exact.score("yes sir", "yes") == 0
    assert InstructionTask("a", "c", "toy", [{"x": "", "y": "b"}], TELL, "rouge_l").score(
        "yes sir", "Yes"
    ) == pytest.approx(2 / 3)


def words(n, first=0):
    return " ".join(f"w{i}" for i in range(first, first + n))


def test_a_planted_run_of_13_words_is_found_and_one_of_12_is_not():
    def texts(name, category, *found):
        return InstructionTask(name, category, "toy", [{"x": text, "y": "yes"} for text in found], TELL)

    train = texts("t", "a", f"Before, {words(13).upper()}! after", words(12, 100))
    other = texts("o", "a", "nothing of the kind")
    thirteen = texts("e13", "a", f"so {words(13)} it is", "and more", "and more yet", "and yet more")
    twelve = texts("e12", "a", f"so {words(12, 100)} it is", f"x {words(12)} y")
    report = overlap_report(Levels((train, other), (), (thirteen, twelve), ()))
    assert report.to_dicts() == [
        {
            "train": "t",
            "evaluated": "e13",
            "level": "partially supervised",
            "examples": 1,
            "rate": 0.25,
            "suspect": True,
        }
    ]
    across = InstructionTask("x", "a", "toy", [{"x": words(12), "y": "w12"}], TELL)  # 13 with the answer
    assert overlap_report(Levels((train, other), (), (across,), ())).is_empty()
    looser = overlap_report(Levels((train, other), (), (thirteen, twelve), ()), threshold=0.25)
    assert not looser["suspect"].any()
    shorter = overlap_report(Levels((train, other), (), (twelve,), ()), ngram=12)
    assert shorter["rate"].to_list() == [1.0]
    with pytest.raises(InputError, match="ngram is 0"):
        overlap_report(Levels((train,), (), (thirteen,), ()), ngram=0)


def test_shared_ngrams_agree_with_sets_of_tuples():
    rng = np.random.default_rng(0)
    texts, others = ([" ".join(rng.choice(list("abcd"), size=rng.integers(1, 12))) for _ in range(60)] for _ in "12")

    def grams(text):
        found = text.split()
        return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}

    known = set().union(*map(grams, others))
    expected = [bool(grams(text) & known) or text in others for text in texts]
    found = shared_ngrams(texts, others, ngram=5)
    assert found.tolist() == expected and 0 < found.sum() < 60
    assert not shared_ngrams(texts, []).any() and len(shared_ngrams([], texts)) == 0


def test_runs_of_a_short_text():
    assert len(word_runs("a b", 3)) == 1 and len(word_runs("a b", 3, short=False)) == 0
    assert len(word_runs("a b c d", 3)) == len(word_runs("a b c d", 3, short=False)) == 2
