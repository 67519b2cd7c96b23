import pytest
import torch

from downriver.core.errors import InputError
from downriver.merge import Sce, merge, open_store, sce


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(19, 7, generator=g),
        "b": torch.randn(30, generator=g),
        "tiny": torch.randn(3, generator=g),
    }


BASE, A, B, C = (state(seed) for seed in range(4))


def reference(base: torch.Tensor, models: list[torch.Tensor], share: float) -> torch.Tensor:
    """Select, calculate, erase on one tensor at once, in float64."""
    tau = torch.stack([m - base for m in models])
    if share < 1:
        variance = tau.var(dim=0, unbiased=False)
        k = int(variance.count_nonzero() * share)
        chosen = variance.flatten().topk(k).indices
        tau = tau * torch.zeros(base.numel()).index_fill_(0, chosen, 1).view(base.shape)
    tau = tau.double()
    eta = tau.square().flatten(1).mean(1)
    eta = eta / eta.sum() if eta.sum() > 0 else torch.full_like(eta, 1 / len(models))
    agree = tau.sign() == torch.where(tau.sum(0) >= 0, 1.0, -1.0)
    weights = eta.view(-1, *[1] * base.dim()) * agree
    return (base + (tau * weights).sum(0) / weights.sum(0).clamp_min(1e-6)).float()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_it_is_select_calculate_erase(share):
    found = sce([A, B, C], BASE, select_topk=share)
    for name in BASE:
        expected = reference(BASE[name], [A[name], B[name], C[name]], share)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
    if share == 0.1:  # of three entries a tenth is none
        assert torch.equal(found["tiny"], BASE["tiny"])


def test_equal_models_and_a_memory_bound(tmp_path):
    for name, value in sce([A, A], BASE, select_topk=1.0).items():
        torch.testing.assert_close(value, A[name])
    assert torch.equal(sce([A, A], BASE, select_topk=0.5)["w"], BASE["w"])  # they differ nowhere
    big = [{"w": torch.randn(300, 400, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    report = merge(big[1:], big[0], Sce(select_topk=0.2), tmp_path / "out", max_bytes=2**20, workers=1)
    expected = sce(big[1:], big[0], select_topk=0.2)["w"].flatten()
    torch.testing.assert_close(open_store(report.out).read("w", 0, 120_000), expected, rtol=1e-6, atol=1e-7)


def test_what_is_refused():
    with pytest.raises(InputError, match="select_topk is 2"):
        sce([A], BASE, select_topk=2)
    with pytest.raises(InputError, match="sce takes no weights"):
        merge([A], BASE, Sce(weights=[1.0]), "never")
