"""Plans: the optimum is one, goals are reached at least cost, over-training is weighed rightly."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import Chain, OverTrainingLaw, RunTable, buy, cheapest, overtrained

N = np.repeat([1e7, 8e7, 4e8], 4)
D = N * np.tile([20.0, 80.0, 320.0, 640.0], 3)


def chain(noise: float = 0.0, tied: bool = True, error: bool = True) -> Chain:
    rng = np.random.default_rng(0)
    loss = (1.8 + 170 * N**-0.27 + 290 * D**-0.27) * (1 + noise * rng.standard_normal(len(N)))
    metrics = {"error": 0.85 - 2.2 * np.exp(-0.7 * loss)} if error else {}
    return Chain(OverTrainingLaw(tied_exponent=tied), metric="error" if error else "loss").fit(
        RunTable(N, D, {"loss": loss}, metrics)
    )


@pytest.fixture(scope="module")
def noisy() -> Chain:
    return chain(0.003)


@pytest.mark.parametrize("tied", [True, False])
def test_a_budget_is_spent_where_no_other_size_does_better(tied):
    fitted = chain(tied=tied)
    plan = buy(fitted, 1e22, anywhere=True)
    assert plan.name == "optimal" and plan.compute == pytest.approx(1e22) and plan.forecast.chain[0].name == "loss"
    others = [fitted.law.fit_.predict(plan.params * f, plan.tokens / f) for f in (0.8, 0.95, 1.05, 1.25)]
    assert plan.forecast.chain[0].value < min(others)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("anywhere", [True, False])
def test_a_goal_and_its_budget_are_inverse(tied, anywhere):
    fitted = chain(tied=tied)
    bought = buy(fitted, 3e21, anywhere=anywhere)
    for goal in ({"loss": bought.forecast.chain[0].value}, {"error": bought.forecast.value}):
        plan = cheapest(fitted, **goal, anywhere=anywhere)
        assert plan.params == pytest.approx(bought.params, rel=1e-6)
        assert plan.tokens == pytest.approx(bought.tokens, rel=1e-6)


def test_plans_stay_within_the_fitted_tokens_a_parameter():
    fitted = chain()
    best = fitted.law.optimal_allocation(1e21)[2]
    assert best < 10 and buy(fitted, 1e21, anywhere=True).multiplier == pytest.approx(best)
    plan = buy(fitted, 1e21)
    assert plan.multiplier == pytest.approx(20) and plan.name == "optimal at 20 tokens a parameter, the fewest fitted"
    goal = cheapest(fitted, loss=plan.forecast.chain[0].value)
    assert goal.compute == pytest.approx(1e21, rel=1e-6) and goal.multiplier == pytest.approx(20)


def test_compute_of_a_goal_has_an_interval(noisy):
    plan = cheapest(noisy, error=0.45, level=0.9)
    low, high = plan.compute_interval
    assert low < plan.compute < high and plan.forecast.value == pytest.approx(0.45)
    near = cheapest(noisy, loss=float(noisy.law.fit_.y.min()) * 1.01, level=0.9)
    assert near.compute_interval[1] / near.compute_interval[0] < high / low  # nearer goals are surer
    few = Chain().fit(
        RunTable(N[:5] * [1, 1, 1, 2, 3], D[:5], {"loss": [4.0, 3.8, 3.6, 3.5, 3.2]}).select([0, 1, 3, 4])
    )
    assert cheapest(few, loss=3.0).compute_interval is None


def test_over_training_is_smaller_and_pays_when_served_enough():
    fitted = chain()
    plan = buy(fitted, 1e21, anywhere=True)
    worse, dearer = overtrained(fitted, plan, 32)
    assert worse.multiplier == pytest.approx(640) == dearer.multiplier
    assert worse.compute == pytest.approx(plan.compute) and worse.forecast.chain[0].value > plan.forecast.chain[0].value
    assert dearer.forecast.chain[0].value == pytest.approx(plan.forecast.chain[0].value, rel=1e-9)
    assert dearer.compute > plan.compute and dearer.params < plan.params
    served = dearer.break_even  # training 6ND and serving 2N a token cost the same there
    assert plan.compute + 2 * plan.params * served == pytest.approx(dearer.compute + 2 * dearer.params * served)
    reducible = (worse.forecast.chain[0].value - 1.8) / (plan.forecast.chain[0].value - 1.8)
    assert fitted.law.overtraining_penalty(640, 1e21) == pytest.approx(reducible, rel=1e-4)


def test_bad_goals_are_refused(noisy):
    with pytest.raises(InputError, match="one goal is expected"):
        cheapest(noisy)
    with pytest.raises(InputError, match="one goal is expected"):
        cheapest(noisy, loss=3.0, error=0.5)
    with pytest.raises(InputError, match=r"loss 0\.5 is not reached by any size: the law's floor is"):
        cheapest(noisy, loss=0.5)
    with pytest.raises(InputError, match=r"error 0\.01 \(loss .*\) is not reached"):
        cheapest(noisy, error=0.01)
    with pytest.raises(InputError, match="lie below epsilon"):
        cheapest(noisy, error=0.99)
    with pytest.raises(InputError, match="these runs have no error"):
        cheapest(chain(error=False), error=0.4)
    with pytest.raises(InputError, match="tokens a parameter already"):
        overtrained(noisy, buy(noisy, 1e21), 0.1)
