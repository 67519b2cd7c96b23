import random

import numpy as np
import torch

from downriver.core import derive_seed, generator, seeded


def test_streams_depend_on_every_name():
    seeds = {derive_seed("s", "a", 0), derive_seed("s", "a", 1), derive_seed("s", "b", 0), derive_seed("t", "a", 0)}
    assert len(seeds) == 4
    assert all(0 <= s < 2**32 for s in seeds)


def test_seeds_are_stable_over_versions():
    assert derive_seed("study", "arm", 0) == 3567588669


def test_all_libraries_are_seeded_and_their_states_given_back():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    with seeded("inside"):
        first = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002
    with seeded("inside"):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == first  # noqa: NPY002


def test_generators_are_their_own():
    assert generator("a").integers(1 << 30) == generator("a").integers(1 << 30) != generator("b").integers(1 << 30)
