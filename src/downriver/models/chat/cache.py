"""Answers on disk, one small file each, so that what was asked once is neither waited nor paid for again."""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from downriver.core.assets import cache_folder
from downriver.core.io import atomic_write, canonical

T = TypeVar("T")
_adapter: Any = functools.cache(pydantic.TypeAdapter)


class AnswerCache:
    """Answers by the sha256 of what was asked: ``<folder>/<2 digits>/<62 digits>.json``.

    A file appears whole or not at all, so that any number of processes may share a folder; two that ask the same at
    the same time both pay, and leave one file. A file that is torn or is not an answer counts as absent and is
    replaced.

    >>> import tempfile
    >>> from downriver.models.chat.protocol import Completion, Tokens
    >>> cache = AnswerCache(tempfile.mkdtemp())
    >>> key = cache.key("a model", "a question")
    >>> cache.get(key, Completion) is None
    True
    >>> cache.put(key, Completion("42", "stop", Tokens(3, 1)))
    >>> cache.get(key, Completion).text
    '42'
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_folder() / "chat"

    @staticmethod
    def key(*asked: Any) -> str:
        """The sha256 of the canonical JSON of what was asked."""
        return hashlib.sha256(canonical(asked).encode()).hexdigest()

    def get(self, key: str, kind: type[T]) -> T | None:
        """The answer under this key, a dataclass of the given kind, or ``None``."""
        try:
            found = json.loads(self._file(key).read_bytes())
            return _adapter(kind).validate_python(found)
        except (OSError, ValueError):  # absent, unreadable, not JSON or not such an answer
            return None

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer (a dataclass)."""
        with atomic_write(self._file(key), "w") as file:
            json.dump(dataclasses.asdict(answer), file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"
