import subprocess
import sys
import time

import pytest
import torch

from downriver.core import charge, count_flops, metered


def test_meters_nest_and_an_inner_one_can_be_hidden():
    with metered() as outer:
        charge(examples=1)
        with metered() as inner:
            charge(examples=10)
        with metered(outer=False) as hidden:
            charge(examples=100)
    assert (outer.cost.examples, inner.cost.examples, hidden.cost.examples) == (11, 10, 100)


def test_seconds_and_memory_are_taken():
    with metered() as meter:
        time.sleep(0.02)
    assert meter.cost.seconds >= 0.02
    assert meter.cost.peak_memory > 1_000_000


PEAKS = """
import numpy as np
from downriver.core import metered

def hold(megabytes):
    np.ones(megabytes << 17).sum()

hold(400)  # before: nobody's
with metered() as outer:
    with metered() as small:
        hold(1)
    with metered() as large:
        hold(200)
    with metered(outer=False) as hidden:
        hold(300)
print(*(meter.cost.peak_memory for meter in (small, large, hidden, outer)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets its high-water mark")
def test_the_peak_is_that_of_the_metered_work_alone():
    """In a process of its own: others may have told the allocator to keep what is freed."""
    said = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    small, large, hidden, outer = map(int, said.split())
    assert 190e6 < large - small < 290e6
    assert 290e6 < hidden - small < 390e6
    assert outer == large  # what is inside counts, what is hidden does not


def test_charging_without_a_meter_is_harmless():
    charge(examples=5)


def test_flops_of_a_linear_layer_are_counted():
    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8)
    assert count_flops(lambda: layer(x)) == 2 * 4 * 8 * 16


def test_flops_of_fused_attention_are_counted_on_a_cpu():
    q = torch.randn(2, 3, 5, 8)  # n, heads, tokens, width: two products of (5, 8) and (8, 5) a head
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 3 * 5 * 5 * 8)
