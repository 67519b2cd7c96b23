"""The over-training paper's own test, on its public runs: five small ones forecast the large ones.

Reach for it to see how far the law is off on each evaluation set before trusting it on one of your own.
"""

from typing import Literal

import numpy as np

from downriver.forecast.backtest import Backtest, backtest
from downriver.forecast.overtraining_law import OverTrainingLaw, paper_runs
from downriver.forecast.table import RunTable


def recipe(runs: RunTable, objective: Literal["lsq", "huber_log"] = "lsq", level: float = 0.9) -> dict[str, Backtest]:
    """Fit the five small runs of one training set and forecast its largest over-trained and its largest run.

    One backtest for each evaluation set, and one for each of ``avg_subset_error`` and ``avg_error`` (17 and 46 tasks)
    through the chain; its error law has also seen the 1.4B run at 20 tokens a parameter.
    """
    five = paper_runs(runs)
    large = runs.params > 1e9
    seen = large & (runs.params < 2e9) & np.isclose(runs.multiplier, 20, rtol=1e-3)
    rows = five | large
    asked = [(loss, "loss") for loss in runs.losses]
    asked += [(next(iter(runs.losses)), metric) for metric in ("avg_subset_error", "avg_error")]
    return {
        loss if metric == "loss" else metric: backtest(
            OverTrainingLaw(loss=objective),
            runs.select(rows),
            (large & ~seen)[rows],
            metric=metric,
            loss=loss,
            loss_rows=five[rows],
            level=level,
        )
        for loss, metric in asked
    }
