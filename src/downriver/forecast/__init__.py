"""Know before you pay: laws that predict a large run from small ones, with intervals and a backtest."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.forecast.backtest import Backtest as Backtest
    from downriver.forecast.backtest import backtest as backtest
    from downriver.forecast.fit import LawFit as LawFit
    from downriver.forecast.fit import fit_law as fit_law
    from downriver.forecast.fit import fit_laws as fit_laws
    from downriver.forecast.learning_curve import LearningCurve as LearningCurve
    from downriver.forecast.overtraining_law import Chain as Chain
    from downriver.forecast.overtraining_law import DownstreamErrorLaw as DownstreamErrorLaw
    from downriver.forecast.overtraining_law import Forecast as Forecast
    from downriver.forecast.overtraining_law import OverTrainingLaw as OverTrainingLaw
    from downriver.forecast.overtraining_law import forecast as forecast
    from downriver.forecast.overtraining_law import paper_runs as paper_runs
    from downriver.forecast.table import RunTable as RunTable

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Backtest": "downriver.forecast.backtest:Backtest",
        "Chain": "downriver.forecast.overtraining_law:Chain",
        "DownstreamErrorLaw": "downriver.forecast.overtraining_law:DownstreamErrorLaw",
        "Forecast": "downriver.forecast.overtraining_law:Forecast",
        "LawFit": "downriver.forecast.fit:LawFit",
        "LearningCurve": "downriver.forecast.learning_curve:LearningCurve",
        "OverTrainingLaw": "downriver.forecast.overtraining_law:OverTrainingLaw",
        "RunTable": "downriver.forecast.table:RunTable",
        "backtest": "downriver.forecast.backtest:backtest",
        "fit_law": "downriver.forecast.fit:fit_law",
        "fit_laws": "downriver.forecast.fit:fit_laws",
        "forecast": "downriver.forecast.overtraining_law:forecast",
        "paper_runs": "downriver.forecast.overtraining_law:paper_runs",
    },
)
