import pytest

from downriver.core import Budget, InputError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2000 examples", Budget(2000, "examples")),
        ("1e15 flops", Budget(1e15, "flops")),
        ("30 s", Budget(30, "seconds")),
        ("2M tokens", Budget(2e6, "tokens")),
        ({"steps": 10}, Budget(10, "steps")),
    ],
)
def test_budgets_are_read(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize("bad", ["many", "10", "10 parsecs", "0 steps", "-3 steps", "1e999 steps"])
def test_bad_budgets_are_refused(bad):
    with pytest.raises(InputError, match="budget"):
        Budget.parse(bad)


def test_steps_in_every_unit():
    assert Budget(10, "steps").steps(32) == 10
    assert Budget(100, "examples").steps(32) == 3
    assert Budget(1000, "tokens").steps(4, tokens_per_step=300) == 3
    assert Budget(1e9, "flops").steps(4, flops_per_step=1e8) == 10
    assert Budget(5, "seconds").steps(4) is None
    assert Budget(1, "examples").steps(32) == 1
    with pytest.raises(InputError, match="needs the tokens of one step"):
        Budget(1000, "tokens").steps(4)


def test_a_share_is_in_the_same_unit():
    assert Budget(10, "steps").share(1 / 2) == Budget(5, "steps")
