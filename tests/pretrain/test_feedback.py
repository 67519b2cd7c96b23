"""The six objectives: their limits, the signs of their gradients, their shift by one, their bad input."""

import math

import datasets
import pytest
import torch
import torch.nn.functional as F

from downriver.core.errors import InputError
from downriver.data.condition import ControlTokens
from downriver.models import small
from downriver.pretrain.feedback import AWR, MLE, OBJECTIVES, RWR, Conditional, Filtered, Unlikelihood
from downriver.training import TokenRows, fine_tune

torch.manual_seed(0)
LOGITS = torch.randn(2, 6, 11)
LABELS = torch.randint(11, (2, 6))
LABELS[0, :3] = -100
SCORES = torch.rand(2, 6)
VALUES = -torch.rand(2, 6)
KEPT = LABELS[:, 1:] != -100
PLAIN = F.cross_entropy(LOGITS[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)


def test_all_are_plain_language_modelling_in_their_limit():
    constant = torch.full_like(SCORES, 0.3)
    for objective in (MLE(), Filtered(), Conditional(), Unlikelihood(threshold=math.inf)):
        assert objective.loss(LOGITS, LABELS, SCORES) == pytest.approx(PLAIN.item(), abs=1e-6)
    assert Unlikelihood(threshold=None).loss(LOGITS, LABELS, 0 * SCORES) == pytest.approx(PLAIN.item(), abs=1e-6)
    factor = math.exp(-0.3 / 0.7)
    assert RWR(beta=0.7).loss(LOGITS, LABELS, constant) == pytest.approx(factor * PLAIN.item(), abs=1e-6)
    awr, values = AWR(4, alpha=1.0, beta=0.7), torch.full_like(SCORES, -0.2)
    expected = math.exp((-0.3 + 0.2) / 0.7) * PLAIN.item()
    assert awr.loss(LOGITS, LABELS, constant, values) == pytest.approx(expected, abs=1e-6)


def test_formulas_by_hand():
    log_p = LOGITS[:, :-1].log_softmax(-1).gather(2, LABELS[:, 1:].clamp(min=0)[..., None])[..., 0]
    score, value = SCORES[:, 1:], VALUES[:, :-1]  # the score of the token predicted, the value of the place before it
    bad = score > 0.5
    expected = torch.where(bad, -0.1 * torch.log(1 - log_p.exp()), -log_p)[KEPT].mean()
    assert torch.allclose(Unlikelihood(0.1, 0.5).loss(LOGITS, LABELS, SCORES), expected)
    mixed = ((1 - score) * -log_p + score * 0.1 * -torch.log(1 - log_p.exp()))[KEPT].mean()
    assert torch.allclose(Unlikelihood(0.1, None).loss(LOGITS, LABELS, SCORES), mixed)
    assert torch.allclose(RWR(0.2).loss(LOGITS, LABELS, SCORES), (torch.exp(-score / 0.2) * -log_p)[KEPT].mean())
    advantage = -score - value
    policy, error = (torch.exp(advantage / 0.1) * -log_p)[KEPT].mean(), ((-score - value) ** 2)[KEPT].mean()
    found = AWR(4, alpha=0.05, beta=0.1).loss(LOGITS, LABELS, SCORES, VALUES)
    assert torch.allclose(found, 0.05 * policy + 0.95 * error)


def test_weights_are_bounded():
    far = torch.full_like(SCORES, -1e4)  # a reward beyond all bounds
    assert RWR().loss(LOGITS, LABELS, far) == pytest.approx(1000 * PLAIN.item(), rel=1e-5)
    sure = torch.zeros(1, 2, 3)
    sure[0, 0, 1] = 1e4  # p = 1: 1 - p is clamped
    loss = Unlikelihood(threshold=0.0).loss(sure, torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert loss == pytest.approx(-math.log(1e-20), rel=1e-4)


def test_unlikelihood_raises_the_wanted_and_lowers_the_others():
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    labels, scores = torch.tensor([[0, 1, 2]]), torch.tensor([[0.0, 0.0, 1.0]])
    Unlikelihood(threshold=0.5).loss(logits, labels, scores).backward()
    assert logits.grad[0, 0, 1] < 0 < logits.grad[0, 1, 2]  # a step down the gradient
    assert (logits.grad[0, 2] == 0).all()


def test_values_start_at_a_half_and_policy_does_not_reach_their_head():
    awr = AWR(4, alpha=1.0)
    hidden = torch.randn(2, 6, 4, requires_grad=True)
    values = awr.values(hidden)
    assert (values == -0.5).all() and awr.head.bias is None
    awr.loss(LOGITS, LABELS, SCORES, values).backward()
    assert (awr.head.weight.grad == 0).all() and (hidden.grad == 0).all()
    awr = AWR(4, alpha=0.5)
    torch.nn.init.normal_(awr.head.weight)
    awr.loss(LOGITS, LABELS, SCORES, awr.values(hidden)).backward()
    assert (awr.head.weight.grad != 0).any() and (hidden.grad != 0).any()  # the error goes on into the trunk


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_trains(name):
    model = small("causal-lm", "nano")
    objective = AWR.of(model) if name == "awr" else OBJECTIVES[name]()
    ids = torch.randint(4, 260, (4, 12)).tolist()
    scores = [[float(i % 3 == 0) for i in row] for row in ids]
    positions = [[*range(5), *range(7)]] * 4
    rows = datasets.Dataset.from_dict({"input_ids": ids, "token_scores": scores, "position_ids": positions})
    tuned = fine_tune(
        model, TokenRows("toy", {"train": rows}), "3 steps", learning_rate=1e-2, batch_size=2, objective=objective
    )
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True)]
    assert all(moved) and {n for n, _ in tuned.named_parameters()} == {n for n, _ in model.named_parameters()}
    if name == "awr":
        assert (objective.head.weight != 0).any()


def test_an_explicit_mask_changes_nothing_where_positions_do():
    model = small("causal-lm", "nano")
    ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[*range(5), *range(7)]] * 2)}
    plain, masked = MLE(), MLE()
    masked.explicit_mask = True
    with torch.no_grad():
        assert torch.allclose(plain(model, batch)["loss"], masked(model, batch)["loss"], atol=1e-6)


def test_what_becomes_of_the_rows():
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "avg_score": [0.0, 1.0, 2.0]})
    assert Filtered().select(rows)["text"][:] == ["a", "b"] and Filtered(0.5).select(rows)["text"][:] == ["a"]
    for objective in (MLE(), Conditional(), Unlikelihood(), RWR(), AWR(4)):
        assert objective.select(rows) is rows
    with pytest.warns(UserWarning, match=r"100.00% of the scores"):
        assert len(Filtered(math.inf).select(rows)) == 3
    assert Conditional().control == ControlTokens() and MLE().control is None


def test_bad_input():
    with pytest.raises(InputError, match=r"token_scores \(2, 5\)"):
        RWR().loss(LOGITS, LABELS, SCORES[:, 1:])
    for objective in (RWR(), Unlikelihood()):
        with pytest.raises(InputError, match="token_scores hold a value that is not finite"):
            objective.loss(LOGITS, LABELS, SCORES.log().log())
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        Unlikelihood(threshold=None).loss(LOGITS, LABELS, SCORES + 1)
    with pytest.raises(InputError, match="AWR needs values"):
        AWR(4).loss(LOGITS, LABELS, SCORES)
    model = small("causal-lm", "nano")
    batch = {"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()}
    assert MLE()(model, batch)["loss"].isfinite()
    with pytest.raises(InputError, match="the rows have no token_scores, which RWR needs"):
        RWR()(model, batch)
    for make, message in [
        (lambda: RWR(0), "beta is 0"),
        (lambda: AWR(4, alpha=2), "alpha 2"),
        (lambda: AWR(4, beta=-1), "beta -1"),
        (lambda: Unlikelihood(-1), "alpha is -1"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
