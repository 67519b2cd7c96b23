"""Give a language model another tokenizer's vocabulary and keep what both have in common.

Reach for it when a model should write with the tokens of another (more languages, a decoder grafted on) and is to be
trained on: tokens that both vocabularies have keep their rows, the others are drawn like the rows there were.
"""

from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from downriver.core.errors import InputError
from downriver.core.seeds import seeded

ROLES = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token")


def shared_tokens(old: Any, new: Any) -> dict[int, int]:
    """Id in the new tokenizer to id in the old one, for every token that both have.

    Tokens are compared as the text they stand for, so that a leading space counts and the way in which a tokenizer
    family writes it («Ġ», «▁», bytes) does not; special tokens are compared by their role, such as ``eos_token``, and
    those without one by their spelling.

    >>> from downriver.models import word_tokenizer
    >>> old, new = word_tokenizer(["red square"]), word_tokenizer(["a red circle"])
    >>> {new.convert_ids_to_tokens(i) for i in shared_tokens(old, new) if i > 4}
    {'red'}
    """
    known = {text: i for i, text in _texts(old).items()}
    found = {i: known[text] for i, text in _texts(new).items() if text in known}
    special = _special(old)
    found |= {i: special[token] for token, i in _special(new).items() if token in special}
    for role in ROLES:
        mine, its = (getattr(tokenizer, f"{role}_id", None) for tokenizer in (new, old))
        if mine is not None and its is not None:
            found[mine] = its
    return found


def swap_vocabulary(model: Any, old: Any, new: Any, *, seed: int = 0) -> dict[int, int]:
    """Change the embeddings and the output rows of a transformers language model, in place, to the ``new`` tokenizer's.

    Rows of ``shared_tokens`` are copied, so that before any training the model gives these tokens the logits that it
    gave them before; the others are normal with the mean and the deviation of the old rows, feature by feature. Input
    and output rows stay tied where they were. The configuration takes the new ids of padding, start and end. Returns
    the shared tokens. Raises ``InputError`` for a model without embeddings and for tokenizers with no token in common.

    >>> from downriver.models import small_language_model, word_tokenizer
    >>> old, new = word_tokenizer(["red square"]), word_tokenizer(["red circle , red"])
    >>> model = small_language_model("causal-lm", old, width=8, heads=2).backbone
    >>> shared = swap_vocabulary(model, old, new)
    >>> model.get_input_embeddings().weight.shape[0] == len(new), len(shared)
    (True, 6)
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None:
        raise InputError(f"a {type(model).__name__} has no embeddings of tokens")
    shared = shared_tokens(old, new)
    if not shared:
        raise InputError("the two tokenizers have no token in common: nothing of the vocabulary would be kept")
    tied = outputs is not None and outputs.weight is inputs.weight
    biased = outputs is not None and getattr(outputs, "bias", None) is not None
    parts = [inputs.weight] if tied or outputs is None else [inputs.weight, outputs.weight]
    before = [part.detach().clone() for part in [*parts, *([outputs.bias] if biased else [])]]
    model.resize_token_embeddings(len(new), mean_resizing=False)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [inputs.weight] if tied or outputs is None else [inputs.weight, outputs.weight]
    mine, its = (torch.tensor(ids, device=before[0].device) for ids in (list(shared), list(shared.values())))
    with torch.no_grad(), seeded("vocabulary", seed):
        for rows, old_rows in zip([*parts, *([outputs.bias] if biased else [])], before, strict=True):
            drawn = torch.randn(rows.shape).to(rows)
            rows.copy_(old_rows.mean(0) + old_rows.std(0) * drawn)
            rows[mine] = old_rows[its]
    for role in ("pad", "bos", "eos"):
        if (token := getattr(new, f"{role}_token_id", None)) is not None:
            setattr(model.config, f"{role}_token_id", token)
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is not None:
        back = {i: token for token, i in shared.items()}
        model.config.decoder_start_token_id = back.get(start, model.config.bos_token_id)
    return shared


def _special(tokenizer: Any) -> dict[str, int]:
    """Tokens with a role, and added ones that are marked as special."""
    marked = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | marked


def _texts(tokenizer: Any) -> dict[int, str]:
    """What each token that is not special stands for, by its id."""
    vocabulary, special = tokenizer.get_vocab(), set(_special(tokenizer).values())
    if any(token.startswith("Ġ") for token in vocabulary):  # tokens of bytes, each written as a printable character
        byte = {character: b for b, character in bytes_to_unicode().items()}
        return {
            i: bytes(byte[c] for c in token).decode("utf-8", "surrogateescape")
            for token, i in vocabulary.items()
            if i not in special and all(c in byte for c in token)
        }
    return {i: token.replace("▁", " ") for token, i in vocabulary.items() if i not in special}
