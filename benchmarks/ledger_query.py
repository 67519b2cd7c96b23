"""A query over a ledger of 1 000 000 rows, against polars scanning the same files.

python benchmarks/ledger_query.py [rows] [rows a cell]
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from downriver.core import Measurement
from downriver.study import Ledger

SQL = "select arm, metric, avg(value) as mean, count(*) as n from measurements group by all order by all"


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    each = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    folder = Path(tempfile.mkdtemp(prefix="downriver-benchmark-"))
    try:
        ledger = Ledger(folder)
        for cell in range(rows // each):
            arm, seed = cell % 20, cell // 20
            found = [
                Measurement(f"loss/{k}", k + seed / 7, task="text", study="wide", arm=f"arm {arm}", seed=seed)
                for k in range(each)
            ]
            ledger.write("wide", f"{cell:020x}", found)
        best = {}
        for name, ask in {
            "DuckDB through the ledger": lambda: ledger.query(SQL),
            "polars over the same files": lambda: (
                pl.scan_parquet(folder / "cells/wide/*.parquet")
                .group_by("arm", "metric")
                .agg(pl.col("value").mean().alias("mean"), pl.len().alias("n"))
                .sort("arm", "metric")
                .collect()
            ),
        }.items():
            taken = []
            for _ in range(5):
                started = time.perf_counter()
                answer = ask()
                taken.append(time.perf_counter() - started)
            assert answer["n"].sum() == rows // each * each
            best[name] = min(taken)
            print(f"{name}: first {taken[0]:.2f} s, best of five {best[name]:.2f} s")
        ours, theirs = best.values()
        print(f"{rows // each} cells of {each} rows; ledger / polars: {ours / theirs:.2f}")
        print(f"cores: {os.cpu_count()}, load of the machine: {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
