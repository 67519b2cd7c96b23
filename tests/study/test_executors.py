import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from downriver.core import DownriverError
from downriver.study import Arm, shared, study
from downriver.study import executors as module

VOLATILE = ["seconds", "peak_memory"]


def declare(seeds=3):
    @study("spread", seeds=seeds)
    def spread(seed, budget, scale):
        @shared
        def base():
            return torch.rand(1).item()

        def run(arm):
            if arm == "fails" and seed == 1:
                raise ValueError("as told")
            return {"x": base() + torch.rand(1).item() + random.random() + np.random.rand()}  # noqa: NPY002

        for arm in ("plain", "fails"):
            yield Arm(arm, lambda arm=arm: run(arm))

    return spread


def outcome(result):
    return result.rows().drop(VOLATILE).to_dicts(), [(f.arm, f.seed, f.error) for f in result.failures]


def test_processes_agree_with_this_process(tmp_path):
    serial = declare().run(tmp_path / "serial", executor="serial", progress=False)
    pool = declare().run(tmp_path / "pool", executor="processes", workers=2, progress=False)
    assert outcome(pool) == outcome(serial)
    assert outcome(serial)[1] == [("fails", 1, "ValueError: as told")]
    assert "as told" in pool.failures[0].traceback and "in run" in pool.failures[0].traceback


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'downriver[ray]'"
)
def test_ray_agrees_with_this_process(tmp_path):
    serial = declare().run(tmp_path / "serial", executor="serial", progress=False)
    cluster = declare().run(tmp_path / "ray", executor="ray", workers=2, progress=False)
    assert outcome(cluster) == outcome(serial)

    @study("deadly", seeds=3)
    def deadly(seed, budget, scale):
        yield Arm("good", lambda: {"x": 1.0})
        yield Arm("deadly", lambda: os._exit(7) if seed == 1 else {"x": 0.0})
        yield Arm("late", lambda: {"x": 2.0})

    result = deadly.run(tmp_path / "ray", executor="ray", workers=2, progress=False)
    assert [(f.arm, f.seed) for f in result.failures] == [("deadly", 1), ("late", 1)]
    assert "the Ray worker died" in result.failures[0].error and result.rows().height == 7


def test_a_worker_that_dies_costs_its_cell_and_nothing_else(tmp_path):
    @study("deadly", seeds=2)
    def deadly(seed, budget, scale):
        def die():
            if seed == 0:
                os._exit(7)
            if seed == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        yield Arm("good", lambda: {"x": 1.0})
        yield Arm("deadly", die)
        yield Arm("late", lambda: {"x": 2.0})

    result = deadly.run(tmp_path, executor="processes", workers=2, progress=False)
    assert {f.seed: f.error for f in result.failures} == {
        0: "the worker process died: exit code 7",
        1: "the worker process died: killed by signal 9 (SIGKILL)",
    }
    assert Counter(result.rows()["arm"]) == {"good": 2, "late": 2}


def test_a_worker_that_dies_before_its_first_cell_fails_the_block(tmp_path):
    parent = os.getpid()

    @study("stillborn", seeds=2)
    def stillborn(seed, budget, scale):
        if seed == 1 and os.getpid() != parent:
            os._exit(3)
        yield Arm("a", lambda: {"x": 1.0})
        yield Arm("b", lambda: {"x": 1.0})

    result = stillborn.run(tmp_path, executor="processes", workers=1, progress=False)
    assert [(f.arm, f.seed) for f in result.failures] == [("a", 1), ("b", 1)]
    assert result.rows()["seed"].to_list() == [0, 0]


class Unloadable:
    def __reduce__(self):
        return int, ("not a number",)


def test_a_job_that_no_worker_can_load_ends_the_run(tmp_path):
    payload = Unloadable()

    @study("unloadable", seeds=2)
    def unloadable(seed, budget, scale):
        yield Arm("a", lambda: {"x": float(payload is None)})

    with pytest.raises(DownriverError, match="a worker cannot run the study: ValueError: invalid literal"):
        unloadable.run(tmp_path, executor="processes", workers=1, progress=False)


def test_a_ledger_that_cannot_be_written_ends_the_run(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file may grow beyond 100 bytes
    try:
        with pytest.raises(DownriverError, match=r"parquet cannot be written: .*File too large"):
            declare().run(tmp_path, executor="serial", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cells/spread").iterdir())


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from helper import half\n"
        "from downriver import models\n"  # a lazy room among the globals that travel
        "from downriver.study import Arm, study\n"
        "WHOLE = 3.0\n"
        "def value(): return half(WHOLE) if models.small else 0\n"
        "@study('scripted', seeds=2)\n"
        "def scripted(seed, budget, scale):\n"
        "    yield Arm('a', lambda: {'x': value()})\n"
        "r = scripted.run('runs', workers=2, progress=False)\n"
        "print(r.rows()['value'].to_list(), r.failures)\n"
    )
    (tmp_path / "helper.py").write_text("def half(x): return x / 2\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[1.5, 1.5] []\n", done.stderr


def test_workers_share_the_cores_and_the_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module, "cores", lambda: 6)

    @study("places", seeds=2)
    def places(seed, budget, scale):
        yield Arm(
            "a",
            lambda: {"gpu": float(os.environ["CUDA_VISIBLE_DEVICES"]), "threads": float(os.environ["OMP_NUM_THREADS"])},
        )

    rows = places.run(tmp_path, executor="processes", progress=False).rows()
    assert set(rows.filter(metric="gpu")["value"]) <= {4.0, 6.0}
    assert set(rows.filter(metric="threads")["value"]) == {3.0}
    assert "OMP_NUM_THREADS" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_progress_in_plain_lines(tmp_path, capsys):
    declare().run(tmp_path, executor="serial")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "spread: 6 cells, 0 of them finished already"
    assert "spread: fails, seed 1: ValueError: as told" in said
    assert said[-1] == "spread: 6/6 cells, last fails with seed 2"
    assert "left" in said[2]
    declare().run(tmp_path, executor="serial")
    assert capsys.readouterr().err.splitlines()[0] == "spread: 6 cells, 5 of them finished already"


def test_progress_as_a_table():
    from rich.console import Console

    from downriver.study.progress import Progress

    cells = declare().cells()
    progress = Progress("spread", cells, cells[:2], shown=False)
    progress(cells[2], "running", "")
    progress(cells[3], "running", "")
    progress(cells[3], "failed", "why")
    progress(cells[3], "failed", "why")  # told twice by a block that went to another worker
    console = Console(width=80)
    with console.capture() as captured:
        console.print(progress)
    plain, fails = (line.split() for line in captured.get().splitlines()[1:3])
    assert plain == ["plain", "1", "1", "0", "1"] and fails == ["fails", "1", "0", "1", "1"]
    assert "3/6 cells" in captured.get()
