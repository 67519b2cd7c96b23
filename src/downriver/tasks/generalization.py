"""Tasks told in words, and three ways in which a model tuned on some of them may generalise to others.

Reach for it before instruction tuning: an average over all tasks hides whether a model can do a new kind of task, a new
task of a kind it knows, or only new cases of a task it was taught. Iyer et al. 2022, «OPT-IML: Scaling Language Model
Instruction Meta Learning through the Lens of Generalization», arXiv:2212.12017. Ours: equal examples of a task never
stand on both sides of its split, and a split that does not mean what its name says is refused.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from downriver.core.errors import InputError, unknown
from downriver.core.io import canonical
from downriver.core.minhash import word_runs
from downriver.core.seeds import generator

Example = Mapping[str, Any]

LEVELS = ("fully held-out", "partially supervised", "fully supervised")
METRICS = ("exact_match", "rouge_l")
BETWEEN = "\n\n"  # demonstrations
FIELDS = "\0"  # no run of words goes across


@dataclass(frozen=True)
class Template:
    """How an example becomes a prompt and an answer: two texts with the example's fields in braces.

    >>> template = Template("Turn the word round: {word} ->", "{turned}")
    >>> template.render({"word": "abc", "turned": "cba"})
    ('Turn the word round: abc ->', 'cba')
    >>> template.render({"word": "abc", "turned": "cba"}, demos=[{"word": "no", "turned": "on"}])[0]
    'Turn the word round: no -> on\\n\\nTurn the word round: abc ->'
    """

    source: str
    target: str

    def __post_init__(self) -> None:
        if not self.target.strip():
            raise InputError(f"template {self.source!r}: the target is empty, an answer is expected")
        _fields(self.source), _fields(self.target)

    def render(self, example: Example, demos: Sequence[Example] = ()) -> tuple[str, str]:
        """The source and the target of an example, after ``demos`` that are rendered whole, with a blank line between.

        A solved example is source, a space, target. Raises ``InputError`` for a field that the example lacks, and for
        an empty target.
        """
        shown = [f"{self._fill(self.source, demo).rstrip(' ')} {self._answer(demo)}" for demo in demos]
        return BETWEEN.join([*shown, self._fill(self.source, example)]), self._answer(example)

    def _answer(self, example: Example) -> str:
        answer = self._fill(self.target, example)
        if not answer.strip():
            raise InputError(f"template {self.target!r} gives an empty target for the example {dict(example)}")
        return answer

    def _fill(self, text: str, example: Example) -> str:
        for name in _fields(text):
            if name not in example:
                raise unknown(f"variable of template {text!r}", name, example)
        return text.format_map(example)


@dataclass(frozen=True)
class InstructionTask:
    """Examples of one task, with the words in which it may be told.

    Args:
        name: told apart by it.
        category: the kind of task (sentiment, paraphrase, ...): what generalisation is measured across.
        benchmark: the collection it comes from.
        examples: mappings with the fields that the templates name (a list, or a ``datasets.Dataset``).
        templates: one or more ways to tell it.
        metric: ``exact_match`` (case and white space aside) or ``rouge_l``.

    Raises ``InputError`` without examples or templates, and for an unknown metric.

    >>> task = InstructionTask("upper", "words", "toy", [{"x": "ab", "y": "AB"}], (Template("Shout {x}:", "{y}"),))
    >>> len(task), task.score("  ab", "AB")
    (1, 1.0)
    """

    name: str
    category: str
    benchmark: str
    examples: Sequence[Example]
    templates: tuple[Template, ...]
    metric: str = "exact_match"

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        if not len(self.examples) or not self.templates:
            missing = "template" if len(self.examples) else "example"
            raise InputError(f"task {self.name!r} has no {missing}: one at least is expected")
        if self.metric not in METRICS:
            raise unknown(f"metric of task {self.name!r}", self.metric, METRICS)

    def __len__(self) -> int:
        return len(self.examples)

    def keep(self, rows: Sequence[int] | np.ndarray) -> "InstructionTask":
        """The same task with these examples only."""
        return replace(self, examples=[self.examples[int(i)] for i in rows])

    def score(self, answer: str, expected: str) -> float:
        """The task's metric, between 0 and 1."""
        given, wanted = answer.casefold().split(), expected.casefold().split()
        return rouge_l(given, wanted) if self.metric == "rouge_l" else float(given == wanted)

    @cached_property
    def texts(self) -> list[str]:
        """The text fields of every example, with a zero character between: what overlap is looked for in."""
        return [FIELDS.join(v for v in example.values() if isinstance(v, str)) for example in self.examples]


def rouge_l(given: Sequence[str], wanted: Sequence[str]) -> float:
    """The F1 of the longest common subsequence of two lists of words (Lin 2004, without stemming).

    >>> rouge_l("the sea is wide".split(), "the river is wide".split())
    0.75
    """
    if not given or not wanted:
        return float(given == wanted)
    row = [0] * (len(wanted) + 1)
    for word in given:
        before = row
        row = [0]
        for i, other in enumerate(wanted):
            row.append(before[i] + 1 if word == other else max(row[i], before[i + 1]))
    return 2 * row[-1] / (len(given) + len(wanted))


@dataclass(frozen=True)
class Levels:
    """What to train on, and three sets of tasks to measure; unpacks in this order.

    ``fully`` holds categories that training never saw, ``partially`` unseen tasks of categories that it saw, and
    ``supervised`` unseen examples of tasks that it saw. Raises ``InputError`` for a task that belongs elsewhere.
    """

    train: tuple[InstructionTask, ...]
    fully: tuple[InstructionTask, ...]
    partially: tuple[InstructionTask, ...]
    supervised: tuple[InstructionTask, ...]

    def __post_init__(self) -> None:
        seen = {task.name: task for task in self.train}
        categories = {task.category for task in self.train}
        if not seen:
            raise InputError("no task is left to train on: hold fewer out")
        for task in self.fully:
            if task.category in categories:
                raise InputError(f"category {task.category!r} of held-out task {task.name!r} occurs in train")
        for task in self.partially:
            if task.name in seen:
                raise InputError(f"task {task.name!r} is held out and occurs in train")
            if task.category not in categories:
                raise InputError(
                    f"task {task.name!r}: no task of its category {task.category!r} is left in train: name the whole"
                    " category among held_out_categories"
                )
        for task in self.supervised:
            if task.name not in seen:
                raise InputError(f"task {task.name!r} is measured as fully supervised and does not occur in train")

    def __iter__(self) -> Iterator[tuple[InstructionTask, ...]]:
        return iter((self.train, self.fully, self.partially, self.supervised))

    def items(self) -> Iterator[tuple[str, tuple[InstructionTask, ...]]]:
        """The names of the three levels with their tasks."""
        return zip(LEVELS, (self.fully, self.partially, self.supervised), strict=True)


class InstructionBench:
    """Tasks by name; ``split`` assigns each to one level.

    Raises ``InputError`` for a name given twice, and when a template names a field that the first example lacks.

    >>> tell = (Template("{x}", "{y}"),)
    >>> tasks = [InstructionTask(n, n[0], "toy", [{"x": f"{n}{i}", "y": "yes"} for i in range(20)], tell)
    ...          for n in ("a1", "a2", "a3", "b1", "b2")]
    >>> levels = InstructionBench(tasks).split(held_out_categories=["b"], held_out_tasks=["a3"])
    >>> [[task.name for task in level] for level in levels], len(levels.supervised[0])
    ([['a1', 'a2'], ['b1', 'b2'], ['a3'], ['a1', 'a2']], 2)
    """

    def __init__(self, tasks: Sequence[InstructionTask]) -> None:
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) != len(tasks):
            names = [task.name for task in tasks]
            raise InputError(f"two tasks are named {next(n for n in names if names.count(n) > 1)!r}")
        for task in tasks:
            for template in task.templates:
                try:
                    template.render(task.examples[0])
                except InputError as error:
                    raise InputError(f"task {task.name!r}: {error}") from None

    def split(
        self,
        held_out_categories: Sequence[str] = (),
        held_out_tasks: Sequence[str] = (),
        instance_frac: float = 0.1,
        seed: int = 0,
    ) -> Levels:
        """Hold out whole categories, single tasks of the others, and a share of the examples of every other task.

        Of a task at least one example is held out and at least one stays; equal examples stay together. Raises
        ``InputError`` for an unknown name, a task that its category holds out already, a category of which every task
        is held out one by one, and a task whose examples are all alike.
        """
        categories = {task.category for task in self.tasks.values()}
        for category in held_out_categories:
            if category not in categories:
                raise unknown("category to hold out", category, categories)
        for name in held_out_tasks:
            if name not in self.tasks:
                raise unknown("task to hold out", name, self.tasks)
            if self.tasks[name].category in held_out_categories:
                raise InputError(
                    f"task {name!r} would be in two levels: its category {self.tasks[name].category!r} is held out too"
                )
        if not 0 < instance_frac < 1:
            raise InputError(f"instance_frac is {instance_frac}: a share between 0 and 1 is expected")
        fully = tuple(task for task in self.tasks.values() if task.category in held_out_categories)
        partially = tuple(self.tasks[name] for name in dict.fromkeys(held_out_tasks))
        held = {task.name for task in (*fully, *partially)}
        halves = [_halve(task, instance_frac, seed) for task in self.tasks.values() if task.name not in held]
        return Levels(tuple(a for a, _ in halves), fully, partially, tuple(b for _, b in halves))


def overlap_report(levels: Levels, ngram: int = 13, threshold: float = 0.01) -> pl.DataFrame:
    """How much of each task that is measured stands in each task that is trained on.

    One row a pair with anything in common, the worst first: ``train``, ``evaluated``, ``level``, ``examples`` (of the
    task measured, that share a run of ``ngram`` words with any example trained on), ``rate`` (their share) and
    ``suspect`` (rate above ``threshold``; the paper looks at every pair above 1 % by hand). Instructions do not count,
    they are the same for all examples of a task.

    >>> run = " ".join(f"w{i}" for i in range(13))
    >>> def task(name, text):
    ...     return InstructionTask(name, name, "toy", [{"x": text, "y": "yes"}], (Template("{x}", "{y}"),))
    >>> found = overlap_report(Levels((task("a", run),), (task("b", "so " + run),), (), ()))
    >>> found.select("train", "evaluated", "rate", "suspect").row(0)
    ('a', 'b', 1.0, True)
    """
    if ngram < 1:
        raise InputError(f"ngram is {ngram}: at least 1 is expected")
    rows = []
    trained = {task.name: np.unique(_grams(task.texts, ngram)[0]) for task in levels.train}
    for level, tasks in levels.items():
        for task in tasks:
            grams, owner = _grams(task.texts, ngram)
            for name, known in trained.items():
                if examples := len(np.unique(owner[_among(grams, known)])):
                    rate = examples / len(task)
                    rows.append((name, task.name, level, examples, rate, rate > threshold))
    schema = {"train": pl.String, "evaluated": pl.String, "level": pl.String, "examples": pl.Int64}
    table = pl.DataFrame(rows, schema | {"rate": pl.Float64, "suspect": pl.Boolean}, orient="row")
    return table.sort("rate", descending=True, maintain_order=True)


def shared_ngrams(texts: Sequence[str], others: Sequence[str], ngram: int = 13) -> np.ndarray:
    """Which of ``texts`` share a run of ``ngram`` words with any of ``others``, or are word for word one of them.

    >>> shared_ngrams(["a b c", "a b d", "x y"], ["so a b c it is", "x y"], ngram=3).tolist()
    [True, False, True]
    """
    found = np.zeros(len(texts), dtype=bool)
    if not len(texts) or not len(others):
        return found
    grams, owner = _grams(texts, ngram)
    found[owner[_among(grams, np.unique(_grams(others, ngram)[0]))]] = True
    whole = {" ".join(text.casefold().split()) for text in others}
    return found | np.array([" ".join(text.casefold().split()) in whole for text in texts])


def _grams(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all runs of n words, and the number of the text of each; shorter texts have none."""
    grams = [np.concatenate([word_runs(part, n, short=False) for part in text.split(FIELDS)]) for text in texts]
    return np.concatenate(grams), np.repeat(np.arange(len(grams)), [len(g) for g in grams])


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which values stand in the sorted array."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def _halve(task: InstructionTask, share: float, seed: int) -> tuple[InstructionTask, InstructionTask]:
    """The task with the examples that stay, and with those held out; equal examples are drawn as one."""
    group = np.unique([canonical(dict(example)) for example in task.examples], return_inverse=True)[1].ravel()
    count = int(group.max()) + 1
    if count < 2:
        raise InputError(f"task {task.name!r} has one distinct example: two at least are needed to hold one out")
    chosen = generator("instances", task.name, seed).permutation(count)[: max(1, round(share * count))]
    held = np.isin(group, chosen[: count - 1])
    return task.keep(np.flatnonzero(~held)), task.keep(np.flatnonzero(held))


def _fields(text: str) -> list[str]:
    """The names in braces; anything else in braces is refused."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise InputError(f"template {text!r}: {error} (write {{{{ for a brace)") from None
    for name in names:
        if not name.isidentifier():
            raise InputError(f"template {text!r}: {{{name}}} is not the name of a field")
    return names
