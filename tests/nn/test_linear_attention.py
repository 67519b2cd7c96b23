"""Linear attention: three forms of one sum, feature maps against closed forms, states."""

import math

import pytest
import torch
from torch import nn

from downriver.core.errors import InputError
from downriver.nn.linear_attention import (
    FEATURE_MAPS,
    FeatureMap,
    attention_weights,
    linear_attention,
    summed,
    windowed_attention,
    windowed_weights,
)


def draw(length, features=6, dim=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.rand(2, 3, length, features, generator=rng) for _ in range(2))
    return q, k, torch.randn(2, 3, length, dim, generator=rng)


@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (7, 3), (16, 4), (33, 64), (50, 7)])
def test_recurrent_chunked_and_quadratic_agree(length, chunk):
    q, k, v = draw(length, seed=length)
    full = attention_weights(q, k) @ v
    chunked, last = linear_attention(q, k, v, chunk=chunk)
    assert torch.allclose(chunked, full, atol=1e-5)
    steps, state = [], None
    for t in range(length):
        y, state = linear_attention(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], state=state)
        steps.append(y)
    assert torch.allclose(torch.cat(steps, 2), full, atol=1e-5)
    assert torch.allclose(state.s, last.s, atol=1e-4) and torch.allclose(state.z, last.z, atol=1e-4)


def test_both_directions_and_a_state_carried_on():
    q, k, v = draw(20)
    seen = torch.ones(20, 20, dtype=torch.bool)
    both, _ = linear_attention(q, k, v, causal=False)
    assert torch.allclose(both, attention_weights(q, k, seen) @ v, atol=1e-5)
    before = summed(k[:, :, :8], v[:, :, :8])
    after, _ = linear_attention(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:], chunk=5, state=before)
    assert torch.allclose(after, (attention_weights(q, k) @ v)[:, :, 8:], atol=1e-5)


def test_weights_are_a_distribution_and_causal():
    q, k, v = draw(12)
    weights = attention_weights(q, k)
    assert (weights >= 0).all() and torch.allclose(weights.sum(-1), torch.ones(2, 3, 12), atol=1e-6)
    assert (weights.triu(1) == 0).all()
    y, _ = linear_attention(q, k, v, chunk=5)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, 7:] += 1
    later_v[:, :, 7:] += 1
    changed, _ = linear_attention(q, later_k, later_v, chunk=5)
    assert torch.allclose(changed[:, :, :7], y[:, :, :7], atol=1e-6)
    assert not torch.allclose(changed[:, :, 7:], y[:, :, 7:], atol=1e-2)


def test_one_token_gives_its_value_and_no_key_gives_nothing():
    q, k, v = draw(1)
    assert torch.allclose(linear_attention(q, k, v)[0], v, atol=1e-6)
    assert torch.equal(linear_attention(q, torch.zeros_like(k), v)[0], torch.zeros_like(v))


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_every_map_counts_its_features(kind):
    φ = FeatureMap(kind, heads=3, dim=4, length=16)
    x = torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(1))
    found = φ(x)
    assert found.shape == (2, 3, 9, φ.features) and found.dtype == torch.float32
    if kind != "taylor":
        assert (found >= 0).all()
    assert torch.equal(φ(x[:, :, 4:], offset=4), found[:, :, 4:])
    assert torch.isfinite(FeatureMap(kind, 3, 4)(100 * x.half())).all() or kind in ("hedgehog",)


def test_closed_forms():
    rng = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 1, 5, 4, generator=rng).unbind()
    taylor, dots = FeatureMap("taylor", 1, 4), q @ k.mT / 2  # 1/√d
    assert torch.allclose(taylor(q) @ taylor(k).mT, 1 + dots + dots**2 / 2, atol=1e-5)
    hedgehog = FeatureMap("hedgehog", 1, 4)
    pairs = (q[..., :, None, :] + k[..., None, :, :]).detach()
    assert torch.allclose(hedgehog(q) @ hedgehog(k).mT, (2 * pairs.cosh()).sum(-1), rtol=1e-5)
    assert torch.equal(FeatureMap("elu", 1, 4)(q), 1 + nn.functional.elu(q))
    assert torch.equal(FeatureMap("t2r", 1, 4)(q), q.relu())
    soft = FeatureMap("hedgehog_softmax", 1, 4)(q)
    assert torch.allclose(soft.sum(-1), torch.full((1, 1, 5), 2.0))
    cos = FeatureMap("cosformer", 1, 4, length=8)
    angle = torch.arange(5)[:, None] - torch.arange(5)[None]
    assert torch.allclose(cos(q) @ cos(k).mT, q.relu() @ k.relu().mT * (math.pi / 16 * angle).cos(), atol=1e-5)


def test_performer_estimates_the_softmax_kernel():
    q, k = 0.5 * torch.randn(2, 1, 1, 6, 16, generator=torch.Generator().manual_seed(3))
    exact = (q @ k.mT / 4).exp()
    estimates = torch.stack(
        [φ(q) @ φ(k).mT for φ in (FeatureMap("performer", 1, 16, seed=seed) for seed in range(200))]
    )
    error = estimates.mean(0) - exact
    assert (error.abs() < 4 * estimates.std(0) / 200**0.5 + 1e-3).all()


def test_an_unknown_map_is_named():
    with pytest.raises(InputError, match="hedgehgo"):
        FeatureMap("hedgehgo", 1, 4)


def drawn_window(length, dim=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 3, length, dim, generator=rng).unbind()
    return q, k, v, q.exp(), k.exp(), torch.tensor([0.5, 1.0, 20.0]).view(3, 1, 1)


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize(("length", "window", "chunk"), [(1, 1, 1), (7, 3, 2), (16, 4, 64), (33, 50, 8), (50, 7, 7)])
def test_a_window_in_pieces_one_by_one_and_written_out(length, window, chunk):
    q, k, v, fq, fk, factor = drawn_window(length, seed=length)
    settings = {"window": window, "factor": factor, "scale": 0.5}
    weights = windowed_weights(fq, fk, 0.5 * q @ k.mT, causal(length), window=window, factor=factor)
    assert (weights >= 0).all() and (weights.triu(1) == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, length), atol=1e-5)
    near = torch.ones(length, length).triu(1 - window).bool() & causal(length)
    expected = torch.where(near, factor * (0.5 * q @ k.mT).exp(), fq @ fk.mT) * causal(length)
    assert torch.allclose(weights, expected / expected.sum(-1, keepdim=True), atol=1e-5)
    full = weights @ v
    whole, _ = windowed_attention(q, k, v, fq, fk, chunk=chunk, **settings)
    assert torch.allclose(whole, full, atol=1e-5)
    steps, state, first = [], None, 0
    for t in range(length):  # a state, and the last keys again
        keys = slice(first, t + 1)
        y, state = windowed_attention(
            q[:, :, t : t + 1],
            k[:, :, keys],
            v[:, :, keys],
            fq[:, :, t : t + 1],
            fk[:, :, keys],
            state=state,
            **settings,
        )
        steps.append(y)
        first = max(0, t + 1 - window)
    assert torch.allclose(torch.cat(steps, 2), full, atol=1e-5)
    later = length // 2  # earlier keys without a state
    y, _ = windowed_attention(q[:, :, later:], k, v, fq[:, :, later:], fk, chunk=chunk, **settings)
    assert torch.allclose(y, full[:, :, later:], atol=1e-5)


def test_a_window_over_everything_is_softmax_and_perfect_maps_give_it_at_any():
    q, k, v, fq, fk, factor = drawn_window(20)
    softmax = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for spread in (1, 40):  # scores far below zero, too
        wide = nn.functional.scaled_dot_product_attention(spread * q, k, v, is_causal=True)
        y, _ = windowed_attention(spread * q, k, v, fq, fk, window=20, factor=factor, scale=0.5, chunk=6)
        assert torch.allclose(y, wide, atol=1e-4)
    x, y = torch.rand(2, 2, 3, 20, 1).unbind()  # with one dimension near exp(xy) = Σ (xy)ⁿ/n!
    powers = torch.arange(8)
    roots = torch.tensor([math.factorial(n) for n in range(8)]) ** -0.5
    kernel, _ = windowed_attention(
        x, y, v, x**powers * roots, y**powers * roots, window=5, factor=torch.ones(3, 1, 1), scale=1.0, chunk=6
    )
    expected = nn.functional.scaled_dot_product_attention(x, y, v, is_causal=True, scale=1.0)
    assert torch.allclose(kernel, expected, atol=1e-4) and not torch.allclose(softmax, expected, atol=1e-2)


def test_keys_that_are_not_real_are_not_seen_in_a_window():
    q, k, v, fq, fk, factor = drawn_window(12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False
    settings = {"window": 4, "factor": factor, "scale": 0.5, "chunk": 3}
    y, _ = windowed_attention(q, k, v, fq, fk * real[:, None, :, None], real=real, **settings)
    alone, _ = windowed_attention(*(x[:1, :, 5:] for x in (q, k, v, fq, fk)), **settings)
    assert torch.allclose(y[:1, :, 5:], alone, atol=1e-5) and (y[0, :, :5] == 0).all()


def test_a_windows_factor_learns():
    q, k, v, fq, fk, factor = drawn_window(12)
    factor.requires_grad_()
    y, _ = windowed_attention(q, k, v, fq, fk, window=4, factor=factor, scale=0.5)
    y.square().sum().backward()
    assert factor.grad.isfinite().all() and (factor.grad != 0).all()
