"""What a ledger must survive: kills at any moment, two processes at once, damaged files, a full disk."""

import errno
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from downriver.core import DownriverError
from downriver.study import Arm, study

CHILD = Path(__file__).with_name("child.py")
VOLATILE = ["seconds", "peak_memory"]


@pytest.fixture(scope="module")
def child():
    spec = importlib.util.spec_from_file_location("downriver_test_child", CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(command, folder):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(CHILD), command, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def test_twenty_kills_leave_the_ledger_of_an_undisturbed_run(tmp_path, child):
    undisturbed = child.declare(tmp_path / "quiet").run(tmp_path / "quiet/ledger", executor="serial", progress=False)
    folder = tmp_path / "killed"
    moments = random.Random(0)
    killed = 0
    with start("nursery", folder) as nursery:
        while killed < 20:
            nursery.stdin.write("go\n")
            victim = int(nursery.stdout.readline())
            time.sleep(moments.uniform(0.005, 0.08))
            os.kill(victim, signal.SIGKILL)
            killed += 1
        nursery.stdin.close()
        assert nursery.wait() == 0
    there = child.declare(folder).result(folder / "ledger").rows().height
    assert there < undisturbed.rows().height, "the kills came too late to test anything"
    resumed = child.declare(folder).run(folder / "ledger", executor="serial", progress=False)
    assert resumed.rows().drop(VOLATILE).equals(undisturbed.rows().drop(VOLATILE))
    assert resumed.ledger.rows("killed").height == undisturbed.rows().height
    assert not resumed.failures and not (folder / "ledger/quarantine").exists()
    assert [v.mean for v in resumed.verdicts()] == [v.mean for v in undisturbed.verdicts()]


@pytest.mark.slow
def test_kills_of_a_whole_pool_of_processes(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(
        "import sys, importlib.util as u; from pathlib import Path\n"
        f"s = u.spec_from_file_location('child', {str(CHILD)!r}); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "f = Path(sys.argv[1])\n"
        "r = m.declare(f).run(f / 'ledger', executor='processes', workers=2, progress=False)\n"
        "print(r.rows().drop('seconds', 'peak_memory').write_csv())\n"
    )

    def run(folder, kill_after=None):
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        if kill_after is None:
            return process.communicate()[0]
        time.sleep(kill_after)
        if random.Random(kill_after).random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # the workers are orphans now, and end by themselves
        process.wait()
        return None

    quiet = run(tmp_path / "quiet")
    moments = random.Random(1)
    for _ in range(20):
        run(tmp_path / "killed", moments.uniform(1, 6))
    assert run(tmp_path / "killed") == quiet


def test_two_processes_on_one_folder_share_the_work(tmp_path, child):
    folder = tmp_path / "both"
    with start("run", folder) as one, start("run", folder) as two:
        assert one.stdout.readline() == two.stdout.readline() == "ready\n"
        (folder / "go").touch()
        assert one.wait() == two.wait() == 0
    done = [line.split() for line in (folder / "trace").read_text().splitlines()]
    assert len({process for _, process in done}) == 2, "one process did everything"
    counts = Counter(cell for cell, _ in done)
    assert len(counts) == child.ARMS * child.SEEDS and set(counts.values()) == {1}, "a cell was done twice"
    assert child.declare(folder).result(folder / "ledger").rows().height == 2 * child.ARMS * child.SEEDS


def counted(seeds=3):
    """A study that counts how often each of its cells is run."""
    runs = Counter()

    @study("counted", seeds=seeds)
    def counted(seed, budget, scale):
        def run(arm):
            runs[arm, seed] += 1
            return {"value": seed + 0.5}

        for arm in ("a", "b"):
            yield Arm(arm, lambda arm=arm: run(arm))

    return counted, runs


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def edit(file):
    table = pq.read_table(file)
    kept = {k.decode(): v.decode() for k, v in pq.read_metadata(file).metadata.items() if k.startswith(b"downriver")}
    changed = table.set_column(table.schema.get_field_index("value"), "value", pa.array([9.9]))
    with pq.ParquetWriter(file, changed.schema) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata(kept)


def strip(file):
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({}), file)


@pytest.mark.parametrize("damage", [truncate, empty, edit, strip])
def test_a_damaged_cell_is_named_set_aside_and_run_again(tmp_path, caplog, damage):
    quick, runs = counted()
    before = quick.run(tmp_path, executor="serial", progress=False)
    cell = before.cells[3]
    file = tmp_path / "cells/counted" / f"{cell.key}.parquet"
    damage(file)
    after = quick.run(tmp_path, executor="serial", progress=False)
    assert cell.key in caplog.text and "set aside" in caplog.text
    assert [f.name.split("-")[0] for f in (tmp_path / "quarantine/counted").iterdir()] == [cell.key]
    assert runs == {(c.arm, c.seed): 2 if c == cell else 1 for c in before.cells}
    assert after.rows().drop(VOLATILE).equals(before.rows().drop(VOLATILE))


def test_a_damaged_cell_does_not_stop_queries(tmp_path):
    quick, _ = counted()
    result = quick.run(tmp_path, executor="serial", progress=False)
    truncate(tmp_path / "cells/counted" / f"{result.cells[0].key}.parquet")
    assert result.ledger.query("select count(*) as n from measurements")["n"].item() == 5


def test_a_full_disk_is_a_clear_error_and_tears_nothing(tmp_path, monkeypatch):
    quick, runs = counted()
    sync, room = os.fsync, 2

    def full(handle):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownriverError, match=r"disk full while writing .*parquet"):
        quick.run(tmp_path, executor="serial", progress=False)
    monkeypatch.undo()
    files = [f.name for f in (tmp_path / "cells/counted").iterdir()]
    assert len(files) == 2 and all(name.endswith(".parquet") for name in files)
    result = quick.run(tmp_path, executor="serial", progress=False)
    assert result.rows().height == 6 and sum(runs.values()) == 7


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        quick, _ = counted(seeds=20)
        with pytest.raises(DownriverError, match="disk full"):
            quick.run(disk, executor="serial", progress=False)
        there = quick.result(disk).rows().height
        assert 0 < there < 40
        assert len(list((disk / "cells/counted").iterdir())) == there
        assert not (disk / "quarantine").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert quick.run(disk, executor="serial", progress=False).rows().height == 40
    finally:
        subprocess.run(["umount", str(disk)], check=True)
