"""Annotation: replies are read whatever they look like, nothing is asked twice, failures are counted and stop it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downriver.core.errors import DownriverError, InputError
from downriver.data.annotate import Annotator, HeuristicAnnotator
from downriver.data.annotate.magpie import MISSIONS, TASKS, parse_json
from downriver.models import ScriptedChat

GOOD = {
    "primary_tag": '{"primary_tag": "math", "other_tags": ["reasoning", "math", "sorcery"]}',
    "input_quality": '{"explanation": "clear", "input_quality": "Excellent"}',
    "difficulty": '{"intent": "a sum", "knowledge": "addition", "difficulty": "very easy"}',
    "safety": '{"safety": "safe"}',
    "score": '{"explanation": "right", "score": 4}',
}


def reply(prompt, replies=GOOD):
    return next(text for key, text in replies.items() if f'"{key}": ' in prompt.split("JSON only")[1])


def chat(user, assistant="Yes.", **more):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **more}


CHATS = [chat(f"What is {i} + {i}?", str(2 * i), id=f"c{i}", source="AB"[i % 2]) for i in range(10)]
LONG = {"messages": [*CHATS[0]["messages"], {"role": "user", "content": "And doubled?"}], "id": "long"}


class Judge:
    def __init__(self, answer=reply):
        self.answer, self.prompts = answer, []

    def __call__(self, prompts):
        self.prompts += prompts
        return [self.answer(prompt) for prompt in prompts]


def test_a_row_a_conversation_with_every_mission():
    table = Annotator(Judge()).annotate([*CHATS, LONG])
    row = table.frame.row(0, named=True)
    assert row["task"] == "math" and row["other_tasks"] == ["reasoning"] and row["quality"] == "excellent"
    assert (row["difficulty"], row["intent"], row["safety"]) == ("very easy", "a sum", "safe")
    assert row["st_reward"] == 4 and row["mt_reward"] is None and row["reward_scale"] == "0 to 5"
    long = table.frame.row(10, named=True)
    assert long["turns"] == 2 and long["mt_reward"] == 4 and long["st_reward"] is None
    assert table.frame["id"].to_list() == [*(f"c{i}" for i in range(10)), "long"]
    assert table.frame["row"].to_list() == list(range(11)) and table.frame["source"][1] == "B"
    assert table.asked == 5 * 11 - 3  # the first message of the last conversation is known already
    assert set(table.nulls.values()) == {0} and table.unknown == {}


def test_which_text_each_mission_sees():
    judge = Judge()
    messages = [
        {"role": "system", "content": "SYSTEM"},
        {"role": "user", "content": "FIRST"},
        {"role": "assistant", "content": "ANSWER"},
        {"role": "user", "content": "SECOND"},
    ]
    Annotator(judge).annotate([messages])
    task, quality, difficulty, safety, reward = judge.prompts
    for prompt in (task, quality, difficulty):
        assert "FIRST" in prompt and not re.search("SYSTEM|ANSWER|SECOND", prompt)
    for prompt in (safety, reward):
        assert all(word in prompt for word in ("SYSTEM", "FIRST", "ANSWER", "SECOND"))
    judge = Judge()
    Annotator(judge, ("task",), look="all").annotate([messages])
    assert "FIRST" in judge.prompts[0] and "SECOND" in judge.prompts[0] and "ANSWER" not in judge.prompts[0]


def test_a_chat_model_is_stopped_at_the_brace():
    scripted = ScriptedChat(lambda messages: "Sure!\n```json\n" + reply(messages[0]["content"]) + "\n```")
    table = Annotator(scripted).annotate(CHATS[:3])
    assert table.frame["task"].to_list() == ["math"] * 3 and table.asked == 15


def test_reward_model_and_guard_take_over():
    judge = Judge()
    annotator = Annotator(
        judge,
        reward_model=lambda chats: [len(c[1]["content"]) for c in chats],
        reward_scale="length",
        guard=lambda chats: ["3 + 3" in c[0]["content"] for c in chats],
    )
    frame = annotator.annotate([*CHATS, LONG]).frame
    assert frame["safety"].to_list() == ["safe"] * 3 + ["unsafe"] + ["safe"] * 7
    assert frame["st_reward"].to_list() == [1.0] * 5 + [2.0] * 5 + [None] and frame["mt_reward"][10] == 4
    assert set(frame["reward_scale"].drop_nulls()) == {"length"}
    assert sum('"score": 0' in prompt for prompt in judge.prompts) == 1


def test_unknown_words_are_counted():
    odd = GOOD | {"primary_tag": '{"primary_tag": "Sorcery"}', "input_quality": '{"input_quality": "superb"}'}
    table = Annotator(Judge(lambda p: reply(p, odd))).annotate(CHATS)
    assert table.frame["task"].to_list() == ["others"] * 10 and table.frame["quality"].null_count() == 10
    assert table.unknown == {"task": 10, "quality": 10} and table.nulls["quality"] == 10 and table.nulls["task"] == 0
    spelt = GOOD | {"primary_tag": '{"primary_tag": "Coding_and  Debugging."}'}
    assert Annotator(Judge(lambda p: reply(p, spelt))).annotate(CHATS[:1]).frame["task"][0] == "coding & debugging"


def test_unreadable_replies_are_asked_again_and_then_stay_empty():
    seen = {}

    def stumbling(prompt):
        seen[prompt] = seen.get(prompt, 0) + 1
        return "hm" if seen[prompt] == 1 else reply(prompt)

    assert Annotator(Judge(stumbling), ("task",)).annotate(CHATS).asked == 20
    mute = Judge(lambda prompt: "no" if "7 + 7" in prompt else reply(prompt))
    table = Annotator(mute, ("task",), retries=1, max_failures=0.2).annotate(CHATS)
    assert table.nulls == {"task": 1} and table.frame["task"][7] is None and table.asked == 11


def test_too_many_failures_stop_the_work_and_show_samples():
    judge = Judge(lambda prompt: "I would rather not")
    with pytest.raises(DownriverError, match=r"10 of 10 replies .* 5% are allowed, like these: 'I would rather not'"):
        Annotator(judge, ("task",), retries=0).annotate(CHATS)
    many = [chat(f"question {i}") for i in range(1000)]
    with pytest.raises(DownriverError, match="128 of 128"):
        Annotator(judge, ("task",), retries=0).annotate(many)


def test_a_killed_annotation_resumes_to_the_same_table(tmp_path):
    whole = Annotator(Judge()).annotate(CHATS)
    calls = []

    def killed(prompts):
        calls.append(len(prompts))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return [reply(p) for p in prompts]

    with pytest.raises(KeyboardInterrupt):
        Annotator(killed, cache=tmp_path, every=8).annotate(CHATS)
    judge = Judge()
    judge.__qualname__ = killed.__qualname__
    table = Annotator(judge, cache=tmp_path, every=8).annotate(CHATS)
    assert len(judge.prompts) == table.asked == 50 - 24
    assert table.frame.equals(whole.frame)
    again = Judge()
    again.__qualname__ = killed.__qualname__
    assert Annotator(again, cache=tmp_path).annotate(CHATS).asked == 0 and again.prompts == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": "b"}\n```', {"a": "b"}),
        ('Here you are: {"a": "b"} I hope it helps', {"a": "b"}),
        ('"a": "b"}', {"a": "b"}),
        ('"a": "b"', {"a": "b"}),
        ('{"a": "b", "c": "cut of', {"a": "b", "c": "cut of"}),
        ('{"a": ["x", "y', {"a": ["x", "y"]}),
        ('{"a": "b", "c":', {"a": "b"}),
        ('{"a": "b", ', {"a": "b"}),
        ("{'a': 'b'}", {"a": "b"}),
        ('{"a": "b",}', {"a": "b"}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ('{"a": "brace } inside"', {"a": "brace } inside"}),
        ("[1, 2]", None),
        ("no json", None),
        ("", None),
    ],
)
def test_parser(text, found):
    assert parse_json(text) == found


@given(st.text() | st.text(alphabet="{}[]\":,\\ 'ab1`\n"))
def test_parser_never_raises(text):
    assert parse_json(text) is None or isinstance(parse_json(text), dict)


@given(st.integers(1, 60))
def test_parser_reads_what_is_whole_of_a_reply_that_was_cut(cut):
    text = '{"primary_tag": "math", "other_tags": ["reasoning", "planning"]}'
    found = parse_json(text[:cut])
    assert found is None or found.get("primary_tag", "math").startswith("math"[: max(0, cut - 17)])


def test_heuristics():
    fine = chat("Explain why the sky is blue in two sentences.", "Because air scatters blue light most.")
    frame = (
        HeuristicAnnotator()
        .annotate(
            [
                fine,
                chat("Do it", "What?"),
                chat("", "?"),
                chat("What is 2 + 3?", "I'm sorry, I can't help with that"),
                chat("Write a poem about rain.", "Rain falls on the"),
                chat("How is a bomb built?", "It is"),
                {
                    "messages": [
                        *fine["messages"],
                        {"role": "user", "content": "ok"},
                        {"role": "assistant", "content": ""},
                    ]
                },
            ]
        )
        .frame
    )
    assert frame["quality"].to_list()[:3] == ["excellent", "poor", "very poor"]
    assert frame["task"].to_list()[3:5] == ["math", "creative writing"] and set(frame["task"]) <= set(TASKS)
    assert frame["st_reward"].to_list() == [5, 5, 5, 2, 3, 5, None] and frame["mt_reward"][6] == 0
    assert frame["safety"].to_list() == ["safe"] * 5 + ["unsafe", "safe"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"missions": ("mood",)}, "unknown mission 'mood'"),
        ({"look": "last"}, "unknown look"),
        ({"every": 0}, "every 0"),
        ({"max_failures": 2}, "max_failures 2"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(InputError, match=said):
        Annotator(Judge(), **settings)


@pytest.mark.parametrize(
    "bad", ["text", {"messages": "text"}, [{"role": "assistant", "content": "a"}], [{"role": "user"}]]
)
def test_malformed_conversations_are_named_before_anything_is_asked(bad):
    judge = Judge()
    with pytest.raises(InputError, match="conversation 1: messages with role and content"):
        Annotator(judge).annotate([CHATS[0], bad])
    assert judge.prompts == [] and len(MISSIONS) == 5


def test_a_judge_that_answers_too_little():
    with pytest.raises(InputError, match="the judge gave 0 replies to 10 prompts"):
        Annotator(lambda prompts: [], ("task",)).annotate(CHATS)
