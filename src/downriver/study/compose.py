"""Studies from YAML: arms composed of the five arrows, on one model and one task.

An arm starts from the study's model and task; ``data`` changes the task, ``adapt``, ``pretrain``, ``merge`` and
``compress`` the model. What comes out is measured on the task as it was in the beginning, by what it kept of another
one (``retention``) and by what it refuses (``safety``). An arm that builds on another
one (``from``, or by naming it in a merge) shares its work and is charged for it.
"""

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from downriver import __version__
from downriver.core.budget import Budget
from downriver.core.errors import InputError, unknown
from downriver.core.io import canonical, fingerprint, sha256_file
from downriver.core.measurement import Measurement
from downriver.core.registry import check_parameters, resolve
from downriver.study.block import Arm, shared
from downriver.study.config import Config, Step, chain, read
from downriver.study.study import Study


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> Study:
    """A study from a YAML file (or a mapping that says the same), checked whole: nothing is run, everything is named.

    The model and the task are opened once, so that a missing file, a wrong column or a model that cannot do the task is
    an ``InputError`` now and not in every cell. The fingerprint of the data becomes part of the study's question.

    >>> study = load({
    ...     "name": "wines", "model": "small:mlp:nano:0", "task": "wine", "budget": "64 examples", "seeds": 2,
    ...     "arms": {"probe": {"adapt": "linear_probe"}, "full": {"adapt": {"method": "full", "batch_size": 8}}},
    ... })
    >>> [arm.name for arm in study.arms()], study.budget
    (['probe', 'full'], Budget(amount=64.0, unit='examples'))
    """
    config = read(source)
    facts = _check(config)

    def compose(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
        @shared
        def start() -> tuple[Any, Any]:
            task = _task(canonical(config.task))
            for split, rows in config.sample.items():
                task = task.sample(split, rows, seed=seed)
            return _model(canonical(config.model)), task

        @shared
        def built(name: str) -> tuple[Any, Any]:
            model, task = start()
            for step in config.arms[name]:
                model, task = _apply(step, model, task, config, built, seed)
            return model, task

        @shared
        def refused_before() -> float:
            return _refusals(start()[0], config)[0].value

        def measure(name: str) -> list[Measurement]:
            from downriver.evaluate.evaluate import evaluate
            from downriver.evaluate.retention import retention

            before, task = start()
            after, _ = built(name)
            rows = evaluate(after, task, split=config.split, metrics=config.metrics)
            if config.retention is not None:
                rows += retention(before, after, _task(canonical(config.retention)))
            if config.safety is not None:
                [refused] = _refusals(after, config)
                change = refused.value - refused_before()
                rows += [refused, dataclasses.replace(refused, metric="refusals_change", value=change)]
            rows += _served(after, task, config.split)
            if config.save is not None:
                after.save(Path(config.save) / config.name / f"{name}-seed{seed}", overwrite=True)
            return rows

        for name in config.arms:
            yield Arm(name, functools.partial(measure, name), parameters={"steps": chain(config, name)})

    return Study(
        name=config.name,
        function=compose,
        claims=config.claims,
        seeds=config.seeds,
        budget=None if config.budget is None else Budget.parse(config.budget),
        title=config.title or config.name,
        version=__version__,
        parameters=facts,
    )


def _apply(
    step: Step, model: Any, task: Any, config: Config, built: Callable[[str], tuple[Any, Any]], seed: int
) -> tuple[Any, Any]:
    """One step of an arm: the model and the task after it."""
    if step.arrow == "from":
        return built(step.models[0])
    method = resolve(step.arrow, step.method)
    parameters = dict(step.parameters)
    if "seed" in inspect.signature(method).parameters:
        parameters.setdefault("seed", seed)
    if step.arrow == "data":
        return model, method(task, **parameters)
    if step.arrow == "compress":
        calibrated = "task" in inspect.signature(method).parameters
        return method(model, *([task] if calibrated else []), **parameters), task
    if step.arrow == "merge":

        def named(name: str) -> Any:
            return built(name)[0] if name in config.arms else _model(canonical(name))

        base = model if step.base is None else named(step.base)
        return method([named(name) for name in step.models], base, **parameters), task
    return method(model, task, Budget.parse(step.budget or config.budget or ""), **parameters), task


def _safety(config: Config) -> tuple[Any, dict[str, Any]]:
    """The prompts that are to be refused, and how they are put to a model."""
    from downriver.evaluate.safety import safety

    stated = config.safety if isinstance(config.safety, Mapping) else {"prompts": config.safety}
    if "prompts" not in stated:
        raise InputError("safety: the key prompts is expected, a task whose texts are to be refused")
    more = {name: value for name, value in stated.items() if name != "prompts"}
    prompts = stated["prompts"]
    return _task(canonical(prompts)), check_parameters(safety, more, "safety")


def _refusals(model: Any, config: Config) -> list[Measurement]:
    from downriver.evaluate.safety import safety

    prompts, settings = _safety(config)
    return safety(model, prompts, **settings)


def _served(model: Any, task: Any, split: str) -> list[Measurement]:
    """What a model with thresholds on its gates leaves out when it is served."""
    from downriver.models.surgery import THRESHOLDS

    if not getattr(getattr(model.backbone, "config", None), THRESHOLDS, None):
        return []
    from downriver.compress.cats import gate_sparsity

    report = gate_sparsity(model, task, split=split, progress=False)
    return [
        Measurement("gate_sparsity", report.sparsity, task.name, "share", "higher"),
        Measurement("feed_forward_traffic", report.traffic, task.name, "share of the dense bytes", "lower"),
    ]


def _check(config: Config) -> dict[str, Any]:
    """Open what the study names; everything its answers depend on beside the arms."""
    from downriver.evaluate.metrics import lookup

    task = _task(canonical(config.task))
    task.rows(config.split)
    for split, rows in config.sample.items():
        task.sample(split, rows, seed=0)
    model = _model(canonical(config.model))
    model.collate(task)
    of = "tokens" if task.kind == "language-modelling" else "classes" if task.classification else "numbers"
    metrics = list(config.metrics or task.metrics)
    for name in metrics:
        lookup(name, of)
    reference = None
    if config.retention is not None:
        reference = _task(canonical(config.retention))
        metrics += ["retention", "retention_change"]
    prompts = None
    if config.safety is not None:
        from downriver.models.language import language_model

        prompts, settings = _safety(config)
        prompts.texts(settings.get("split", "test"))
        language_model(model)
        metrics += ["refusals", "refusals_change"]
    if any(step.arrow == "compress" for steps in config.arms.values() for step in steps):
        served = ["gate_sparsity", "feed_forward_traffic"]
    else:
        served = []
    for claim in config.claims:
        measured = claim.on.split("/")[0]  # language modelling measures loss/domain beside loss
        kept = reference is not None and measured.endswith(("_before", "_after"))
        if measured not in [*metrics, *served] and not kept:
            raise unknown(f"metric in the claim «{claim.text}»", claim.on, [*metrics, *served])
    others = {name for steps in config.arms.values() for s in steps for name in (*s.models, s.base) if name}
    return {
        "model": _identity(config.model),
        "others": {name: _identity(_named(name, config)) for name in sorted(others - set(config.arms))},
        "task": task.fingerprint,
        "sample": config.sample,
        "split": config.split,
        "metrics": metrics,
        "retention": reference and reference.fingerprint,
        **({} if prompts is None else {"safety": [prompts.fingerprint, config.safety]}),
        "save": config.save,
    }


def _named(name: str, config: Config) -> str:
    """A model that a merge names beside the arms: it must at least look like one."""
    from downriver.models.builtin import builtin_names

    if not Path(name).is_dir() and "/" not in name and ":" not in name and name not in builtin_names():
        raise unknown("arm or model in a merge", name, [*config.arms, *builtin_names()])
    _model(canonical(name))
    return name


def _identity(spec: str | Mapping[str, Any]) -> Any:
    """What tells one model from another: its name and, for a folder, the content of its files."""
    source = Path(spec if isinstance(spec, str) else str(spec.get("source", "")))
    if not source.is_dir():
        return spec
    files = sorted(path for path in source.rglob("*") if path.suffix in (".safetensors", ".json", ".bin"))
    return [spec, fingerprint([(path.relative_to(source).as_posix(), sha256_file(path)) for path in files])]


@functools.lru_cache(maxsize=8)
def _task(spec: str) -> Any:
    from downriver.tasks.load import load

    return load(json.loads(spec))


@functools.lru_cache(maxsize=2)
def _model(spec: str) -> Any:
    from downriver.models.load import load

    stated = json.loads(spec)
    if isinstance(stated, str):
        return load(stated)
    if "source" not in stated:
        raise InputError("model: the key source is expected, a folder, a hub id or a built-in name")
    source = stated.pop("source")
    return load(source, **check_parameters(load, stated, "model"))
