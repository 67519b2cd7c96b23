"""Tasks whose inputs resemble their targets as much as asked: points with a given alignment of kernels.

Reach for it to study what a network's nonlinearity does to the geometry it learns («Task structure and nonlinearity
jointly determine learned representational geometry», 2024); ``evaluate.geometry`` has the measures.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.nn.similarity import Array, as_rows, gram


@dataclass(frozen=True)
class GeometryTask:
    """P conditions with mean inputs (P, dim) and K binary targets (P, K), and noise of deviation ``noise`` on inputs.

    Made by ``random_task``, ``xor_task``, or by hand from condition means of real data.

    >>> task = random_task(8, 2, signal=1.0, noise=0.5)
    >>> x, y, condition = task.sample(100)
    >>> x.shape, y.shape, bool((y == task.targets[condition]).all())
    ((100, 100), (100, 2), True)
    """

    means: Array
    targets: Array
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        means, targets = as_rows(self.means, "means"), as_rows(self.targets, "targets")
        if len(means) != len(targets):
            raise InputError(f"{len(means)} condition means and targets of {len(targets)}: as many are expected")
        if not np.isin(targets, (0, 1)).all():
            raise InputError("targets: 0 and 1 are expected")
        if not 0 <= self.noise < np.inf:
            raise InputError(f"noise is {self.noise}: 0 or more is expected")
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "targets", targets)

    @property
    def kernels(self) -> tuple[Array, Array]:
        """K_x of the means and K_y = (2Y − 1)(2Y − 1)ᵀ of the targets, (P, P) each."""
        return gram(self.means), gram(2 * self.targets - 1)

    def sample(self, n: int, *, draw: Any = 0) -> tuple[Array, Array, NDArray[np.int64]]:
        """n noisy inputs (n, dim), their targets (n, K) and conditions (n,), each condition about as often.

        Another ``draw`` gives other rows.
        """
        rng = generator("geometry task", self.seed, draw)
        condition = rng.permutation(np.arange(n) % len(self.means))
        x = self.means[condition] + self.noise * rng.standard_normal((n, self.means.shape[1]))
        return x, self.targets[condition], condition


def random_task(
    n_points: int,
    n_targets: int,
    *,
    signal: float | None = None,
    alignment: float | None = None,
    max_rank: int | None = None,
    spectrum: Literal["random", "flat"] = "random",
    dim: int = 100,
    noise: float = 1.0,
    seed: int = 0,
) -> GeometryTask:
    """P points whose kernel has a given centred alignment c with that of K targets.

    Targets are the first K columns of the Hadamard matrix, those of one bit before parities of two, and so on. The
    kernel is c times the targets' and √(1 − c²) times a random one without anything of the targets, both of norm one;
    its trace is P − 1, as of points at distances √2.

    Parameters
    ----------
    n_points
        P, a power of two.
    signal, alignment
        One of them. ``alignment`` is c, from 0 to 1; ``signal`` s means c = √(K s / (P − 1)): at 0 the means hold no
        linear trace of the labels, at 1 (default) they are aligned like points without structure, and at (P − 1) / K
        they are the labels.
    max_rank
        Of the part without the targets; the kernel's rank is at most K more.
    spectrum
        Its eigenvalues: ``random`` (exponential, default) or ``flat``: at s = 1 all points are then equally far apart.
    dim, noise
        Inputs a point (a random rotation of the means) and the deviation of each; 100 and 1 in the paper's code.

    Raises ``InputError`` for an alignment that P, K and the rank do not allow, with what they do.

    >>> from downriver.nn.similarity import alignment as aligned
    >>> round(aligned(*random_task(16, 3, alignment=0.4).kernels), 9)
    0.4
    """
    P, K = n_points, n_targets
    if P < 2 or P & (P - 1):
        raise InputError(f"n_points is {P}: a power of two, 2 at least, is expected")
    if not 1 <= K < P:
        raise InputError(f"n_targets is {K}: from 1 to {P - 1} are expected for {P} points")
    if signal is not None and alignment is not None:
        raise InputError("signal and alignment say the same thing: give one of them")
    if spectrum not in ("random", "flat"):
        raise unknown("spectrum", spectrum, ("random", "flat"))
    s = 1.0 if signal is None else signal
    if alignment is None and not 0 <= s <= (P - 1) / K:
        raise InputError(f"signal is {s}: from 0 to (P − 1) / K = {(P - 1) / K:g} is possible")
    c = float(np.sqrt(K * s / (P - 1))) if alignment is None else alignment
    if not 0 <= c <= 1 + 1e-12:
        raise InputError(f"alignment is {c}: from 0 to 1 is possible")
    rank = min(P - 1 - K, P if max_rank is None else max_rank)
    if rank < 1 and c < 1 - 1e-12:
        raise InputError(
            f"alignment {c:g} with {K} targets of {P} points and max_rank {max_rank}: only 1 is possible, for nothing "
            "is left beside the targets"
        )
    rank = 0 if c >= 1 - 1e-12 else rank
    if dim < rank + K:
        raise InputError(f"dim is {dim}: the kernel has rank {rank + K}, at least as many are expected")
    columns = sorted(range(1, P), key=lambda j: (j.bit_count(), j))
    signs = hadamard(P).astype(np.float64)[:, columns]
    rng = generator("random task", P, K, c, rank, spectrum, dim, seed)
    others = signs[:, K:] / np.sqrt(P) @ np.linalg.qr(rng.standard_normal((P - 1 - K, P - 1 - K)))[0]
    values = np.ones(rank) if spectrum == "flat" else rng.exponential(size=rank) + 1e-3
    values = np.sqrt(max(0.0, 1 - c**2)) * values / (np.linalg.norm(values) or 1.0)
    axes = np.hstack([signs[:, :K] / np.sqrt(P), others[:, :rank]])
    eigenvalues = np.concatenate([np.full(K, c / np.sqrt(K)), values])
    eigenvalues = eigenvalues * (P - 1) / eigenvalues.sum()
    rotation = np.linalg.qr(rng.standard_normal((dim, rank + K)))[0].T
    return GeometryTask((axes * np.sqrt(eigenvalues)) @ rotation, (signs[:, :K] < 0).astype(np.float64), noise, seed)


def xor_task(eps: float, *, dim: int = 100, noise: float = 1.0, seed: int = 0) -> GeometryTask:
    """Four points, two bits ±1 and their exclusive or with magnitude ``eps``, labelled by the exclusive or.

    At 0 no hyperplane separates the labels; the larger ``eps``, the easier it is.

    >>> xor_task(0.5, dim=5).targets.ravel()
    array([0., 1., 1., 0.])
    """
    if eps < 0 or dim < 3:
        raise InputError(f"eps is {eps} and dim {dim}: 0 or more, and at least 3, are expected")
    bits = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    points = np.column_stack([bits, -eps * bits.prod(axis=1)])
    rotation = np.linalg.qr(generator("xor task", dim, seed).standard_normal((dim, 3)))[0].T
    return GeometryTask(points @ rotation, (bits.prod(axis=1) < 0).astype(np.float64)[:, None], noise, seed)
