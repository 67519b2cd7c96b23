"""Choose documents by a rule and a budget, with one reason for each that is left out; find copies; learn weights."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.data.select.color_filter import ColorFilter as ColorFilter
    from downriver.data.select.color_filter import fit_conditional as fit_conditional
    from downriver.data.select.color_filter import select_by as select_by
    from downriver.data.select.curate import Curator as Curator
    from downriver.data.select.curate import TaskBalance as TaskBalance
    from downriver.data.select.dedup import Duplicates as Duplicates
    from downriver.data.select.dedup import dedup as dedup
    from downriver.data.select.meta_rater import MetaRater as MetaRater
    from downriver.data.select.meta_rater import train_rater as train_rater
    from downriver.data.select.rules import Rule as Rule
    from downriver.data.select.rules import rule as rule
    from downriver.data.select.rules import weighted as weighted
    from downriver.data.select.select import Selection as Selection
    from downriver.data.select.select import select as select
    from downriver.data.select.top import best_rows as best_rows

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ColorFilter": "downriver.data.select.color_filter:ColorFilter",
        "Curator": "downriver.data.select.curate:Curator",
        "Duplicates": "downriver.data.select.dedup:Duplicates",
        "MetaRater": "downriver.data.select.meta_rater:MetaRater",
        "Rule": "downriver.data.select.rules:Rule",
        "Selection": "downriver.data.select.select:Selection",
        "TaskBalance": "downriver.data.select.curate:TaskBalance",
        "best_rows": "downriver.data.select.top:best_rows",
        "dedup": "downriver.data.select.dedup:dedup",
        "fit_conditional": "downriver.data.select.color_filter:fit_conditional",
        "rule": "downriver.data.select.rules:rule",
        "select": "downriver.data.select.select:select",
        "select_by": "downriver.data.select.color_filter:select_by",
        "train_rater": "downriver.data.select.meta_rater:train_rater",
        "weighted": "downriver.data.select.rules:weighted",
    },
)
