import math

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from downriver.core.errors import InputError
from downriver.merge import Slerp, merge, open_store, slerp


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"h.0.w": torch.randn(9, 7, generator=g), "h.1.w": torch.randn(30, generator=g)}


A, B = state(0), state(1)


def test_the_ends_are_the_models():
    for t, end in ((0.0, A), (1.0, B)):
        for name, value in slerp([A, B], A, t=t).items():
            torch.testing.assert_close(value, end[name], rtol=1e-6, atol=1e-7)


def test_it_is_the_arc_between_unit_vectors():
    a, b = ({n: v / v.norm() for n, v in model.items()} for model in (A, B))
    for t in (0.1, 0.5, 0.8):
        for name, value in slerp([a, b], a, t=t).items():
            ends = (model[name].double().flatten().numpy() for model in (a, b))
            ends = [v / np.linalg.norm(v) for v in ends]
            np.testing.assert_allclose(value.flatten().numpy(), geometric_slerp(*ends, t), atol=1e-6)
            assert math.isclose(float(value.norm()), 1, rel_tol=1e-6)


def test_one_model_goes_from_the_base_and_parallel_tensors_are_mixed_along_the_line():
    for name, value in slerp([B], A, t=0.3).items():
        torch.testing.assert_close(value, slerp([A, B], A, t=0.3)[name])
    double = {name: 2 * value for name, value in A.items()}
    for name, value in slerp([A, double], A, t=0.25).items():
        torch.testing.assert_close(value, 1.25 * A[name])
    zero = {name: torch.zeros_like(value) for name, value in A.items()}
    assert all(torch.isfinite(v).all() for v in slerp([zero, B], A).values())


def test_t_by_layer(tmp_path):
    report = merge([A, B], A, Slerp(), tmp_path / "out", params={r"h\.": {"t": [0.0, 1.0]}})
    found = open_store(report.out)
    torch.testing.assert_close(found.read("h.0.w", 0, 63), A["h.0.w"].flatten())
    torch.testing.assert_close(found.read("h.1.w", 0, 30), B["h.1.w"])


def test_what_is_refused():
    with pytest.raises(InputError, match="slerp: 3 models, two are expected"):
        slerp([A, B, A], A)
    with pytest.raises(InputError, match="slerp: t is nan"):
        slerp([A, B], A, t=math.nan)
    with pytest.raises(InputError, match="slerp takes neither weights nor lam"):
        merge([A, B], A, Slerp(lam=2.0), "never")
