"""Controllability and robustness, on oracles of which both are known."""

import math

import pytest

from downriver.core.errors import InputError
from downriver.data.synth.context import ContextMixer
from downriver.evaluate import knowledge_conflict_eval
from downriver.models import ScriptedChat, small

NAMES = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay"]
ROWS = [
    {"id": str(i), "question": f"Who rules L{i}?", "context": f"{n} rules L{i}.", "answer": n, "type": f"t{i % 2}"}
    for i, n in enumerate(NAMES)
]


def land(prompt):
    return int(prompt.rsplit("L", 1)[1].split("?")[0])


def from_memory(prompts):
    return [NAMES[land(p)] for p in prompts]


def from_context(prompts):
    return [p.split("Context: ")[1].split(" ")[0] if "Context: " in p else NAMES[land(p)] for p in prompts]


def perfect(prompts):
    copied = from_context(prompts)
    return [
        c if f"rules L{land(p)}." in p.split("\n")[0] else NAMES[land(p)] for c, p in zip(copied, prompts, strict=True)
    ]


@pytest.fixture(scope="module")
def conflicts():
    return ContextMixer(from_memory, ROWS).conflicts()


@pytest.mark.parametrize(
    ("oracle", "controllability", "robustness"), [(from_context, 1, 0), (from_memory, 0, 1), (perfect, 1, 1)]
)
def test_oracles(conflicts, oracle, controllability, robustness):
    found = knowledge_conflict_eval(oracle, conflicts)
    assert (found.controllability, found.robustness) == (controllability, robustness)
    assert found.relevant == found.closed_book == 1 and found.n == found.asked == 6
    assert found.confusion["counterfactual"] == {"a": 1 - controllability, "a'": controllability, "other": 0}
    assert found.confusion["irrelevant"]["a"] == robustness
    assert set(found.by_type) == {"t0", "t1"} and found.by_type["t1"]["controllability"] == controllability
    assert [m.metric for m in found.measurements()] == ["controllability", "robustness", "relevant", "closed-book"]


def test_only_questions_that_the_base_model_knows_count():
    half = ContextMixer(lambda ps: [n if n < "Dan" else "Zed" for n in from_memory(ps)], ROWS).conflicts()
    found = knowledge_conflict_eval(lambda ps: [n if n < "Dan" else "?" for n in from_memory(ps)], half)
    assert (found.n, found.asked, found.robustness, found.controllability) == (3, 6, 1, 0)


def test_a_base_model_that_knows_nothing_leaves_nothing_to_measure():
    rows = ContextMixer(lambda ps: [""] * len(ps), ROWS).conflicts()
    with pytest.warns(UserWarning, match="answers none of 6 questions right"):
        found = knowledge_conflict_eval(from_memory, rows)
    assert math.isnan(found.robustness) and math.isnan(found.controllability) and found.n == 0


def test_a_chat_model_and_a_language_model_are_asked_as_well(conflicts):
    chat = ScriptedChat(lambda messages: f" The {from_context([messages[-1]['content']])[0]}!\nand so on")
    assert knowledge_conflict_eval(chat, conflicts).controllability == 1  # compared as SQuAD does
    assert knowledge_conflict_eval(small("causal-lm", "nano"), conflicts, max_tokens=2).controllability == 0


def test_aliases_count_and_columns_are_needed(conflicts):
    row = {**conflicts[0], "aliases": ["Queen Ann"]}
    assert knowledge_conflict_eval(lambda ps: ["queen ann"] * len(ps), [row]).robustness == 1
    with pytest.raises(InputError, match="row 0: no column 'counterfactual'"):
        knowledge_conflict_eval(from_memory, [{"relevant": "x"}])
