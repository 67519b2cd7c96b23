"""Whether a model follows a context that contradicts it, and ignores one that has nothing to do with the question.

Reach for it before and after ``adapt.kaft``, and before a retriever is put in front of a model. Controllability and
robustness as in Li et al., «Large Language Models with Controllable Working Memory» (November 2022).
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from downriver.core import InputError, Measurement
from downriver.data.synth.context import Answerer, ask, normalised

CONDITIONS = ("relevant", "counterfactual", "irrelevant", "closed_book")
COLUMNS = (*CONDITIONS, "answer", "new_answer", "memory", "known")


@dataclass(frozen=True)
class ContextUse:
    """Shares of the questions that the base model answers right without a context; NaN when there is none.

    ``controllability``: answered a', given the context that says a'. ``robustness``: still answered as the base model
    does from memory, given an irrelevant context. ``relevant``: answered a, given the context that says so.
    ``closed_book``: answered a without a context (what was retained). ``confusion``: by condition the shares answered
    ``a``, ``a'`` and ``other``. ``by_type``: the four figures by type of answer. ``n`` questions of ``asked``.
    """

    controllability: float
    robustness: float
    relevant: float
    closed_book: float
    confusion: Mapping[str, Mapping[str, float]]
    by_type: Mapping[str, Mapping[str, float]]
    n: int
    asked: int

    def measurements(self, task: str = "") -> list[Measurement]:
        """The four figures, for a study."""
        values = _figures_of(self)
        return [Measurement(name.replace("_", "-"), value, task=task) for name, value in values.items()]


def knowledge_conflict_eval(
    model: Answerer, rows: datasets.Dataset | Iterable[Mapping[str, Any]], *, max_tokens: int = 16
) -> ContextUse:
    """Ask a model every question four times: with the true context, a contradicting one, an irrelevant one, and none.

    Parameters
    ----------
    model
        A causal ``Model``, a ``ChatModel``, or a function from prompts to answers.
    rows
        What ``ContextMixer.conflicts`` gives, made with the *base* model, on questions that no tuning has seen. Those
        that the base model does not know (``known``) are left out: without memory there is no conflict.

    Answers are compared as SQuAD does. Raises ``InputError`` for missing columns; warns when no question is known.

    >>> row = dict(answer="Paris", new_answer="Rome", memory="Paris", known=True, type="city", aliases=[])
    >>> row |= dict(relevant="Paris. ?", counterfactual="Rome. ?", irrelevant="Oslo. ?", closed_book="?")
    >>> found = knowledge_conflict_eval(lambda prompts: [p.split(".")[0] for p in prompts], [row])
    >>> found.controllability, found.robustness  # it repeats whatever the context says
    (1.0, 0.0)
    """
    listed = [dict(row) for row in rows]
    for number, row in enumerate(listed):
        if missing := [name for name in COLUMNS if name not in row]:
            raise InputError(
                f"rows, row {number}: no column {missing[0]!r}; what ContextMixer.conflicts gives is expected"
            )
    known = [row for row in listed if row["known"]]
    if not known:
        warnings.warn(
            f"the base model answers none of {len(listed)} questions right without a context: no conflict to measure",
            stacklevel=2,
        )
    prompts = [row[condition] for condition in CONDITIONS for row in known]
    answers = iter(ask(model, prompts, max_tokens=max_tokens) if prompts else ())
    said = {condition: [_said(row, next(answers)) for row in known] for condition in CONDITIONS}
    kinds = np.array([str(row.get("type", "")) for row in known])
    return ContextUse(
        **_figures(said, np.ones(len(known), bool)),
        confusion={c: {name: _share(said[c], name) for name in ("a", "a'", "other")} for c in CONDITIONS},
        by_type={str(kind): _figures(said, kinds == kind) for kind in np.unique(kinds)},
        n=len(known),
        asked=len(listed),
    )


def _said(row: Mapping[str, Any], answer: str) -> str:
    """Which answer it is; a known question's memory is its a."""
    given = normalised(answer)
    if given == normalised(row["new_answer"]):
        return "a'"
    names = map(normalised, [row["answer"], row["memory"], *row.get("aliases", ())])
    return "a" if given in names else "other"


def _figures(said: Mapping[str, Sequence[str]], which: np.ndarray) -> dict[str, float]:
    of = {condition: [s for s, chosen in zip(said[condition], which, strict=True) if chosen] for condition in said}
    return {
        "controllability": _share(of["counterfactual"], "a'"),
        "robustness": _share(of["irrelevant"], "a"),
        "relevant": _share(of["relevant"], "a"),
        "closed_book": _share(of["closed_book"], "a"),
    }


def _figures_of(found: ContextUse) -> dict[str, float]:
    return {name: getattr(found, name) for name in ("controllability", "robustness", "relevant", "closed_book")}


def _share(said: Sequence[str], name: str) -> float:
    return sum(s == name for s in said) / len(said) if said else math.nan
