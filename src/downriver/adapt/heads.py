"""Where a head starts: from a linear probe, at random, or as it is.

Kumar et al. 2022 («Fine-tuning can distort pretrained features», LP-FT): with a random head the first steps move the
backbone to suit a head that knows nothing. A head that is fitted first leaves the features in place.
"""

from typing import Literal

from downriver.adapt.linear_probe import linear_probe
from downriver.core import Budget, InputError, metered, seeded, unknown
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training.engine import clone

HeadStart = Literal["probe", "random", "keep"]
SHARE = 0.25
"""The probe gets at most this share of the budget; what it does not use goes to the training."""


def ready(
    model: Model, task: Task, budget: Budget, *, head: HeadStart, batch_size: int, seed: int
) -> tuple[Model, Budget]:
    """A copy of the model with a head for the task, and what is left of the budget (all, where a task has no head)."""
    if head not in ("probe", "random", "keep"):
        raise unknown("start of the head", head, ("probe", "random", "keep"))
    if head == "keep":
        return clone(model), budget
    if head == "random" or task.kind in ("language-modelling", "text-similarity"):
        with seeded("head", seed):
            return model.with_head(task), budget
    step = {"steps": 1, "examples": batch_size}.get(budget.unit, 0)
    if budget.amount * (1 - SHARE) < step:
        raise InputError(
            f"a budget of {budget}: a quarter is for the probe of the head, and what is left does not pay for one step "
            f"of {batch_size} examples: give more, or head='random'"
        )
    with metered() as meter:
        model = linear_probe(model, task, Budget(budget.amount * SHARE, budget.unit), batch_size=batch_size, seed=seed)
    used = meter.cost.examples / batch_size if budget.unit == "steps" else getattr(meter.cost, budget.unit)
    return model, Budget(budget.amount - used, budget.unit)
