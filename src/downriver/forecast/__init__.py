"""Know before you pay: laws that predict a large run from small ones, with intervals and a backtest."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.forecast.alignment import language_shares as language_shares
    from downriver.forecast.alignment import ngram_cross_entropy as ngram_cross_entropy
    from downriver.forecast.alignment import translation_alignment as translation_alignment
    from downriver.forecast.backtest import Backtest as Backtest
    from downriver.forecast.backtest import backtest as backtest
    from downriver.forecast.cod import CODPredictor as CODPredictor
    from downriver.forecast.cod import EndToEndLaw as EndToEndLaw
    from downriver.forecast.cod import LossIntermediate as LossIntermediate
    from downriver.forecast.cod import NoPredictableSubset as NoPredictableSubset
    from downriver.forecast.data_scaling import DataScalingCurve as DataScalingCurve
    from downriver.forecast.difficulty import difficulty_features as difficulty_features
    from downriver.forecast.difficulty import option_pass_rates as option_pass_rates
    from downriver.forecast.difficulty import sampled_pass_rates as sampled_pass_rates
    from downriver.forecast.fit import LawFit as LawFit
    from downriver.forecast.fit import fit_law as fit_law
    from downriver.forecast.fit import fit_laws as fit_laws
    from downriver.forecast.forgetting_law import ForgettingLaw as ForgettingLaw
    from downriver.forecast.ladder import TaskLadder as TaskLadder
    from downriver.forecast.learning_curve import LearningCurve as LearningCurve
    from downriver.forecast.overtraining_law import Chain as Chain
    from downriver.forecast.overtraining_law import DownstreamErrorLaw as DownstreamErrorLaw
    from downriver.forecast.overtraining_law import Forecast as Forecast
    from downriver.forecast.overtraining_law import OverTrainingLaw as OverTrainingLaw
    from downriver.forecast.overtraining_law import forecast as forecast
    from downriver.forecast.overtraining_law import paper_runs as paper_runs
    from downriver.forecast.pareto import LogLinearLaw as LogLinearLaw
    from downriver.forecast.pareto import ParetoPowerLaw as ParetoPowerLaw
    from downriver.forecast.pareto import generalization_gap as generalization_gap
    from downriver.forecast.plan import Plan as Plan
    from downriver.forecast.plan import buy as buy
    from downriver.forecast.plan import cheapest as cheapest
    from downriver.forecast.plan import overtrained as overtrained
    from downriver.forecast.table import RunTable as RunTable
    from downriver.forecast.transfer_law import LawDomainError as LawDomainError
    from downriver.forecast.transfer_law import PowerLossLaw as PowerLossLaw
    from downriver.forecast.transfer_law import PretrainingAdvisor as PretrainingAdvisor
    from downriver.forecast.transfer_law import ScoreLogLaw as ScoreLogLaw
    from downriver.forecast.transfer_law import alignment_verdict as alignment_verdict

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Backtest": "downriver.forecast.backtest:Backtest",
        "CODPredictor": "downriver.forecast.cod:CODPredictor",
        "Chain": "downriver.forecast.overtraining_law:Chain",
        "DataScalingCurve": "downriver.forecast.data_scaling:DataScalingCurve",
        "DownstreamErrorLaw": "downriver.forecast.overtraining_law:DownstreamErrorLaw",
        "EndToEndLaw": "downriver.forecast.cod:EndToEndLaw",
        "Forecast": "downriver.forecast.overtraining_law:Forecast",
        "ForgettingLaw": "downriver.forecast.forgetting_law:ForgettingLaw",
        "LawDomainError": "downriver.forecast.transfer_law:LawDomainError",
        "LawFit": "downriver.forecast.fit:LawFit",
        "LearningCurve": "downriver.forecast.learning_curve:LearningCurve",
        "LogLinearLaw": "downriver.forecast.pareto:LogLinearLaw",
        "LossIntermediate": "downriver.forecast.cod:LossIntermediate",
        "NoPredictableSubset": "downriver.forecast.cod:NoPredictableSubset",
        "OverTrainingLaw": "downriver.forecast.overtraining_law:OverTrainingLaw",
        "ParetoPowerLaw": "downriver.forecast.pareto:ParetoPowerLaw",
        "Plan": "downriver.forecast.plan:Plan",
        "PowerLossLaw": "downriver.forecast.transfer_law:PowerLossLaw",
        "PretrainingAdvisor": "downriver.forecast.transfer_law:PretrainingAdvisor",
        "RunTable": "downriver.forecast.table:RunTable",
        "ScoreLogLaw": "downriver.forecast.transfer_law:ScoreLogLaw",
        "TaskLadder": "downriver.forecast.ladder:TaskLadder",
        "alignment_verdict": "downriver.forecast.transfer_law:alignment_verdict",
        "backtest": "downriver.forecast.backtest:backtest",
        "buy": "downriver.forecast.plan:buy",
        "cheapest": "downriver.forecast.plan:cheapest",
        "difficulty_features": "downriver.forecast.difficulty:difficulty_features",
        "fit_law": "downriver.forecast.fit:fit_law",
        "fit_laws": "downriver.forecast.fit:fit_laws",
        "forecast": "downriver.forecast.overtraining_law:forecast",
        "generalization_gap": "downriver.forecast.pareto:generalization_gap",
        "language_shares": "downriver.forecast.alignment:language_shares",
        "ngram_cross_entropy": "downriver.forecast.alignment:ngram_cross_entropy",
        "option_pass_rates": "downriver.forecast.difficulty:option_pass_rates",
        "overtrained": "downriver.forecast.plan:overtrained",
        "paper_runs": "downriver.forecast.overtraining_law:paper_runs",
        "sampled_pass_rates": "downriver.forecast.difficulty:sampled_pass_rates",
        "translation_alignment": "downriver.forecast.alignment:translation_alignment",
    },
)
