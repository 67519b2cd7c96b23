import math

import pytest

from downriver.core import Cost, InputError, Measurement


def test_a_row_is_flat_and_carries_cost_and_versions():
    row = Measurement("accuracy", 0.5, arm="lora", seed=3, cost=Cost(examples=10, flops=1e9)).to_row()
    assert row["arm"] == "lora"
    assert (row["examples"], row["flops"]) == (10, 1e9)
    assert row["downriver_version"]
    assert row["torch_version"].startswith("2.")
    assert row["device"]
    assert all(not isinstance(v, dict) for v in row.values())


def test_values_are_numbers():
    with pytest.raises(InputError, match="metric 'loss': value 'high' is not a number"):
        Measurement("loss", "high")
    with pytest.raises(InputError, match="infinite"):
        Measurement("loss", math.inf)
    with pytest.raises(InputError, match="direction 'up'"):
        Measurement("loss", 1.0, direction="up")


def test_costs_add_counts_and_keep_the_largest_sizes():
    total = Cost(parameters=10, examples=5, seconds=1.0, peak_memory=7) + Cost(parameters=8, examples=6, seconds=2.0)
    assert total == Cost(parameters=10, examples=11, seconds=3.0, peak_memory=7)
