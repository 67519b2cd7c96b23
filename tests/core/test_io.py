import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from downriver.core import DownriverError, InputError, atomic_folder, atomic_write, canonical, fingerprint, sha256_file


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target, "w") as file:
        file.write("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    full_disk = pytest.raises(DownriverError, match=r"disk full while writing .*b\.txt")
    with full_disk, atomic_write(tmp_path / "b.txt") as f:
        f.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_real_size_limit_leaves_nothing(tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from downriver.core import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f: f.write(b'x' * 100000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "kept").read_text() == "mine"


def test_overwriting_a_folder_replaces_all_of_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with atomic_folder(tmp_path / "out", overwrite=True) as part:
        (part / "new").write_text("2")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as part:
        (part / "half").write_text("2")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_see_values_not_key_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1, 2), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert json.loads(canonical({"x": np.float64(0.5), "y": np.arange(3)})) == {"x": 0.5, "y": [0, 1, 2]}


def test_what_cannot_be_named_cannot_be_fingerprinted():
    with pytest.raises(TypeError, match="cannot fingerprint"):
        canonical({"f": {1, 2}})


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path):
    script = """
import os, sys, time
from downriver.core.io import atomic_folder
with atomic_folder(sys.argv[1]) as part:
    (part / "half").write_text("x")
    print("open", flush=True)
    time.sleep(60)
"""

    def started():
        run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None and run.stdout.readline() == "open\n"
        for part in tmp_path.glob(".out.*.part"):
            os.utime(part, (0, 0))
        return run

    killed = started()
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 1
    living = started()
    try:
        [held] = tmp_path.iterdir()  # that of the killed one is gone
        with atomic_folder(tmp_path / "out") as part:
            (part / "whole").write_text("y")
        assert sorted(tmp_path.iterdir()) == sorted([held, tmp_path / "out"])
        assert (held / "half").exists()
    finally:
        living.kill()
        living.wait()
