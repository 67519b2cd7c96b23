import pickle

import pytest

from downriver.core import Cost, InputError, Measurement
from downriver.study import Failure, Ledger


def measured(value=0.5, arm="a", seed=0, study="s", **more):
    cost = Cost(parameters=10, examples=5, flops=1e15, seconds=0.1)
    return Measurement("accuracy", value, task="t", study=study, arm=arm, seed=seed, cost=cost, **more)


@pytest.fixture(params=["folder", "memory"])
def ledger(request, tmp_path):
    return Ledger(tmp_path / "runs" if request.param == "folder" else f"memory://{tmp_path.name}/runs")


def test_what_is_written_is_read(ledger):
    ledger.write("s", "k", [measured(0.5), measured(float("nan"), direction="lower")])
    row, nan = ledger.read("s", "k").to_pylist()
    assert row["value"] == 0.5 and row["parameters"] == 10 and row["flops"] == 1e15 and row["cell"] == "k"
    assert row["downriver_version"] and row["python_version"] and row["device"]
    assert nan["value"] != nan["value"] and nan["direction"] == "lower"
    assert ledger.finished("s") == {"k"} and ledger.read("s", "other") is None and ledger.finished("other") == set()


def test_queries_read_the_folder_in_place(ledger):
    assert ledger.rows().is_empty() and "value" in ledger.rows().columns
    assert ledger.query("select count(*) as n from measurements")["n"].item() == 0
    for seed in range(4):
        ledger.write("s", f"k{seed}", [measured(seed / 10, seed=seed), measured(1.0, arm="b", seed=seed)])
    ledger.write("other", "k", [measured(study="other")])
    assert ledger.rows("s").height == 8 and ledger.rows().height == 9 and ledger.rows("nothing").is_empty()
    means = ledger.query("select arm, avg(value) as mean from measurements where cell != 'k' group by arm order by arm")
    assert means["mean"].to_list() == pytest.approx([0.15, 1.0])
    assert ledger.query("select $x as x", {"x": 3})["x"].item() == 3
    with pytest.raises(InputError, match="valu"):
        ledger.query("select valu from measurements")


def test_versions_without_a_column_of_their_own_are_kept(ledger):
    ledger.write("s", "k", [measured()])
    ledger.write("s", "l", [measured(versions={"downriver": "9", "peft": "1"})])
    rows = ledger.rows("s").sort("cell")
    assert rows["other_versions"].to_list() == [None, '{"peft_version":"1"}']
    assert rows["downriver_version"][1] == "9" and rows["torch_version"][1] is None


def test_a_large_cell_is_packed(ledger):
    ledger.write("s", "k", [measured(value=i / 7) for i in range(1000)])
    assert ledger.read("s", "k")["value"].to_pylist() == [i / 7 for i in range(1000)]
    assert len(ledger.files.cat_file(f"{ledger.path}/cells/s/k.parquet")) < 20_000


def test_failures_are_kept_until_the_cell_succeeds(ledger):
    failure = Failure("s", "a", 0, "ValueError: no", "Traceback ...", at=1.0)
    ledger.write_failure("k", failure)
    assert ledger.failures("s") == {"k": failure} and ledger.failure("s", "k") == failure
    ledger.write("s", "k", [measured()])
    assert ledger.failures("s") == {} and ledger.failure("s", "k") is None


def test_forgetting(ledger):
    ledger.write("s", "k", [measured()])
    ledger.write_failure("l", Failure("s", "a", 0, "e", "t", at=1.0))
    ledger.forget("s", ["k", "l", "m"])
    assert ledger.finished("s") == set() and ledger.failures("s") == {}


def test_a_ledger_travels_to_other_processes(ledger, tmp_path, monkeypatch):
    ledger.write("s", "k", [measured()])
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(ledger)).rows("s").height == 1


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = pickle.loads(pickle.dumps(Ledger("runs")))
    monkeypatch.chdir("/")
    ledger.write("s", "k", [measured()])
    assert (tmp_path / "runs/cells/s/k.parquet").exists()


def test_a_folder_with_a_quote_in_its_name_can_be_queried(tmp_path):
    ledger = Ledger(tmp_path / "it's [here]")
    ledger.write("s", "k", [measured()])
    assert ledger.rows().height == 1


def test_a_file_is_no_ledger(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a folder is expected"):
        Ledger(tmp_path / "file")


def test_one_process_holds_a_seed_at_a_time(tmp_path):
    import subprocess
    import sys

    ledger = Ledger(tmp_path)
    other = f"from downriver.study import Ledger\nwith Ledger({str(tmp_path)!r}).lock('s', 3) as f: print(f)"

    def ask():
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout.strip()

    with ledger.lock("s", 3) as free:
        assert free and ask() == "False"
    with ledger.lock("s", 4) as free:
        assert free and ask() == "True"
