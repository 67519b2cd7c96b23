"""Spelling with a hierarchical transformer: a cache of words for the backbone, one of bytes for the decoder.

Reach for ``HATForCausalLM.generate``, which calls it. All texts spell one word at a time side by side; those whose word
is done wait for the others, so a step of the backbone is one for all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from downriver.models.hat_layers import Cached, Words
from downriver.models.hat_tokenizer import END, PAD, WORD, HATTokenizer

Symbols = list[list[int]]  # words of one text, [W] first


def spell(
    model: Any,
    tokenizer: HATTokenizer,
    texts: Sequence[str | bytes],
    max_bytes: int,
    temperature: float,
    seed: int,
    progress: bool,
) -> list[bytes]:
    """Continue every text by ``max_bytes`` bytes, or up to the end of its document."""
    prompts = [tokenizer.words(text) if text else [] for text in texts]
    speller, limit = Speller(model, len(texts)), tokenizer.splitter.max_bytes
    speller.read([words[:-1] for words in prompts])
    words = [words[-1][1:] if words else [] for words in prompts]  # each text's word so far
    written = [bytearray() for _ in texts]
    live = [True] * len(texts)
    rng = torch.Generator(model.device).manual_seed(seed)
    with tqdm(total=max_bytes * len(texts), desc="bytes", disable=not progress, delay=2) as bar:
        while any(live):
            spelling = list(live)
            speller.begin()
            feed = [[WORD, *word] if on else [] for word, on in zip(words, live, strict=True)]
            while any(spelling):
                logits = speller.feed(feed)
                sizes = [len(word) for word in words]
                chosen = _choose(logits, sizes, limit, temperature, rng)
                feed = [[] for _ in texts]
                for row in [row for row, on in enumerate(spelling) if on]:
                    symbol = chosen[row]
                    if symbol < WORD:
                        words[row].append(symbol)
                        written[row].append(symbol)
                        feed[row] = [symbol]
                        bar.update()
                    live[row] = symbol != END and len(written[row]) < max_bytes
                    spelling[row] = live[row] and symbol != WORD
            if any(live):
                speller.end([[WORD, *word] if on else [] for word, on in zip(words, live, strict=True)])
            words = [[] for _ in texts]
    return [bytes(found) for found in written]


def _choose(logits: Tensor, sizes: Sequence[int], limit: int, temperature: float, rng: torch.Generator) -> list[int]:
    """The next symbol of every row: no padding, no empty word, no end within a word, [W] where a word is full."""
    size = torch.tensor(sizes, device=logits.device)[:, None]
    symbol = torch.arange(logits.shape[1], device=logits.device)[None]
    barred = (symbol == PAD) | ((symbol == WORD) & (size == 0)) | ((symbol == END) & (size > 0))
    allowed = logits.float().masked_fill(barred | ((symbol != WORD) & (size >= limit)), -torch.inf)
    if temperature == 0:
        return allowed.argmax(1).tolist()
    return torch.multinomial((allowed / temperature).softmax(1), 1, generator=rng)[:, 0].tolist()


class Speller:
    """The caches of a batch of texts, and p, (rows, D), what each text's next word is spelled from."""

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self.trunk, self.rows = model, model.model, rows
        self.backbone = Cached(self.trunk.backbone, rows)
        self.encoder, self.decoder = Cached(self.trunk.encoder, rows), Cached(model.decoder, rows)
        self.p = model.start.expand(rows, -1)
        self.spelled: list[tuple[Tensor, Tensor]] = []

    def read(self, texts: Sequence[Symbols]) -> None:
        """Take in the whole words of the texts, of which some may have none."""
        words = _words(texts, self.model.device)
        if not len(words.ids):
            return
        if not self.model.cross:
            self._advance(words, self.trunk.word_vectors(words)[0])
            return
        ids, real = _padded([[symbol for word in text for symbol in word] for text in texts], self.model.device)
        h = self.encoder.run(self.trunk.embed(ids), real)
        start = self.p[:, None]
        p = self._advance(words, self.trunk.word_vectors(words, h[real])[0])
        before = torch.cat([start, p[:, :-1]], 1)[words.mask].repeat_interleave(words.lengths, 0)
        self.decoder.run(h, real, p=h.new_zeros(*real.shape, before.shape[1]).masked_scatter(real[..., None], before))

    def begin(self) -> None:
        """A new word in every row."""
        self.spelled = []
        if not self.model.cross:
            self.decoder = Cached(self.model.decoder, self.rows)

    def feed(self, symbols: Sequence[Sequence[int]]) -> Tensor:
        """Symbols of the word that is being spelled (none for rows that wait) → logits (rows, V) of what follows."""
        ids, real = _padded(symbols, self.model.device)
        if self.model.cross:
            h = self.encoder.run(self.trunk.embed(ids), real)
            self.spelled.append((h, real))
            out = self.decoder.run(h, real, p=self.p[:, None].expand(-1, ids.shape[1], -1))
        else:
            fresh = self.decoder.seen.shape[1] == 0
            out = self.decoder.run(self.model.spell_inputs(ids, self.p if fresh else None), real)
        last = (real.sum(1) - 1).clamp(min=0)
        return self.model.lm_head(out[torch.arange(self.rows, device=out.device), last])

    def end(self, spelled: Sequence[Sequence[int]]) -> None:
        """Give the spelled words to the backbone, for the rows that go on."""
        words = _words([[list(word)] if word else [] for word in spelled], self.model.device)
        if not self.model.cross:
            self._advance(words, self.trunk.word_vectors(words)[0])
            return
        states, real = (torch.cat(parts, 1) for parts in zip(*self.spelled, strict=True))
        goes_on = words.mask.any(1)[:, None]
        self._advance(words, self.trunk.word_vectors(words, states[real & goes_on])[0])

    def _advance(self, words: Words, vectors: Tensor) -> Tensor:
        e = vectors.new_zeros(*words.mask.shape, vectors.shape[1]).masked_scatter(words.mask[..., None], vectors)
        p = self.backbone.run(e, words.mask)
        count = words.mask.sum(1)
        newest = p[torch.arange(self.rows, device=p.device), (count - 1).clamp(min=0)]
        self.p = torch.where(count[:, None] > 0, newest, self.p)
        return p


def _padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=PAD)
    return ids.to(device), (ids != PAD).to(device)


def _words(texts: Sequence[Symbols], device: Any) -> Words:
    """The words of several texts, without labels."""
    flat = [word for text in texts for word in text]
    ids = torch.tensor([symbol for word in flat for symbol in word], dtype=torch.long, device=device)
    lengths = torch.tensor([len(word) for word in flat], dtype=torch.long, device=device)
    counts = torch.tensor([len(text) for text in texts], device=device)
    mask = torch.arange(max(1, int(counts.max())), device=device) < counts[:, None]
    first = (torch.arange(mask.shape[1], device=device) == 0).expand(mask.shape)[mask]
    return Words(ids, lengths, mask, mask, ids, first)
