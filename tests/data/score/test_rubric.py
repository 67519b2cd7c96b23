"""The judge: its prompt, its parser, failures counted, nothing paid twice, a limit that stops and goes on."""

from pathlib import Path

import numpy as np
import pytest

from downriver.core.errors import DownriverError, InputError
from downriver.data.score import RubricScorer, ScoreTable
from downriver.data.score.rubric import RUBRICS
from downriver.models import ScriptedChat, SpendingLimit


def _judge(messages: list[dict[str, str]]) -> str:
    text = messages[-1]["content"].split("<<<\n")[1].split("\n>>>")[0]
    return f"A word on each. Cleanliness: {len(text) % 6}"


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("Readability: 3", 3),
        ("…\n**Readability:** 4", 4),
        ("readability score: 0", 0),
        ("Readability: 2 for now.\nReadability: **5**/5", 5),
        ("Readability = 2.5", 2.5),
        ("Readability: 6", np.nan),
        ("Readability: -1", np.nan),
        ("Reasoning: 3", np.nan),
        ("", np.nan),
    ],
)
def test_answers_are_read(answer: str, points: float) -> None:
    assert RubricScorer(ScriptedChat({}), "readability").read(answer) == pytest.approx(points, nan_ok=True)


def test_every_rubric_has_five_conditions_in_its_prompt() -> None:
    for name, conditions in RUBRICS.items():
        prompt = RubricScorer(ScriptedChat({}), name, characters=10).prompt("0123456789ABC")
        assert len(conditions) == 5 and all(condition in prompt for condition in conditions)
        assert "0123456789\n" in prompt and "ABC" not in prompt and prompt.endswith(f"{name.capitalize()}: <sum>")


def test_points_and_failures() -> None:
    answers = iter(["Cleanliness: 4", "no idea", "Cleanliness: 1"])
    scorer = RubricScorer(ScriptedChat(lambda messages: next(answers)), "cleanliness")
    assert scorer.score(["a", "b", "c"]).tolist() == pytest.approx([4, np.nan, 1], nan_ok=True)
    assert (scorer.asked, scorer.failures) == (3, 1)
    scorer = RubricScorer(ScriptedChat(lambda messages: "I like it."), "cleanliness")
    with pytest.raises(DownriverError, match=r"30 of 30 answers of scripted .* 'Cleanliness: <points>'.*I like it"):
        scorer.score([f"text {i}" for i in range(30)])


def test_own_rubric() -> None:
    scorer = RubricScorer(ScriptedChat(lambda messages: "Wit: 2"), ("it is short", "it is funny"), name="wit")
    assert scorer.score(["ha"]).tolist() == [2.0] and np.isnan(scorer.read("Wit: 3"))
    with pytest.raises(InputError, match="unknown rubric 'wit': known are professionalism"):
        RubricScorer(ScriptedChat({}), "wit")
    with pytest.raises(InputError, match="needs a name="):
        RubricScorer(ScriptedChat({}), ("it is short",))


def test_over_budget_stops_and_a_later_run_pays_only_the_rest(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "word " * (i + 1)} for i in range(8)]
    cache = tmp_path / "answers"

    def chat(limit: float | None) -> ScriptedChat:
        return ScriptedChat(_judge, cache=cache, price=(1e6, 0.0), spending_limit=limit)

    once = chat(None)
    one = once.count_tokens(RubricScorer(once, "cleanliness").prompt("word")) + 10
    poor = chat(one * 4.0)
    table = ScoreTable(tmp_path / "table")
    with pytest.raises(SpendingLimit):
        table.add("clean", RubricScorer(poor, "cleanliness"), rows)
    paid = len(poor.asked)
    assert 0 < paid < 8
    rich = chat(None)
    table.add("clean", RubricScorer(rich, "cleanliness"), rows)
    assert len(rich.asked) == 8 - paid
    assert table.frame().collect()["clean"].to_list() == [len(row["text"]) % 6 for row in rows]
