"""Attention whose cost grows with the length, not its square: feature maps in place of softmax, and a state.

    y_i = φ(q_i)ᵀ Σ_{j≤i} φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_{j≤i} φ(k_j)

Reach for ``compress.hedgehog`` to convert a model; the parts here are what it puts in. Maps: Zhang et al., "The
Hedgehog & the Porcupine" (2024), with the older ones it is compared with. Features and sums are in float32. Beside
them the recent keys may keep softmax's weights (``windowed_attention``), as Zhang et al. have it in "LoLCATs" (2024).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from downriver.core.errors import unknown

FEATURE_MAPS = ("hedgehog", "hedgehog_softmax", "t2r", "elu", "relu", "cosformer", "performer", "taylor")
_TRAINED = ("hedgehog", "hedgehog_softmax", "t2r")
_SMALLEST = 1e-12  # of a softmax feature


class FeatureMap(nn.Module):
    """φ: vectors (batch, heads, length, d) to features of the same shape but for the last axis, f of them, all ≥ 0
    (Taylor's apart, whose products are).

    ==================  ===================================================  ========
    ``hedgehog``        [exp(Wx + b), exp(−Wx − b)]                          f = 2d
    ``hedgehog_softmax``[softmax(Wx + b), softmax(−Wx − b)], for half        f = 2d
                        precision
    ``t2r``             ReLU(Wx + b) (Kasai et al. 2021)                     f = d
    ``elu``             1 + ELU(x) (Katharopoulos et al. 2020)               f = d
    ``relu``            ReLU(x)                                              f = d
    ``cosformer``       ReLU(x) cos(πt/2M), ReLU(x) sin(πt/2M) at position   f = 2d
                        t of at most M (Qin et al. 2022)
    ``performer``       exp(ωᵀx − |x|²/2)/√f, orthogonal ω from a seed       f = 2d
                        (Choromanski et al. 2021)
    ``taylor``          [1, x, x xᵀ/√2]: the expansion of exp to 2nd order   f = 1+d+d²
    ==================  ===================================================  ========

    W and b belong to one head each; W starts as the identity, b at 0. The last two estimate exp(qᵀk/√d), so they scale
    x by d^(−1/4). ``length`` is M.

    >>> φ = FeatureMap("hedgehog", heads=1, dim=2)
    >>> q, k = torch.tensor([[[[0.5, -1.0]]]]), torch.tensor([[[[1.0, 2.0]]]])
    >>> torch.allclose((φ(q) * φ(k)).sum(), (2 * torch.cosh(q + k)).sum())  # Σ exp(q+k) + exp(−q−k)
    True
    """

    omega: Tensor

    def __init__(self, kind: str, heads: int, dim: int, length: int = 2048, seed: int = 0) -> None:
        super().__init__()
        if kind not in FEATURE_MAPS:
            raise unknown("feature map", kind, FEATURE_MAPS)
        self.kind, self.dim, self.length = kind, dim, length
        if kind in _TRAINED:
            self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))
            self.bias = nn.Parameter(torch.zeros(heads, 1, dim))
        if kind == "performer":
            rng = torch.Generator().manual_seed(seed)
            blocks = [_rotation(dim, rng) for _ in range(2)]
            norms = torch.randn(2 * dim, dim, generator=rng).norm(dim=1, keepdim=True)
            self.register_buffer("omega", torch.cat(blocks) * norms)

    @property
    def features(self) -> int:
        """f."""
        if self.kind == "taylor":
            return 1 + self.dim + self.dim**2
        return self.dim if self.kind in ("t2r", "elu", "relu") else 2 * self.dim

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """``offset``: the position of the first vector, for maps that depend on it."""
        x = x.float()
        if self.kind in _TRAINED:
            x = x @ self.weight.float().mT + self.bias.float()
            if self.kind == "t2r":
                return x.relu()
            if self.kind == "hedgehog":
                return torch.cat([x.exp(), (-x).exp()], -1)
            return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp(min=_SMALLEST)
        if self.kind == "elu":
            return 1 + nn.functional.elu(x)
        if self.kind == "relu":
            return x.relu()
        if self.kind == "cosformer":
            place = torch.arange(offset, offset + x.shape[-2], device=x.device)[:, None]
            angle = torch.pi / 2 * place / max(self.length, offset + x.shape[-2])
            return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1)
        x = x * self.dim**-0.25
        if self.kind == "performer":
            return (x @ self.omega.mT - x.square().sum(-1, keepdim=True) / 2).exp() * self.features**-0.5
        second = (x[..., :, None] * x[..., None, :]).flatten(-2) * 2**-0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, second], -1)


def _rotation(dim: int, rng: torch.Generator) -> Tensor:
    """An orthogonal matrix (d, d), uniform among all."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=rng))
    return q * r.diagonal().sign()


class State(NamedTuple):
    """What all keys so far leave behind: S = Σ φ(k) vᵀ (batch, heads, f, d) and z = Σ φ(k) (batch, heads, f)."""

    s: Tensor
    z: Tensor


def summed(k: Tensor, v: Tensor, before: State | None = None) -> State:
    """The state after these features of keys (batch, heads, length, f) and values (batch, heads, length, d)."""
    s, z = k.mT @ v.float(), k.sum(-2)
    return State(s, z) if before is None else State(before.s + s, before.z + z)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    chunk: int = 64,
    eps: float = 1e-12,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """y (batch, heads, length, d) in float32, and the state after the last key.

    Parameters
    ----------
    q, k
        Features (batch, heads, length, f). A key's features set to 0 make it invisible: that is how to pad.
    v
        Values (batch, heads, length, d).
    causal
        A query sees the keys up to its own position; else all of them. ``state``: earlier keys, which all may see.
    chunk
        Causal attention is quadratic within pieces of this length and passes a state on from piece to piece: the same
        sums as one query at a time (``chunk`` 1) and as the full matrix, in another order.
    eps
        Added to the denominator, for queries that see no key.

    >>> q, k, v = torch.rand(3, 1, 2, 10, 4).unbind()
    >>> y, _ = linear_attention(q, k, v, chunk=3)
    >>> torch.allclose(y, attention_weights(q, k) @ v, atol=1e-5)
    True
    """
    v = v.float()
    if not causal:
        whole = summed(k, v, state)
        return (q @ whole.s) / ((q @ whole.z[..., None]) + eps), whole
    numerator, denominator, last = _sums(q, k, v, chunk, state)
    return numerator / (denominator + eps), last


def _sums(q: Tensor, k: Tensor, v: Tensor, chunk: int, state: State | None) -> tuple[Tensor, Tensor, State]:
    """Numerator (batch, heads, length, d) and denominator (…, 1) of causal attention, and the state after the last."""
    length = q.shape[-2]
    chunk = min(chunk, length)
    pad = -length % chunk
    cut_q, cut_k, cut_v = (nn.functional.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, chunk)) for x in (q, k, v))
    s, z = cut_k.mT @ cut_v, cut_k.sum(-2)  # of each piece: (batch, heads, pieces, f, d), (batch, heads, pieces, f)
    upto = State(s.cumsum(2), z.cumsum(2))
    last = State(upto.s[:, :, -1], upto.z[:, :, -1])
    earlier = State(upto.s - s, upto.z - z)
    if state is not None:
        earlier = State(earlier.s + state.s[:, :, None], earlier.z + state.z[:, :, None])
        last = State(last.s + state.s, last.z + state.z)
    within = (cut_q @ cut_k.mT).tril()
    numerator = within @ cut_v + cut_q @ earlier.s
    denominator = within.sum(-1, keepdim=True) + cut_q @ earlier.z[..., None]
    return numerator.flatten(2, 3)[:, :, :length], denominator.flatten(2, 3)[:, :, :length], last


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features_q: Tensor,
    features_k: Tensor,
    *,
    window: int,
    factor: Tensor,
    scale: float,
    real: Tensor | None = None,
    chunk: int = 64,
    eps: float = 1e-12,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Softmax's own weights for the last ``window`` keys of each query, linear attention for the keys before them:

        y_i = (γ Σ_{i−w<j≤i} exp(s_ij) v_j + φ(q_i)ᵀ Σ_{j≤i−w} φ(k_j) v_jᵀ) / (the same sums without v)

    Parameters
    ----------
    q, k, v
        Queries (batch, heads, n, d), keys and values (batch, heads, m, d); the last query stands at the last key.
    features_q, features_k
        φ of them, (…, f), 0 for keys that nobody sees.
    window, factor, scale
        w, at least 1; γ (heads, 1, 1), the weight of the two parts against each other; s = qᵀk times ``scale``. Where
        w reaches over everything γ has no effect, and this is softmax.
    real
        (batch, m): False for keys that nobody sees.
    chunk, eps
        As in ``linear_attention``; the cost grows with m (w + chunk).
    state
        Of the keys before the first one given. The state that comes back leaves out the last w keys: give them again.

    >>> q, k, v = torch.randn(3, 1, 2, 10, 4).unbind()
    >>> y, _ = windowed_attention(q, k, v, q.exp(), k.exp(), window=10, factor=torch.ones(2, 1, 1), scale=0.5, chunk=4)
    >>> softmax = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(y, softmax, atol=1e-5)
    True
    """
    v = v.float()
    n, m = q.shape[-2], k.shape[-2]
    far_k, far_v = (
        nn.functional.pad(x, (0, 0, window, 0))[:, :, :m] for x in (features_k, v)
    )  # each key w places late
    if m > n:
        state = summed(far_k[:, :, : m - n], far_v[:, :, : m - n], state)
    numerator, denominator, last = _sums(features_q, far_k[:, :, m - n :], far_v[:, :, m - n :], chunk, state)
    block = min(chunk, n)
    pad, reach, start = -n % block, window + block - 1, m - n - window + 1

    def pieces(x: Tensor) -> Tensor:
        """What each block of queries can reach: (batch, heads, m, …) to (batch, heads, blocks, …, reach)."""
        return nn.functional.pad(x[:, :, max(0, start) :], (0, 0, max(0, -start), pad)).unfold(2, reach, block)

    if real is None:
        real = k.new_ones(1, m, dtype=torch.bool)
    shown = k.new_ones(block, reach, dtype=torch.bool).triu().tril(window - 1) & pieces(real[:, None, :, None])
    cut_q = nn.functional.pad(q.float(), (0, 0, 0, pad)).unflatten(-2, (-1, block))
    scores = ((cut_q @ pieces(k.float())) * scale).masked_fill(~shown, -torch.inf)
    cut_sum = nn.functional.pad(denominator, (0, 0, 0, pad)).unflatten(-2, (-1, block))
    top, far = _scaled(scores, cut_sum)
    weights = factor[:, None] * (scores - top).exp()
    near, near_sum = weights @ pieces(v).mT, weights.sum(-1, keepdim=True)
    near, near_sum, far = (x.flatten(2, 3)[:, :, :n] for x in (near, near_sum, far))
    return (near + far * numerator) / (near_sum + far * denominator + eps), last


def _scaled(scores: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of what both parts of a row are divided by, so that neither overflows nor vanishes, and the factor
    of the linear part, whose sum is ``far``."""
    top = torch.maximum(scores.amax(-1, keepdim=True), far.log()).detach().nan_to_num(neginf=0.0)
    return top, (-top).clamp(max=80.0).exp()


def windowed_weights(
    features_q: Tensor,
    features_k: Tensor,
    scores: Tensor,
    seen: Tensor,
    *,
    window: int,
    factor: Tensor,
    eps: float = 1e-12,
) -> Tensor:
    """The weights (batch, heads, queries, keys) that ``windowed_attention`` stands for, from all scores s."""
    every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    near = every.triu(scores.shape[-1] - scores.shape[-2] - window + 1)  # the later keys are not seen
    scores = scores.masked_fill(~(seen & near), -torch.inf)
    far = (features_q @ features_k.mT).masked_fill(~(seen & ~near), 0)
    top, scale = _scaled(scores, far.sum(-1, keepdim=True))
    products = factor * (scores - top).exp() + scale * far
    return products / (products.sum(-1, keepdim=True) + eps)


def attention_weights(q: Tensor, k: Tensor, seen: Tensor | None = None, eps: float = 1e-12) -> Tensor:
    """The weights (batch, heads, queries, keys) that linear attention stands for, written out: for training and tests.

    ``seen`` (…, queries, keys): True where a query sees a key; by default causal, the last query with the last key.
    """
    if seen is None:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    products = (q @ k.mT).masked_fill(~seen, 0)
    return products / (products.sum(-1, keepdim=True) + eps)
