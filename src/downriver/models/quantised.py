"""Weights in 4 or 8 bits: the frozen base of QLoRA, in a quarter or half of the memory that 16 bits take.

Reach for it where a model does not fit beside its adapter. Dettmers et al., "QLoRA" (2023): 4 bits are NormalFloat
with the blocks' scales quantised once more; "LLM.int8()" (2022): 8 bits a row, outlying features apart. The work is
that of bitsandbytes (``pip install 'downriver[quantised]'``), on GPUs and on CPUs.
"""

import copy
import functools
import logging
from typing import Any, Literal

import peft
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from downriver.core.errors import InputError, MissingExtra, require
from downriver.models.model import Model

Bits = Literal[4, 8]


def quantised(model: Model, bits: Bits = 4, *, device: torch.device | str | None = None) -> Model:
    """A frozen copy of the model with every linear layer but the output in ``bits`` bits, ready for an adapter.

    What is not quantised (embeddings, norms, output) is put in float32, and products are computed in the precision
    that the model has. ``device`` is where it goes; by default where the model is.

    Raises ``InputError`` for other numbers of bits, a model that is adapted or quantised already, or not of
    transformers; ``MissingExtra`` without bitsandbytes.

    >>> from downriver.models import small
    >>> quantised(small("causal-lm", "nano"), 3)
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: bits is 3: 4 or 8 is expected
    """
    if bits not in (4, 8):
        raise InputError(f"bits is {bits}: 4 or 8 is expected")
    backbone: Any = model.backbone
    if not isinstance(backbone, transformers.PreTrainedModel) or getattr(backbone, "is_quantized", False):
        what = "quantised already" if hasattr(backbone, "is_quantized") else type(backbone).__name__
        raise InputError(f"{model.source or 'the model'} is {what}: a plain model of transformers is expected")
    require("bitsandbytes", "quantised")
    found = copy.deepcopy(model, {id(model.processor): model.processor})
    backbone = found.backbone
    dtype = next(backbone.parameters()).dtype
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(
        **(settings | {"bnb_4bit_compute_dtype": dtype} if bits == 4 else {"load_in_8bit": True})
    )
    place = torch.device(device) if device is not None else model.device
    output = backbone.get_output_embeddings()
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, nn.Linear | Conv1D) and layer is not output:
            parent, _, last = name.rpartition(".")
            setattr(backbone.get_submodule(parent), last, _layer(layer, bits, dtype).to(place))
    # what transformers sets on a model that it has loaded in few bits, but for hf_quantizer: with it, save_pretrained
    # takes no state_dict, and the base of an adapter could not be saved
    backbone.is_quantized, backbone.quantization_method = True, config.quant_method
    AutoHfQuantizer.from_config(config, pre_quantized=True).postprocess_model(backbone)
    peft.prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
    if bits == 8:  # says at every product that it casts its input
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return found.to(place)


@functools.cache
def missing(bits: Bits, device: torch.device | str = "cpu") -> str | None:
    """Why a device cannot hold weights in so many bits; None where it can: a small product is tried.

    >>> missing(4) is None or "bitsandbytes" in missing(4)
    True
    """
    try:
        require("bitsandbytes", "quantised")
        layer = _layer(nn.Linear(64, 64), bits, torch.float32).to(device)
        with torch.no_grad():
            layer(torch.ones(1, 64, device=device))
    except MissingExtra as error:
        return str(error)
    except Exception as error:  # what a build lacks, it says in many ways
        return f"bitsandbytes does not work in {bits} bits on {device}: {error}"
    return None


def _layer(layer: nn.Linear | Conv1D, bits: Bits, dtype: torch.dtype) -> nn.Module:
    """A layer of bitsandbytes that quantises the weight when it is moved to its device."""
    import bitsandbytes

    weight = layer.weight.data.T.contiguous() if isinstance(layer, Conv1D) else layer.weight.data
    outputs, inputs = weight.shape
    made: Any
    biased = layer.bias is not None
    if bits == 4:
        nf4: Any = {"compress_statistics": True, "quant_type": "nf4"}
        made = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=biased, compute_dtype=dtype, **nf4)
        made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **nf4)
    else:
        made = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=biased, has_fp16_weights=False, threshold=6.0)
        made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.train(layer.training)
