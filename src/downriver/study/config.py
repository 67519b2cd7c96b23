"""The YAML file of a study: what may stand in it, read and checked whole before anything runs.

Every name is held against what there is (keys, arrows, methods, arms, metrics, claims) and every parameter against the
signature of its method; a wrong one is an ``InputError`` with the nearest right one.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from downriver.core.budget import Budget
from downriver.core.errors import InputError, unknown
from downriver.core.registry import ARROWS, check_parameters, resolve
from downriver.study.claims import Claim, above, below, better, keeps

CLAIMS: dict[str, Callable[..., Claim]] = {"better": better, "keeps": keeps, "above": above, "below": below}
STEPS = ("from", *ARROWS)


class Step(pydantic.BaseModel, extra="forbid", frozen=True):
    """One arrow of an arm: a method of a room with its parameters, or ``from``, the model of another arm to go on with.

    ``models`` and ``base`` belong to ``merge``: names of arms, or anything ``models.load`` takes; ``base`` is the model
    that the step starts from unless it is named. ``budget`` is for ``adapt`` and ``pretrain``: the study's unless it is
    named.
    """

    arrow: str
    method: str
    parameters: dict[str, Any] = {}
    models: tuple[str, ...] = ()
    base: str | None = None
    budget: str | dict[str, float] | None = None


class Config(pydantic.BaseModel, extra="forbid"):
    """A study as its file states it."""

    name: str
    title: str = ""
    model: str | dict[str, Any]
    task: str | dict[str, Any]
    arms: dict[str, tuple[Step, ...]]
    metrics: tuple[str, ...] | None = None
    retention: str | dict[str, Any] | None = None
    safety: str | dict[str, Any] | None = None
    split: Literal["validation", "test"] = "test"
    sample: dict[Literal["train", "validation", "test"], int] = {}
    seeds: pydantic.PositiveInt = 5
    budget: str | dict[str, float] | None = None
    claims: tuple[Any, ...] = ()
    save: str | None = None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words and numbers (``on`` is a key of claims, ``1e-3`` a number), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                where = node.value[place][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", where)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """Read and check a study from a YAML file, or from a mapping that says the same (then ``name`` must be in it).

    >>> config = read({
    ...     "name": "demo", "model": "all-MiniLM-L6-v2", "task": "20newsgroups", "budget": "2000 examples",
    ...     "arms": {"probe": {"adapt": "linear_probe"}},
    ...     "claims": [{"above": {"arm": "probe", "on": "accuracy", "value": 0.5}}],
    ... })
    >>> config.arms["probe"][0].method, config.claims[0].text
    ('linear_probe', 'probe is above 0.5 on accuracy')
    """
    if isinstance(source, Mapping):
        stated, where = dict(source), "the study"
    else:
        stated, where = _parse(Path(source)), str(source)
        stated.setdefault("name", Path(source).stem)
    for key in stated:
        if key not in Config.model_fields:
            raise unknown(f"key of {where}", key, Config.model_fields)
    arms = stated.get("arms")
    if not isinstance(arms, Mapping) or not arms:
        raise InputError(f"{where}, arms: a mapping from the name of an arm to its steps is expected")
    stated["arms"] = {str(name): _steps(f"{where}, arm {name!r}", steps) for name, steps in arms.items()}
    claims = stated.get("claims") or []
    if not isinstance(claims, list):
        raise InputError(f"{where}, claims: a list is expected")
    stated["claims"] = [_claim(where, claim, stated["arms"]) for claim in claims]
    try:
        config = Config.model_validate(stated)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}, {place}: {first['msg']}") from None
    if config.budget is not None:
        Budget.parse(config.budget)
    for name, steps in config.arms.items():
        for step in steps:
            if step.arrow in ("adapt", "pretrain") and step.budget is None and config.budget is None:
                raise InputError(f"{where}, arm {name!r}: {step.arrow} needs a budget, like budget: 2000 examples")
    _order(where, config)
    return config


def chain(config: Config, name: str) -> list[Any]:
    """Every step that an arm's model goes through, those of the arms it builds on included."""
    found: list[Any] = []
    for step in config.arms[name]:
        found.append(step.model_dump(exclude_defaults=True))
        found += [chain(config, other) for other in _needs(config, step)]
    return found


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is not there: a study's YAML file is expected")
    try:
        stated = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(stated, dict) or not all(isinstance(key, str) for key in stated):
        raise InputError(f"{path}: a mapping with the keys {', '.join(Config.model_fields)} is expected")
    return stated


def _steps(where: str, stated: Any) -> list[Step]:
    steps = stated if isinstance(stated, list) else [stated]
    if not steps:
        raise InputError(f"{where}: at least one step is expected")
    return [_step(where, step, first=number == 0) for number, step in enumerate(steps)]


def _step(where: str, stated: Any, first: bool) -> Step:
    if not isinstance(stated, Mapping) or len(stated) != 1:
        raise InputError(
            f"{where}: {stated!r}: a step is one of {', '.join(STEPS)} with a method, like {{adapt: lora}}"
        )
    ((arrow, what),) = stated.items()
    if arrow not in STEPS:
        raise unknown(f"step in {where}", arrow, STEPS)
    if arrow == "from":
        if not (first and isinstance(what, str)):
            raise InputError(f"{where}: 'from' names one arm, and stands first")
        return Step(arrow=arrow, method="", models=(what,))
    parameters = {"method": what} if isinstance(what, str) else dict(what) if isinstance(what, Mapping) else {}
    method = parameters.pop("method", None)
    if not isinstance(method, str):
        raise InputError(f"{where}: {arrow} needs a method, like {{{arrow}: {{method: ...}}}}")
    own: dict[str, Any] = {}
    if arrow == "merge":
        own["models"] = parameters.pop("models", None)
        own["base"] = parameters.pop("base", None)
        if not isinstance(own["models"], list) or not all(isinstance(m, str) for m in own["models"]):
            raise InputError(f"{where}: merge needs models, a list of arms, folders or hub ids")
    if arrow in ("adapt", "pretrain"):
        own["budget"] = parameters.pop("budget", None)
        if own["budget"] is not None:
            Budget.parse(own["budget"])
    checked = check_parameters(resolve(arrow, method), parameters, f"{arrow} method {method} ({where})")
    return Step(arrow=arrow, method=method, parameters=checked, **own)


def _claim(where: str, stated: Any, arms: Iterable[str]) -> Claim:
    if not isinstance(stated, Mapping) or len(stated) != 1:
        raise InputError(f"{where}, claims: {stated!r}: one of {', '.join(CLAIMS)} with its arm is expected")
    ((kind, details),) = stated.items()
    if kind not in CLAIMS:
        raise unknown(f"claim in {where}", kind, CLAIMS)
    if not isinstance(details, Mapping) or "arm" not in details:
        raise InputError(f"{where}, claim {kind!r}: a mapping with the key arm is expected")
    rest = {key: value for key, value in details.items() if key != "arm"}
    claim = CLAIMS[kind](str(details["arm"]), **check_parameters(CLAIMS[kind], rest, f"claim {kind} ({where})"))
    for arm in claim.arms:
        if arm not in arms:
            raise unknown(f"arm in a claim of {where}", arm, arms)
    return claim


def _needs(config: Config, step: Step) -> list[str]:
    """The arms that a step builds on."""
    return [name for name in (*step.models, *([step.base] if step.base else [])) if name in config.arms]


def _order(where: str, config: Config) -> None:
    """Refuse arms that build on themselves, and ``from`` steps that name no arm."""

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise InputError(f"{where}: arms build on one another in a circle: {' → '.join((*path, name))}")
        for step in config.arms[name]:
            if step.arrow == "from" and step.models[0] not in config.arms:
                raise unknown(f"arm in {where}, arm {name!r}", step.models[0], config.arms)
            for other in _needs(config, step):
                visit(other, (*path, name))

    for name in config.arms:
        visit(name, ())
