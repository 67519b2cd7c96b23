"""LogME, SFDA and NLEEP against plain loops over the classes, written from the published algorithms.

    python benchmarks/rank_scores.py [--rows 10000] [--features 2048] [--classes 100] [--small 2000 256 20]

LogME at full size has two peers: the algorithm of the first paper (a fixed point on the weights of every class, which
is also what the Transfer Learning Library runs) and the faster one of the second paper (one decomposition, then a loop
over the classes). SFDA's peer makes every class's covariance and solves the generalised eigenproblem twice; NLEEP's
takes scikit-learn's principal components and the same mixture. NLEEP is compared at ``--small`` size, for a mixture of
500 Gaussians in a thousand dimensions does not fit in memory. The scores must agree. Times are CPU seconds (of one
thread with OMP_NUM_THREADS=1), so that other work on the machine counts less; memory is the largest resident set of a
process of its own for each, less what it held before. In the end every score is timed at the small size.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable

import numpy as np
from scipy.linalg import eigh

from downriver.core.cost import metered
from downriver.rank.scores import SCORES, logme, nleep, sfda
from downriver.rank.scores import score as score_of

Score = Callable[[np.ndarray, np.ndarray], float]


def data(rows: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rectified features of a falling spectrum, shifted by class."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    X = rng.normal(size=(rows, features)) + 0.05 * rng.normal(size=(classes, features))[y]
    return np.maximum(X * np.geomspace(1, 0.1, features), 0), y


def logme_weights(X: np.ndarray, y: np.ndarray) -> float:
    """The first paper's algorithm: every class iterates on its d weights and its n residuals (tolerance 1e-3)."""
    n, d = X.shape
    V, s, _ = np.linalg.svd(X.T @ X)
    found = []
    for c in range(y.max() + 1):
        target = (y == c).astype(np.float64)
        projected = V.T @ (X.T @ target)
        alpha = beta = 1.0
        for _ in range(11):
            t = alpha / beta
            gamma = np.sum(s / (s + t))
            m = V @ (projected / (t + s))
            residual = np.sum((target - X @ m) ** 2)
            alpha, beta = gamma / (m @ m + 1e-5), (n - gamma) / (residual + 1e-5)
            if abs(alpha / beta - t) <= 1e-3 * t:
                break
        found.append(evidence(n, d, s, alpha, beta, residual, m @ m))
    return float(np.mean(found))


def logme_one_decomposition(X: np.ndarray, y: np.ndarray) -> float:
    """The second paper's algorithm: left singular vectors once, then every class iterates on d numbers."""
    n, d = X.shape
    _, s, Vt = np.linalg.svd(X.T @ X)
    U = X @ Vt.T / np.sqrt(s)
    found = []
    for c in range(y.max() + 1):
        target = (y == c).astype(np.float64)
        x2 = (U.T @ target) ** 2
        outside = np.sum(target**2) - np.sum(x2)
        alpha = beta = 1.0
        for _ in range(11):
            t = alpha / beta
            gamma = np.sum(s / (s + t))
            m2 = np.sum(s * x2 / (s + t) ** 2)
            residual = np.sum(x2 / (1 + s / t) ** 2) + outside
            alpha, beta = gamma / (m2 + 1e-5), (n - gamma) / (residual + 1e-5)
            if abs(alpha / beta - t) <= 1e-3 * t:
                break
        found.append(evidence(n, d, s, alpha, beta, residual, m2))
    return float(np.mean(found))


def evidence(n: int, d: int, s: np.ndarray, alpha: float, beta: float, residual: float, m2: float) -> float:
    logs = d * np.log(alpha) + n * np.log(beta) - np.sum(np.log(alpha + beta * s)) - n * np.log(2 * np.pi)
    return (logs - beta * residual - alpha * m2) / 2 / n


def sfda_loop(X: np.ndarray, y: np.ndarray) -> float:
    """Scatters class by class, the generalised eigenproblem, the mix row by class, and all of it again."""
    n, classes = len(X), range(y.max() + 1)

    def fit(X: np.ndarray, shrinkage: float | None) -> tuple[np.ndarray, float, np.ndarray]:
        prior = [np.mean(y == c) for c in classes]
        within = np.zeros((X.shape[1], X.shape[1]))
        for c in classes:
            within += prior[c] * np.cov(X[y == c].T, bias=True)
        if shrinkage is None:
            x = within.sum(axis=1)
            for _ in range(6):
                x = within @ x / np.linalg.norm(x)
            shrinkage = max(np.exp(-5 * np.linalg.norm(x)), 1e-10)

        def shrink(S: np.ndarray) -> np.ndarray:
            return (1 - shrinkage) * S + shrinkage * np.trace(S) / len(S) * np.eye(len(S))

        U = eigh(shrink(np.cov(X.T, bias=True)) - shrink(within), shrink(within))[1]
        means = np.stack([X[y == c].mean(axis=0) for c in classes])
        coefficients = means @ U @ U.T
        logits = X @ coefficients.T - np.diag(means @ coefficients.T) / 2 + np.log(prior)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True), shrinkage, means

    p, shrinkage, means = fit(X, None)
    soft = np.exp(p) / np.exp(p).sum(axis=1, keepdims=True)
    mixed = X.copy()
    for c in classes:
        sure = soft[y == c, c][:, None]
        mixed[y == c] = sure * X[y == c] + (1 - sure) * np.delete(means, c, axis=0).mean(axis=0)
    return float(fit(mixed, shrinkage)[0][np.arange(n), y].mean())


def nleep_loop(X: np.ndarray, y: np.ndarray) -> float:
    """Principal components and mixture by scikit-learn, LEEP by loops over classes and rows."""
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    classes, Z = int(y.max()) + 1, PCA(0.8, svd_solver="full").fit_transform(X)
    Z /= Z[:, 0].std()
    theta = GaussianMixture(5 * classes, random_state=0).fit(Z).predict_proba(Z)
    joint = np.zeros((classes, theta.shape[1]))
    for c in range(classes):
        joint[c] = theta[y == c].sum(axis=0) / len(y)
    conditional = joint / joint.sum(axis=0)
    return float(np.mean([np.log(theta[i] @ conditional[y[i]]) for i in range(len(y))]))


def run(score: Score, size: tuple[int, int, int], queue: "multiprocessing.Queue[tuple[float, float, float]]") -> None:
    X, y = data(*size)
    score(*data(60, 8, 3))  # imports
    before = resident()
    begun = time.process_time()
    with metered() as meter:
        value = score(X, y)
    queue.put((value, time.process_time() - begun, meter.cost.peak_memory - before))


def resident() -> float:
    with metered() as meter:
        pass
    return meter.cost.peak_memory


def measure(score: Score, size: tuple[int, int, int]) -> tuple[float, float, float]:
    """Score, CPU seconds and bytes, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[tuple[float, float, float]] = context.Queue()
    process = context.Process(target=run, args=(score, size, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--small", type=int, nargs=3, default=[2000, 256, 20], help="rows, features, classes of NLEEP")
    options = parser.parse_args()
    full, small = (options.rows, options.features, options.classes), tuple(options.small)
    for name, score, size, peers in (
        ("LogME", logme, full, {"second paper's loop": logme_one_decomposition, "first paper's loop": logme_weights}),
        ("SFDA", sfda, full, {"loop": sfda_loop}),
        ("NLEEP", nleep, small, {"loop": nleep_loop}),
    ):
        value, seconds, memory = measure(score, size)
        print(
            f"{name}, {size[0]} x {size[1]}, {size[2]} classes: {seconds:.2f} s, {memory / 1e6:.0f} MB beside X, "
            f"score {value:.6f}",
            flush=True,
        )
        for peer, function in peers.items():
            theirs, their_seconds, their_memory = measure(function, size)
            print(
                f"  {peer}: {their_seconds:.2f} s, {their_memory / 1e6:.0f} MB; ratio {their_seconds / seconds:.1f}x; "
                f"scores differ by {abs(value - theirs):.1e}",
                flush=True,
            )
    X, y = data(*small)
    theta = np.random.default_rng(1).dirichlet(np.ones(100), size=len(y))
    print(f"every score, {small[0]} x {small[1]}, {small[2]} classes (leep and nce: 100 source classes), CPU seconds:")
    for name in SCORES:
        begun = time.process_time()
        score_of(X, y, name, probs=theta)
        print(f"  {name}: {time.process_time() - begun:.3f}", flush=True)


if __name__ == "__main__":
    main()
