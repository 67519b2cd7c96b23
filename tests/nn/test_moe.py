import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from downriver.core import DownriverError, InputError
from downriver.nn.moe import (
    RoutingTally,
    gated_experts,
    load_balance_loss,
    report,
    route,
    router_z_loss,
    routing_context,
)


def experts(n: int = 4, d: int = 6, f: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    return tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in ((17, d), (n, 2 * f, d), (n, d, f)))


def by_hand(x, gate_up, down, routed) -> torch.Tensor:
    """Every expert on every token, weighted by its gate."""
    total = torch.zeros_like(x)
    for n, gate in enumerate(routed.dense().double().unbind(-1)):
        w_gate, w_up = gate_up[n].chunk(2)
        total += gate[:, None] * ((F.silu(x @ w_gate.T) * (x @ w_up.T)) @ down[n].T)
    return total


def test_gates_are_float32_renormalised_and_sum_to_one():
    logits = torch.randn(5, 3, 8, dtype=torch.bfloat16)
    for k in (None, 1, 3, 8):
        routed = route(logits, k)
        assert routed.gates.dtype == routed.logits.dtype == torch.float32
        torch.testing.assert_close(routed.gates.sum(-1), torch.ones(5, 3))
        torch.testing.assert_close(routed.dense().sum(-1), torch.ones(5, 3))
        assert routed.gates.shape[-1] == (k or 8)
    top = route(logits, 3)
    p = logits.float().softmax(-1)
    kept = p * (p >= p.topk(3).values[..., -1:])
    torch.testing.assert_close(top.dense(), kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_number_of_experts_that_there_is_not_is_refused(top_k):
    with pytest.raises(InputError, match="1 to 4"):
        route(torch.zeros(2, 4), top_k)


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4])
def test_experts_give_the_weighted_sum_and_its_gradient(top_k):
    x, gate_up, down = (t.requires_grad_() for t in experts())
    router = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def both(compute):
        y = compute(x, gate_up, down, route(x @ router.T, top_k))
        return y, torch.autograd.grad(y.square().sum(), (x, gate_up, down, router))

    def ours(*arguments):
        return gated_experts(*arguments, F.silu)

    torch.testing.assert_close(both(ours), both(by_hand), rtol=1e-6, atol=1e-6)


def test_an_expert_that_nobody_chose_costs_and_gets_nothing():
    x, gate_up, down = experts()
    gate_up.requires_grad_()
    logits = torch.tensor([0.0, 9.0, -9.0, -9.0]).expand(17, 4)
    gated_experts(x, gate_up, down, route(logits, 2), F.silu).sum().backward()
    assert gate_up.grad[2:].abs().sum() == 0 and (gate_up.grad[:2].abs().sum((1, 2)) > 0).all()


def test_the_load_balance_is_one_when_even_and_the_number_of_experts_when_all_go_to_one():
    even = torch.eye(4).repeat(3, 1) * 20
    assert load_balance_loss(route(even, 1)).item() == pytest.approx(1)
    assert load_balance_loss(route(torch.randn(9, 4), None)).item() == pytest.approx(1)  # all chosen: all loads equal
    one = torch.tensor([50.0, 0, 0, 0]).expand(12, 4)
    assert load_balance_loss(route(one, 1)).item() == pytest.approx(4)


def test_descent_on_the_load_balance_evens_the_load_and_padding_does_not_count():
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, -1])
    logits.requires_grad_()
    mask = torch.ones(64)
    mask[48:] = 0
    before = load_balance_loss(route(logits, 1), mask)
    for _ in range(400):
        (grad,) = torch.autograd.grad(load_balance_loss(route(logits, 1), mask), logits)
        assert grad[48:].abs().sum() == 0
        logits = (logits - 20 * grad).detach().requires_grad_()
    assert before > 1.5 > 1.05 > load_balance_loss(route(logits, 1), mask)


def test_the_z_loss_is_the_mean_square_of_the_log_sum():
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0], [100.0, 100.0]])
    expected = (math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2
    assert router_z_loss(route(logits, 1), torch.tensor([1, 1, 0])).item() == pytest.approx(expected, rel=1e-6)


class Layer(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.router = name, torch.nn.Linear(4, 2)

    def forward(self, x):
        routed = route(self.router(x))
        report(self.name, routed)
        return x * routed.gates[..., :1]


def test_a_context_collects_each_layer_once_also_under_checkpointing():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(Layer("a"), Layer("b"))
    x = torch.randn(2, 3, 4, requires_grad=True)

    def gradients(run):
        layers.zero_grad()
        with routing_context() as routing:
            y = run(x)
        assert list(routing.layers) == ["a", "b"]
        (y.sum() + routing.total(router_z_loss)).backward()
        return [p.grad.clone() for p in layers.parameters()]

    plain = gradients(layers)
    torch.testing.assert_close(gradients(lambda x: checkpoint(layers, x, use_reentrant=False)), plain)
    with pytest.raises(DownriverError, match="use_reentrant=False"):
        gradients(lambda x: checkpoint(layers, x, use_reentrant=True))
    layers(x)  # without a context nothing is kept
    with pytest.raises(InputError, match="no layer"), routing_context() as routing:
        routing.total(router_z_loss)


def test_the_tally_adds_batches_of_any_length_by_group():
    g = torch.Generator().manual_seed(0)
    types, mask = torch.tensor([0, 1, 1]), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    logits = torch.randn(3, 4, 5, generator=g)
    whole, parts = RoutingTally(["a", "b"]), RoutingTally(["a", "b"])
    with routing_context(types, mask) as routing:
        report("layer", route(logits, 2))
    whole.add(routing)
    for i in range(3):
        length = int(mask[i].sum())
        with routing_context(types[i : i + 1], mask[i : i + 1, :length]) as routing:
            report("layer", route(logits[i : i + 1, :length], 2))
        parts.add(routing)
    for statistic in ("shares", "loads", "entropy"):
        torch.testing.assert_close(getattr(whole, statistic)(), getattr(parts, statistic)())
    gates = route(logits, 2).dense()
    torch.testing.assert_close(torch.tensor(whole.shares()[0, 0]).float(), gates[0, :2].mean(0))
    torch.testing.assert_close(torch.tensor(whole.shares().sum(-1)), torch.ones(1, 2, dtype=torch.float64))
    assert (whole.loads().sum(-1).round(6) == 1).all()
    assert whole.entropy()[0, 1] < math.log(5)


def test_the_tally_names_dead_experts():
    tally = RoutingTally(["all"])
    with routing_context() as routing:
        report("first", route(torch.randn(2, 50, 3), 1))
        report("second", route(torch.randn(2, 50, 3) - torch.tensor([0.0, 99.0, 0.0]), 1))
    tally.add(routing)
    assert tally.dead() == [("second", 1)]
