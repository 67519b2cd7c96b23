"""Code: what a compiler sees as one unit and a tokenizer cuts into several, and merging it again inside a model."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.domains.code.subtokens import DataCollatorWithGroups as DataCollatorWithGroups
    from downriver.domains.code.subtokens import GroupingTokenizer as GroupingTokenizer
    from downriver.domains.code.subtokens import MergeStats as MergeStats
    from downriver.domains.code.subtokens import SubtokenGrouper as SubtokenGrouper
    from downriver.domains.code.subtokens import merge_stats as merge_stats
    from downriver.domains.code.units import Unit as Unit
    from downriver.domains.code.units import split as split

_HERE = "downriver.domains.code"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "DataCollatorWithGroups": f"{_HERE}.subtokens:DataCollatorWithGroups",
        "GroupingTokenizer": f"{_HERE}.subtokens:GroupingTokenizer",
        "MergeStats": f"{_HERE}.subtokens:MergeStats",
        "SubtokenGrouper": f"{_HERE}.subtokens:SubtokenGrouper",
        "Unit": f"{_HERE}.units:Unit",
        "merge_stats": f"{_HERE}.subtokens:merge_stats",
        "split": f"{_HERE}.units:split",
    },
)
