"""Choosing: budgets, ties, one reason a dropped row, no part for the order; a killed copy equals an undisturbed one."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.data.documents import read_documents, write_documents
from downriver.data.score import RuleScorer, ScoreTable
from downriver.data.select.rules import rule, weighted
from downriver.data.select.select import select


def table(n=500, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "id": [f"d{i:05d}" for i in rng.permutation(n)],
            "a": rng.normal(size=n),
            "b": rng.integers(0, 5, n).astype(float),
            "tokens": rng.integers(10, 100, n),
            "group": rng.choice(["x", "y", "z"], n, p=[0.6, 0.3, 0.1]),
        }
    )


RULES = ["a", "b", "a - b", "0.3*a + 0.7*b", "random", "resample(a)", weighted({"a": 0.5, "b": 0.5}, "rank")]
BUDGETS = [{"k": 37}, {"tau": 7}, {"budget_tokens": 3000}, {"quantile": 0.9}, {"k": 11, "per_group": "group"}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("by", RULES, ids=str)
def test_one_reason_each_and_no_part_for_the_order(by, budget):
    frame = table()
    chosen = select(frame, by, **budget, seed=3)
    assert set(chosen.indices) | set(chosen.reasons) == set(range(500))
    assert not set(chosen.indices) & set(chosen.reasons) and all(chosen.reasons.values())
    shuffled = frame.sample(fraction=1, shuffle=True, seed=1)
    again = select(shuffled, by, **budget, seed=3)
    assert set(again.ids) == set(chosen.ids)
    why = {frame["id"][row]: reason for row, reason in chosen.reasons.items()}
    assert {shuffled["id"][row]: reason for row, reason in again.reasons.items()} == why


def test_budgets():
    frame = table()
    best = np.sort(np.argsort(-frame["a"].to_numpy())[:71])
    assert select(frame, "a", tau=7).indices.tolist() == best.tolist()  # floor(500 / 7)
    assert select(frame, "a", tau=1).reasons == {}
    within = select(frame, "a", budget_tokens=3000)
    spent = frame["tokens"].to_numpy()[within.indices].sum()
    order = np.argsort(-frame["a"].to_numpy())
    assert within.indices.tolist() == sorted(order[: len(within.indices)])
    assert spent <= 3000 < spent + frame["tokens"][int(order[len(within.indices)])]
    half = select(frame, "a", quantile=0.5)
    assert len(half.indices) == 250 and half.threshold == frame["a"].to_numpy()[half.indices].min()
    quotas = select(frame, "a", quotas={"x": 5, "z": 2}, per_group="group")
    assert frame["group"].gather(quotas.indices).value_counts(sort=True).rows() == [("x", 5), ("z", 2)]
    epochs = select(frame, "a", k=100, source="group", train_tokens=5 * frame["tokens"].sum()).epochs_by_source
    shares = frame.group_by("group").agg(pl.col("tokens").sum())
    read = sum(epochs[name] * tokens for name, tokens in shares.iter_rows())
    assert read == pytest.approx(5 * frame["tokens"].sum())


def test_resampling_is_in_proportion():
    """Of two documents, one e times as likely: it is drawn first in a share e / (1 + e) of the seeds."""
    frame = pl.DataFrame({"id": ["a", "b"], "w": [1.0, 0.0]})
    first = np.mean([select(frame, "resample(w)", k=1, seed=s).ids[0] == "a" for s in range(400)])
    assert abs(first - np.e / (1 + np.e)) < 0.06


def test_dropped_and_missing():
    frame = table(20).with_columns(a=pl.when(pl.int_range(20) < 3).then(None).otherwise("a"))
    chosen = select(frame, "a", k=5, drop={frame["id"][4]: "duplicate of x"})
    assert [chosen.reasons[row] for row in (0, 1, 2, 4)] == ["no score in a"] * 3 + ["duplicate of x"]
    with pytest.raises(InputError, match=f"column 'a': 3 documents have no finite score, '{frame['id'][0]}' the first"):
        select(frame, "a", k=5, missing="fail")


def test_audit(tmp_path):
    frame = table(50)
    chosen = select(frame, "a", k=5)
    audit = pl.read_parquet(chosen.audit(tmp_path / "audit.parquet"))
    assert audit.columns == ["row", "id", "kept", "reason", "score", "threshold"]
    assert audit["id"].to_list() == frame["id"].to_list() and audit.filter("kept")["id"].to_list() == list(chosen.ids)
    assert (audit.filter(~pl.col("kept"))["reason"] == "below the threshold").all()
    assert (audit.filter("kept")["score"] >= chosen.threshold).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "exactly one of k, tau, budget_tokens, quantile, quotas is expected, not none"),
        ({"k": 5, "tau": 2}, "not k, tau"),
        ({"k": 51}, "k is 51 and 50 documents can be chosen"),
        ({"k": 0}, "k is 0"),
        ({"tau": 51}, "the pool has 50 documents and tau is 51"),
        ({"tau": 0.5}, "tau is 0.5"),
        ({"budget_tokens": 1e9}, "budget_tokens is 1e"),
        ({"quantile": 2}, "quantile is 2"),
        ({"quotas": {"q": 1}, "per_group": "group"}, "unknown group of 'group' in quotas 'q'"),
        ({"quotas": {"x": 1}}, "per_group="),
        ({"k": 1, "per_group": "sauce"}, "unknown column of the table 'sauce'"),
        ({"k": 1, "missing": "guess"}, "unknown policy for missing scores 'guess'"),
    ],
)
def test_bad_budgets(settings, said):
    with pytest.raises(InputError) as caught:
        select(table(50), "a", **settings)
    assert said in str(caught.value)


def test_bad_tables_and_rules():
    with pytest.raises(InputError, match="id 'a' stands for several rows"):
        select(pl.DataFrame({"id": ["a", "a"], "x": [1, 2]}), "x", k=1)
    with pytest.raises(InputError, match="unknown column of the table 'quality'"):
        select(table(5), "quality", k=1)
    with pytest.raises(InputError, match="column 'group' holds String"):
        select(table(5), "group", k=1)
    with pytest.raises(InputError, match="a list is no table of scores"):
        select([1.0], "a", k=1)
    with pytest.raises(InputError, match="'1 2' is no column"):
        rule("1 2 + b")


def test_rules_as_text():
    assert rule("2*a - 0.5*b + c").weights == {"a": 2.0, "b": -0.5, "c": 1.0}
    assert rule("-loss").weights == {"loss": -1.0} and rule("random").kind == "random"


def rows(n):
    return [{"text": f"text {i} ü" * 3, "id": f"i{i}", "n": i, "metadata": {"source": "ab"[i % 2]}} for i in range(n)]


@pytest.mark.parametrize("layout", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_copies_are_unchanged(tmp_path, layout):
    write_documents(tmp_path / "in", rows(100), like=layout, shard_rows=30)
    scores = ScoreTable(tmp_path / "table")
    scores.add("rules", RuleScorer.redpajama(), tmp_path / "in", executor="serial", progress=False)
    chosen = select(scores, "random", k=40, seed=1)
    paths = chosen.apply(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in paths] == [f"part-0000{i}.{layout}" for i in range(4)]
    kept = list(read_documents(tmp_path / "out"))
    assert kept == [d for d in read_documents(tmp_path / "in") if d["id"] in set(chosen.ids)] and len(kept) == 40
    if layout == "jsonl":
        before = b"".join(p.read_bytes() for p in sorted((tmp_path / "in").iterdir())).splitlines()
        after = b"".join(p.read_bytes() for p in paths).splitlines()
        assert after == [line for line in before if json.loads(line)["id"] in set(chosen.ids)]
    stamps = [p.stat().st_mtime_ns for p in paths]
    chosen.apply(tmp_path / "in", tmp_path / "out")  # finished: nothing is written again
    assert [p.stat().st_mtime_ns for p in paths] == stamps
    with pytest.raises(InputError, match="holds another selection"):
        select(scores, "random", k=41, seed=1).apply(tmp_path / "in", tmp_path / "out")


def test_rows_without_ids_and_wrong_sources(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "one"}\nbroken\n{"text": "two"}\n')
    scores = ScoreTable(tmp_path / "table")
    scores.add("rules", RuleScorer.redpajama(), tmp_path / "a.jsonl.gz", executor="serial", progress=False)
    chosen = select(scores, "random", k=1)
    assert chosen.ids[0] in ("a.jsonl.gz/0", "a.jsonl.gz/2")
    chosen.apply(tmp_path / "a.jsonl.gz", tmp_path / "out")
    word = "one" if chosen.ids[0].endswith("/0") else "two"
    copied = gzip.decompress((tmp_path / "out" / "a.jsonl.gz").read_bytes()).decode()
    assert copied == f'{{"text": "{word}"}}\n'
    with pytest.raises(InputError, match="1 chosen ids are not in the source"):
        chosen.apply([{"id": "other", "text": "x"}], tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="holds no selection"):
        chosen.apply(tmp_path / "a.jsonl.gz", tmp_path / "full")


KILLED = """
import sys, time
from pathlib import Path
import polars as pl
from downriver.data.select import apply as module
from downriver.data.select.select import select
copy = module._copy
def slow(*given):
    copy(*given)
    print("copied", flush=True)
    time.sleep(0.2)
module._copy = slow
frame = pl.read_parquet(sys.argv[1])
select(frame, "a", k=60).apply(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_copy_equals_an_undisturbed_one(tmp_path):
    write_documents(tmp_path / "in", rows(200), like="jsonl.zst", shard_rows=20)
    frame = pl.DataFrame({"id": [f"i{i}" for i in range(200)], "a": np.random.default_rng(0).normal(size=200)})
    frame.write_parquet(tmp_path / "scores.parquet")
    (tmp_path / "run.py").write_text(KILLED)
    paths = [str(tmp_path / name) for name in ("run.py", "scores.parquet", "in", "killed")]
    process = subprocess.Popen([sys.executable, *paths], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "copied\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = contents(tmp_path / "killed")
    assert 3 <= sum(name.endswith(".zst") for name in done) < 10
    (tmp_path / "killed" / ".part-00005.jsonl.zst.abc.part").write_bytes(b"half")  # what a kill within a file leaves
    chosen = select(frame, "a", k=60)
    chosen.apply(tmp_path / "in", tmp_path / "killed")
    chosen.apply(tmp_path / "in", tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert [d["id"] for d in read_documents(tmp_path / "whole")] == list(chosen.ids)
