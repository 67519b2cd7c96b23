"""What the study engine itself costs: 10 000 cells that do nothing, on two processes.

    python benchmarks/study_overhead.py [cells]

The same cells are also written as bare Parquet files by a plain loop in one process, which is what the disk alone asks.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from downriver.core import Measurement
from downriver.study import Arm, Ledger, study

ARMS = 10


@study("nothing", seeds=1000)
def nothing(seed, budget, scale):
    for number in range(ARMS):
        yield Arm(f"arm {number}", lambda number=number: {"value": seed + number})


class Timed:
    """Wall seconds of a block, and the processor seconds that it and its worker processes took."""

    def __enter__(self) -> "Timed":
        self.wall, self.busy = time.perf_counter(), sum(os.times()[:4])
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.busy = time.perf_counter() - self.wall, sum(os.times()[:4]) - self.busy

    def __str__(self) -> str:
        return f"{self.wall:.1f} s ({self.busy:.1f} s of processor time)"


def main() -> None:
    cells = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seeds = max(1, cells // ARMS)
    folder = Path(tempfile.mkdtemp(prefix="downriver-benchmark-"))
    try:
        ledger = Ledger(folder / "bare")
        rows = [Measurement("value", 1.0, study="bare", arm="a")]
        with Timed() as bare:
            for number in range(seeds * ARMS):
                ledger.write("bare", f"{number:05d}", rows)
        print(f"{seeds * ARMS} cells written by a plain loop in one process: {bare}")

        with Timed() as first:
            result = nothing.run(folder / "runs", executor="processes", workers=2, seeds=seeds, progress=False)
        assert not result.failures and len(result.ledger.finished("nothing")) == seeds * ARMS
        print(f"{seeds * ARMS} cells on 2 processes: {first}, {first.wall / bare.wall:.2f} of the loop")

        with Timed() as again:
            nothing.run(folder / "runs", executor="processes", workers=2, seeds=seeds, progress=False)
        print(f"the same study again, every cell there and verified: {again}")

        with Timed() as read:
            height = result.rows().height
        print(f"its {height} rows read and verified: {read}")
        print(f"cores: {os.cpu_count()}, load of the machine: {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
