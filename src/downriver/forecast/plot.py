"""A picture of a backtest: what was fitted, the law with its band, and what the hidden runs really reached."""

import os

from downriver.core.io import atomic_write
from downriver.forecast.backtest import Backtest


def plot(test: Backtest, path: str | os.PathLike[str]) -> None:
    """Draw a backtest and save it as PNG, whole or not at all.

    >>> import tempfile, pathlib
    >>> from downriver.forecast import LearningCurve, backtest
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "curve.png"
    >>> n = [50, 100, 200, 400, 800, 1600]
    >>> plot(backtest(LearningCurve(), (n, [0.31, 0.23, 0.19, 0.15, 0.13, 0.12]), hide=2), place)
    >>> place.read_bytes()[1:4]
    b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(test.curve_x, test.curve_low, test.curve_high, alpha=0.15, label=f"{test.level:.0%} interval")
    axes.plot(test.curve_x, test.curve_y, linewidth=1.2, label=test.law)
    axes.plot(test.fit_x, test.fit_y, "o", color="black", markersize=4, label="fitted")
    axes.plot(test.held_x, test.predicted, "D", fillstyle="none", color="tab:red", label="forecast")
    axes.plot(test.held_x, test.held_y, "o", color="tab:red", label="hidden, really reached")
    axes.set(xscale="log", xlabel=test.x_name, ylabel=test.y_name)
    axes.legend(frameon=False)
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
