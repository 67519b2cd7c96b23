"""1 000 bootstrap refits x 108 starts of the over-training law: the batched solver against a loop over curve_fit.

    python benchmarks/forecast_fit.py [--resamples 1000] [--starts 108] [--subset 20]

Both solve the same problems: five runs, four parameters, least squares, from the same starts in the same units, the
best end of each resample kept. The loop is timed on ``--subset`` resamples and scaled up; its two variants are SciPy's
default (MINPACK, numeric jacobian) and MINPACK with the analytic jacobian. The optima of the subset are compared.
Times are CPU seconds, so that other work on the machine counts less.
"""

import argparse
import time
import warnings

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from downriver.forecast.fit import fit_law, solve
from downriver.forecast.forms import TiedChinchilla

N = np.array([10_569_312, 78_914_048, 153_677_376, 411_616_256, 10_569_312], dtype=float)
D = N * [20, 20, 20, 20, 320]


def value(x: np.ndarray, E: float, log_a: float, log_b: float, alpha: float) -> np.ndarray:
    return E + np.exp(log_a - alpha * x[0]) + np.exp(log_b - alpha * x[1])


def jacobian(x: np.ndarray, E: float, log_a: float, log_b: float, alpha: float) -> np.ndarray:
    u, v = np.exp(log_a - alpha * x[0]), np.exp(log_b - alpha * x[1])
    return np.stack([np.ones_like(u), u, v, -(u * x[0] + v * x[1])], axis=1)


def loop(x: np.ndarray, Y: np.ndarray, starts: np.ndarray, jac: object) -> tuple[float, np.ndarray]:
    """CPU seconds, and the least cost of each resample."""
    costs = np.full(len(Y), np.inf)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (RuntimeWarning, OptimizeWarning))
        for i, y in enumerate(Y):
            for start in starts.T:
                try:
                    found, _ = curve_fit(value, x, y, p0=start, jac=jac)
                except RuntimeError:  # no convergence within the default number of calls
                    continue
                costs[i] = min(costs[i], ((value(x, *found) - y) ** 2).sum())
    return time.process_time() - begun, costs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--starts", type=int, default=108)
    parser.add_argument("--subset", type=int, default=20)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    loss = 1.84 + 166 * N**-0.273 + 287 * D**-0.273
    fit = fit_law(TiedChinchilla(), [N, D], loss, n_starts=options.starts)
    Z = fit.form.prepare(fit.X[:, :, None], fit.units)
    Y = loss / fit.units.y * (1 + 0.003 * rng.standard_normal((options.resamples, len(N))))

    begun = time.process_time()
    solved = solve(fit.form, Z, Y, np.ones_like(Y), fit.starts, None)
    ours = time.process_time() - begun
    print(f"{options.resamples} resamples x {options.starts} starts, batched: {ours:.2f} s")

    subset, fits = slice(0, options.subset), options.subset * options.starts
    for name, jac in (("curve_fit, numeric jacobian (its default)", None), ("curve_fit, analytic jacobian", jacobian)):
        seconds, costs = loop(Z[:, :, 0], Y[subset], fit.starts, jac)
        scaled = seconds * options.resamples / options.subset
        print(f"{name}: {fits} fits in {seconds:.2f} s, scaled to all: {scaled:.0f} s, ratio {scaled / ours:.0f}x")
        # curve_fit knows no bounds: where its floor is negative ours stays at 0 and costs more
        free = solved.theta[0, subset] > 0
        worse = (np.sqrt(solved.cost[subset][free]) - np.sqrt(costs[free])).max()
        print(
            f"  root of the cost, ours minus theirs, at most {worse:.1e} ({free.sum()} resamples with a floor above 0)"
        )


if __name__ == "__main__":
    main()
