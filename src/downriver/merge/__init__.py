"""Combine models that come from one base without training: in memory, or on disk within a declared memory."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.merge.adapter import extract_adapter as extract_adapter
    from downriver.merge.average import Average as Average
    from downriver.merge.average import average as average
    from downriver.merge.bam import bam as bam
    from downriver.merge.breadcrumbs import Breadcrumbs as Breadcrumbs
    from downriver.merge.breadcrumbs import breadcrumbs as breadcrumbs
    from downriver.merge.dare import Dare as Dare
    from downriver.merge.dare import dare as dare
    from downriver.merge.della import Della as Della
    from downriver.merge.della import della as della
    from downriver.merge.distill import HintDistiller as HintDistiller
    from downriver.merge.distill import LabelDistiller as LabelDistiller
    from downriver.merge.distill import RelationDistiller as RelationDistiller
    from downriver.merge.engine import merge as merge
    from downriver.merge.fisher import Fisher as Fisher
    from downriver.merge.fisher import diagonal_fisher as diagonal_fisher
    from downriver.merge.fisher import fisher as fisher
    from downriver.merge.inspect import conflicts as conflicts
    from downriver.merge.mergekit import read_mergekit as read_mergekit
    from downriver.merge.method import Method as Method
    from downriver.merge.model_stock import ModelStock as ModelStock
    from downriver.merge.model_stock import model_stock as model_stock
    from downriver.merge.moe_report import MoEReport as MoEReport
    from downriver.merge.moe_report import moe_report as moe_report
    from downriver.merge.passthrough import Passthrough as Passthrough
    from downriver.merge.passthrough import stack as stack
    from downriver.merge.patch import patch_checkpoint as patch_checkpoint
    from downriver.merge.report import MergeReport as MergeReport
    from downriver.merge.rl_subnetwork import DeltaReport as DeltaReport
    from downriver.merge.rl_subnetwork import delta_stats as delta_stats
    from downriver.merge.rl_subnetwork import subnetwork as subnetwork
    from downriver.merge.sce import Sce as Sce
    from downriver.merge.sce import sce as sce
    from downriver.merge.search import search_lambda as search_lambda
    from downriver.merge.skill_grafting import Graft as Graft
    from downriver.merge.skill_grafting import graft as graft
    from downriver.merge.skill_grafting import localize_skill as localize_skill
    from downriver.merge.slerp import Slerp as Slerp
    from downriver.merge.slerp import slerp as slerp
    from downriver.merge.stores import open_store as open_store
    from downriver.merge.talking_models import DistillReport as DistillReport
    from downriver.merge.talking_models import InteractiveDistiller as InteractiveDistiller
    from downriver.merge.talking_models import talking_models as talking_models
    from downriver.merge.task_arithmetic import TaskArithmetic as TaskArithmetic
    from downriver.merge.task_arithmetic import task_arithmetic as task_arithmetic
    from downriver.merge.ties import Ties as Ties
    from downriver.merge.ties import ties as ties
    from downriver.merge.vocabulary import align_vocabularies as align_vocabularies
    from downriver.nn.select import kth_magnitude as kth_magnitude
    from downriver.nn.select import quantile as quantile

METHODS = {
    "average": "downriver.merge.average:average",
    "bam": "downriver.merge.bam:bam",
    "breadcrumbs": "downriver.merge.breadcrumbs:breadcrumbs",
    "dare": "downriver.merge.dare:dare",
    "della": "downriver.merge.della:della",
    "fisher": "downriver.merge.fisher:fisher",
    "model_stock": "downriver.merge.model_stock:model_stock",
    "sce": "downriver.merge.sce:sce",
    "slerp": "downriver.merge.slerp:slerp",
    "task_arithmetic": "downriver.merge.task_arithmetic:task_arithmetic",
    "ties": "downriver.merge.ties:ties",
}
"""Functions ``(models, base, *, ...)`` that a study's YAML may name."""

CLASSES = (
    "Average",
    "Breadcrumbs",
    "Dare",
    "Della",
    "Fisher",
    "ModelStock",
    "Passthrough",
    "Sce",
    "Slerp",
    "TaskArithmetic",
    "Ties",
)
"""The same methods for ``merge``, where models are on disk."""

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "Average": "downriver.merge.average:Average",
        "Breadcrumbs": "downriver.merge.breadcrumbs:Breadcrumbs",
        "Dare": "downriver.merge.dare:Dare",
        "Della": "downriver.merge.della:Della",
        "DistillReport": "downriver.merge.talking_models:DistillReport",
        "Fisher": "downriver.merge.fisher:Fisher",
        "HintDistiller": "downriver.merge.distill:HintDistiller",
        "InteractiveDistiller": "downriver.merge.talking_models:InteractiveDistiller",
        "LabelDistiller": "downriver.merge.distill:LabelDistiller",
        "MergeReport": "downriver.merge.report:MergeReport",
        "Method": "downriver.merge.method:Method",
        "ModelStock": "downriver.merge.model_stock:ModelStock",
        "MoEReport": "downriver.merge.moe_report:MoEReport",
        "Passthrough": "downriver.merge.passthrough:Passthrough",
        "RelationDistiller": "downriver.merge.distill:RelationDistiller",
        "Sce": "downriver.merge.sce:Sce",
        "Slerp": "downriver.merge.slerp:Slerp",
        "TaskArithmetic": "downriver.merge.task_arithmetic:TaskArithmetic",
        "Ties": "downriver.merge.ties:Ties",
        "align_vocabularies": "downriver.merge.vocabulary:align_vocabularies",
        "conflicts": "downriver.merge.inspect:conflicts",
        "DeltaReport": "downriver.merge.rl_subnetwork:DeltaReport",
        "delta_stats": "downriver.merge.rl_subnetwork:delta_stats",
        "subnetwork": "downriver.merge.rl_subnetwork:subnetwork",
        "diagonal_fisher": "downriver.merge.fisher:diagonal_fisher",
        "kth_magnitude": "downriver.nn.select:kth_magnitude",
        "Graft": "downriver.merge.skill_grafting:Graft",
        "extract_adapter": "downriver.merge.adapter:extract_adapter",
        "graft": "downriver.merge.skill_grafting:graft",
        "localize_skill": "downriver.merge.skill_grafting:localize_skill",
        "merge": "downriver.merge.engine:merge",
        "moe_report": "downriver.merge.moe_report:moe_report",
        "open_store": "downriver.merge.stores:open_store",
        "patch_checkpoint": "downriver.merge.patch:patch_checkpoint",
        "quantile": "downriver.nn.select:quantile",
        "read_mergekit": "downriver.merge.mergekit:read_mergekit",
        "search_lambda": "downriver.merge.search:search_lambda",
        "stack": "downriver.merge.passthrough:stack",
        "talking_models": "downriver.merge.talking_models:talking_models",
    },
)
