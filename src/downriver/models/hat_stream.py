"""Text → one stream of bytes with [W] before every word: a tokenizer of transformers for hierarchical transformers.

Reach for it as the ``processor`` of a ``Model``, in a pipeline or with transformers' Trainer; ``AutoTokenizer`` loads
it. ``HATTokenizer`` gives the same words as rows, which take less padding. "Hierarchical Autoregressive Transformers"
(2025).
"""

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken

from downriver.models.hat_layers import HATConfig
from downriver.models.hat_tokenizer import END, PAD, VOCABULARY, WORD
from downriver.models.word_split import WordSplitter

SYMBOLS = {WORD: "[W]", END: "[END]", PAD: "[PAD]"}
_TOKENS = {byte: f"<0x{byte:02X}>" for byte in range(256)} | SYMBOLS
_IDS = {token: i for i, token in _TOKENS.items()}


class HATStreamTokenizer(transformers.PreTrainedTokenizer):
    """Bytes are the tokens ``<0x00>`` to ``<0xFF>``; nothing is unknown, and no text is read as a special token.

    A text ends with the word of the one symbol ``[END]``. What is too long is cut between two words.

    Parameters
    ----------
    rule, max_bytes
        As in ``WordSplitter``; saved with the tokenizer.

    >>> tokenizer = HATStreamTokenizer()
    >>> tokenizer("a b")["input_ids"]
    [256, 97, 256, 32, 98, 256, 257]
    >>> tokenizer.decode([256, 97, 256, 32, 98, 256, 257], skip_special_tokens=True)
    'a b'
    >>> tokenizer(["a b", "a"], padding=True, truncation=True, max_length=6)["input_ids"]
    [[256, 97, 256, 257], [256, 97, 256, 257]]
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "right"

    def __init__(self, rule: str = "hat", max_bytes: int = 64, **settings: Any) -> None:
        splitter: Any = WordSplitter
        self.splitter: WordSplitter = splitter(rule, max_bytes)
        special = {"eos_token": SYMBOLS[END], "pad_token": SYMBOLS[PAD], "split_special_tokens": True}
        self._added_tokens_decoder = {i: AddedToken(token, special=True) for i, token in SYMBOLS.items()}
        super().__init__(rule=rule, max_bytes=max_bytes, **special | settings)

    @property
    def vocab_size(self) -> int:
        """Bytes and the three symbols."""
        return VOCABULARY

    def get_vocab(self) -> dict[str, int]:
        """Every symbol's number."""
        return dict(_IDS)

    def _tokenize(self, text: str, **settings: Any) -> list[str]:
        return [t for word in self.splitter.split(text) for t in (SYMBOLS[WORD], *map(_TOKENS.__getitem__, word))]

    def _convert_token_to_id(self, token: str) -> int | None:
        return _IDS.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return _TOKENS[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of bytes; other symbols are left out."""
        return bytes(int(token[3:5], 16) for token in tokens if token.startswith("<0x")).decode("utf-8", "replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Close one text or two."""
        return [i for ids in (token_ids_0, token_ids_1) if ids is not None for i in (*ids, WORD, END)]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for what closes a text; [W] before a word is part of it."""
        if already_has_special_tokens:
            return [int(i in (END, PAD)) for i in token_ids_0]
        return [mark for ids in (token_ids_0, token_ids_1) if ids is not None for mark in (*[0] * len(ids), 1, 1)]

    def truncate_sequences(self, ids: list[int], *args: Any, **settings: Any) -> Any:
        """Cut between two words."""
        kept, pair, overflowing = super().truncate_sequences(ids, *args, **settings)
        if kept and len(kept) < len(ids) and ids[len(kept)] != WORD:
            last = len(kept) - 1 - kept[::-1].index(WORD)
            kept = kept[: last or None]
        return kept, pair, overflowing

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """The symbols, for whoever looks; loading needs the settings alone."""
        file = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}vocab.json"
        file.write_text(json.dumps(self.get_vocab(), indent=0), encoding="utf-8")
        return (str(file),)


transformers.AutoTokenizer.register(HATConfig, slow_tokenizer_class=HATStreamTokenizer, exist_ok=True)
