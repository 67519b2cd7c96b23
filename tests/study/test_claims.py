import math

import polars as pl
import pytest

from downriver.core import InputError
from downriver.study import above, below, better, keeps
from downriver.study.claims import check, verdicts


def table(values, direction="higher", metric="accuracy", task="t"):
    """Rows of ``{arm: [value of seed 0, 1, ...]}``."""
    return pl.DataFrame(
        [
            {"arm": arm, "seed": seed, "task": task, "metric": metric, "value": value, "direction": direction}
            for arm, found in values.items()
            for seed, value in enumerate(found)
            if value is not None
        ],
        schema_overrides={"value": pl.Float64},
    )


def judge(claims, rows, seeds=5):
    return verdicts(claims, rows, ["a", "b", "c"], range(seeds))


A = [0.80, 0.82, 0.81, 0.83, 0.84]
B = [0.70, 0.73, 0.70, 0.74, 0.73]


def test_better_is_judged_seed_by_seed():
    (v,) = judge([better("a", than="b", on="accuracy")], table({"a": A, "b": B}))
    assert v.verdict == "holds" and v.n == 5 and v.seeds == (0, 1, 2, 3, 4)
    assert v.differences == pytest.approx([0.1, 0.09, 0.11, 0.09, 0.11])
    assert v.mean == pytest.approx(0.1) and 0.09 <= v.low <= v.mean <= v.high <= 0.11
    assert v.p == 1 / 32
    assert v.text.startswith("holds: a is better than b on accuracy by 0.1 [") and "over 5 seeds" in v.text


def test_the_other_way_round_it_fails_and_says_so():
    (v,) = judge([better("b", than="a", on="accuracy")], table({"a": A, "b": B}))
    assert v.verdict == "fails" and v.mean == pytest.approx(-0.1) and v.p == 1.0
    assert v.text.startswith("fails: b is better than a on accuracy: b is worse than a on accuracy by 0.1 [0.0")


def test_where_lower_is_better_the_sign_turns():
    rows = table({"a": A, "b": B}, direction="lower", metric="loss")
    assert judge([better("b", than="a", on="loss")], rows)[0].verdict == "holds"
    assert judge([better("a", than="b", on="loss")], rows)[0].verdict == "fails"
    assert judge([keeps("a", than="b", on="loss", within=0.2)], rows)[0].verdict == "holds"
    assert judge([keeps("a", than="b", on="loss", within=0.05)], rows)[0].verdict == "fails"


@pytest.mark.parametrize(("margin", "word"), [(0.05, "holds"), (0.1, "undecided"), (0.2, "fails")])
def test_a_margin_must_be_exceeded(margin, word):
    assert judge([better("a", than="b", on="accuracy", margin=margin)], table({"a": A, "b": B}))[0].verdict == word


def test_keeping_is_losing_less_than_was_allowed():
    rows = table({"a": A, "b": B})
    assert judge([keeps("b", than="a", on="accuracy", within=0.15)], rows)[0].verdict == "holds"
    assert judge([keeps("b", than="a", on="accuracy", within=0.05)], rows)[0].verdict == "fails"
    assert judge([keeps("a", than="b", on="accuracy", within=0.0)], rows)[0].verdict == "holds"


def test_thresholds():
    rows = table({"a": A}, direction="lower")
    claims = [above("a", on="accuracy", value=0.7), above("a", on="accuracy", value=0.9)]
    assert [v.verdict for v in judge(claims, rows)] == ["holds", "fails"]
    claims = [below("a", on="accuracy", value=0.9), below("a", on="accuracy", value=0.7)]
    assert [v.verdict for v in judge(claims, rows)] == ["holds", "fails"]
    text = judge([below("a", on="accuracy", value=0.7)], rows)[0].text
    assert text.startswith("fails: a is below 0.7 on accuracy: a lies above 0.7 on accuracy by 0.12 [")


@pytest.mark.parametrize(("n", "said"), [(1, "over one seed"), (2, "over 2 seeds")])
def test_one_or_two_seeds_decide_nothing(n, said):
    (v,) = judge([better("a", than="b", on="accuracy")], table({"a": A[:n], "b": B[:n]}), seeds=n)
    assert v.verdict == "undecided" and f"{said}, too few to decide: at least 3 are needed" in v.text


def test_seeds_without_a_value_are_left_out_and_named():
    rows = table({"a": [0.8, None, 0.81, math.nan, 0.84], "b": B})
    (v,) = judge([better("a", than="b", on="accuracy")], rows)
    assert v.n == 3 and v.seeds == (0, 2, 4) and v.dropped == (1, 3)
    assert "without seed 1, 3, where a value is missing" in v.text


def test_an_arm_that_failed_everywhere_leaves_the_claim_undecided():
    (v,) = judge([better("a", than="c", on="accuracy")], table({"a": A, "b": B}))
    assert (v.verdict, v.n, v.dropped) == ("undecided", 0, (0, 1, 2, 3, 4))
    assert "no seed has the values it needs" in v.text
    (v,) = judge([better("a", than="c", on="accuracy")], table({"a": A}).clear())
    assert v.verdict == "undecided"


def test_several_tasks_are_averaged_within_a_seed():
    rows = pl.concat([table({"a": [1.0, 0.8], "b": [0.0, 0.0]}, task="x"), table({"a": [0.0, 0.4], "b": [0.5, 0.0]})])
    (v,) = judge([better("a", than="b", on="accuracy")], rows, seeds=2)
    assert v.differences == pytest.approx([0.25, 0.6])
    (v,) = judge([better("a", than="b", on="accuracy", task="x")], rows, seeds=2)
    assert v.differences == pytest.approx([1.0, 0.8]) and "accuracy of x" in v.text


def test_holm_runs_over_all_claims():
    claims = [better("a", than="b", on="accuracy"), above("a", on="accuracy", value=0.5)]
    assert [(v.p, v.p_holm) for v in judge(claims, table({"a": A, "b": B}))] == [(1 / 32, 2 / 32)] * 2


def test_unknown_names_are_refused_with_the_nearest():
    rows = table({"a": A, "b": B})
    with pytest.raises(InputError, match=r"unknown metric in the claim .* 'acuracy': did you mean 'accuracy'"):
        judge([better("a", than="b", on="acuracy")], rows)
    with pytest.raises(InputError, match=r"unknown task in the claim"):
        judge([better("a", than="b", on="accuracy", task="tt")], rows)
    with pytest.raises(InputError, match=r"unknown arm in the claim .* 'ties': did you mean 'tie'"):
        check([better("ties", than="b", on="accuracy")], ["tie", "b"])
    only_b = pl.concat([rows, table({"b": B}, metric="f1")])
    with pytest.raises(InputError, match="needs f1, which arm 'a' does not measure"):
        judge([better("a", than="b", on="f1")], only_b)


def test_a_metric_without_a_direction_cannot_be_better():
    with pytest.raises(InputError, match="which way accuracy is better"):
        judge([better("a", than="b", on="accuracy")], table({"a": A, "b": B}, direction="none"))
    mixed = pl.concat([table({"a": A}), table({"b": B}, direction="lower")])
    with pytest.raises(InputError, match="higher, lower"):
        judge([better("a", than="b", on="accuracy")], mixed)


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_margins_are_checked(margin):
    with pytest.raises(InputError, match="margin"):
        better("a", than="b", on="accuracy", margin=margin)
    with pytest.raises(InputError, match="margin"):
        keeps("a", than="b", on="accuracy", within=margin)


def test_claims_in_words():
    assert better("a", than="b", on="x", margin=0.1).text == "a is better than b on x by more than 0.1"
    assert keeps("a", than="b", on="x", within=0.1, task="t").text == "a keeps the x of t of b to within 0.1"
    assert above("a", on="x", value=2).text == "a is above 2 on x"
