"""Images and sentence pairs: the nearest by cosine, whatever the batches, and bad input by name."""

import numpy as np
import pytest
import torch

from downriver.core.errors import InputError
from downriver.domains import MatchedBitext

VECTORS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
ROWS = [{"source": str(i), "target": f"t{i}", "language": "de"} for i in range(40)]


def matched(batch: int = 7) -> MatchedBitext:
    return MatchedBitext(lambda x: torch.stack(list(x)), lambda t: 3 * VECTORS[[int(s) for s in t]], batch_size=batch)


def test_matches_are_the_nearest_by_cosine_in_order() -> None:
    images = list(torch.randn(15, 6, generator=torch.Generator().manual_seed(1)))
    found = matched().pair(images, ROWS, top_n=3)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (torch.stack(images).numpy(), VECTORS.numpy()))
    expected = np.argsort(-(a @ b.T), axis=1)[:, :3]
    assert [(row["image"], int(row["source"])) for row in found] == [
        (i, j) for i, js in enumerate(expected) for j in js
    ]
    assert {row["task"] for row in found} == {"translate"}
    assert [row["source"] for row in found] == [row["source"] for row in matched(100).pair(images, ROWS, top_n=3)]


@pytest.mark.parametrize(
    ("images", "rows", "top", "word"),
    [
        ([VECTORS[0]], [{"source": "1", "target": "a"}], 1, "row 0 has no 'language'"),
        ([], ROWS, 1, "at least one image"),
        ([VECTORS[0]], ROWS[:2], 3, "no more matches"),
        ([VECTORS[0][:3]], ROWS, 1, "3 features and texts 6"),
        ([VECTORS[0] * float("nan")], ROWS, 1, "image_encoder gives"),
    ],
)
def test_bad_input(images: list, rows: list, top: int, word: str) -> None:
    with pytest.raises(InputError, match=word):
        matched().pair(images, rows, top)
