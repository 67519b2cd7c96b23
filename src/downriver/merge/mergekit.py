"""Read mergekit's YAML: a merge that is already written down for mergekit runs here as it is.

Reach for it, or for ``downriver merge``, with a file whose ``merge_method`` is linear (or average), task_arithmetic or
ties. ``compat: mergekit`` at its top level asks for mergekit's arithmetic of TIES and its defaults (density 1, λ 1);
without it the method is the paper's: entries are ranked over the whole model, and 20 % are kept unless the file says
otherwise.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from downriver.core.errors import InputError, unknown
from downriver.merge.average import Average
from downriver.merge.engine import as_dtype, merge
from downriver.merge.method import Method
from downriver.merge.plan import spread
from downriver.merge.report import MergeReport
from downriver.merge.stores import Source
from downriver.merge.task_arithmetic import TaskArithmetic
from downriver.merge.ties import Ties

_TOP = ("models", "base_model", "merge_method", "parameters", "dtype", "out_dtype", "tokenizer_source", "compat")
_METHODS: dict[str, type[Method]] = {
    "linear": Average,
    "average": Average,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
}
_BY_TENSOR = {"weight": "weights", "density": "density", "lambda": "lam"}
_OURS = ("scope", "elect", "majority_zero")
_Setting = Callable[[str, float], float | None]


@dataclass(frozen=True)
class MergeConfig:
    """A merge as a file describes it. ``params`` gives each tensor's own parameters by its name and depth."""

    models: tuple[Source, ...]
    base: Source
    method: Method
    params: Callable[[str, float], Mapping[str, Any]]
    dtype: str | None
    out_dtype: str | None

    def merge(self, out: str | os.PathLike[str], **settings: Any) -> MergeReport:
        """Merge into the folder ``out``; ``settings`` as in ``downriver.merge.merge``."""
        kinds: Any = {"dtype": self.dtype, "out_dtype": self.out_dtype}
        return merge(self.models, self.base, self.method, out, params=self.params, **kinds, **settings)


def read_mergekit(config: str | os.PathLike[str] | Mapping[str, Any]) -> MergeConfig:
    """Read a merge configuration in mergekit's format.

    Parameters
    ----------
    config
        A YAML file, or what one holds. ``models`` (each with ``model``, a folder, hub id or ``base+adapter``, and its
        ``parameters``), ``base_model``, ``merge_method``, ``parameters``, ``dtype`` (what is read is rounded to it),
        ``out_dtype``, ``tokenizer_source: base``, and our ``compat: mergekit``. Parameters are ``weight``, ``density``
        and ``lambda``, each a number, a list of numbers spread over the layers, or a list of ``filter`` and ``value``;
        ``density`` is for TIES only. Further ``normalize``, ``int8_mask`` (no effect, there as here),
        ``rescale: false``, and for the paper's TIES ``scope``, ``elect`` and ``majority_zero``. Folders are looked for
        from the working directory, then beside the file.

    Raises
    ------
    InputError
        No YAML mapping; a key, method or parameter that is not known here (it is named, with the nearest known one); a
        setting of the wrong kind; no base for a method that needs one.

    Notes
    -----
    Without ``lambda``, task arithmetic takes λ = 1 where the file gives weights, as mergekit does, and 0.4 where it
    does not.

    Example
    -------
    >>> models = [{"model": "a", "parameters": {"weight": 1.0, "density": [0.2, 0.4]}}, {"model": "b"}]
    >>> config = read_mergekit({"merge_method": "ties", "base_model": "base", "models": models})
    >>> config.method.name, config.params("layers.1.w", 0.5)["density"]
    ('ties', [0.30000000000000004, 0.2])
    """
    if not isinstance(config, str | os.PathLike):
        return _read(config, Path())
    found = _load(config)
    try:
        return _read(found, Path(config).parent)
    except InputError as error:
        raise InputError(f"{config}: {error}") from None


def _read(found: Mapping[str, Any], folder: Path) -> MergeConfig:
    for key in found:
        if key not in _TOP:
            raise unknown("key of a merge configuration (others of mergekit are not supported)", key, _TOP)
    name = found.get("merge_method")
    if not isinstance(name, str) or name not in _METHODS:
        raise unknown("merge_method", name, _METHODS)
    kind = _METHODS[name]
    if found.get("tokenizer_source", "base") != "base":
        raise InputError(f"tokenizer_source is {found['tokenizer_source']!r}: only 'base' is supported")
    compat = found.get("compat")
    if compat not in (None, "mergekit"):
        raise unknown("compat", compat, ["mergekit"])
    entries = found.get("models")
    if (
        not isinstance(entries, list)
        or not all(isinstance(e, Mapping) and "model" in e for e in entries)
        or not entries
    ):
        raise InputError("models: a list of entries with the key model is expected")
    for entry in entries:
        for key in entry:
            if key not in ("model", "parameters"):
                raise unknown("key of a model", key, ("model", "parameters"))
    base = found.get("base_model")
    if kind is not Average:
        if base is None:
            raise InputError(f"base_model: {name} needs the model that the others were fine-tuned from")
        entries = [e for e in entries if e["model"] != base]
        if not entries:
            raise InputError(f"models: {name} needs at least one besides the base")
    shared = _mapping(found.get("parameters"), "parameters")
    of_model = ["weight", "density"] if kind is Ties else ["weight"]  # others trim nothing
    allowed = [*of_model, "normalize", "int8_mask"]
    if kind is not Average:
        allowed += ["lambda", "rescale"]
    if kind is Ties and compat is None:
        allowed += _OURS
    own = [_mapping(e.get("parameters"), f"parameters of {e['model']}") for e in entries]
    for where in (shared, *own):
        for key in where:
            known = allowed if where is shared else of_model
            if key not in known:
                raise unknown(f"parameter of {name}" + ("" if where is shared else " for one model"), key, known)
    settings = _settings(shared, own, kind, compat)
    fields: dict[str, Any] = _resolved(settings, "", 0.0)
    normalize = _flag(shared, "normalize", kind is not TaskArithmetic)
    if _flag(shared, "rescale", False):
        raise InputError("rescale: true is not supported")
    _flag(shared, "int8_mask", False)
    if kind is Ties:
        fields |= {"agg": "mean" if normalize else "sum", "compat": compat} | {
            k: shared[k] for k in _OURS if k in shared
        }
    else:
        fields["normalize"] = normalize
    method = kind(**fields)
    method.check(len(entries))
    sources = tuple(_source(e["model"], folder) for e in entries)
    ground = sources[0] if base is None else _source(base, folder)
    kinds = found.get("dtype"), found.get("out_dtype")
    for key, value in zip(("dtype", "out_dtype"), kinds, strict=True):
        if not isinstance(value, str | None):
            raise InputError(f"{key} is {value!r}: the name of a type such as bfloat16 is expected")
        as_dtype(value)
    return MergeConfig(sources, ground, method, lambda n, depth: _resolved(settings, n, depth), *kinds)


def _load(file: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no mapping: merge_method, models and so on are expected")
    return found


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is {value!r}: a mapping is expected")
    return value


def _flag(shared: Mapping[str, Any], key: str, default: bool) -> bool:
    value = shared.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key} is {value!r}: true or false is expected")
    return value


def _source(model: Any, folder: Path) -> Source:
    """A folder from the working directory or from beside the file, a hub id, or a pair of both as ``base+adapter``."""
    if not isinstance(model, str):
        raise InputError(f"model is {model!r}: a folder, hub id or base+adapter is expected")
    if "+" in model and not Path(model).exists():
        base, _, adapter = model.partition("+")
        return _source(base, folder), str(_source(adapter, folder))
    return str(folder / model) if not Path(model).exists() and (folder / model).exists() else model


def _settings(
    shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]], kind: type[Method], compat: str | None
) -> dict[str, list[list[_Setting]]]:
    """For each parameter of the method the settings of each model, those of its own first and the default last."""
    weighted = any("weight" in where for where in (shared, *own))
    defaults: dict[str, float] = {"weight": 1.0}
    if kind is not Average:
        defaults["lambda"] = 0.4 if kind is TaskArithmetic and compat is None and not weighted else 1.0
    if kind is Ties:
        defaults["density"] = 0.2 if compat is None else 1.0
    found = {}
    for key, default in defaults.items():
        of_models: Sequence[Mapping[str, Any]] = own if key != "lambda" else [{}]
        levels = [[where[key] for where in (mine, shared) if key in where] + [default] for mine in of_models]
        found[_BY_TENSOR[key]] = [[_setting(value, key) for value in level] for level in levels]
    return found


def _setting(value: Any, key: str) -> _Setting:
    """A number, numbers spread over the layers, or the first of several whose filter is part of the tensor's name."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        for v in value:
            if "value" not in v or not v.keys() <= {"value", "filter"}:
                raise InputError(f"{key}: {dict(v)} is no setting: value, and perhaps filter, are expected")
        rules = [(v.get("filter"), _setting(v["value"], key)) for v in value]

        def first(name: str, depth: float) -> float | None:
            fits = (inner for part, inner in rules if part in (None, "*") or (name and part in name))
            inner = next(fits, None)
            return None if inner is None else inner(name, depth)

        return first
    try:
        anchors = [float(v) for v in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        anchors = []
    if not anchors or any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
        raise InputError(f"{key} is {value!r}: a number, a list of numbers, or filters with values are expected")
    return lambda name, depth: spread(anchors, depth)


def _resolved(settings: Mapping[str, list[list[_Setting]]], name: str, depth: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for parameter, models in settings.items():
        values = [next(v for s in levels if (v := s(name, depth)) is not None) for levels in models]
        found[parameter] = values[0] if parameter == "lam" else values
    return found
