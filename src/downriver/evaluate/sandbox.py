"""Run generated Python code where it cannot do much: limited time, memory, processes, files, output, and no network.

Reach for it to score programs by their tests. Each program gets an interpreter of its own in a folder of its own, with
nothing of the caller's environment. Limits are the operating system's; where the kernel allows it (Linux, user
namespaces) there is no network at all, and everywhere sockets, subprocesses and forks are refused by an audit hook.
That stops generated code that loops, forks, floods or downloads. It is no wall against code that was written to break
out: for that, run the whole evaluation in a container.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

from downriver.core import InputError

Status = Literal["passed", "failed", "timeout", "memory", "output", "forbidden"]
FORBIDDEN = 86  # exit code of the hook
OUT_OF_MEMORY = 87
_CHUNK = 1 << 14

# What the child does before it runs the program: limits first, then the hook that nothing can take off again.
_PREPARE = """
import os, sys
limit, seconds, size, FORBIDDEN, OUT_OF_MEMORY = (int(x) for x in sys.argv[1:6])
try:
    import resource
    for what, most in ((resource.RLIMIT_AS, limit), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, size),
                       (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
except ImportError:
    pass
try:
    import ctypes
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # a user namespace of its own, and in it no network
except Exception:
    pass
with open("program.py", encoding="utf-8") as file:
    source = file.read()
code = compile(source, "program.py", "exec")
refused = ("socket.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill",
           "ctypes.", "os.putenv", "pty.spawn", "signal.pthread_kill")
def watch(event, arguments):
    if event.startswith(refused):
        os.write(2, ("refused: " + event).encode())
        os._exit(FORBIDDEN)
sys.addaudithook(watch)
try:
    exec(code, {"__name__": "__main__", "__file__": "program.py"})
except MemoryError:
    os._exit(OUT_OF_MEMORY)
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``passed`` (exit code 0), ``failed`` (an exception or another code), ``timeout``,
    ``memory``, ``output`` (more than allowed), ``forbidden`` (network or another process); the beginning of what it
    wrote; elapsed ``seconds``."""

    status: Status
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it ended well."""
        return self.status == "passed"


def run_python(
    program: str,
    *,
    stdin: str = "",
    timeout: float = 5.0,
    memory: int = 512 << 20,
    output: int = 64 << 10,
    file_size: int = 1 << 20,
) -> Outcome:
    """Run a program, with its tests in it, to its end or to a limit.

    Parameters
    ----------
    timeout
        Seconds, elapsed; of the processor's time it gets as many, rounded up, and one more.
    memory
        Bytes of address space (512 MiB; the interpreter itself takes some 20).
    output, file_size
        Bytes that it may write to stdout and stderr together, and to one file.

    Raises ``InputError`` for limits that are not positive.

    >>> run_python("assert sorted([2, 1]) == [1, 2]").status, run_python("assert 1 > 2").status
    ('passed', 'failed')
    """
    for name, value in (("timeout", timeout), ("memory", memory), ("output", output), ("file_size", file_size)):
        if not value > 0:
            raise InputError(f"{name} is {value}: a positive number is expected")
    with tempfile.TemporaryDirectory(prefix="downriver-sandbox-") as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8", errors="replace")
        started = time.perf_counter()
        settings = (memory, timeout + 2, file_size, FORBIDDEN, OUT_OF_MEMORY)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PREPARE, *(str(int(each)) for each in settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        assert child.stdin and child.stdout and child.stderr
        flooded = threading.Event()
        room = _Room(output)
        readers = [
            threading.Thread(target=_read, args=(pipe, room, flooded, child)) for pipe in (child.stdout, child.stderr)
        ]
        for reader in readers:
            reader.start()
        try:
            child.stdin.write(stdin.encode())
            child.stdin.close()
        except BrokenPipeError:
            pass
        try:
            code = child.wait(timeout)
            ended = True
        except subprocess.TimeoutExpired:
            ended, code = False, None
        _kill(child)
        for reader in readers:
            reader.join()
        seconds = time.perf_counter() - started
        stdout, stderr = (room.text(pipe) for pipe in (child.stdout, child.stderr))
        child.stdout.close()
        child.stderr.close()
    status: Status = "failed"
    if flooded.is_set():
        status = "output"
    elif not ended or code == -signal.SIGXCPU:
        status = "timeout"
    elif code == 0:
        status = "passed"
    elif code == FORBIDDEN:
        status = "forbidden"
    elif code == OUT_OF_MEMORY or "MemoryError" in stderr:
        status = "memory"
    return Outcome(status, stdout, stderr, seconds)


def run_all(
    programs: Sequence[str], *, workers: int | None = None, progress: bool = True, timeout: float = 5.0, **limits: Any
) -> list[Outcome]:
    """Run programs side by side, as many as there are cores by default; outcomes in the order of the programs.

    >>> [outcome.status for outcome in run_all(["1", "1 / 0"], progress=False)]
    ['passed', 'failed']
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        found = pool.map(lambda program: run_python(program, timeout=timeout, **limits), programs)
        return list(tqdm(found, total=len(programs), desc="programs", disable=not progress, delay=2))


class _Room:
    """What two pipes may write together."""

    def __init__(self, size: int) -> None:
        self.left, self.lock, self.parts = size, threading.Lock(), dict[int, list[bytes]]()

    def take(self, pipe: IO[bytes], data: bytes) -> bool:
        with self.lock:
            self.parts.setdefault(id(pipe), []).append(data[: self.left])
            self.left -= len(data)
            return self.left >= 0

    def text(self, pipe: IO[bytes]) -> str:
        return b"".join(self.parts.get(id(pipe), [])).decode("utf-8", "replace")


def _read(pipe: IO[bytes], room: _Room, flooded: threading.Event, child: subprocess.Popen) -> None:
    while data := os.read(pipe.fileno(), _CHUNK):
        if not room.take(pipe, data):
            flooded.set()
            _kill(child)
            return


def _kill(child: subprocess.Popen) -> None:
    """The program and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
