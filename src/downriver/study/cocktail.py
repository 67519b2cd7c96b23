"""Which other tasks help this one? Fine-tuning on cocktails of tasks, compared so that the answer can be believed.

Reach for it before collecting «more data» for a task: it says which ingredients help, which hurt, and how sure that is.
Brief, Ovadia, Shenderovitz, Ben Yoash, Lemberg and Sheetrit 2024, «Mixing It Up: The Cocktail Effect of Multi-Task
Fine-Tuning on LLM Performance», arXiv:2410.01109, grew cocktails of financial tasks, general instructions and maths.
Theirs: the incremental design, gains over single-task tuning, general data as a regulariser. Ours, because the best of
200 runs chosen on the test set proves little: cocktails are chosen on validation rows and never on test rows; every
mixture, the single task too, gets the same steps, seeds and settings; seeds are paired and gains have intervals;
whether an answer has the right form is told apart from whether it is right; designs in which every ingredient occurs
equally often; a regressor that proposes cocktails nobody has run.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from scipy.linalg import hadamard

from downriver.core.errors import InputError, unknown
from downriver.core.measurement import Measurement
from downriver.core.stats import FEWEST, Paired, paired
from downriver.data.mix.regress import Kind, MixtureRegressor
from downriver.study.block import Arm
from downriver.study.claims import Claim
from downriver.study.study import Result, Study

Design = Literal["incremental", "leave_one_out", "fractional", "full"]
Split = Literal["validation", "test"]
Train = Callable[..., tuple[Any, int]]  # (mixture, seed, **setting) -> (model, optimisation steps)
Evaluate = Callable[[Any, str, Split], Mapping[str, float]]  # (model, task, split) -> scores, the main one first

BASE = "base"
STEPS, FORMAT = "steps", "format"
JOIN = " + "


@dataclass(frozen=True)
class CocktailDesign:
    """Which mixtures of tasks are trained on.

    Args:
        tasks: their names.
        target: the task that is to become better; it is part of every mixture. ``None``: each of the tasks is a target
            in its turn.
        helpers: tasks that may be added to the target; by default all others.
        regularizers: further training data that is nobody's target (general instructions, maths); a mapping's keys.
        design: ``incremental`` (the paper's: helpers one after another, each stage without and with every
            regulariser), ``leave_one_out`` (everything, and everything but one), ``full`` (all subsets), ``fractional``
            (the fewest mixtures in which every ingredient, and every pair of them, occurs equally often, so that an
            effect is never mixed up with another effect, nor with a pair where ``max_runs`` allows), or a list of
            mixtures of your own. The target alone is always there.
        max_runs: more mixtures than this are refused.
        budget: ``steps``: a report refuses mixtures that were trained for different numbers of steps. ``examples``:
            more data may mean more steps, and gains then hold both.
        seeds: how often each mixture is trained; the seeds pair them.
        transfer: allow mixtures without the target in a list of your own; they are reported, never chosen.

    Raises ``InputError`` for unknown names, one given twice, a mixture without the target, and too many mixtures.

    >>> design = CocktailDesign(("t", "a", "b"), target="t", regularizers=("general",), design="leave_one_out")
    >>> list(design.mixtures)
    ['t', 't + a + b + general', 't + b + general', 't + a + general', 't + a + b']
    >>> len(CocktailDesign(("t", *"abcdefg"), target="t", design="fractional").mixtures)
    16
    """

    tasks: tuple[str, ...]
    target: str | None = None
    helpers: tuple[str, ...] | None = None
    regularizers: Sequence[str] | Mapping[str, Any] = ()
    design: Design | Sequence[Sequence[str]] = "incremental"
    max_runs: int = 64
    budget: Literal["steps", "examples"] = "steps"
    seeds: int = 3
    transfer: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "regularizers", tuple(self.regularizers))
        everything = (*self.tasks, *self.regularizers)
        if twice := [name for name in everything if everything.count(name) > 1]:
            raise InputError(f"ingredient {twice[0]!r} is named twice")
        if strange := [name for name in everything if not name or JOIN in name or name == BASE]:
            raise InputError(f"ingredient {strange[0]!r}: a name other than {BASE!r}, without {JOIN!r}, is expected")
        if self.target is not None and self.target not in self.tasks:
            raise unknown("target", self.target, self.tasks)
        for helper in self.helpers or ():
            if helper not in self.tasks or helper == self.target:
                raise unknown("helper", helper, [name for name in self.tasks if name != self.target])
        if self.budget not in ("steps", "examples"):
            raise unknown("budget", self.budget, ("steps", "examples"))
        if self.seeds < 1:
            raise InputError(f"seeds is {self.seeds}: at least 1 is expected")
        if len(self.mixtures) > self.max_runs:
            raise InputError(
                f"the design has {len(self.mixtures)} mixtures and max_runs is {self.max_runs}: a fractional design"
                " needs the fewest"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """The tasks that are measured."""
        return self.tasks if self.target is None else (self.target,)

    @cached_property
    def mixtures(self) -> dict[str, tuple[str, ...]]:
        """The ingredients of every arm, by its name; single tasks first."""
        fixed = () if self.target is None else (self.target,)
        helpers = [name for name in self.tasks if name != self.target] if self.helpers is None else list(self.helpers)
        known = (*self.tasks, *self.regularizers)
        found = [(target,) for target in self.targets]
        if isinstance(self.design, str):
            if self.design not in get_args(Design):
                raise unknown("design", self.design, get_args(Design))
            make = {"incremental": _incremental, "leave_one_out": _leave_one_out, "full": _full}
            if self.design == "fractional":
                subsets = _fractional([*helpers, *self.regularizers], self.max_runs)
            else:
                subsets = make[self.design](helpers, list(self.regularizers))
            found += [(*fixed, *subset) for subset in subsets]
        else:
            for mixture in self.design:
                for name in mixture:
                    if name not in known:
                        raise unknown("ingredient", name, known)
                if self.target is not None and self.target not in mixture and not self.transfer:
                    raise InputError(
                        f"the mixture {JOIN.join(mixture)} lacks the target {self.target!r}: transfer=True allows it"
                    )
                found.append(tuple(name for name in known if name in mixture))
        return {JOIN.join(mixture): mixture for mixture in found if mixture}

    def single(self, target: str) -> str:
        """The arm that a gain is measured against."""
        return JOIN.join((target,))


def cocktail_arms(
    design: CocktailDesign,
    train: Train,
    evaluate: Evaluate,
    seed: int,
    *,
    probes: Sequence[str] = (),
    settings: Sequence[Mapping[str, Any]] = ({},),
) -> Iterator[Arm]:
    """The arms of one seed: a mixture each, and with ``probes`` the untrained model; see ``cocktail_study``."""
    if not settings:
        raise InputError("settings is empty: one at least is expected, {} for train's own defaults")
    for name, mixture in design.mixtures.items():
        run = partial(_measure, mixture, seed, design.targets, train, evaluate, probes, settings)
        yield Arm(name, run, parameters={"mixture": mixture, "settings": list(settings), "probes": list(probes)})
    if probes:
        run = partial(_measure, (), seed, design.targets, train, evaluate, probes, ({},))
        yield Arm(BASE, run, parameters={"probes": list(probes)})


def cocktail_study(
    design: CocktailDesign,
    train: Train,
    evaluate: Evaluate,
    *,
    name: str = "cocktail",
    probes: Sequence[str] = (),
    settings: Sequence[Mapping[str, Any]] = ({},),
    claims: Sequence[Claim] = (),
    title: str = "",
    version: str = "1",
    parameters: Mapping[str, Any] | None = None,
) -> Study:
    """The design as a study: arms × seeds, run anywhere, resumed cell by cell; ``cocktail_report`` reads its result.

    Args:
        train: ``train(mixture, seed, **setting)`` fine-tunes on the ingredients named in the tuple ``mixture`` and
            gives the model and the number of optimisation steps it took. With an empty mixture it gives the untrained
            model (asked for when there are probes).
        evaluate: ``evaluate(model, task, split)`` gives scores by name, higher being better, the main one first;
            ``format`` is the share of answers in the right form. ``split`` is ``"validation"`` or ``"test"``.
        probes: what else is measured, on test rows, before and after: knowledge that tuning should not harm.
        settings: hyper-parameters that every arm tries, the single task too; the best on the target's validation rows
            goes on, and test rows are read for that one only.
        claims, title, version, parameters: as of any study. ``train`` and ``evaluate`` are yours: raise ``version``, or
            put what they depend on into ``parameters``, when they change.

    >>> import tempfile
    >>> worth = {"t": 0.5, "a": 0.2, "b": -0.1}
    >>> design = CocktailDesign(("t", "a", "b"), target="t", design="full")
    >>> study = cocktail_study(design, lambda mixture, seed: (sum(worth[n] for n in mixture) + seed / 50, 100),
    ...                        lambda model, task, split: {"accuracy": model})
    >>> report = cocktail_report(study.run(tempfile.mkdtemp(), executor="serial", progress=False), design)
    >>> report.chosen, round(report.chosen_gain.mean, 3)
    ('t + a', 0.2)
    """

    def cocktail(seed: int, budget: Any, scale: str) -> Iterator[Arm]:
        return cocktail_arms(design, train, evaluate, seed, probes=probes, settings=settings)

    return Study(
        name=name,
        function=cocktail,
        claims=tuple(claims),
        seeds=design.seeds,
        title=title or name,
        version=version,
        parameters=dict(parameters or {}),
    )


@dataclass(frozen=True)
class CocktailReport:
    """What the cocktails did for one target.

    ``gains``: a row an arm and split: ``arm``, ``split``, ``gain`` over the single task (mean of paired differences),
    ``low``, ``high``, ``n``, ``transfer``. ``effects``: a row an ingredient or pair: ``term``, ``effect`` on the test
    score, ``low``, ``high``, ``occurs`` (in how many mixtures), ``r2`` of the whole linear model; a term that the
    design cannot tell from others is missing and named in ``confounded``. ``degradation``: ``arm``, ``probe``,
    ``change`` against the untrained model, ``low``, ``high``. ``format_rate``: ``arm``, ``rate``. ``ranking``: arms
    with the target, the best on validation first; ``chosen`` is the first of it and ``chosen_gain`` its gain on test
    rows; ``losing`` are the arms whose mean gain on test rows is negative.
    """

    target: str
    metric: str
    gains: pl.DataFrame
    effects: pl.DataFrame
    confounded: tuple[str, ...]
    degradation: pl.DataFrame
    format_rate: pl.DataFrame
    ranking: tuple[str, ...]
    chosen: str
    chosen_gain: Paired
    losing: tuple[str, ...]
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The report in words."""
        d = self.chosen_gain
        sure = "no interval: one seed" if d.n < 2 else f"[{d.low:.3g}, {d.high:.3g}] over {d.n} seeds"
        few = f"; {FEWEST} seeds at least are needed to decide" if 1 < d.n < FEWEST else ""
        lines = [
            f"{self.target}: on validation {self.chosen} is best of {len(self.ranking)} mixtures;"
            f" its gain in {self.metric} over {self.target} alone on test rows is {d.mean:+.3g} ({sure}{few})"
        ]
        for row in self.effects.iter_rows(named=True):
            what = f"{row['term']}, beyond their sum" if "×" in row["term"] else f"adding {row['term']}"
            lines.append(f"  {what}: {row['effect']:+.3g}" + _interval(row, d.n))
        if self.confounded:
            lines.append(f"  the design cannot tell apart: {', '.join(self.confounded)}")
        losing = f"worse than {self.target} alone on test rows: {', '.join(self.losing)}"
        lines.append(losing if self.losing else f"no mixture is worse than {self.target} alone on test rows")
        for row in self.degradation.iter_rows(named=True):
            lines.append(f"  {row['probe']} after {row['arm']}: {row['change']:+.3g}" + _interval(row, d.n))
        for row in self.format_rate.iter_rows(named=True):
            lines.append(f"  answers in the right form after {row['arm']}: {row['rate']:.1%}")
        return "\n".join(lines)


def cocktail_report(
    runs: Result | pl.DataFrame,
    design: CocktailDesign,
    *,
    target: str | None = None,
    metric: str | None = None,
    level: float = 0.95,
) -> CocktailReport:
    """Read what a design measured for one target.

    gain(S) = score(trained on S) − score(trained on the target alone), seed by seed. The effect of an ingredient is its
    coefficient in score ~ intercept + inclusions + centred pairs, fitted to the test scores of each seed: the mean
    difference that it makes with and without the others; that of a pair is what both make beyond their sum. Intervals
    are those of the mean over seeds. Which arm is best is decided by validation scores alone.

    Args:
        runs: the result of a ``cocktail_study``, or its rows (``arm``, ``seed``, ``task``, ``metric``, ``value``).
        target: needed where the design has none of its own.
        metric: which score; by default the first that ``evaluate`` gave.
        level: of the intervals (BCa bootstrap over seeds).

    Raises ``InputError`` for arms that were trained for different numbers of steps (unless the design's budget is
    ``examples``), an arm without steps, and a target without the arm of it alone.
    """
    rows = runs if isinstance(runs, pl.DataFrame) else runs.rows()
    target = _target(design, target)
    steps = _steps(rows, design)
    metric = metric or _main(rows, target)
    scores = {split: _scores(rows, f"{split} {metric}", target) for split in ("validation", "test")}
    single = design.single(target)
    for split, found in scores.items():
        if single not in found:
            raise InputError(
                f"nothing is known of {split} {metric} of the arm {single!r}: gains are measured against it"
            )
    with_target = [arm for arm, mixture in design.mixtures.items() if target in mixture and arm in scores["validation"]]
    gains, of = [], {}
    for split, found in scores.items():
        for arm, mixture in design.mixtures.items():
            if differences := _differences(found.get(arm, {}), found[single]):
                gain = of[arm, split] = paired(differences, level)
                gains.append((arm, split, gain.mean, gain.low, gain.high, gain.n, target not in mixture))
    ranking = tuple(sorted(with_target, key=lambda arm: -of[arm, "validation"].mean))
    effects, confounded = _effects(scores["test"], design, target, level)
    names = ("arm", "split", "gain", "low", "high", "n", "transfer")
    return CocktailReport(
        target=target,
        metric=metric,
        gains=pl.DataFrame(gains, list(names), orient="row"),
        effects=effects,
        confounded=confounded,
        degradation=_degradation(rows, design, metric, level),
        format_rate=_format_rate(rows, design, target),
        ranking=ranking,
        chosen=ranking[0],
        chosen_gain=of[ranking[0], "test"],
        losing=tuple(arm for arm in with_target if (arm, "test") in of and of[arm, "test"].mean < 0),
        steps=steps,
    )


@dataclass(frozen=True)
class Recommendation:
    """A cocktail to try: ``predicted`` gain on validation, ``error`` of such predictions (root mean square, of arms
    that the regressor had not seen), their rank correlation ``rho``, the ``kind`` of regressor, and whether the mixture
    was ``measured`` already.
    """

    mixture: tuple[str, ...]
    predicted: float
    error: float
    rho: float
    kind: str
    measured: bool


def recommend(
    runs: Result | pl.DataFrame,
    design: CocktailDesign,
    *,
    target: str | None = None,
    k: int = 2,
    metric: str | None = None,
    kind: Kind | None = None,
) -> Recommendation:
    """The target with up to ``k`` ingredients, by a ``MixtureRegressor`` over all subsets, run or not.

    A mixture is described by its inclusions (of m ingredients each, in or out, has the share 1 / m, so that a linear
    regressor adds effects up). Gains are those on validation rows, a row a seed; the
    regressor (linear or a Gaussian process by default) is the one that predicts arms it has not seen best. Raises
    ``InputError`` for a ``k`` below 1, and for fewer than four mixtures with the target.
    """
    rows = runs if isinstance(runs, pl.DataFrame) else runs.rows()
    target = _target(design, target)
    scores = _scores(rows, f"validation {metric or _main(rows, target)}", target)
    others = tuple(name for name in (*design.tasks, *design.regularizers) if name != target)
    if k < 1:
        raise InputError(f"k is {k}: at least 1 is expected")
    single = scores.get(design.single(target), {})
    seen = [
        (arm, mixture, gain)
        for arm, mixture in design.mixtures.items()
        if target in mixture
        for gain in _differences(scores.get(arm, {}), single)
    ]
    arms = list(dict.fromkeys(arm for arm, _, _ in seen))
    if len(arms) < 4:
        raise InputError(f"{len(arms)} mixtures hold {target!r}: four at least are needed to recommend another")
    W = _inclusions(others, [mixture for _, mixture, _ in seen])
    y = np.array([gain for _, _, gain in seen])
    best: Any = None
    for one in ("linear", "gp") if kind is None else (kind,):
        tried = MixtureRegressor(one)
        checked = tried.cross_validate(W, y, folds=min(len(arms), 10), groups=[arm for arm, _, _ in seen])
        if best is None or checked.mse[0] < best[1].mse[0]:
            best = tried, checked
    regressor, checked = best[0].fit(W, y), best[1]
    subsets = [(target, *s) for size in range(min(k, len(others)) + 1) for s in itertools.combinations(others, size)]
    predicted = regressor.predict(_inclusions(others, subsets))
    chosen = int(np.argmax(predicted))
    measured = {frozenset(mixture) for _, mixture, _ in seen}
    return Recommendation(
        mixture=subsets[chosen],
        predicted=float(predicted[chosen]),
        error=math.sqrt(checked.mse[0]),
        rho=float(checked.rho[0]),
        kind=regressor.kind,
        measured=frozenset(subsets[chosen]) in measured,
    )


def _measure(
    mixture: tuple[str, ...],
    seed: int,
    targets: Sequence[str],
    train: Train,
    evaluate: Evaluate,
    probes: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
) -> list[Measurement]:
    """Train once a setting, keep what is best on validation rows, and read the test rows of that one."""
    best: Any = None
    for number, setting in enumerate(settings):
        model, steps = train(mixture, seed, **setting)
        found = {task: dict(evaluate(model, task, "validation")) for task in targets}
        own = [task for task in targets if task in mixture] or list(targets)
        score = float(np.mean([next(iter(found[task].values())) for task in own]))
        if best is None or score > best[0]:
            best = score, number, model, steps, found
    _, number, model, steps, found = best
    rows = [Measurement(f"validation {m}", v, task=task) for task, s in found.items() for m, v in s.items()]
    for task in (*targets, *probes):
        rows += [Measurement(f"test {m}", v, task=task) for m, v in evaluate(model, task, "test").items()]
    rows.append(Measurement(STEPS, steps, direction="none"))
    return [*rows, Measurement("setting", number, direction="none")]


def _incremental(helpers: list[str], regularizers: list[str]) -> list[tuple[str, ...]]:
    """Stages of more and more helpers; each without, and with every one of, the regularisers."""
    stages = [tuple(helpers[:n]) for n in range(len(helpers) + 1)]
    return [(*stage, *extra) for stage in stages for extra in [(), *((r,) for r in regularizers)]]


def _leave_one_out(helpers: list[str], regularizers: list[str]) -> list[tuple[str, ...]]:
    everything = [*helpers, *regularizers]
    return [tuple(everything), *(tuple(n for n in everything if n != left) for left in everything)]


def _full(helpers: list[str], regularizers: list[str]) -> list[tuple[str, ...]]:
    everything = [*helpers, *regularizers]
    return [s for size in range(len(everything) + 1) for s in itertools.combinations(everything, size)]


def _fractional(ingredients: list[str], max_runs: int) -> list[tuple[str, ...]]:
    """Half of the runs with each ingredient: columns of a Hadamard matrix.

    Columns whose number has an odd count of ones in base 2 have no product of two of them among them (resolution IV:
    effects are clear of pairs) and there are N / 2; with all N - 1 columns (resolution III) effects are clear of one
    another only.
    """
    k = len(ingredients)
    if k == 0:
        return []
    for enough in (lambda n: k <= n // 2, lambda n: k <= n - 1):
        runs = next(n for n in (2**p for p in range(1, 40)) if enough(n))
        if runs <= max_runs:
            break
    else:
        raise InputError(f"max_runs is {max_runs}: a fractional design of {k} ingredients needs {runs} mixtures")
    odd = k <= runs // 2
    columns = [c for c in range(1, runs) if not odd or c.bit_count() % 2]
    columns.sort(key=lambda c: (c.bit_count(), c))  # single bits are independent: all subsets where they suffice
    included = hadamard(runs)[:, columns[:k]] < 0
    return [tuple(name for name, there in zip(ingredients, row, strict=True) if there) for row in included]


def _target(design: CocktailDesign, target: str | None) -> str:
    if target is None and design.target is None:
        raise InputError(f"the design has no target of its own: name one of {', '.join(design.tasks)}")
    target = target or str(design.target)
    if target not in design.targets:
        raise unknown("target", target, design.targets)
    return target


def _steps(rows: pl.DataFrame, design: CocktailDesign) -> dict[str, float]:
    """Steps by arm, after the check that the arms may be compared."""
    found: dict[str, float] = {}
    measured = rows.filter(pl.col("metric") == STEPS)
    for arm in design.mixtures:
        values = measured.filter(arm=arm)["value"].unique().to_list()
        if not values and not rows.filter(arm=arm).is_empty():
            raise InputError(f"arm {arm!r} does not say how many {STEPS} it was trained for")
        if len(values) > 1 and design.budget == "steps":
            raise InputError(f"arm {arm!r} was trained for {values[0]:g} steps and for {values[1]:g}, by seed")
        if values:
            found[arm] = float(np.mean(values))
    if design.budget == "steps" and len(set(found.values())) > 1:
        (a, x), (b, y) = next((p, q) for p, q in itertools.combinations(found.items(), 2) if p[1] != q[1])
        raise InputError(
            f"{a!r} was trained for {x:g} steps and {b!r} for {y:g}: train all arms alike, or declare"
            " budget='examples' in the design"
        )
    return found


def _main(rows: pl.DataFrame, target: str) -> str:
    names = rows.filter(pl.col("task") == target, pl.col("metric").str.starts_with("validation "))["metric"]
    if names.is_empty():
        raise InputError(f"no row measures {target!r} on validation: run the study first")
    return str(names[0]).removeprefix("validation ")


def _scores(rows: pl.DataFrame, metric: str, task: str) -> dict[str, dict[int, float]]:
    """arm → seed → value."""
    found: dict[str, dict[int, float]] = {}
    of = rows.filter(pl.col("metric") == metric, pl.col("task") == task)
    for arm, seed, value in of.select("arm", "seed", "value").iter_rows():
        found.setdefault(arm, {})[seed] = value
    return found


def _differences(mine: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    return [mine[seed] - other[seed] for seed in sorted(mine) if seed in other]


def _effects(
    scores: Mapping[str, Mapping[int, float]], design: CocktailDesign, target: str, level: float
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Least squares of the scores on the inclusion of ingredients and pairs of them, seed by seed."""
    seeds = sorted(set.intersection(*(set(found) for found in scores.values())))
    arms = [arm for arm, mixture in design.mixtures.items() if target in mixture and arm in scores]
    mixtures = [design.mixtures[arm] for arm in arms]
    ingredients = [n for n in (*design.tasks, *design.regularizers) if n != target and any(n in m for m in mixtures)]
    columns: dict[tuple[str, ...], np.ndarray] = {
        (n,): np.array([float(n in m) for m in mixtures]) for n in ingredients
    }
    columns |= {  # centred: an ingredient's own effect is then that averaged over absence and presence of the others
        (a, b): (columns[a,] - 0.5) * (columns[b,] - 0.5) for a, b in itertools.combinations(ingredients, 2)
    }
    clear = _estimable(columns)
    mains: dict[tuple[str, ...], np.ndarray] = {k: column for k, column in columns.items() if len(k) == 1}
    for key in _estimable(mains):  # what pairs blur, and no other ingredient does
        clear.setdefault(key, mains[key])
    confounded = tuple(" × ".join(key) for key in columns if key not in clear)
    schema = {"term": pl.String, "occurs": pl.Int64} | dict.fromkeys(("effect", "low", "high", "r2"), pl.Float64)
    if not seeds or not clear:
        return pl.DataFrame(schema=schema), confounded
    X = np.column_stack([np.ones(len(arms)), *clear.values()])
    Y = np.array([[scores[arm][seed] for seed in seeds] for arm in arms])
    fitted = np.linalg.lstsq(X, Y, rcond=None)[0]
    spread = ((Y - Y.mean(axis=0)) ** 2).sum()
    r2 = 1 - ((Y - X @ fitted) ** 2).sum() / spread if spread > 0 else math.nan
    rows = []
    for i, key in enumerate(clear, start=1):
        effect = paired(fitted[i].tolist(), level)
        occurs = sum(set(key) <= set(mixture) for mixture in mixtures)
        rows.append((" × ".join(key), occurs, effect.mean, effect.low, effect.high, float(r2)))
    return pl.DataFrame(rows, schema, orient="row"), confounded


def _estimable(columns: Mapping[tuple[str, ...], np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """The columns that no combination of the others (and the intercept) can stand in for."""
    if not columns:
        return {}
    X = np.column_stack([np.ones(len(next(iter(columns.values())))), *columns.values()])
    rank = np.linalg.matrix_rank(X)
    return {
        key: column
        for i, (key, column) in enumerate(columns.items(), start=1)
        if np.linalg.matrix_rank(np.delete(X, i, axis=1)) < rank
    }


def _inclusions(ingredients: Sequence[str], mixtures: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Two shares an ingredient, in and out; they sum to 1 in every mixture."""
    there = {name: np.array([name in mixture for mixture in mixtures]) / len(ingredients) for name in ingredients}
    return there | {f"without {name}": 1 / len(ingredients) - column for name, column in there.items()}


def _degradation(rows: pl.DataFrame, design: CocktailDesign, metric: str, level: float) -> pl.DataFrame:
    schema = {"arm": pl.String, "probe": pl.String} | dict.fromkeys(("change", "low", "high"), pl.Float64)
    of_base = rows.filter(pl.col("arm") == BASE, pl.col("metric").str.starts_with("test "))
    found = []
    for probe in of_base["task"].unique(maintain_order=True).to_list():
        if probe in design.targets:
            continue
        main = str(of_base.filter(task=probe)["metric"][0])
        scores = _scores(rows, main, probe)
        for arm in design.mixtures:
            if differences := _differences(scores.get(arm, {}), scores[BASE]):
                change = paired(differences, level)
                found.append((arm, probe, change.mean, change.low, change.high))
    return pl.DataFrame(found, schema, orient="row")


def _format_rate(rows: pl.DataFrame, design: CocktailDesign, target: str) -> pl.DataFrame:
    scores = _scores(rows, f"test {FORMAT}", target)
    found = [(arm, float(np.mean(list(scores[arm].values())))) for arm in design.mixtures if arm in scores]
    return pl.DataFrame(found, {"arm": pl.String, "rate": pl.Float64}, orient="row")


def _interval(row: Mapping[str, Any], n: int) -> str:
    return "" if n < 2 else f" [{row['low']:.3g}, {row['high']:.3g}]"
