"""DPO and supervised tuning on token rows: what they train, in which order, and what they refuse."""

import pytest
import torch

from downriver.core.errors import InputError
from downriver.data.synth import dpo as room_dpo
from downriver.data.synth.dpo import _pairwise, dpo, encode, logprobs, sft
from downriver.models import small

PAIRS = [("a", "b", "c"), ("x", "yy", "z"), ("", "q", "rrr")]


@pytest.fixture(scope="module")
def model():
    return small("causal-lm", "nano")


def margin(model, pairs):
    better, worse = (logprobs(model, [(pair[0], pair[side]) for pair in pairs]) for side in (1, 2))
    return better - worse


def test_preferred_gains_on_rejected_and_the_input_stays(model):
    assert room_dpo is dpo
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = dpo(model, PAIRS, "60 examples", learning_rate=3e-3, batch_size=3)
    assert (margin(tuned, PAIRS) > margin(model, PAIRS) + 1).all()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    again = dpo(model, PAIRS, "60 examples", learning_rate=3e-3, batch_size=3)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))


def test_the_anchor_keeps_the_preferred_probable(model):
    preferred = [(prompt, text) for prompt, text, _ in PAIRS]
    plain = dpo(model, PAIRS, "90 examples", learning_rate=3e-3, batch_size=3)
    anchored = dpo(model, PAIRS, "90 examples", learning_rate=3e-3, batch_size=3, nll_weight=1.0)
    assert logprobs(anchored, preferred).sum() > logprobs(plain, preferred).sum() + 1


def test_beta_zero_without_anchor_changes_nothing(model):
    tuned = dpo(model, PAIRS, "9 examples", beta=0.0, batch_size=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))


def test_visits_take_pairs_whole_and_all_of_them():
    row = _pairwise(5, seed=0)
    first = [row(visit) for visit in range(10)]
    second = [row(visit) for visit in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert all(first[i] % 2 == 0 and first[i + 1] == first[i] + 1 for i in range(0, 10, 2))
    assert [row(visit) for visit in range(10)] == first  # a pure function


def test_sft_teaches_the_continuation_only(model):
    lessons = [("1+1=", "2"), ("1+2=", "3")]
    tuned = sft(model, lessons, "60 examples", learning_rate=3e-3, batch_size=2)
    assert (logprobs(tuned, lessons) > logprobs(model, lessons) + 1).all()
    [row] = encode(model, [("ab", "c")])
    assert row["labels"][:3] == [-100] * 3 and row["labels"][3:] == row["input_ids"][3:] and len(row["labels"]) == 5


def test_messages_go_through_the_chat_template(model):
    tokenizer = model.processor
    try:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }};{% endfor %}A:"
        [row] = encode(model, [([{"role": "user", "content": "hi"}], "yo")])
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(row["input_ids"]) == "<s>user:hi;A:yo</s>"
    assert sum(label != -100 for label in row["labels"]) == 3


def test_bad_input(model):
    with pytest.raises(InputError, match="pairs are empty"):
        dpo(model, [])
    with pytest.raises(InputError, match="nll_weight is -1"):
        dpo(model, PAIRS, nll_weight=-1)
    with pytest.raises(InputError, match=r"beta is -0\.5"):
        dpo(model, PAIRS, beta=-0.5)
    with pytest.raises(InputError, match="lessons are empty"):
        sft(model, [], name="lessons")
    with pytest.raises(InputError, match="have 202 tokens and the model takes 128"):
        sft(model, [("a" * 100, "b" * 100)])
