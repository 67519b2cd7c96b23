"""Read mergekit's YAML: a merge that is already written down for mergekit runs here as it is.

Reach for it, or for ``downriver merge``, with a file whose ``merge_method`` is one of ``METHODS``. ``compat: mergekit``
at its top level asks for mergekit's arithmetic and its defaults (nothing trimmed, λ 1, L1 rescaling); without it a
method is the paper's: TIES ranks over the whole model and keeps 20 % unless the file says otherwise, DARE and DELLA
divide by the probability of being kept.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from downriver.core.errors import InputError, unknown
from downriver.merge.average import Average
from downriver.merge.breadcrumbs import Breadcrumbs
from downriver.merge.dare import Dare
from downriver.merge.della import Della
from downriver.merge.engine import as_dtype, merge
from downriver.merge.method import Method
from downriver.merge.model_stock import ModelStock
from downriver.merge.passthrough import Passthrough, stack
from downriver.merge.plan import Vocabulary, spread
from downriver.merge.report import MergeReport
from downriver.merge.sce import Sce
from downriver.merge.slerp import Slerp
from downriver.merge.stores import Source
from downriver.merge.task_arithmetic import TaskArithmetic
from downriver.merge.ties import Ties

_TOP = ("models", "slices", "base_model", "merge_method", "parameters", "dtype", "out_dtype", "tokenizer_source")
_Setting = Callable[[str, float], float | None]


@dataclass(frozen=True)
class _Reading:
    """How a merge_method is read: ``numbers`` maps a parameter to the method's field, the default of the paper's
    reading and that of mergekit; those in ``single`` are one number for all models. ``flags`` have one default."""

    kind: type[Method]
    numbers: Mapping[str, tuple[str, float, float]] = field(default_factory=dict)
    single: tuple[str, ...] = ("lambda",)
    flags: Mapping[str, bool] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ours: tuple[str, ...] = ()
    """Fields of the method that a file may set when it does not ask for compat."""
    base: bool = True


_WEIGHT, _LAMBDA = {"weight": ("weights", 1.0, 1.0)}, {"lambda": ("lam", 1.0, 1.0)}
_SHARED = _WEIGHT | _LAMBDA


def _sparse(kind: type[Method], density: float, normalize: bool, rescale: bool, **more: Any) -> dict[str, _Reading]:
    """Both readings of a method of sparse task vectors: with and without a vote."""
    name = kind.name
    numbers = _SHARED | {"density": ("density", density, 1.0)} | more
    voted, added = (name, f"{name}_linear") if kind is Della else (f"{name}_ties", name)
    if kind is Dare:
        added = "dare_linear"
    flags = {"normalize": normalize, "rescale": rescale}
    return {
        voted: _Reading(kind, numbers, flags=flags, fixed={"consensus": "ties"}, ours=("seed",) if rescale else ()),
        added: _Reading(
            kind,
            numbers,
            flags=flags | {"normalize": False},
            fixed={"consensus": "linear"},
            ours=("seed",) if rescale else (),
        ),
    }


METHODS: Mapping[str, _Reading] = {
    "linear": _Reading(Average, _WEIGHT, single=(), flags={"normalize": True}, base=False),
    "average": _Reading(Average, _WEIGHT, single=(), flags={"normalize": True}, base=False),
    "task_arithmetic": _Reading(
        TaskArithmetic,
        _WEIGHT | {"lambda": ("lam", 0.4, 1.0)},
        flags={"normalize": False, "rescale": False},
    ),
    "ties": _Reading(
        Ties,
        _SHARED | {"density": ("density", 0.2, 1.0)},
        flags={"normalize": True, "rescale": False},
        ours=("scope", "elect", "majority_zero"),
    ),
    **_sparse(Dare, 0.5, normalize=False, rescale=True),
    **_sparse(Della, 0.5, normalize=True, rescale=True, epsilon=("epsilon", 0.15, 0.15)),
    **_sparse(Breadcrumbs, 0.9, normalize=False, rescale=False, gamma=("gamma", 0.01, 0.01)),
    "model_stock": _Reading(ModelStock, single=(), flags={"filter_wise": False}),
    "sce": _Reading(Sce, {"select_topk": ("select_topk", 0.1, 1.0)}, single=("select_topk",)),
    "slerp": _Reading(Slerp, {"t": ("t", 0.5, 0.5)}, single=("t",)),
    "passthrough": _Reading(Passthrough, {"scale": ("scale", 1.0, 1.0)}, single=("scale",), base=False),
}
"""How each ``merge_method`` is read."""


@dataclass(frozen=True)
class MergeConfig:
    """A merge as a file describes it. ``params`` gives each tensor's own parameters by its name and depth."""

    models: tuple[Source, ...]
    base: Source
    method: Method
    params: Callable[[str, float], Mapping[str, Any]]
    dtype: str | None
    out_dtype: str | None
    vocabulary: Vocabulary | None = None

    def merge(self, out: str | os.PathLike[str], **settings: Any) -> MergeReport:
        """Merge into the folder ``out``; ``settings`` as in ``downriver.merge.merge``."""
        kinds: Any = {"dtype": self.dtype, "out_dtype": self.out_dtype, "vocabulary": self.vocabulary}
        return merge(self.models, self.base, self.method, out, params=self.params, **kinds, **settings)


def read_mergekit(config: str | os.PathLike[str] | Mapping[str, Any]) -> MergeConfig:
    """Read a merge configuration in mergekit's format.

    Parameters
    ----------
    config
        A YAML file, or what one holds. ``models`` (each with ``model``, a folder, hub id or ``base+adapter``, and its
        ``parameters``) or ``slices`` (of ``sources`` with a ``layer_range``, see ``stack``), ``base_model``,
        ``merge_method``, ``parameters``, ``dtype`` (what is read is rounded to it), ``out_dtype``,
        ``tokenizer_source: base`` or ``union`` (rows of tokens are aligned, see ``merge``), and our ``compat:
        mergekit``. Parameters are those of mergekit's method: ``weight``, ``density``, ``epsilon``, ``gamma``,
        ``lambda``, ``t``, ``select_topk`` and ``scale``, each a number, a list of numbers spread over all layers, or a
        list of ``filter`` and ``value``; ``normalize``, ``rescale`` and ``int8_mask`` (no effect, there as here). For
        the paper's TIES also ``scope``, ``elect`` and ``majority_zero``, for DARE and DELLA ``seed``. Folders are
        looked for from the working directory, then beside the file.

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
        if key not in (*_TOP, "compat"):
            raise unknown("key of a merge configuration (others of mergekit are not supported)", key, (*_TOP, "compat"))
    name = found.get("merge_method")
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("merge_method", name, METHODS)
    reading = METHODS[name]
    vocabulary = found.get("tokenizer_source")
    if vocabulary is not None and vocabulary not in get_args(Vocabulary):
        raise unknown("tokenizer_source", vocabulary, get_args(Vocabulary))
    compat = found.get("compat")
    if compat not in (None, "mergekit"):
        raise unknown("compat", compat, ["mergekit"])
    if ("models" in found) == ("slices" in found):
        raise InputError("one of models and slices is expected: a list of entries with the key model, or of slices")
    entries = _entries(found, reading)
    base = found.get("base_model")
    if reading.base:
        if base is None:
            raise InputError(f"base_model: {name} needs the model that the others were fine-tuned from")
        others = [e for e in entries if e["model"] != base]
        if not others:
            raise InputError(f"models: {name} needs at least one besides the base")
        if reading.kind is Slerp:  # t goes from the base to the other
            entries = [next((e for e in entries if e["model"] == base), {"model": base}), *others]
        else:
            entries = others
    shared = _mapping(found.get("parameters"), "parameters")
    own = [_mapping(e.get("parameters"), f"parameters of {e['model']}") for e in entries]
    of_model = [key for key in reading.numbers if key not in reading.single or reading.kind is Passthrough]
    allowed = [*reading.numbers, *reading.flags, "int8_mask", *(reading.ours if compat is None else ())]
    for where in (shared, *own):
        for key in where:
            known = allowed if where is shared else of_model
            if key not in known:
                raise unknown(f"parameter of {name}" + ("" if where is shared else " for one model"), key, known)
    settings = _settings(shared, own, reading, compat)
    method = reading.kind(**_resolved(settings, reading, "", 0.0), **_fields(shared, reading, compat))
    sources, ground = _sources(found, entries, base, folder, reading)
    method.check(len(sources))
    kinds = found.get("dtype"), found.get("out_dtype")
    for key, value in zip(("dtype", "out_dtype"), kinds, strict=True):
        if not isinstance(value, str | None):
            raise InputError(f"{key} is {value!r}: the name of a type such as bfloat16 is expected")
        as_dtype(value)
    return MergeConfig(
        sources, ground, method, lambda n, depth: _resolved(settings, reading, n, depth), *kinds, vocabulary
    )


def _fields(shared: Mapping[str, Any], reading: _Reading, compat: str | None) -> dict[str, Any]:
    """The fields of the method that are the same for all tensors."""
    _flag(shared, "int8_mask", False)
    flags = {key: _flag(shared, key, default) for key, default in reading.flags.items()}
    found: dict[str, Any] = {**reading.fixed} | {key: shared[key] for key in reading.ours if key in shared}
    if reading.kind in (TaskArithmetic, Ties) and flags["rescale"]:
        raise InputError("rescale: true is not supported for task_arithmetic and ties")
    if reading.kind is ModelStock:
        found["filter_wise"] = flags["filter_wise"]
    if reading.kind is Ties:
        return found | {"agg": "mean" if flags["normalize"] else "sum", "compat": compat}
    if "normalize" in flags:
        found["normalize"] = flags["normalize"]
    if "consensus" in found:
        drawn = compat is None and reading.kind in (Dare, Della)  # mergekit keeps the L1 norm instead
        found |= {"compat": compat, "rescale": ("probability" if drawn else "l1") if flags["rescale"] else None}
    return found


def _entries(found: Mapping[str, Any], reading: _Reading) -> list[Mapping[str, Any]]:
    """The entries of models, or of the first slice."""
    if "models" in found:
        return _models(found["models"], "models", ("model", "parameters"))
    slices = found["slices"]
    if not isinstance(slices, list) or not slices or not all(isinstance(s, Mapping) and "sources" in s for s in slices):
        raise InputError("slices: a list of mappings with the key sources is expected")
    columns: list[list[Mapping[str, Any]]] = []
    for number, part in enumerate(slices):
        for key in part:
            if key != "sources":
                raise unknown(f"key of slice {number}", key, ("sources",))
        sources = _models(part["sources"], f"slice {number}, sources", ("model", "layer_range", "parameters"))
        for source in sources:
            span = source.get("layer_range")
            if not (isinstance(span, list) and len(span) == 2 and all(type(layer) is int for layer in span)):
                raise InputError(
                    f"slice {number}: layer_range of {source['model']} is {span!r}: [start, stop] is expected"
                )
        if len({source["layer_range"][1] - source["layer_range"][0] for source in sources}) > 1:
            raise InputError(f"slice {number}: its sources have layer ranges of different length")
        columns.append(sources)
    if reading.kind is not Passthrough:
        named = [[source["model"] for source in sources] for sources in columns]
        if any(models != named[0] for models in named):
            raise InputError("slices: the same sources in every slice are expected (but for passthrough)")
        if any(source.get("parameters") for sources in columns[1:] for source in sources):
            raise InputError("slices: parameters of sources may stand in the first slice only (but for passthrough)")
    elif any(len(sources) > 1 for sources in columns):
        raise InputError("slices: passthrough takes one source a slice")
    elif any(source.get("parameters", {}) != columns[0][0].get("parameters", {}) for (source,) in columns):
        raise InputError("slices: a scale of single slices is not supported: give one with filters under parameters")
    return columns[0]


def _models(entries: Any, what: str, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    if (
        not isinstance(entries, list)
        or not all(isinstance(e, Mapping) and "model" in e for e in entries)
        or not entries
    ):
        raise InputError(f"{what}: a list of entries with the key model is expected")
    for entry in entries:
        for key in entry:
            if key not in keys:
                raise unknown("key of a model", key, keys)
    return entries


def _sources(
    found: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], base: Any, folder: Path, reading: _Reading
) -> tuple[tuple[Source, ...], Source]:
    """The models to merge and the base; with slices, each of them stacked from its slices' layers."""
    if "models" in found:
        sources = tuple(_source(e["model"], folder) for e in entries)
        return sources, sources[0] if base is None else _source(base, folder)
    slices = [part["sources"] for part in found["slices"]]
    if reading.kind is Passthrough:
        alone = stack([(_source(s["model"], folder), tuple(s["layer_range"])) for (s,) in slices])
        return (alone,), alone

    def stacked(model: Any) -> Source:
        spans = [next((s for s in sources if s["model"] == model), sources[0])["layer_range"] for sources in slices]
        return stack([(_source(model, folder), (span[0], span[1])) for span in spans])

    made = {e["model"]: stacked(e["model"]) for e in entries}
    ground = made[entries[0]["model"]] if base is None else made.get(base) or stacked(base)
    return tuple(made[e["model"]] for e in entries), ground


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
    shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]], reading: _Reading, compat: str | None
) -> dict[str, list[list[_Setting]]]:
    """For each parameter of the method the settings of each model, those of its own first and the default last."""
    weighted = any("weight" in where for where in (shared, *own))
    found = {}
    for key, (parameter, paper, library) in reading.numbers.items():
        default = library if compat or (key == "lambda" and weighted) else paper
        of_models: Sequence[Mapping[str, Any]] = own[:1] if key in reading.single else own
        levels = [[where[key] for where in (mine, shared) if key in where] + [default] for mine in of_models]
        found[parameter] = [[_setting(value, key) for value in level] for level in levels]
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


def _resolved(
    settings: Mapping[str, list[list[_Setting]]], reading: _Reading, name: str, depth: float
) -> dict[str, Any]:
    single = {reading.numbers[key][0] for key in reading.single}
    found: dict[str, Any] = {}
    for parameter, models in settings.items():
        values = [next(v for s in levels if (v := s(name, depth)) is not None) for levels in models]
        found[parameter] = values[0] if parameter in single else values
    return found
