"""The meter that is running: training and evaluation charge what they use to it, a study reads it."""

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Callable, Iterator
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

    def add(self, cost: Cost) -> None:
        self.cost = self.cost + cost


@contextlib.contextmanager
def metered(outer: bool = True) -> Iterator[Meter]:
    """Run a block under a new meter that also takes wall seconds and peak memory.

    ``outer=False`` hides the block from the meters around it, so that shared work can be charged to each of its users.
    """
    meter = Meter()
    around = _meters.get()
    token = _meters.set((*around, meter) if outer else (meter,))
    cuda = _cuda()
    if cuda:
        cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        yield meter
    finally:
        _meters.reset(token)
        peak = cuda.max_memory_allocated() if cuda else _resident_peak()
        meter.add(Cost(seconds=time.perf_counter() - started, peak_memory=peak))


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


def _cuda() -> Any:
    import sys

    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _resident_peak() -> int:
    """The process's largest resident set so far, in bytes (Linux reports kilobytes, macOS bytes)."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
