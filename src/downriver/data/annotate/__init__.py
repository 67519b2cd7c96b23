"""Say of every conversation what it is and how good: task, quality, difficulty, safety, reward."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.data.annotate.magpie import AnnotationTable as AnnotationTable
    from downriver.data.annotate.magpie import Annotator as Annotator
    from downriver.data.annotate.magpie import HeuristicAnnotator as HeuristicAnnotator

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"downriver.data.annotate.magpie:{name}" for name in ("AnnotationTable", "Annotator", "HeuristicAnnotator")},
)
