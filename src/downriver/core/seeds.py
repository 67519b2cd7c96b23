"""Randomness that does not depend on what ran before: every piece of work derives its own streams from names."""

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator

import numpy as np

from downriver.core.io import canonical


def derive_seed(*names: object) -> int:
    """A seed in [0, 2**32) from any names: study, arm, seed, part. Different names give unrelated streams.

    >>> derive_seed("study", "arm", 0) == derive_seed("study", "arm", 0) != derive_seed("study", "arm", 1)
    True
    """
    return int.from_bytes(hashlib.sha256(canonical(list(names)).encode()).digest()[:4], "big")


def generator(*names: object) -> np.random.Generator:
    """A numpy generator of its own for these names."""
    return np.random.default_rng(derive_seed(*names))


@contextlib.contextmanager
def seeded(*names: object) -> Iterator[int]:
    """Seed python, numpy and (where it is loaded) torch from the names; give back the old states afterwards.

    >>> with seeded("demo", 3):
    ...     a = random.random()
    >>> with seeded("demo", 3):
    ...     b = random.random()
    >>> a == b
    True
    """
    seed = derive_seed(*names)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch = sys.modules.get("torch")
    torch_state = torch.random.get_rng_state() if torch else None
    cuda_states = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_available() else None
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if torch:
        # torch.manual_seed queues a call and its traceback for every absent accelerator each time: seed what there is
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
    try:
        yield seed
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        if torch and torch_state is not None:
            torch.random.set_rng_state(torch_state)
        if torch and cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
