"""The ingredients of a cocktail as tasks told in words: what ``cocktail_study`` needs to train and to evaluate.

Reach for it when the tasks are examples and templates and the model is a causal language model; for anything else write
``train`` and ``evaluate`` yourself. Tuning is ``adapt.opt_iml``: loss on the answers, tasks drawn in proportion to
their examples up to a cap, so that a large helper does not swamp the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from downriver.adapt.opt_iml import opt_iml
from downriver.core.budget import Budget
from downriver.core.cost import metered
from downriver.core.errors import InputError, unknown
from downriver.data.mix.tasks import TaskMixture
from downriver.evaluate.generalization import score_task
from downriver.models.model import Model
from downriver.study.cocktail import FORMAT, CocktailDesign, Evaluate, Split, Train
from downriver.tasks.generalization import InstructionTask, shared_ngrams


@dataclass(frozen=True)
class Ingredient:
    """A task's examples to train on, to choose by and to report; a helper or regulariser needs the first only."""

    train: InstructionTask
    validation: InstructionTask | None = None
    test: InstructionTask | None = None


def instruction_cocktail(
    design: CocktailDesign,
    ingredients: Mapping[str, Ingredient],
    model: Model | Callable[[int], Model],
    budget: Budget | str,
    *,
    cap: float | None = 4096,
    extra: Mapping[str, float] | None = None,
    lora: int | None = 8,
    batch_size: int = 16,
    overlap: float = 0.0,
    ngram: int = 13,
    limit: int | None = None,
    **settings: Any,
) -> tuple[Train, Evaluate]:
    """``train`` and ``evaluate`` for ``cocktail_study``.

    Args:
        ingredients: by the names that the design has; more (probes) may be there, with test rows.
        model: the base, or a function of the seed that makes it.
        budget: of one mixture, in steps, examples (blocks) or tokens. In a design whose budget is ``examples`` it is
            that of the target alone, and grows with the examples (up to the cap) of a mixture.
        cap: η of ``TaskMixture``.
        extra: shares of the draws that go to regularisers, in the mixtures that have them (by default they count as
            tasks do): of plain text every token is learnt, so a little of it weighs much.
        lora: rank of the adapter; ``None`` tunes all weights.
        batch_size: blocks a step.
        overlap: the share of a target's validation or test rows that may share ``ngram`` words with the training rows
            of any ingredient, or equal one of them.
        limit: at most so many rows are answered.
        settings: of ``opt_iml``, for all mixtures.

    Scores are ``exact_match`` (or the task's metric) and, where answers are exact, ``format``: the share of answers
    that are an answer to some training example.

    Raises ``InputError`` for a name without ingredient, a target without validation or test rows, and overlap.
    """
    for name in (*design.tasks, *design.regularizers):
        if name not in ingredients:
            raise unknown("ingredient", name, ingredients)
    for name in design.targets:
        for split in ("validation", "test"):
            if getattr(ingredients[name], split) is None:
                raise InputError(f"target {name!r} has no {split} rows")
            _check_overlap(design, ingredients, name, split, overlap, ngram)
    base, shares = Budget.parse(budget), dict(extra or {})
    for name in shares:
        if name not in design.regularizers:
            raise unknown("regularizer in extra", name, design.regularizers)

    def start(seed: int) -> Model:
        return model if isinstance(model, Model) else model(seed)

    def size(mixture: tuple[str, ...]) -> float:
        return sum(min(len(ingredients[name].train), float("inf") if cap is None else cap) for name in mixture)

    def train(mixture: tuple[str, ...], seed: int, **setting: Any) -> tuple[Model, int]:
        if not mixture:
            return start(seed), 0
        tasks = [replace(ingredients[name].train, name=name, benchmark=name) for name in mixture]
        growth = size(mixture) / size((design.target or mixture[0],)) if design.budget == "examples" else 1.0
        with metered() as meter:
            tuned = opt_iml(
                start(seed),
                TaskMixture(tasks, cap=cap, extra={n: p for n, p in shares.items() if n in mixture}, seed=seed),
                Budget(base.amount * growth, base.unit),
                lora=lora,
                batch_size=batch_size,
                seed=seed,
                **(settings | setting),
            )
        return tuned, meter.cost.examples // batch_size

    def evaluate(tuned: Model, task: str, split: Split) -> dict[str, float]:
        held = getattr(ingredients[task], split)
        if held is None:
            raise InputError(f"{task!r} has no {split} rows")
        given, scores = score_task(tuned, held, limit=limit)
        found = {held.metric: sum(scores) / len(scores)}
        if held.metric == "exact_match":
            known = _answers(ingredients[task].train)
            found[FORMAT] = sum(" ".join(answer.casefold().split()) in known for answer in given) / len(given)
        return found

    return train, evaluate


def _check_overlap(
    design: CocktailDesign,
    ingredients: Mapping[str, Ingredient],
    target: str,
    split: str,
    most: float,
    ngram: int,
) -> None:
    held = getattr(ingredients[target], split)
    for name in (*design.tasks, *design.regularizers):
        found = shared_ngrams(held.texts, ingredients[name].train.texts, ngram)
        if found.mean() > most:
            raise InputError(
                f"{int(found.sum())} of {len(held)} {split} rows of {target!r} share {ngram} words with training rows"
                f" of {name!r} or equal one, row {int(found.argmax())} first: leave those out of training, or allow a"
                " share of them with overlap="
            )


def _answers(task: InstructionTask) -> set[str]:
    """The answers to the training examples, in whatever words the task is told."""
    told = (template.render(example)[1] for template in task.templates for example in task.examples)
    return {" ".join(answer.casefold().split()) for answer in told}
