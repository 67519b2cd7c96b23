"""Translations that an image goes with: the nearest sentence pairs of each image in a space of images and texts.

Reach for it to make multimodal translation examples where there are images without translations and translations
without images, as training data of ``GraftedVLM``.

Spravil et al. 2025, «Florenz: Scaling Laws for Systematic Generalization in Vision-Language Models», arXiv:2503.09443.
Whether the paper keeps the best of each image or of the whole collection is not public: here the best of each image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from downriver.core.errors import InputError

Encoder = Callable[[Sequence[Any]], Tensor]


class MatchedBitext:
    """Pair images with sentence pairs by the cosine between the image and the source sentence.

    Args:
        image_encoder, text_encoder: a batch of images, of texts → their embeddings (n, d) in one space (CLIP's two
            towers, for example).
        batch_size: how many images, or texts, an encoder is given at a time.

    >>> colours = {"red": [1.0, 0.0], "blue": [0.0, 1.0]}
    >>> matched = MatchedBitext(lambda x: torch.stack(list(x)), lambda texts: torch.tensor([colours[t] for t in texts]))
    >>> pairs = [("blue", "bleu", "fr"), ("red", "rot", "de")]
    >>> bitexts = [dict(zip(("source", "target", "language"), pair, strict=True)) for pair in pairs]
    >>> [row] = matched.pair([torch.tensor([2.0, 0.1])], bitexts, top_n=1)
    >>> row["image"], row["target"], round(row["similarity"], 3)
    (0, 'rot', 0.999)
    """

    def __init__(self, image_encoder: Encoder, text_encoder: Encoder, *, batch_size: int = 256) -> None:
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.batch_size = batch_size

    def pair(self, images: Sequence[Any], bitexts: Sequence[Mapping[str, str]], top_n: int = 1) -> list[dict[str, Any]]:
        """The ``top_n`` best sentence pairs of each image, best first.

        ``bitexts`` are rows with ``source``, ``target`` and ``language``. A row that comes back has these, the number
        of its ``image``, ``task`` «translate» and the ``similarity``. Images are compared a batch at a time, so that
        memory holds batch × sentences numbers. Raises ``InputError`` for no images, a row that lacks a column, fewer
        sentence pairs than ``top_n``, and embeddings that do not fit together.
        """
        for i, row in enumerate(bitexts):
            if missing := {"source", "target", "language"} - set(row):
                raise InputError(f"bitexts: row {i} has no {sorted(missing)[0]!r}")
        if not len(images) or not 1 <= top_n <= len(bitexts):
            raise InputError(
                f"{len(images)} images, {len(bitexts)} sentence pairs, top_n {top_n}: at least one image is expected,"
                " and no more matches an image than there are sentence pairs"
            )
        said = self._embedded(self.text_encoder, [row["source"] for row in bitexts], "text_encoder")
        found = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            seen = self._embedded(self.image_encoder, part, "image_encoder")
            if seen.shape[1] != said.shape[1]:
                raise InputError(
                    f"images have {seen.shape[1]} features and texts {said.shape[1]}: one space is expected"
                )
            values, rows = (seen @ said.T).topk(top_n, dim=1)
            for i, (near, which) in enumerate(zip(values.tolist(), rows.tolist(), strict=True)):
                found += [
                    {**bitexts[j], "image": start + i, "task": "translate", "similarity": v}
                    for v, j in zip(near, which, strict=True)
                ]
        return found

    @torch.no_grad()
    def _embedded(self, encoder: Encoder, items: Sequence[Any], name: str) -> Tensor:
        parts = [encoder(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]
        rows = torch.cat([torch.as_tensor(part) for part in parts]).float()
        if rows.ndim != 2 or len(rows) != len(items) or not rows.isfinite().all():
            raise InputError(
                f"{name} gives {tuple(rows.shape)} for {len(items)} items: finite numbers (n, d) are expected"
            )
        return F.normalize(rows, dim=1)
