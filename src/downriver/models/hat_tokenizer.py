"""Texts → words of bytes, the input of ``models.hat``, and back: no vocabulary is learned, nothing is unknown.

Reach for it with a ``HATForCausalLM`` or ``HATForSequenceClassification``; ``save_pretrained`` puts it beside the
model. "Hierarchical Autoregressive Transformers" (2025). The document's start is no symbol here but a vector of the
model; its end is a word of the one symbol ``END``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding

from downriver.core.errors import InputError
from downriver.core.io import atomic_write
from downriver.models.word_split import Rule, WordSplitter

WORD, END, PAD, VOCABULARY = 256, 257, 258, 259
"""The symbols beyond the bytes: [W], which opens a word and closes the one before; end of document; padding."""
IGNORED = -100
FILE = "hat_tokenizer.json"


class HATTokenizer:
    """Called with texts as a tokenizer of transformers is; gives the words of each as rows of bytes.

    Parameters
    ----------
    rule, max_bytes
        See ``WordSplitter``; one of your own as ``splitter`` counts before both.

    >>> tokenizer = HATTokenizer()
    >>> batch = tokenizer(["Hi, you", "Yes"])
    >>> batch["byte_ids"].shape, batch["word_mask"].tolist()
    (torch.Size([2, 2, 5]), [[True, True], [True, False]])
    >>> batch["byte_ids"][0].tolist()
    [[256, 72, 105, 44, 258], [256, 32, 121, 111, 117]]
    >>> tokenizer.decode(batch["byte_ids"][0])
    'Hi, you'
    """

    model_input_names = ("byte_ids", "word_mask", "byte_mask")
    pad_token_id, eos_token_id, vocab_size = PAD, END, VOCABULARY

    def __init__(self, rule: Rule = "hat", max_bytes: int = 64, *, splitter: WordSplitter | None = None) -> None:
        self.splitter = splitter or WordSplitter(rule, max_bytes)

    def __len__(self) -> int:
        return VOCABULARY

    def words(self, text: str | bytes, *, end: bool = False, max_words: int | None = None) -> list[list[int]]:
        """The symbols of every word of a text, [W] first.

        ``end`` closes the text with the word (END,); ``max_words`` drops what comes after so many words, the end among
        it. Raises ``InputError`` for an empty text.

        >>> HATTokenizer().words("a b", end=True)
        [[256, 97], [256, 32, 98], [256, 257]]
        """
        if not isinstance(text, str | bytes):
            raise InputError(f"{text!r} is not a text: str or bytes are expected")
        if not text:
            raise InputError("a text is empty: at least one byte is expected")
        found = [[WORD, *word] for word in self.splitter.split(text)]
        return [*found, *([[WORD, END]] if end else [])][:max_words]

    def __call__(
        self,
        texts: str | bytes | Sequence[str | bytes],
        *,
        end: bool = False,
        max_words: int | None = None,
        packed: bool = False,
        labels: bool = False,
    ) -> BatchEncoding:
        """A batch of B texts with M words at most of C symbols at most, [W] counted, padded at the right.

        ``byte_ids`` (B, M, C) int64, ``word_mask`` (B, M) and ``byte_mask`` (B, M, C), true where something stands.

        Parameters
        ----------
        end, max_words
            See ``words``.
        packed
            All texts in one row of words, (1, ΣM, C), with ``position_ids`` that start at 0 in every text: no padding
            of words, and no text sees another.
        labels
            Also ``labels``, the ids with -100 where nothing stands.
        """
        several = [texts] if isinstance(texts, str | bytes) else list(texts)
        if not several:
            raise InputError("no texts were given: at least one is expected")
        documents = [self.words(text, end=end, max_words=max_words) for text in several]
        counts = torch.tensor([len(words) for words in documents])
        rows = pad_sequence(
            [torch.tensor(word) for words in documents for word in words], batch_first=True, padding_value=PAD
        )
        if packed:
            ids, word_mask = rows[None], torch.ones(1, len(rows), dtype=torch.bool)
        else:
            word_mask = torch.arange(int(counts.max())) < counts[:, None]
            ids = rows.new_full((*word_mask.shape, rows.shape[1]), PAD)
            ids[word_mask] = rows
        batch = {"byte_ids": ids, "word_mask": word_mask, "byte_mask": ids != PAD}
        if packed:
            batch["position_ids"] = torch.cat([torch.arange(int(n)) for n in counts])[None]
        if labels:
            batch["labels"] = ids.masked_fill(ids == PAD, IGNORED)
        return BatchEncoding(batch)

    def stream(self, text: str | bytes, *, end: bool = False, max_words: int | None = None) -> list[int]:
        """The symbols of a text one after the other, as ``input_ids`` of the models: [W] c_1 … c_n [W] c_1 ….

        >>> HATTokenizer().stream("a b")
        [256, 97, 256, 32, 98]
        """
        return [symbol for word in self.words(text, end=end, max_words=max_words) for symbol in word]

    def decode(self, ids: Tensor | Sequence[Any], *, errors: str = "replace") -> str:
        """The text of one document, (M, C) or as a stream; symbols that are no bytes are left out."""
        flat = torch.as_tensor(ids).flatten()
        return bytes(flat[flat < WORD].tolist()).decode("utf-8", errors)

    def batch_decode(self, ids: Tensor | Sequence[Any], *, errors: str = "replace") -> list[str]:
        """The texts of several documents."""
        return [self.decode(document, errors=errors) for document in ids]

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write the settings into a folder; a rule that is a function cannot be written."""
        if callable(self.splitter.rule):
            raise InputError("the rule of words is a function of your own, which cannot be saved: keep it in your code")
        settings = {name: getattr(self.splitter, name) for name in ("rule", "max_bytes", "too_long")}
        target = Path(folder) / FILE
        with atomic_write(target, "w") as file:
            json.dump(settings, file, indent=1)
        return (str(target),)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "HATTokenizer":
        """Read what ``save_pretrained`` wrote."""
        source = Path(folder) / FILE
        if not source.is_file():
            raise InputError(f"{folder} has no {FILE}: a folder that a HATTokenizer was saved in is expected")
        return cls(splitter=WordSplitter(**json.loads(source.read_text(encoding="utf-8"))))
