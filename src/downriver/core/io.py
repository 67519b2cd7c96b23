"""Files that appear whole or not at all, and fingerprints of what was asked."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from downriver.core.errors import DownriverError, InputError

FRESH = 60.0
"""Seconds for which an unlocked temporary folder may be one that is just being made."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary sibling of ``path``; rename it into place when the block ends without an error.

    A reader sees the old file or the new one, never a part. A full disk is a ``DownriverError`` and leaves nothing.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(target, "w") as f:
    ...     _ = f.write("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)  # mkstemp makes files that only their owner may read
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        _explain_full_disk(error, path)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes ``path`` when the block ends without an error.

    What a killed process left of an earlier attempt at the same path is removed.

    Raises ``InputError`` before anything is written when ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists already: choose another output folder, or say that it may be overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    alive = _lock(part)
    try:
        yield part
        part.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.replace(old)
            part.replace(path)
            shutil.rmtree(old)
        else:
            part.replace(path)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        _explain_full_disk(error, path)
        raise
    finally:
        if alive is not None:
            os.close(alive)


def _sweep(path: Path) -> None:
    """Remove temporary folders of the same path whose process is gone: a living one holds a lock on its own."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if left.is_dir() and time.time() - left.stat().st_mtime > FRESH:
            descriptor = _lock(left)
            if descriptor is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A folder's lock, until it is closed; None where another process has it, or the system knows no such locks."""
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def canonical(value: Any) -> str:
    """One JSON text for a value, whatever the order of its keys; the base of every fingerprint.

    >>> canonical({"b": 1, "a": (1, 2)})
    '{"a":[1,2],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=True, default=_plain)


def fingerprint(*values: Any) -> str:
    """The first 20 hexadecimal digits of the sha256 of the values' canonical JSON.

    >>> fingerprint("a", {"x": 1}) == fingerprint("a", {"x": 1})
    True
    """
    return hashlib.sha256(canonical(list(values)).encode()).hexdigest()[:20]


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return value.tolist()
    if hasattr(value, "__dict__"):
        return {"class": type(value).__qualname__, **vars(value)}
    raise TypeError(f"cannot fingerprint a {type(value).__name__}")


def _explain_full_disk(error: BaseException, path: Path) -> None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DownriverError(f"disk full while writing {path}: nothing was left half-written") from error
