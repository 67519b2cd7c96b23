"""What each judge calls a failure."""

import math

import datasets
import pytest

from downriver.core.errors import InputError
from downriver.data.synth.judges import (
    ClassifierJudge,
    EntropyJudge,
    ExactMatch,
    GuardJudge,
    NumberMatch,
    PairwiseJudge,
    final_number,
)
from downriver.models import ScriptedChat, small
from downriver.tasks import Task


def test_exact_match_says_nothing_without_a_reference():
    judge = ExactMatch(lambda queries: ["a", "a", ""])
    assert [r.failed for r in judge([("q", ("A ",)), ("q", ("b",)), ("q", ("c",))])] == [False, True, None]
    with pytest.raises(InputError, match="reference gave 1 answers for 2 queries"):
        ExactMatch(lambda queries: ["a"])([("q", ("a",)), ("r", ("a",))])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234),
        ("2 + 2 = 4\n#### 4\nnot 7", 4),
        (r"so \boxed{\frac{1}{4}} or 9", 0.25),
        (r"\boxed{x_{2} = -3.5}", -3.5),
        ("it is 12, no 13.", 13),
        ("-.5", -0.5),
        ("1/0", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_number_match():
    judge = NumberMatch(lambda queries: ["#### 10", "#### 10", "unknown"])
    assert [r.failed for r in judge([("q", ("10.0",)), ("q", ("100",)), ("q", ("1",))])] == [False, True, None]


def test_entropy_of_answers():
    judge = EntropyJudge()
    same, spread = judge([("q", ("a",) * 10), ("q", (*("abcd" * 2), "e", "e"))])
    assert same == (False, 0.0, "") and spread.failed
    four = EntropyJudge(samples=4)([("q", tuple("abcd"))])[0]
    assert four.score == pytest.approx(math.log(4)) and four.score > 1.193 and four.failed
    assert not EntropyJudge(samples=4)([("q", tuple("aabb"))])[0].failed  # ln 2 = 0.69
    with pytest.raises(InputError, match=r"threshold 1.193 is beyond log 2"):
        EntropyJudge(samples=2)
    with pytest.raises(InputError, match="samples is 1"):
        EntropyJudge(samples=1)


def test_a_classifier_model():
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    task = Task("t", "text-classification", {"train": rows}, ("text",), "label", labels=("safe", "unsafe"))
    model = small("text-encoder", "nano").with_head(task)
    answered = [("q" * i, ("a",)) for i in range(1, 40)]
    found = ClassifierJudge(model, "unsafe")(answered)
    other = ClassifierJudge(model, "safe")(answered)
    assert all(a.score + b.score == pytest.approx(1, abs=1e-5) for a, b in zip(found, other, strict=True))
    assert [r.failed for r in found] == [r.score >= 0.5 for r in found]
    with pytest.raises(InputError, match=r"one of the classifier's labels is expected \(safe, unsafe\)"):
        ClassifierJudge(model, "bad")


def test_guard_reads_the_first_word():
    guard = GuardJudge(ScriptedChat({"a": "safe", "b": " Unsafe\nS3", "c": "I think"}))
    assert [r.failed for r in guard([("q", (x,)) for x in "abc"])] == [False, True, None]


def test_pairwise_needs_both_orders():
    def longer(messages):
        _, a, b = messages[0]["content"].removesuffix("\n\nBetter answer:").split("\n\nAnswer ")
        return "A." if len(a) > len(b) else "B"

    answered = [("q", ("no",)), ("q", ("a much longer answer",))]
    judge = PairwiseJudge(ScriptedChat(longer), lambda queries: ["a reference"] * 2)
    assert [r.failed for r in judge(answered)] == [True, False]
    tie, mute = ScriptedChat(lambda m: "A"), ScriptedChat(lambda m: "neither")
    assert [r.failed for r in PairwiseJudge(tie, lambda q: ["x"] * 2)(answered)] == [False, False]
    assert [r.failed for r in PairwiseJudge(mute, lambda q: ["x"] * 2)(answered)] == [None, None]
