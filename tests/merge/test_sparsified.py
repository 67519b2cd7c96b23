"""DARE, DELLA and Breadcrumbs: what is kept, what is scaled, blocks that change nothing, and mergekit's formulas."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from downriver.core.errors import InputError
from downriver.merge import Breadcrumbs, Dare, Della, breadcrumbs, dare, della, merge, open_store, task_arithmetic, ties
from downriver.merge.plan import plan

NAMES = {"h.0.w": (40, 30), "h.1.w": (25, 16, 3), "b": (17,)}


def state(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in NAMES.items()}


BASE, A, B, C = (state(seed) for seed in range(4))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_with_everything_kept_they_are_task_arithmetic_and_ties():
    plain = task_arithmetic([A, B], BASE, lam=0.7, weights=[1.0, 0.5])
    for method in (dare, breadcrumbs):
        found = method([A, B], BASE, density=1.0, lam=0.7, weights=[1.0, 0.5])
        close(found, plain)
    voted = ties([A, B, C], BASE, density=1.0)
    close(della([A, B, C], BASE, density=1.0), voted)
    close(dare([A, B, C], BASE, density=1.0, consensus="ties", normalize=True), voted)


@pytest.mark.parametrize("method", [Dare(density=0.3), Della(density=0.4, rescale="l1"), Breadcrumbs(density=0.5)])
def test_blocks_change_nothing(method, tmp_path):
    whole = merge([A, B], BASE, method, tmp_path / "whole", workers=1)
    job = plan([A, B], BASE, method, device="cpu", workers=1)
    job.block = 64  # blocks that end within rows and within Philox' groups of four
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    job.execute(lambda entry, start, values: parts.setdefault(entry.name, []).append((start, values.float())))
    for name in NAMES:
        found = torch.cat([values for _, values in sorted(parts[name], key=lambda part: part[0])])
        torch.testing.assert_close(found, open_store(whole.out).read(name, 0, found.numel()), rtol=1e-6, atol=1e-7)


def test_dare_keeps_the_mean_and_drops_its_share():
    tau = {name: torch.ones(200, 200) for name in ("a", "b")}
    base = {name: torch.zeros(200, 200) for name in tau}
    found = dare([tau], base, density=0.2)
    for values in found.values():
        assert set(values.unique().tolist()) == {0.0, 5.0}
        assert abs(float((values > 0).float().mean()) - 0.2) < 0.01
    assert not torch.equal(found["a"], found["b"])  # each tensor has a mask of its own
    assert torch.equal(dare([tau], base, density=0.2)["a"], found["a"])
    assert not torch.equal(dare([tau], base, density=0.2, seed=1)["a"], found["a"])
    two = dare([tau, tau], base, density=0.2, lam=1.0)["a"]
    assert set(two.unique().tolist()) == {0.0, 5.0, 10.0}  # each model has one, too


def test_rescaling_by_l1_keeps_the_norm_of_each_tensor():
    found = dare([A], BASE, density=0.3, rescale="l1")
    for name in NAMES:
        expected = float((A[name] - BASE[name]).abs().sum())
        assert math.isclose(float((found[name] - BASE[name]).abs().sum()), expected, rel_tol=1e-5)
    bare = dare([A], BASE, density=0.3, rescale=None)["h.0.w"] - BASE["h.0.w"]
    kept = bare != 0
    torch.testing.assert_close(bare[kept], (A["h.0.w"] - BASE["h.0.w"])[kept], rtol=1e-5, atol=1e-6)


def test_della_keeps_large_entries_more_often_and_divides_by_their_probability():
    n = 400
    base, a = {"w": torch.zeros(500, n)}, {"w": (torch.arange(n) + 1.0).expand(500, n).contiguous()}
    found = della([a], base, density=0.5, epsilon=0.3)["w"]
    share = (found != 0).double().mean(0)
    expected = torch.linspace(0.2, 0.8, n, dtype=torch.float64)
    assert float((share - expected).abs().mean()) < 0.03
    kept = found != 0
    probability = expected.expand_as(found)[kept]
    torch.testing.assert_close(found[kept].double(), a["w"][kept].double() / probability, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.mean(0), a["w"][0], rtol=0.4, atol=0.0)  # nothing is lost on average


def test_breadcrumbs_keep_the_middle():
    for density, gamma in ((0.3, 0.1), (0.9, 0.3), (0.5, 0.0)):
        found = breadcrumbs([A], BASE, density=density, gamma=gamma)
        for name in NAMES:
            tau = (A[name] - BASE[name]).flatten()
            n = tau.numel()
            kept, top = int(density * n), int(gamma * n)
            below = max(0, n - kept - top)
            order = tau.abs().argsort()[below : below + kept]
            expected = torch.zeros_like(tau)
            expected[order] = tau[order]
            close({name: found[name].flatten()}, {name: BASE[name].flatten() + expected})


def mergekits(base: Tensor, hats: list[Tensor], weights: list[float], vote: bool, normalize: bool) -> Tensor:
    """The library's generalised task arithmetic on one tensor whose sparse task vectors are given."""
    deltas = torch.stack([hat * w for hat, w in zip(hats, weights, strict=True)])
    w = torch.tensor(weights).view(-1, *[1] * base.dim())
    if vote:
        mask = deltas.sign() == (deltas.sum(0) >= 0).float() * 2 - 1
        mixed, divisor = (deltas * mask).sum(0), (w * mask).sum(0)
        divisor[divisor == 0] = 1
    else:
        mixed, divisor = deltas.sum(0), w.sum(0)
    return base + (mixed / divisor if normalize else mixed)


@pytest.mark.parametrize("vote", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_mergekits_arithmetic(vote, normalize, tmp_path):
    weights = [0.5, 1.5]
    method = Breadcrumbs(
        density=0.6,
        gamma=0.1,
        weights=weights,
        normalize=normalize,
        consensus="ties" if vote else "linear",
        compat="mergekit",
    )
    found = open_store(merge([A, B], BASE, method, tmp_path / "out").out)
    for name in NAMES:
        hats = []
        for model in (A, B):
            tau = model[name] - BASE[name]
            n = tau.numel()
            kept, top = int(0.6 * n), int(0.1 * n)
            order = tau.abs().flatten().sort().indices[n - kept - top : n - top]
            hats.append(tau * torch.zeros(n).index_fill_(0, order, 1).view(tau.shape))
        expected = mergekits(BASE[name], hats, weights, vote, normalize)
        assert torch.equal(found.read(name, 0, expected.numel()), expected.flatten()), name


def test_what_is_refused():
    with pytest.raises(InputError, match="dare: density is 0"):
        dare([A], BASE, density=0)
    with pytest.raises(InputError, match=r"della: epsilon is 0\.5 and density 0\.5"):
        della([A], BASE, epsilon=0.5)
    with pytest.raises(InputError, match="breadcrumbs: gamma is 1"):
        breadcrumbs([A], BASE, gamma=1)
    with pytest.raises(InputError, match="unknown dare: consensus 'vote'"):
        dare([A], BASE, consensus="vote")
    with pytest.raises(InputError, match="unknown breadcrumbs: rescale 'probability'"):
        merge([A], BASE, Breadcrumbs(rescale="probability"), "never")
    with pytest.raises(InputError, match="dare: density has 2 values for 1 models"):
        dare([A], BASE, density=[0.1, 0.2])


def test_a_row_must_fit_into_memory():
    base, a = {"w": torch.zeros(2, 5000)}, {"w": torch.ones(2, 5000)}
    small = 100_000
    with pytest.raises(InputError, match=r"too small for 1 models: at least \d+ bytes"):
        plan([a], base, Della(), max_bytes=small, workers=1)
    assert plan([a], base, Dare(), max_bytes=2**20, workers=1).block < 5000 <= plan([a], base, Della()).block


def test_the_report_counts_what_is_kept(tmp_path):
    report = merge([A, B], BASE, Dare(density=0.25, consensus="ties"), tmp_path / "out")
    assert report.total.kept is not None and np.allclose(report.total.kept, 0.25, atol=0.04)
    assert report.total.conflict is not None and 0 < report.total.conflict < 1
