"""Where the blocks of a study run: in this process, in a pool of processes, or on a Ray cluster.

A block is one seed. An executor hands out blocks and tells the progress what happened to their cells; the cells are
written by whoever runs them, so nothing is lost when an executor dies.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from downriver.core.errors import DownriverError, InputError, require, unknown
from downriver.study.block import Block
from downriver.study.ledger import Failure, Ledger

if TYPE_CHECKING:
    from downriver.study.study import Cell, Study

State = Literal["running", "done", "failed"]
Tell = Callable[["Cell", State, str], None]
PAUSE = 0.2  # seconds between two looks at blocks that another process holds


@dataclass(frozen=True)
class Job:
    """The cells of a study that are to be run, where they are written, and when the run started."""

    study: "Study"
    ledger: Ledger
    started: float
    cells: "Sequence[Cell]"

    @cached_property
    def blocks(self) -> "dict[int, list[Cell]]":
        """The cells by seed."""
        found: dict[int, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.seed, []).append(cell)
        return found

    def settled(self, cell: "Cell") -> tuple[State, str] | None:
        """What has become of a cell since the run started, be it here or in another process on the same ledger."""
        if self.ledger.read(self.study.name, cell.key) is not None:
            return "done", ""
        failure = self.ledger.failure(self.study.name, cell.key)
        return ("failed", failure.error) if failure and failure.at >= self.started else None

    def fail(self, cell: "Cell", error: str, trace: str) -> None:
        """Record that a cell failed."""
        self.ledger.write_failure(
            cell.key, Failure(self.study.name, cell.arm, cell.seed, error, trace, at=max(time.time(), self.started))
        )


def run_block(job: Job, seed: int, tell: Tell) -> bool:
    """Run the missing cells of one seed; False, and nothing done, where another process is at it."""
    import torch  # noqa: F401  (loaded before any cell, so that its seeds and its device do not depend on the order)

    with contextlib.ExitStack() as stack:
        if not stack.enter_context(job.ledger.lock(job.study.name, seed)):
            return False
        waiting = {cell.arm: cell for cell in job.blocks[seed]}
        block = Block(job.study, seed)
        arms = stack.enter_context(contextlib.closing(block.arms()))
        while waiting:
            try:
                arm = next(arms)
            except Exception as error:  # the body broke, or does not yield these arms any more (StopIteration)
                for cell in waiting.values():
                    job.fail(cell, _line(error), traceback.format_exc())
                    tell(cell, "failed", _line(error))
                break
            if arm.name not in waiting:
                continue
            cell = waiting.pop(arm.name)
            if settled := job.settled(cell):
                tell(cell, *settled)
                continue
            tell(cell, "running", "")
            try:
                rows = block.measure(arm)
            except Exception as error:
                job.fail(cell, _line(error), traceback.format_exc())
                tell(cell, "failed", _line(error))
            else:
                job.ledger.write(job.study.name, cell.key, rows)
                tell(cell, "done", "")
    return True


def serial(job: Job, workers: int | None, tell: Tell) -> None:
    """Run the blocks one after the other in this process."""
    queue, busy = deque(job.blocks), 0
    while queue:
        seed = queue.popleft()
        if run_block(job, seed, tell):
            busy = 0
            continue
        queue.append(seed)
        busy += 1
        if busy >= len(queue):
            time.sleep(PAUSE)
            busy = 0


def processes(job: Job, workers: int | None, tell: Tell) -> None:
    """Run the blocks in a pool of spawned processes, which share the cores; one a GPU where there are GPUs.

    When a worker dies (out of memory, a crash in native code) the cell it was at is recorded as failed, and the rest of
    its block goes to a fresh worker.
    """
    import cloudpickle

    payload = cloudpickle.dumps(job)
    queue, gpus = deque(job.blocks), _gpus()
    size = min(workers or len(gpus) or cores(), len(queue))
    places = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // size)))} for _ in range(size)]
    for number, place in enumerate(places if gpus else []):
        place["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    pool = [_Worker(payload, place) for place in places]
    pause_until = 0.0
    try:
        while queue or any(worker.seed is not None for worker in pool):
            if time.monotonic() >= pause_until:
                for worker in pool:
                    if worker.seed is None and queue:
                        worker.give(queue.popleft())
            connections = {worker.connection: worker for worker in pool if worker.seed is not None}
            if not connections:
                time.sleep(PAUSE)
            for connection in wait(list(connections), timeout=PAUSE):
                worker = connections[connection]  # type: ignore[index]
                seed = worker.seed
                assert seed is not None
                try:
                    kind, *what = worker.connection.recv()
                except (EOFError, OSError):
                    queue.extend(_bury(job, worker, tell))
                    pool[pool.index(worker)] = _Worker(payload, worker.place)
                    continue
                if kind == "cell":
                    worker.cell = what[0] if what[1] == "running" else None
                    tell(*what)
                elif kind == "end":
                    worker.seed = None
                    if not what[0]:  # another process holds this block
                        queue.append(seed)
                        pause_until = time.monotonic() + PAUSE
                else:
                    raise what[0]
    finally:
        for worker in pool:
            worker.stop()


def ray(job: Job, workers: int | None, tell: Tell) -> None:
    """Run the blocks as tasks of a Ray cluster: the one that is running, or a local one for the time being.

    Every machine of the cluster must see the ledger's folder.
    """
    import cloudpickle

    cluster = require("ray", "ray")
    own = not cluster.is_initialized()
    if own:
        cluster.init(log_to_driver=False, logging_level="warning")
    try:
        task = cluster.remote(max_retries=0)(_ray_block)
        payload = cluster.put(cloudpickle.dumps(job))
        size = workers or max(1, int(cluster.cluster_resources().get("CPU", 1)))
        queue = deque(job.blocks)
        flying: dict[Any, int] = {}
        while queue or flying:
            while queue and len(flying) < size:
                seed = queue.popleft()
                flying[task.remote(payload, seed)] = seed
            (ready,), _ = cluster.wait(list(flying), num_returns=1)
            seed = flying.pop(ready)
            try:
                free, told = cluster.get(ready)
            except cluster.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, DownriverError) else error from None
            except cluster.exceptions.RayError as error:
                free, told = True, _fail_rest(job, seed, f"the Ray worker died: {_line(error)}")
            for event in told:
                tell(*event)
            if not free:
                queue.append(seed)
                time.sleep(PAUSE)
    finally:
        if own:
            cluster.shutdown()


EXECUTORS: dict[str, Callable[[Job, int | None, Tell], None]] = {"serial": serial, "processes": processes, "ray": ray}


def choose(name: str, ledger: Ledger, workers: int | None) -> Callable[[Job, int | None, Tell], None]:
    """The executor of this name, or an ``InputError`` when it cannot do what is asked."""
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}: at least 1 is expected")
    if ledger.protocol == "memory" and name != "serial":
        raise InputError(f"{ledger.root} is the memory of one process: use the executor 'serial', or a folder")
    return EXECUTORS[name]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A spawned process that runs the blocks it is given and tells what becomes of their cells."""

    def __init__(self, payload: bytes, place: Mapping[str, str]) -> None:
        self.place = place
        self.seed: int | None = None
        self.cell: Cell | None = None
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, payload))
        with _spawning(place):
            self.process.start()
        theirs.close()

    def give(self, seed: int) -> None:
        self.seed, self.cell = seed, None
        with contextlib.suppress(OSError):  # it is dead already: the next look at its connection says so
            self.connection.send(seed)

    def stop(self) -> None:
        self.connection.close()
        if self.seed is None:  # it ends by itself and leaves nothing behind
            self.process.join(timeout=5)
        self.process.terminate()
        self.process.join()


def _work(connection: Connection, payload: bytes) -> None:
    """A worker's life: load the job, run blocks as they are asked for, end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def send(*message: Any) -> None:
        try:
            connection.send(message)
        except OSError:  # the parent is gone
            sys.exit(1)

    try:
        job: Job = pickle.loads(payload)
        while True:
            try:
                seed = connection.recv()
            except (EOFError, OSError):
                return
            free = run_block(job, seed, lambda cell, state, error: send("cell", cell, state, error))
            send("end", free)
    except DownriverError as error:
        send("error", error)
    except Exception as error:
        send("error", DownriverError(f"a worker cannot run the study: {_line(error)}\n{traceback.format_exc()}"))


def _bury(job: Job, worker: _Worker, tell: Tell) -> list[int]:
    """Record what a dead worker leaves behind; give back the seed if there is something left of its block."""
    worker.stop()
    code = worker.process.exitcode or 0
    how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    error = f"the worker process died: {how}"
    assert worker.seed is not None
    if worker.cell is None:
        for event in _fail_rest(job, worker.seed, error):
            tell(*event)
        return []
    job.fail(worker.cell, error, error)
    tell(worker.cell, "failed", error)
    return [worker.seed]


def _fail_rest(job: Job, seed: int, error: str) -> "list[tuple[Cell, State, str]]":
    """Record every cell of a block that nothing has become of as failed; what there is to tell of the whole block."""
    told: list[tuple[Cell, State, str]] = []
    for cell in job.blocks[seed]:
        if not (settled := job.settled(cell)):
            job.fail(cell, error, error)
        state, why = settled or ("failed", error)
        told.append((cell, state, why))
    return told


def _ray_block(payload: bytes, seed: int) -> "tuple[bool, list[tuple[Cell, State, str]]]":
    told: list[tuple[Cell, State, str]] = []
    return run_block(pickle.loads(payload), seed, lambda cell, state, error: told.append((cell, state, error))), told


@contextlib.contextmanager
def _spawning(place: Mapping[str, str]) -> Iterator[None]:
    """What a worker finds at its start: its share of the machine, no progress bars, and no script to import again.

    What a worker needs of the user's script travels by value, so the script needs no ``__main__`` guard.
    """
    main, environment = sys.modules["__main__"], dict(os.environ)
    os.environ.update(place, TQDM_DISABLE="1")
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name in {"TQDM_DISABLE", *place}:
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]


def _gpus() -> list[str]:
    """The CUDA devices that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()  # asks the driver and starts nothing on the devices
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
