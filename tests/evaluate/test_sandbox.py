"""The sandbox: programs that pass, fail, loop, fork, flood, fill memory and disk, or call out."""

import os
import time

import pytest

from downriver.core.errors import InputError
from downriver.evaluate.sandbox import run_all, run_python


def test_passing_failing_and_what_was_written():
    found = run_python("import sys\nprint(input()[::-1])\nprint('warned', file=sys.stderr)", stdin="abc\n")
    assert (found.status, found.stdout, found.stderr, found.passed) == ("passed", "cba\n", "warned\n", True)
    failed = run_python("raise ValueError('no')")
    assert failed.status == "failed" and "ValueError: no" in failed.stderr and not failed.passed
    assert run_python("import sys; sys.exit(3)").status == "failed"
    assert run_python("this is no python").status == "failed"


def test_an_endless_loop_is_stopped():
    started = time.monotonic()
    assert run_python("while True: pass", timeout=1).status == "timeout"
    assert run_python("import time; time.sleep(60)", timeout=1).status == "timeout"
    assert (
        run_python("try:\n  while True: pass\nexcept BaseException: pass\nwhile True: pass", timeout=1).status
        == "timeout"
    )
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['ls'])",
        "import os; os.system('ls')",
        "import multiprocessing as m\nm.Process(target=print).start()",
        "import os; os.execv('/bin/ls', ['ls'])",
        "import os; os.kill(os.getppid(), 9)",
        "import socket; socket.create_connection(('127.0.0.1', 80))",
        "import urllib.request; urllib.request.urlopen('http://example.com')",
        "import ctypes; ctypes.CDLL(None).fork()",
    ],
)
def test_other_processes_and_the_network_are_refused(program):
    found = run_python(program, timeout=10)
    assert found.status == "forbidden" and "refused: " in found.stderr


def test_floods_are_cut():
    found = run_python("while True: print('x' * 1000)", output=20_000)
    assert found.status == "output" and len(found.stdout) == 20_000
    assert run_python("import sys\nwhile True: sys.stderr.write('x' * 1000)", output=20_000).status == "output"


def test_memory_and_files_are_limited(tmp_path):
    assert run_python("x = bytearray(10**9)", memory=256 << 20).status == "memory"
    assert run_python("x = [0]\nwhile True: x += x", memory=256 << 20).status == "memory"
    found = run_python("f = open('big', 'wb')\nwhile True: f.write(b'x' * 10**6)", file_size=1 << 20)
    assert found.status == "failed"


def test_nothing_of_the_caller_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hush")
    program = (
        "import os, sys\nprint('SECRET_KEY' in os.environ, os.listdir('.'), 'torch' in sys.modules)\nopen('note', 'w')"
    )
    found = run_python(program)
    assert found.stdout == "False ['program.py'] False\n"
    assert not os.path.exists("note")  # noqa: PTH110


def test_many_keep_their_order():
    found = run_all([f"print({i})" for i in range(8)], workers=3, progress=False)
    assert [outcome.stdout.strip() for outcome in found] == [str(i) for i in range(8)]


def test_bad_limits():
    for name in ("timeout", "memory", "output", "file_size"):
        with pytest.raises(InputError, match=name):
            run_python("1", **{name: 0})
