"""Pictures: a backtest, a law with its runs and targets, its residuals, and forecasts against the truth.

Reach for it to look before you believe. Every function saves a PNG, whole or not at all.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from downriver.core.errors import InputError
from downriver.core.io import atomic_write
from downriver.forecast.backtest import CURVE, Backtest
from downriver.forecast.fit import Array
from downriver.forecast.overtraining_law import Chain
from downriver.forecast.table import RunTable

Path_ = str | os.PathLike[str]


def plot(test: Backtest, path: Path_) -> None:
    """Draw a backtest: what was fitted, the law with its band, and what the hidden runs really reached.

    >>> import tempfile, pathlib
    >>> from downriver.forecast import LearningCurve, backtest
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "curve.png"
    >>> n = [50, 100, 200, 400, 800, 1600]
    >>> plot(backtest(LearningCurve(), (n, [0.31, 0.23, 0.19, 0.15, 0.13, 0.12]), hide=2), place)
    >>> place.read_bytes()[1:4]
    b'PNG'
    """
    with _picture(path) as axes:
        axes.fill_between(test.curve_x, test.curve_low, test.curve_high, alpha=0.15, label=f"{test.level:.0%} interval")
        axes.plot(test.curve_x, test.curve_y, linewidth=1.2, label=test.law)
        axes.plot(test.fit_x, test.fit_y, "o", color="black", markersize=4, label="fitted")
        axes.plot(test.held_x, test.predicted, "D", fillstyle="none", color="tab:red", label="forecast")
        axes.plot(test.held_x, test.held_y, "o", color="tab:red", label="hidden, really reached")
        axes.set(xscale="log", xlabel=test.x_name, ylabel=test.y_name)
        axes.legend(frameon=False)


def plot_law(
    chain: Chain, runs: RunTable, path: Path_, targets: Sequence[tuple[float, float]] = (), level: float = 0.9
) -> None:
    """Draw a fitted chain against compute: a curve and its band for the fewest and the most tokens a parameter.

    The runs are dots, darker the longer they were trained for their size; ``targets`` (N, D) are forecasts with their
    intervals.
    """
    truth = _reached(chain, runs)
    known = np.isfinite(truth)
    spread = [6 * N * D for N, D in targets]
    compute = np.geomspace(min([runs.compute.min(), *spread]), max([runs.compute.max(), *spread]), CURVE)
    with _picture(path) as axes:
        for M, colour in dict.fromkeys(
            [(float(runs.multiplier.min()), "tab:blue"), (float(runs.multiplier.max()), "tab:orange")]
        ):
            N = np.sqrt(compute / (6 * M))
            said = [chain.forecast(n, M * n, level) for n in N]
            low, high = np.array([f.interval for f in said]).T
            axes.fill_between(compute, low, high, alpha=0.12, color=colour, linewidth=0)
            axes.plot(
                compute, [f.value for f in said], color=colour, linewidth=1.2, label=f"law, {M:,.3g} tokens a parameter"
            )
        shade = np.log(runs.multiplier[known])
        axes.scatter(
            runs.compute[known],
            truth[known],
            c=shade,
            cmap="Greys",
            vmin=shade.min() - 2,
            s=18,
            edgecolors="black",
            linewidths=0.4,
            label="runs",
            zorder=3,
        )
        if targets:
            said = [chain.forecast(N, D, level) for N, D in targets]
            y = np.array([f.value for f in said])
            ends = np.abs(np.array([f.interval for f in said]).T - y)
            axes.errorbar(
                spread,
                y,
                yerr=np.nan_to_num(ends),
                fmt="D",
                fillstyle="none",
                color="tab:red",
                capsize=3,
                label=f"forecast, {level:.0%} interval",
            )
        axes.set(xscale="log", xlabel="training FLOP", ylabel=chain.metric)
        axes.legend(frameon=False)


def plot_residuals(chain: Chain, runs: RunTable, path: Path_) -> None:
    """Draw what the chain leaves of each run, in percent of what the run reached, against compute."""
    truth = _reached(chain, runs)
    known = np.isfinite(truth)
    said = np.array([chain.forecast(N, D).value for N, D in zip(runs.params, runs.tokens, strict=True)])
    with _picture(path) as axes:
        points = axes.scatter(
            runs.compute[known],
            100 * (said / truth - 1)[known],
            c=np.log10(runs.multiplier[known]),
            cmap="viridis",
            s=22,
        )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.figure.colorbar(points, label="log10 of tokens a parameter")
        axes.set(xscale="log", xlabel="training FLOP", ylabel=f"{chain.metric}: law above the run, %")


def plot_truth(
    truth: Any,
    forecast: Any,
    path: Path_,
    low: Any = None,
    high: Any = None,
    labels: Sequence[str] = (),
    name: str = "",
) -> None:
    """Draw forecasts against the truth, with intervals where given; ``labels`` colours points of one kind alike."""
    truth, forecast = np.asarray(truth, dtype=np.float64), np.asarray(forecast, dtype=np.float64)
    if truth.shape != forecast.shape or truth.ndim != 1 or not len(truth):
        raise InputError(f"truth {truth.shape} and forecast {forecast.shape}: two columns of one length are expected")
    kinds = list(labels) or [""] * len(truth)
    with _picture(path, size=(6, 5)) as axes:
        for number, kind in enumerate(dict.fromkeys(kinds)):
            rows = np.array([k == kind for k in kinds])
            colour = f"C{number % 10}"
            if low is not None and high is not None:
                axes.vlines(truth[rows], np.asarray(low)[rows], np.asarray(high)[rows], color=colour, alpha=0.35)
            axes.plot(truth[rows], forecast[rows], "o", color=colour, markersize=5, label=kind or None)
        ends = [min(truth.min(), forecast.min()), max(truth.max(), forecast.max())]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(xlabel=f"{name} reached".strip(), ylabel=f"{name} forecast".strip())
        if labels:
            axes.legend(frameon=False, fontsize=8)


def _reached(chain: Chain, runs: RunTable) -> Array:
    return runs.losses[chain.loss or next(iter(runs.losses))] if chain.metric == "loss" else runs.metrics[chain.metric]


@contextmanager
def _picture(path: Path_, size: tuple[float, float] = (7, 4.2)) -> Iterator[Any]:
    """Axes to draw on; saved where the block ends without an error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.add_subplot()
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
