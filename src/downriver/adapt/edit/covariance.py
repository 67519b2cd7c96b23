"""C = E[kkᵀ], the second moment of an MLP projection's keys over real text: what an edit should leave alone."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from downriver.adapt.edit.projections import projection
from downriver.adapt.edit.requests import start_ids
from downriver.core.assets import cache_folder
from downriver.core.errors import InputError
from downriver.core.io import atomic_write, fingerprint
from downriver.models.features import inference, weights_fingerprint
from downriver.models.language import language_model
from downriver.models.model import Model


def key_covariance(
    model: nn.Module,
    layers: Sequence[int | str],
    texts: Sequence[str],
    tokenizer: Any = None,
    *,
    batch_size: int = 16,
    cache: bool = False,
) -> dict[str, Tensor]:
    """The mean of kkᵀ over every token of the texts, by the projection's name: (keys, keys) float32 on the CPU.

    The authors take 100 000 texts of Wikipedia; there must be more tokens than keys for C to have an inverse. Texts
    are cut at the model's ``max_length``. With ``cache`` the result is kept as safetensors in downriver's cache, under
    the hash of weights, layers and texts.

    >>> from downriver.models import small
    >>> found = key_covariance(small("causal-lm", "nano"), [1], ["a river", "the sea"])
    >>> [(name, tuple(C.shape)) for name, C in found.items()]
    [('model.layers.1.mlp.down_proj', (128, 128))]
    """
    if not layers or isinstance(texts, str) or not texts or batch_size < 1:
        raise InputError("key_covariance: at least one layer, a list of texts and a batch size of 1 are expected")
    lm = language_model(model, tokenizer)
    places = [projection(lm.backbone, layer) for layer in layers]
    file = None
    if cache:
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        name = fingerprint(weights_fingerprint(lm), [place.name for place in places], digest)
        file = cache_folder() / "covariances" / f"{name}.safetensors"
        if file.is_file():
            return load_file(file)
    sums = {place.name: torch.zeros(place.width, place.width, dtype=torch.float64) for place in places}
    mask = torch.empty(0)

    def add(name: str, inputs: Any) -> None:
        keys = inputs[0][mask].float()
        sums[name] += (keys.T @ keys).double().cpu()

    handles = [
        place.module.register_forward_pre_hook(lambda _, inputs, name=place.name: add(name, inputs)) for place in places
    ]
    tokens = 0
    try:
        with inference(lm):
            for start in range(0, len(texts), batch_size):
                ids, mask = _batch(lm, texts[start : start + batch_size])
                tokens += int(mask.sum())
                lm.backbone(input_ids=ids, attention_mask=mask.long())
    finally:
        for handle in handles:
            handle.remove()
    found = {name: (total / tokens).float() for name, total in sums.items()}
    if file is not None:
        with atomic_write(file) as out:
            out.write(save(found))
    return found


def _batch(lm: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts, each begun as the tokenizer begins one, right-padded."""
    start = start_ids(lm.processor)
    encoded = lm.processor(list(texts), add_special_tokens=False)["input_ids"]
    rows = [[*start, *ids][: lm.max_length] for ids in encoded]
    width = max(map(len, rows))
    if not all(rows):
        raise InputError("key_covariance: a text without a token")
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=lm.device)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=lm.device)
    return ids, mask
