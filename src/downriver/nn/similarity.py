"""How alike two descriptions of the same rows are: kernel alignment (CKA), RSA and PARC.

Reach for ``cka`` to compare layers or models, for ``parc`` to see whether a model's features tell a task's labels
apart. Kornblith et al. 2019 (CKA), Song et al. 2012 (its debiased form), Kriegeskorte et al. 2008 (RSA), Bolya et al.
2021 (PARC). Everything is float64; the n × n kernels and their like are held in memory, 8 n² bytes each.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata

from downriver.core.errors import InputError, unknown

Array = NDArray[np.float64]
Kernel = Literal["linear", "rbf"]


def as_rows(values: Any, name: str = "features", *, fewest: int = 2) -> Array:
    """``values`` (an array or a torch tensor, (n, ...)) as a float64 array (n, d); refuses anything not finite.

    >>> as_rows([[1, 2], [3, 4], [5, 6]]).shape
    (3, 2)
    """
    if hasattr(values, "detach"):  # a torch tensor of any type, on any device
        values = values.detach().cpu().double().numpy()
    try:
        rows = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: rows of numbers are expected ({error})") from None
    rows = rows[:, None] if rows.ndim == 1 else rows.reshape(len(rows), -1) if rows.ndim else rows[None, None]
    if len(rows) < fewest or rows.shape[1] == 0:
        raise InputError(f"{name} has shape {rows.shape}: at least {fewest} rows with one column are expected")
    if not np.isfinite(rows).all():
        raise InputError(f"{name}, row {int(np.argwhere(~np.isfinite(rows))[0][0]) + 1}: a value is not finite")
    return rows


def gram(X: Any, kernel: Kernel = "linear") -> Array:
    """The kernel of the rows of X with one another, (n, n), not centred.

    ``linear`` is XXᵀ; ``rbf`` is exp(−‖x − x′‖² / 2σ²) with σ the median distance of two rows.

    >>> gram([[1.0, 0.0], [1.0, 1.0]])
    array([[1., 1.],
           [1., 2.]])
    """
    rows = as_rows(X)
    if kernel == "linear":
        return rows @ rows.T
    if kernel != "rbf":
        raise unknown("kernel", kernel, ("linear", "rbf"))
    squares = pdist(rows, "sqeuclidean")
    width = np.median(squares)
    return np.exp(-squareform(squares) / (2 * width if width > 0 else 1.0))


def centre(K: Array) -> Array:
    """HKH with H = I − 11ᵀ/n: the kernel of the features less their mean.

    >>> centre(np.array([[1.0, 1.0], [1.0, 2.0]]))
    array([[ 0.25, -0.25],
           [-0.25,  0.25]])
    """
    return K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean()


def alignment(K: Any, L: Any, *, debiased: bool = False) -> float:
    """Centred alignment ⟨K, L⟩ / ‖K‖‖L‖ of two kernels (n, n) over the same rows: CKA.

    From 0 to 1, and 0 where a kernel says nothing (all rows alike). ``debiased`` takes the U-statistic of Song et al.
    2012 for every product: 0 on average for independent features, also below 0; it needs four rows.

    >>> round(alignment(np.eye(4), 3 * np.eye(4) + 1), 12)
    1.0
    """
    kernels = [np.asarray(kernel, dtype=np.float64) for kernel in (K, L)]
    shapes = [kernel.shape for kernel in kernels]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
        raise InputError(f"kernels of shapes {shapes[0]} and {shapes[1]}: two of one shape (n, n) are expected")
    if shapes[0][0] < (4 if debiased else 2):
        raise InputError(f"kernels of {shapes[0][0]} rows: at least {4 if debiased else 2} are expected")
    product = _u_product if debiased else _product
    k, l = kernels if debiased else [centre(kernel) for kernel in kernels]
    square = product(k, k) * product(l, l)
    # a constant kernel leaves rounding errors only
    nothing = (1e-14 * np.abs(kernels[0]).max() * np.abs(kernels[1]).max() * len(k)) ** 2
    return float(product(k, l) / np.sqrt(square)) if square > nothing else 0.0


def cka(X: Any, Y: Any, kernel: Kernel = "linear", debiased: bool = False) -> float:
    """Centred kernel alignment of features X (n, d) and Y (n, e) of the same rows.

    Unchanged by rotation, isotropic scaling and shifts of either. With fewer rows than features the plain value is
    high for any two random features; ``debiased`` corrects that.

    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(cka(x, 3 * x[:, ::-1] + 1), 12), cka(x, x[:, :2]) < 0.6
    (1.0, True)
    """
    x, y = _pair(X, Y)
    if kernel == "linear":  # centring first keeps precision when the mean is large
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return alignment(gram(x, kernel), gram(y, kernel), debiased=debiased)


def dissimilarities(X: Any) -> Array:
    """1 − Pearson's correlation of every two rows of X (n, d), the upper triangle: (n(n−1)/2,).

    A row whose values are all equal correlates 0 with every other.

    >>> dissimilarities([[0, 0, 1], [0, 0, 2], [1, 0, 0]])
    array([0. , 1.5, 1.5])
    """
    rows = as_rows(X)
    return _one_minus_cosine(rows - rows.mean(axis=1, keepdims=True))


def rsa(X: Any, Y: Any) -> float:
    """Representational similarity: Spearman's correlation of the dissimilarities of X (n, d) and of Y (n, e).

    From −1 to 1, and 0 where either knows one dissimilarity only. It needs three rows, and two columns on either side.

    >>> x = np.random.default_rng(0).normal(size=(20, 8))
    >>> round(rsa(x, 2 * x + 5), 12)
    1.0
    """
    x, y = _pair(X, Y, fewest=3)
    for name, rows in (("X", x), ("Y", y)):
        if rows.shape[1] < 2:
            raise InputError(f"{name} has one column: rows correlate only over two or more")
    return _spearman(dissimilarities(x), dissimilarities(y))


def parc(features: Any, labels: Any, *, components: int = 32) -> float:
    """PARC: Spearman's correlation between 1 − corr of the features (n, d) and 1 − corr of the one-hot labels (n,).

    From −1 to 1: whether rows of one class are alike and rows of two are not. With n ≥ 4 · ``components`` rows
    (and features of that rank) the features are first reduced to so many principal components and standardised, as
    published (32). With fewer that would whiten the sample until all rows are equally far apart and the score near
    0; there the features are centred only, and their correlation is taken about that centre (the cosine), so that
    rotating or scaling the features changes nothing. Published scores are these times 100.

    Raises ``InputError`` for fewer than three rows, labels that do not fit the rows, and a single class.

    >>> labels = np.repeat([0, 1, 2], 5)
    >>> round(parc(np.eye(3)[labels], labels), 12)
    1.0
    """
    if components < 2:
        raise InputError(f"components is {components}: at least 2 are expected")
    rows, classes = as_rows(features, fewest=3), class_ids(labels)
    if len(classes) != len(rows):
        raise InputError(f"{len(classes)} labels for {len(rows)} rows of features: as many are expected")
    rows = rows - rows.mean(axis=0)
    reduced = _principal(rows, components) if len(rows) >= 4 * components else None
    found = _one_minus_cosine(rows) if reduced is None else dissimilarities(reduced)
    wanted = (classes[:, None] != classes)[np.triu_indices(len(rows), 1)]  # 1 − corr of one-hot rows, up to scale
    return _spearman(found, wanted.astype(np.float64))


def class_ids(labels: Any) -> NDArray[np.int64]:
    """Labels of any kind as class ids 0 … C−1, (n,); ``InputError`` where there is one class only.

    >>> class_ids(["cat", "dog", "cat"])
    array([0, 1, 0])
    """
    if hasattr(labels, "detach"):
        labels = labels.detach().cpu().numpy()
    names = np.asarray(labels)
    if names.ndim != 1:
        raise InputError(f"labels of shape {names.shape}: one class a row is expected")
    known, ids = np.unique(names, return_inverse=True)
    if len(known) < 2:
        raise InputError(f"the labels hold {len(known)} class: at least two are expected")
    return ids.astype(np.int64)


def _pair(X: Any, Y: Any, fewest: int = 2) -> tuple[Array, Array]:
    x, y = as_rows(X, "X", fewest=fewest), as_rows(Y, "Y", fewest=fewest)
    if len(x) != len(y):
        raise InputError(f"X has {len(x)} rows and Y {len(y)}: both must describe the same rows")
    return x, y


def _product(K: Array, L: Array) -> float:
    return float(np.einsum("ij,ij->", K, L))


def _u_product(K: Array, L: Array) -> float:
    """n(n−3) times the unbiased estimate of HSIC: the diagonals are left out."""
    n = len(K)
    k, l = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    rows_k, rows_l = k.sum(axis=0), l.sum(axis=0)
    return _product(k, l) + rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 * float(rows_k @ rows_l) / (n - 2)


def _one_minus_cosine(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    dead = length <= 1e-12 * length.max(initial=0.0)  # no direction: alike to nothing
    unit = np.where(dead, 0.0, rows / np.where(dead, 1.0, length))
    return np.abs(np.round(1 - (unit @ unit.T)[np.triu_indices(len(rows), 1)], 12))  # ties stay ties


def _principal(rows: Array, components: int) -> Array | None:
    """The leading principal components of centred rows, each of variance one and of a sign that the rows decide;
    ``None`` where there are not so many.
    """
    n, d = rows.shape
    if d <= n:
        variances, axes = np.linalg.eigh(rows.T @ rows)
        scores = rows @ axes
    else:
        variances, scores = np.linalg.eigh(rows @ rows.T)
    kept = np.flatnonzero(variances > 1e-10 * variances[-1])[::-1][:components]
    if len(kept) < components:
        return None
    scores = scores[:, kept]
    return scores / scores.std(axis=0) * np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(components)])


def _spearman(a: Array, b: Array) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
