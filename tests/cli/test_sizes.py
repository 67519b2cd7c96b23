"""Sizes in bytes as people write them, and what is none."""

import pytest

from downriver.cli.sizes import size
from downriver.core.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1GiB", 2**30), ("500 MB", 5 * 10**8), ("64", 64), ("1.5kib", 1536), ("2G", 2 * 10**9), ("7B", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1 XB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        size(text)
