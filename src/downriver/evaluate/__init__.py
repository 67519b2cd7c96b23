"""What a model can do: metrics, predictions, retrieval, and what was kept of what it could do before."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.evaluate.code_metrics import exact_match_at_k as exact_match_at_k
    from downriver.evaluate.code_metrics import pass_at_k as pass_at_k
    from downriver.evaluate.collapse import Collapsed as Collapsed
    from downriver.evaluate.collapse import CollapseGuard as CollapseGuard
    from downriver.evaluate.collapse import CollapseWarning as CollapseWarning
    from downriver.evaluate.collapse import GuardReport as GuardReport
    from downriver.evaluate.collapse import surrogate_validity as surrogate_validity
    from downriver.evaluate.context_use import ContextUse as ContextUse
    from downriver.evaluate.context_use import knowledge_conflict_eval as knowledge_conflict_eval
    from downriver.evaluate.evaluate import evaluate as evaluate
    from downriver.evaluate.generalization import by_level as by_level
    from downriver.evaluate.generalization import evaluate_generalization as evaluate_generalization
    from downriver.evaluate.geometry import GeometryReport as GeometryReport
    from downriver.evaluate.geometry import ccgp as ccgp
    from downriver.evaluate.geometry import geometry_report as geometry_report
    from downriver.evaluate.geometry import parallelism_score as parallelism_score
    from downriver.evaluate.geometry import participation_ratio as participation_ratio
    from downriver.evaluate.geometry_task import GeometryTask as GeometryTask
    from downriver.evaluate.geometry_task import random_task as random_task
    from downriver.evaluate.geometry_task import xor_task as xor_task
    from downriver.evaluate.layers import layer_features as layer_features
    from downriver.evaluate.longcontext import Needle as Needle
    from downriver.evaluate.longcontext import NeedleGrid as NeedleGrid
    from downriver.evaluate.longcontext import PerplexityCurve as PerplexityCurve
    from downriver.evaluate.longcontext import draw_curves as draw_curves
    from downriver.evaluate.longcontext import needle_grid as needle_grid
    from downriver.evaluate.longcontext import ppl_curve as ppl_curve
    from downriver.evaluate.perplexity import PerplexityReport as PerplexityReport
    from downriver.evaluate.perplexity import SurrogatePerplexity as SurrogatePerplexity
    from downriver.evaluate.perplexity import perplexity as perplexity
    from downriver.evaluate.predict import Predictions as Predictions
    from downriver.evaluate.predict import predict as predict
    from downriver.evaluate.readers import CausalReader as CausalReader
    from downriver.evaluate.readers import DiffusionReader as DiffusionReader
    from downriver.evaluate.readers import Reader as Reader
    from downriver.evaluate.retention import retention as retention
    from downriver.evaluate.retrieval import half_document_retrieval as half_document_retrieval
    from downriver.evaluate.robustness import robustness as robustness
    from downriver.evaluate.safety import safety as safety
    from downriver.evaluate.sandbox import run_python as run_python

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CausalReader": "downriver.evaluate.readers:CausalReader",
        "CollapseGuard": "downriver.evaluate.collapse:CollapseGuard",
        "CollapseWarning": "downriver.evaluate.collapse:CollapseWarning",
        "Collapsed": "downriver.evaluate.collapse:Collapsed",
        "ContextUse": "downriver.evaluate.context_use:ContextUse",
        "DiffusionReader": "downriver.evaluate.readers:DiffusionReader",
        "GeometryReport": "downriver.evaluate.geometry:GeometryReport",
        "GeometryTask": "downriver.evaluate.geometry_task:GeometryTask",
        "GuardReport": "downriver.evaluate.collapse:GuardReport",
        "Needle": "downriver.evaluate.longcontext:Needle",
        "NeedleGrid": "downriver.evaluate.longcontext:NeedleGrid",
        "PerplexityCurve": "downriver.evaluate.longcontext:PerplexityCurve",
        "PerplexityReport": "downriver.evaluate.perplexity:PerplexityReport",
        "Predictions": "downriver.evaluate.predict:Predictions",
        "Reader": "downriver.evaluate.readers:Reader",
        "SurrogatePerplexity": "downriver.evaluate.perplexity:SurrogatePerplexity",
        "by_level": "downriver.evaluate.generalization:by_level",
        "ccgp": "downriver.evaluate.geometry:ccgp",
        "draw_curves": "downriver.evaluate.longcontext:draw_curves",
        "evaluate": "downriver.evaluate.evaluate:evaluate",
        "evaluate_generalization": "downriver.evaluate.generalization:evaluate_generalization",
        "exact_match_at_k": "downriver.evaluate.code_metrics:exact_match_at_k",
        "geometry_report": "downriver.evaluate.geometry:geometry_report",
        "half_document_retrieval": "downriver.evaluate.retrieval:half_document_retrieval",
        "knowledge_conflict_eval": "downriver.evaluate.context_use:knowledge_conflict_eval",
        "layer_features": "downriver.evaluate.layers:layer_features",
        "needle_grid": "downriver.evaluate.longcontext:needle_grid",
        "parallelism_score": "downriver.evaluate.geometry:parallelism_score",
        "participation_ratio": "downriver.evaluate.geometry:participation_ratio",
        "pass_at_k": "downriver.evaluate.code_metrics:pass_at_k",
        "perplexity": "downriver.evaluate.perplexity:perplexity",
        "ppl_curve": "downriver.evaluate.longcontext:ppl_curve",
        "predict": "downriver.evaluate.predict:predict",
        "run_python": "downriver.evaluate.sandbox:run_python",
        "random_task": "downriver.evaluate.geometry_task:random_task",
        "retention": "downriver.evaluate.retention:retention",
        "robustness": "downriver.evaluate.robustness:robustness",
        "safety": "downriver.evaluate.safety:safety",
        "surrogate_validity": "downriver.evaluate.collapse:surrogate_validity",
        "xor_task": "downriver.evaluate.geometry_task:xor_task",
    },
)
