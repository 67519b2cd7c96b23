"""Every parameter-efficient method by name: what it trains, how many parameters that takes, and a size for a budget.

Reach for ``catalogue()`` to compare methods, for ``method(name)`` to put one on a model of your own loop, and for
``adapt.peft`` to train with one. Families after «Parameter-Efficient Fine-Tuning for Foundation Models» (2025). The
entries are the tuners of the installed peft, LoRA's variants that need no quantised base (so not LoftQ and QALoRA), and
four that peft has not: BitFit, FISH masks, bottleneck adapters, LoRAMoE. Every method adapts the same layers unless
told otherwise, all linear ones but the LM head, where several papers adapt attention alone. Not here are ladder side
networks, optimisers for LoRA (LoRA+, LoRA-FA), and ways of training with an adapter: ``alignguard_lora``,
``train_subnetwork``.
"""

import contextlib
import copy
import dataclasses
import math
import re
import warnings
from bisect import bisect_right
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import polars as pl
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import initialize_lora_eva_weights
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

from downriver.adapt.bitfit import BitFitConfig, bias_names
from downriver.adapt.bottleneck import BottleneckConfig, Bottlenecked, linear, sites
from downriver.adapt.fish_mask import FishMaskConfig
from downriver.adapt.lora import linear_layers
from downriver.adapt.loramoe import LoRAMoE, LoRAMoEConfig
from downriver.adapt.peft_entries import Entry, Shape, known
from downriver.core import InputError, generator, seeded, unknown
from downriver.models.model import Model
from downriver.models.surgery import layer_stack
from downriver.tasks.task import Task
from downriver.training.engine import clone

OWN = {
    "bitfit": BitFitConfig,
    "bottleneck": BottleneckConfig,
    "fish_mask": FishMaskConfig,
    "loramoe": LoRAMoEConfig,
}
UNCOUNTED = (
    "bias",
    "exclude_modules",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings of peft that change how many parameters are trained, and that no formula knows."""
SAMPLES = 64
"""Rows of the task that a start from data looks at."""


def catalogue() -> pl.DataFrame:
    """One row a method.

    ``family``; ``trains`` (W a weight, i inputs, o outputs, r rank, d width, k width of the keys); ``parameters`` (of
    one adapted layer, or in all); ``size`` (the setting that a budget fixes); ``mergeable`` (into plain weights with
    the same outputs); ``identity_at_init`` (a fresh adapter changes no output); whether it works on a ``quantised``
    base (of ``models.quantised``), ``embeddings``, ``convolutions`` and the fused weights of ``experts``;
    ``mixed_batches`` (several adapters in one batch); ``kinds`` of model; ``needs_data`` to start; ``learning_rate``
    (the middle of the grid, after the public comparison of peft and the papers); ``reference``, ``implemented`` and
    ``note``.

    >>> methods = catalogue()
    >>> methods.filter(name="dora")["parameters"].item()
    'r (i + o) + o'
    """
    return pl.DataFrame(
        [
            {
                "name": entry.name,
                "family": entry.family,
                "trains": entry.trains,
                "parameters": entry.formula,
                "size": entry.size or None,
                "mergeable": entry.mergeable,
                "identity_at_init": entry.identity,
                "quantised": entry.quantised,
                "embeddings": entry.embeddings,
                "convolutions": entry.convolutions,
                "experts": entry.experts,
                "mixed_batches": entry.mixed_batches,
                "kinds": list(entry.kinds),
                "needs_data": entry.needs_data,
                "learning_rate": entry.learning_rate,
                "reference": entry.reference,
                "implemented": f"peft {entry.peft_type}" if entry.peft_type else f"downriver.adapt.{entry.name}",
                "note": entry.note or None,
            }
            for entry in known().values()
        ]
    )


def method(name: str) -> "Method":
    """A method of the catalogue.

    Raises ``InputError`` for an unknown name, and for a type that the installed peft has not, with its version.

    >>> from downriver.models import small
    >>> model = small("causal-lm", "nano")
    >>> lora = method("lora")
    >>> config = lora.config(model, budget_params=5000)
    >>> config.r, lora.parameters(model, config)
    (3, 4416)
    """
    if name not in known():
        raise unknown("PEFT method", name, known())
    entry = known()[name]
    if entry.peft_type and entry.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"{name}: peft {version('peft')} has no {entry.peft_type}: a newer peft is expected")
    return Method(entry)


@dataclass(frozen=True)
class Method:
    """A method with its facts (``entry``): configurations, counts, and adapters on a model."""

    entry: Entry

    def config(
        self,
        model: Model,
        *,
        budget_params: float | None = None,
        target_modules: str | list[str] | None = None,
        **settings: Any,
    ) -> Any:
        """A configuration of the method for the model: peft's own class, or ours for the three that peft has not.

        Parameters
        ----------
        budget_params
            Train at most so many parameters: the largest size (``entry.size``: rank, tokens, block) that keeps to it.
            A scale α keeps its proportion to the rank.
        target_modules
            Layers to adapt, as peft reads it: ends of names, or a regular expression. Default: all linear layers but
            the LM head (what a method that adapts something else takes by itself).
        settings
            Settings of the configuration class, as they are.

        Raises ``InputError`` for a kind of model or of layer that the method does not work on, an unknown setting, a
        budget below the method's minimum, or a budget together with the size itself.
        """
        entry = self.entry
        if model.kind not in entry.kinds:
            able = ", ".join(entry.kinds)
            raise InputError(f"{entry.name} does not work on a {model.kind} model: {able} is expected")
        if budget_params is not None and entry.size in settings:
            raise InputError(f"{entry.name}: give budget_params or {entry.size}, not both")
        if target_modules == "all-linear":  # peft's word for the default here
            target_modules = None
        kind: Any = OWN.get(entry.name) or PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(entry.peft_type)]
        allowed = [field.name for field in dataclasses.fields(kind)]
        for setting in settings:
            if setting not in allowed:
                raise unknown(f"setting of {entry.name}", setting, allowed)
        chosen = _targets(entry, model, target_modules)
        given = {**entry.settings, **settings}
        chosen |= entry.settings
        chosen |= _completed(entry, model, chosen.get("target_modules"), given) | settings
        try:
            config = kind(**chosen)
        except (TypeError, ValueError) as error:
            raise InputError(f"{entry.name}: {error}") from None
        return config if budget_params is None else self._within(model, config, budget_params)

    def parameters(self, model: Model, config: Any) -> int:
        """How many parameters a fresh adapter of this configuration trains, by the formula: nothing is built.

        Raises ``InputError`` for settings that train more or less than the formula knows, such as ``modules_to_save``.
        """
        return self.entry.count(self._shape(model, config), config)

    def add(self, model: Model, config: Any, *, task: Task | None = None, seed: int = 0) -> Model:
        """A copy of the model with a fresh adapter; what it trains and the head require gradients, nothing else does.

        With virtual tokens the copy cuts texts where both together would be longer than the model takes.

        Parameters
        ----------
        task
            Rows for a start from data (EVA, CorDA, LoRA-GA): 64 of the train split.
        seed
            Draws the start.

        BitFit and FISH masks add nothing: they train a part of the weights (``adapt.bitfit``, ``adapt.peft``).
        Raises ``InputError`` where peft refuses the configuration, for a missing task, and for a base in few bits that
        the method does not work on (on such a one peft makes plain LoRA of some variants without a word).
        """
        entry = self.entry
        if entry.name in ("bitfit", "fish_mask"):
            raise InputError(f"{entry.name} adds no adapter: adapt.peft(..., tuner={entry.name!r}) trains the weights")
        if isinstance(model, Bottlenecked | LoRAMoE) or hasattr(model.backbone, "get_base_model"):
            raise InputError(f"the model {model.source} has an adapter: the plain model is expected (merge_adapter)")
        if getattr(model.backbone, "is_quantized", False) and not entry.quantised:
            raise InputError(f"{entry.name} does not work on a quantised base: {model.source or 'the model'} is one")
        if entry.name == "bottleneck":
            return Bottlenecked(model, config, seed=seed)
        if entry.name == "loramoe":
            return LoRAMoE(clone(model), config, seed=seed).eval()
        if entry.needs_data and task is None:
            raise InputError(f"{entry.name} starts from data: a task is expected")
        model, config = clone(model), copy.deepcopy(config)
        backbone: Any = model.backbone
        if config.is_prompt_learning:
            left = _positions(model) - config.num_virtual_tokens
            if left < 1:
                raise InputError(
                    f"{entry.name}: {config.num_virtual_tokens} virtual tokens leave no room for a text: "
                    f"fewer than {_positions(model)} are expected"
                )
            model.max_length = min(model.max_length, left)  # texts and virtual tokens together
        if entry.name == "xlora":
            backbone.config.use_cache = False  # peft asks for it
        with seeded("peft", entry.name, seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that peft completes
            size = 1 if entry.name == "corda" else 8  # peft takes CorDA's rows one by one
            batches = _batches(model, task, size, seed) if entry.needs_data and task is not None else []

            def look() -> None:
                for batch in batches:
                    loss = model(**batch)["loss"]
                    if entry.name == "lora_ga":
                        loss.backward()

            if entry.name == "corda":
                with torch.no_grad():
                    preprocess_corda(backbone, config, look)
            elif entry.name == "lora_ga":
                preprocess_loraga(backbone, config, look)
            try:
                model.backbone = adapted = get_peft_model(backbone, config)
            except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
                raise InputError(f"{entry.name}: {' '.join(str(error).split())}") from None
            if entry.name == "eva":
                inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
                initialize_lora_eva_weights(adapted, inputs, show_progress_bar=False)
        if isinstance(getattr(config, "init_lora_weights", None), str):
            # the base now lacks what the adapter started from: a loaded adapter must not take it off once more
            adapted.peft_config["default"].init_lora_weights = True
        return model.eval()

    def _shape(self, model: Model, config: Any) -> Shape:
        for name in UNCOUNTED:
            if getattr(config, name, None) not in (None, False, "none", {}, []):
                raise InputError(f"{self.entry.name}: the formula does not count parameters with the setting {name}")
        given = getattr(config, "targets" if self.entry.name == "loramoe" else "target_modules", None)
        return shape_of(model, _adapted(self.entry, model, given))

    def _within(self, model: Model, config: Any, budget: float) -> Any:
        entry = self.entry
        shape = self._shape(model, config)

        def sized(value: Any) -> Any:
            changed = copy.copy(config)
            object.__setattr__(changed, entry.size, value)
            for alpha in ("lora_alpha", "alpha", "psoft_alpha"):
                if entry.size in ("r", "init_r") and getattr(config, alpha, None):
                    scaled = getattr(config, alpha) * value / getattr(config, entry.size)
                    object.__setattr__(changed, alpha, scaled)
            if entry.name == "adalora":
                changed.target_r = max(1, value * 2 // 3)  # the proportion of peft's 12 and 8
            if entry.name == "supertuning":
                changed.sparsity = min(value, 1 - 1e-12)
            return changed

        sizes = entry.sizes(shape) if entry.size else ()
        least = entry.count(shape, sized(sizes[0]) if entry.size else config)
        if least > budget:
            raise InputError(
                f"{entry.name} trains at least {least:,} parameters of this model: the budget is {budget:,.0f}"
            )
        if not entry.size:
            return config
        place = bisect_right(sizes, budget, key=lambda value: entry.count(shape, sized(value)))
        return sized(sizes[place - 1])


def shape_of(model: Model, targets: list[str]) -> Shape:
    """What counts depend on, of a model and the names of the layers to adapt."""
    backbone: Any = model.backbone
    layers = []
    for name in targets:
        layer = backbone.get_submodule(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise InputError(f"{name} is a {type(layer).__name__}: parameters are counted of linear layers only")
        layers.append(linear(name, layer))
    facts = dict.fromkeys(("width", "depth", "keys", "block", "last_norm", "feed_forwards", "attentions"), 0)
    facts["positions"] = _positions(model)
    if model.kind in ("causal-lm", "masked-lm", "text-encoder") and hasattr(backbone, "config"):
        config = backbone.config.get_text_config()
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        facts["keys"] = (getattr(config, "num_key_value_heads", None) or heads) * head
    with contextlib.suppress(InputError):  # without a stack of layers, only what adapts single layers is counted
        stack_name, stack = layer_stack(backbone)
        attentions, feed_forwards = sites(backbone)
        outside = [m for n, m in backbone.named_modules() if is_norm(m) and not n.startswith(f"{stack_name}.")]
        facts |= {"depth": len(stack), "block": _size(stack[0]), "last_norm": _size(outside[-1]) if outside else 0}
        facts |= {"attentions": len(attentions), "feed_forwards": len(feed_forwards)}
        facts["width"] = feed_forwards[0].output.outputs
    return Shape(
        layers=tuple(layers),
        norms=sum(_size(module) for module in backbone.modules() if is_norm(module)),
        biases=sum(backbone.get_parameter(name).numel() for name in bias_names(backbone)),
        total=_size(backbone),
        **facts,
    )


def _positions(model: Model) -> int:
    """The longest sequence in tokens that a model of texts takes."""
    config: Any = getattr(model.backbone, "config", None)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return min(longest or model.max_length, getattr(model.processor, "model_max_length", None) or model.max_length)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer with parameters: of torch, or a family's own by its name."""
    named = type(module).__name__.lower().endswith(("norm", "norm1d", "norm2d", "norm3d"))
    return named and any(True for _ in module.parameters(recurse=False))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _targets(entry: Entry, model: Model, given: str | list[str] | None) -> dict[str, Any]:
    """``target_modules`` and ``task_type`` of a configuration."""
    backbone: Any = model.backbone
    if given is not None and entry.targets not in ("linear", "norm"):
        raise InputError(f"{entry.name} takes no target_modules: it adapts the {entry.targets}")
    if not entry.peft_type:
        return {} if given is None else {"targets": [given] if isinstance(given, str) else given}
    wrapped = entry.targets in ("model", "layers") or entry.name in ("poly", "xlora")
    encoder = "FEATURE_EXTRACTION" if wrapped else None
    chosen: dict[str, Any] = {"task_type": "CAUSAL_LM" if model.kind == "causal-lm" else encoder}
    if entry.targets == "norm":
        chosen["target_modules"] = given or [name for name, module in backbone.named_modules() if is_norm(module)]
    elif entry.targets == "linear" and entry.name != "xlora":
        names = chosen["target_modules"] = given or linear_layers(backbone)
        if entry.name == "lily" and given is None:
            names = chosen["target_modules"] = sorted({name.split(".")[-1] for name in names})  # it shares by name
            return chosen
        convolutions = given is None and isinstance(backbone.get_submodule(names[0]), nn.Conv2d)
        if convolutions and not entry.convolutions:
            raise InputError(f"{entry.name} works on linear layers: {type(backbone).__name__} has convolutions alone")
    return chosen


def _adapted(entry: Entry, model: Model, given: str | list[str] | None) -> list[str]:
    """The names of the layers that a configuration with these ``target_modules`` adapts."""
    if entry.targets != "linear":
        return []
    backbone: Any = model.backbone
    if given is None:
        return linear_layers(backbone)
    every = [n for n, layer in backbone.named_modules() if isinstance(layer, nn.Linear | Conv1D | nn.Conv2d)]
    if isinstance(given, str):
        found = [name for name in every if re.fullmatch(given, name)]
    else:
        found = [name for name in every if any(name == end or name.endswith(f".{end}") for end in given)]
    if not found:
        last = sorted({name.split(".")[-1] for name in every})
        raise InputError(f"target_modules {given!r}: no such layer (layers there are: {', '.join(last)})")
    return found


def _completed(entry: Entry, model: Model, target_modules: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that depend on the model; those that only the user can give are asked for."""
    needed = {"cpt": "cpt_token_ids", "alora": "alora_invocation_tokens", "xlora": "adapters"}
    if entry.name in needed and not settings.get(needed[entry.name]):
        raise InputError(f"{entry.name} needs the setting {needed[entry.name]!r}: {entry.note}")
    own = {"ia3": "feedforward_modules", "bdlora": "use_bdlora"}.get(entry.name)
    if own is not None and own not in settings:
        attentions, feed_forwards = sites(model.backbone)
        down = [site.output.name for site in feed_forwards]
        if entry.name == "ia3":
            return {"feedforward_modules": down}
        rows = [*down, *(site.output.name for site in attentions)]
        columns = [name for name in _adapted(entry, model, target_modules) if name not in rows]
        return {"use_bdlora": BdLoraConfig(target_modules_bd_a=rows, target_modules_bd_b=columns, nblocks=2)}
    if entry.name == "adalora":
        return {"total_step": 2**31}  # training sets its own number of steps
    if entry.name == "adaption_prompt":
        return {"adapter_layers": len(layer_stack(model.backbone)[1])}
    if entry.name == "trainable_tokens":
        return {"token_indices": sorted(model.processor.all_special_ids)}
    if entry.name == "cpt":
        n = len(settings["cpt_token_ids"])
        return {"num_virtual_tokens": n, "cpt_mask": [1] * n, "cpt_tokens_type_mask": [2] * n}
    if entry.name == "xlora":
        return {"hidden_size": shape_of(model, []).width}
    if entry.name in ("vblora", "c3a", "road", "fourierft", "waveft"):
        layers = shape_of(model, _adapted(entry, model, target_modules)).layers
        if entry.name in ("fourierft", "waveft"):
            default = {"fourierft": 1000, "waveft": 2592}[entry.name]
            return {"n_frequency": min(default, *(layer.inputs * layer.outputs for layer in layers))}
        sides = [n for layer in layers for n in (layer.outputs, *([] if entry.name == "road" else [layer.inputs]))]
        setting, most = {"vblora": ("vector_length", 256), "c3a": ("block_size", 256), "road": ("group_size", 64)}[
            entry.name
        ]
        common = math.gcd(*sides)
        return {setting: max(n for n in range(1, most + 1) if common % n == 0)}
    return {}


def _batches(model: Model, task: Task, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Some rows of the train split."""
    rows, collate = task.rows("train"), model.collate(task)
    chosen = generator("peft start", seed).permutation(len(rows))[:SAMPLES].tolist()
    batches = [collate([rows[i] for i in chosen[at : at + size]]) for at in range(0, len(chosen), size)]
    return [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
