"""Built-in models: real pretrained weights that package registries ship, converted once to transformers' layout and
cached.

Reach for them by name, ``models.load("all-MiniLM-L6-v2")``; ``downriver assets list`` shows what there is. Reading
the 4-bit GGUF and the quantised ONNX file needs the extra ``assets``.
"""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from downriver.core import assets
from downriver.core.errors import InputError, require
from downriver.core.io import atomic_folder
from downriver.core.tensors import open_checkpoint
from downriver.models.efficientnet_lite import VARIANTS, EfficientNetLite, EfficientNetLiteConfig
from downriver.models.images import ImageProcessor
from downriver.models.model import Model, quiet

_CONVERSION = 1  # raised when a converter changes, so that folders made by an older one are left aside


def builtin_names() -> list[str]:
    """The names that ``models.load`` knows without a folder or a hub.

    >>> "SmolLM2-135M-Instruct" in builtin_names()
    True
    """
    return [asset.name for asset in assets.listing() if asset.kind == "model"]


def find(name: str) -> assets.Asset | None:
    """The asset behind a built-in model's name (in any case), or ``None``."""
    known = {asset.name.lower(): asset for asset in assets.listing() if asset.kind == "model"}
    return known.get(name.lower())


def folder(name: str) -> Path:
    """The folder of a built-in model in transformers' layout, fetched and converted on first use.

    Raises ``AssetUnavailable`` where the package cannot be had and ``MissingExtra`` where its format cannot be read.
    """
    asset = assets.find(name)
    convert = _CONVERTERS.get(asset.name)
    if convert is None:
        return assets.path(name)
    made = assets.cache_folder() / "models" / f"{assets.location(asset).name}-{_CONVERSION}"
    if not made.is_dir():
        source = assets.path(name)
        with assets.locked(made):
            if not made.is_dir():
                with atomic_folder(made) as part, quiet():
                    print(f"converting {asset.name} to transformers' layout, once", file=sys.stderr)
                    convert(source, part)
    return made


def _smollm2(source: Path, target: Path) -> None:
    """The 4-bit GGUF file to float32 safetensors: every quantised value keeps its exact value."""
    require("gguf", "assets")
    file = next(source.glob("*.gguf")).name
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    settings = {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "model_type")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    _fill(model, quantised.state_dict(), source / file)
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


def _efficientnet(name: str) -> Callable[[Path, Path], None]:
    """The original state dict to our module: the same tensors in the same order, the classifier as the head."""

    def convert(source: Path, target: Path) -> None:
        width, depth, side = VARIANTS[name]
        file = next(source.glob("*.pth"))
        weights = open_checkpoint(file)
        net = EfficientNetLite(EfficientNetLiteConfig(width=width, depth=depth, image_size=side))
        names = [name for name in weights if not name.startswith("_fc.")]
        if len(names) != len(net.state_dict()):
            raise InputError(f"{file} has {len(names)} tensors: {len(net.state_dict())} are expected")
        _fill(net, {mine: weights.read(theirs) for mine, theirs in zip(net.state_dict(), names, strict=True)}, file)
        classes, features = weights.shape("_fc.weight")
        head = nn.Linear(features, classes)
        _fill(head, {"weight": weights.read("_fc.weight"), "bias": weights.read("_fc.bias")}, file)
        pixel = 127 / 255, 128 / 255  # the original input is (pixel - 127) / 128
        images = ImageProcessor(side, side, (pixel[0],) * 3, (pixel[1],) * 3, shortest=round(side / 0.875), resample=3)
        model = Model(net, kind="vision-encoder", head=head, processor=images, pooling="mean", source=name)
        model.save(target)

    return convert


def _whisper(source: Path, target: Path) -> None:
    """CTranslate2's half-precision file to ``WhisperForConditionalGeneration`` in float32."""
    file = source / "model.bin"
    stored = _read_ctranslate2(file)
    vocabulary, width = stored["decoder/embeddings/weight"].shape
    layers = sum(name.startswith("decoder/layer_") and name.endswith("/ffn/linear_0/weight") for name in stored)
    config = transformers.WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    _fill(model, dict(_whisper_state(stored, layers)), file)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
        no_timestamps_token_id=50362,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=False,
        max_length=448,
    )
    model.save_pretrained(target)
    features = transformers.WhisperFeatureExtractor(feature_size=80)
    tokenizer = transformers.WhisperTokenizer.from_pretrained(source)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(target)


def _whisper_state(stored: dict[str, np.ndarray], layers: int) -> Iterator[tuple[str, Tensor]]:
    """The stored arrays under transformers' names; fused projections are taken apart (keys have no bias in Whisper)."""

    def linear(here: str, there: str, parts: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            if (array := stored.get(f"{there}/{kind}")) is None:
                continue
            for part, values in zip(parts, torch.from_numpy(array).chunk(len(parts)), strict=True):
                if (kind, part) != ("bias", "k_proj"):
                    yield f"{here}{part}.{kind}", values

    def norm(here: str, there: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{here}.weight", torch.from_numpy(stored[f"{there}/gamma"])
        yield f"{here}.bias", torch.from_numpy(stored[f"{there}/beta"])

    for side in ("encoder", "decoder"):
        for i in range(layers):
            here, there = f"model.{side}.layers.{i}.", f"{side}/layer_{i}/"
            yield from linear(f"{here}self_attn.", f"{there}self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            yield from linear(f"{here}self_attn.out_proj", f"{there}self_attention/linear_1")
            yield from norm(f"{here}self_attn_layer_norm", f"{there}self_attention/layer_norm")
            if side == "decoder":
                yield from linear(f"{here}encoder_attn.q_proj", f"{there}attention/linear_0")
                yield from linear(f"{here}encoder_attn.", f"{there}attention/linear_1", ("k_proj", "v_proj"))
                yield from linear(f"{here}encoder_attn.out_proj", f"{there}attention/linear_2")
                yield from norm(f"{here}encoder_attn_layer_norm", f"{there}attention/layer_norm")
            yield from linear(f"{here}fc1", f"{there}ffn/linear_0")
            yield from linear(f"{here}fc2", f"{there}ffn/linear_1")
            yield from norm(f"{here}final_layer_norm", f"{there}ffn/layer_norm")
        yield from norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        yield f"model.{side}.embed_positions.weight", torch.from_numpy(stored[f"{side}/position_encodings/encodings"])
    yield from linear("model.encoder.conv1", "encoder/conv1")
    yield from linear("model.encoder.conv2", "encoder/conv2")
    embeddings = torch.from_numpy(stored["decoder/embeddings/weight"])
    yield from (("model.decoder.embed_tokens.weight", embeddings), ("proj_out.weight", embeddings))


def _read_ctranslate2(file: Path) -> dict[str, np.ndarray]:
    """Every array of a CTranslate2 model file, as float32 or as stored integers, aliases included."""
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    with file.open("rb") as stream:

        def number(form: str) -> int:
            return struct.unpack(f"<{form}", stream.read(struct.calcsize(form)))[0]

        def text() -> str:
            return stream.read(number("H")).rstrip(b"\0").decode()

        number("I"), text(), number("I")  # version of the format, name and revision of the model's specification
        arrays = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind = types[number("B")]
            array = np.frombuffer(stream.read(number("I")), kind).reshape(shape)
            arrays[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
        for _ in range(number("I")):
            alias = text()
            arrays[alias] = arrays[text()]
    return arrays


def _distilbert(source: Path, target: Path) -> None:
    """The 8-bit ONNX graph to ``DistilBertForTokenClassification``: weights de-quantised, activations no longer
    rounded.
    """
    onnx = require("onnx", "assets")
    file = source / "tagger.onnx"
    graph = onnx.load(file).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    state = {
        name: torch.from_numpy(array.copy())
        for name, array in stored.items()
        if name.startswith(("distilbert.", "classifier.")) and name.endswith((".weight", ".bias"))
    }
    for node in graph.node:
        weight = made_by.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.op_type == "DequantizeLinear" and weight.input[0] in stored:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            # ONNX multiplies by (in, out) with one scale an output; torch keeps (out, in)
            state[f"{module}.weight"] = _dequantised(*(stored[name] for name in weight.input)).T.contiguous()
    for name in [name for name in stored if name.endswith(".weight_quantized")]:
        parts = (name, name.replace("_quantized", "_scale"), name.replace("_quantized", "_zero_point"))
        state[name.removesuffix("_quantized")] = _dequantised(*(stored[part] for part in parts))
    tags = json.loads((source / "tag_vocab.json").read_text(encoding="utf-8"))["tags"]
    vocabulary = state["distilbert.embeddings.word_embeddings.weight"].shape[0]
    config = transformers.DistilBertConfig(
        vocab_size=vocabulary, id2label=dict(enumerate(tags)), label2id={tag: i for i, tag in enumerate(tags)}
    )
    model = transformers.DistilBertForTokenClassification(config)
    _fill(model, state, file)
    model.save_pretrained(target)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        model_max_length=config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    ).save_pretrained(target)


def _dequantised(values: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> Tensor:
    """(q - zero point) · scale, along the second axis where there is one scale a column."""
    return torch.from_numpy((values.astype(np.float32) - zero.astype(np.float32)) * scale)


def _fill(module: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Load every tensor, none missing and none left over, or say which."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{file} does not fit a {type(module).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None


_CONVERTERS: dict[str, Callable[[Path, Path], Any]] = {
    "SmolLM2-135M-Instruct": _smollm2,
    "whisper-tiny.en": _whisper,
    "distilbert-grammar": _distilbert,
    **{name: _efficientnet(name) for name in VARIANTS},
}
