"""A study in a process of its own, for tests that kill processes: ``child.py COMMAND FOLDER``.

``nursery`` forks a fresh run for every line on standard input (and says its process id), so that a run can be killed
again and again without importing everything each time. ``run`` runs once, when the file ``FOLDER/go`` appears.
"""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from downriver.core import charge
from downriver.study import Arm, better, shared, study

ARMS, SEEDS = 4, 10


def declare(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)

    def note(what: str) -> None:
        """Leave a trace of work that was done, by appending one line."""
        with (folder / "trace").open("a") as file:
            file.write(f"{what} {os.getpid()}\n")

    @study("killed", claims=[better("arm 1", than="arm 0", on="value")], seeds=SEEDS)
    def killed(seed, budget, scale):
        @shared
        def drawn():
            charge(examples=10)
            time.sleep(0.01)
            return torch.rand(3).sum().item() + np.random.rand() + random.random()  # noqa: NPY002

        def run(number):
            note(f"{number}/{seed}")
            time.sleep(0.02)
            charge(examples=1, flops=2.5)
            return {"value": number + drawn() + torch.rand(1).item(), "noise": np.random.rand()}  # noqa: NPY002

        for number in range(ARMS):
            yield Arm(f"arm {number}", lambda number=number: run(number))

    return killed


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    killed = declare(folder)
    if command == "run":
        print("ready", flush=True)
        while not (folder / "go").exists():
            time.sleep(0.001)
        killed.run(folder / "ledger", executor="serial", progress=False)
    for _ in sys.stdin if command == "nursery" else ():
        child = os.fork()
        if child == 0:
            killed.run(folder / "ledger", executor="serial", progress=False)
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
