"""The meter that is running: training and evaluation charge what they use to it, a study reads it."""

import contextlib
import contextvars
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from downriver.core.measurement import Cost

_meters: contextvars.ContextVar[tuple["Meter", ...]] = contextvars.ContextVar("meters", default=())


class Meter:
    """Adds up costs. ``seconds`` and ``peak_memory`` are taken by ``metered``; the rest is charged by the work itself.

    >>> with metered() as meter:
    ...     charge(examples=32, flops=1e9)
    ...     charge(examples=32, flops=1e9)
    >>> meter.cost.examples, meter.cost.flops
    (64, 2000000000.0)
    """

    def __init__(self) -> None:
        self.cost = Cost()
        self.peak = 0

    def add(self, cost: Cost) -> None:
        self.cost = self.cost + cost


@contextlib.contextmanager
def metered(outer: bool = True) -> Iterator[Meter]:
    """Run a block under a new meter that also takes wall seconds and peak memory.

    ``outer=False`` hides the block from the meters around it, so that shared work can be charged to each of its users.
    """
    meter, around = Meter(), _meters.get()
    _mark_peak(around)
    token = _meters.set((*around, meter) if outer else (meter,))
    started = time.perf_counter()
    try:
        yield meter
    finally:
        _meters.reset(token)
        _mark_peak((*around, meter) if outer else (meter,))
        meter.add(Cost(seconds=time.perf_counter() - started, peak_memory=meter.peak))


def charge(cost: Cost | None = None, **counts: Any) -> None:
    """Add a cost, given whole or by its fields, to every meter that is running."""
    cost = cost if cost is not None else Cost(**counts)
    for meter in _meters.get():
        meter.add(cost)


def without_clock(cost: Cost) -> Cost:
    """The same cost without seconds and peak memory: the part that two equal runs share exactly."""
    return dataclasses.replace(cost, seconds=0.0, peak_memory=0)


def count_flops(step: Callable[[], Any]) -> float:
    """The floating-point operations of one real call of ``step``, counted by torch: products, convolutions, attention.

    >>> import torch
    >>> a = torch.ones(2, 3)
    >>> count_flops(lambda: a @ a.T)  # 2 x 2 results of 3 products and 3 sums each
    24.0
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # torch counts fused attention on a GPU only; the same formulas hold for its kernel on a CPU
    aten = torch.ops.aten
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        fused_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return float(counter.get_total_flops())


def _mark_peak(meters: tuple[Meter, ...]) -> None:
    """Tell the meters the highest memory use since the last mark, and start counting anew."""
    peak = _peak_since_mark()
    for meter in meters:
        meter.peak = max(meter.peak, peak)


def _peak_since_mark() -> int:
    """Bytes that torch held on the GPU where there is one, else the process's largest resident set.

    Linux forgets its high-water mark when asked; elsewhere, and where asking is forbidden, the mark is that of the
    whole process so far (macOS reports it in bytes, others in kilobytes).
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return int(peak)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak
