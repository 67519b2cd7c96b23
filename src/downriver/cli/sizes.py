"""Sizes in bytes as people write them on a command line."""

import re

from downriver.core.errors import InputError


def size(text: str) -> int:
    """Bytes of ``1GiB``, ``500 MB`` or ``1073741824``.

    >>> size("1.5 kB"), size("1GiB")
    (1500, 1073741824)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise InputError(f"size {text!r}: a number of bytes such as 512MiB, 2GB or 1073741824 is expected")
    power = " KMGT".index((found[2] or " ").upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
