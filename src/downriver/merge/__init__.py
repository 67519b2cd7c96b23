"""Combine models that come from one base without training: in memory, or on disk within a declared memory."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.merge.average import Average as Average
    from downriver.merge.average import average as average
    from downriver.merge.engine import merge as merge
    from downriver.merge.inspect import conflicts as conflicts
    from downriver.merge.mergekit import read_mergekit as read_mergekit
    from downriver.merge.method import Method as Method
    from downriver.merge.report import MergeReport as MergeReport
    from downriver.merge.search import search_lambda as search_lambda
    from downriver.nn.select import kth_magnitude as kth_magnitude
    from downriver.nn.select import quantile as quantile
    from downriver.merge.stores import open_store as open_store
    from downriver.merge.task_arithmetic import TaskArithmetic as TaskArithmetic
    from downriver.merge.task_arithmetic import task_arithmetic as task_arithmetic
    from downriver.merge.ties import Ties as Ties
    from downriver.merge.ties import ties as ties

METHODS = {
    "average": "downriver.merge.average:average",
    "task_arithmetic": "downriver.merge.task_arithmetic:task_arithmetic",
    "ties": "downriver.merge.ties:ties",
}
"""Functions ``(models, base, *, ...)`` that a study's YAML may name."""

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "Average": "downriver.merge.average:Average",
        "MergeReport": "downriver.merge.report:MergeReport",
        "Method": "downriver.merge.method:Method",
        "TaskArithmetic": "downriver.merge.task_arithmetic:TaskArithmetic",
        "Ties": "downriver.merge.ties:Ties",
        "conflicts": "downriver.merge.inspect:conflicts",
        "kth_magnitude": "downriver.nn.select:kth_magnitude",
        "merge": "downriver.merge.engine:merge",
        "open_store": "downriver.merge.stores:open_store",
        "quantile": "downriver.nn.select:quantile",
        "read_mergekit": "downriver.merge.mergekit:read_mergekit",
        "search_lambda": "downriver.merge.search:search_lambda",
    },
)
