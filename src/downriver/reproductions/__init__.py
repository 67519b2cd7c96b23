"""One file a paper: what it claims and the study that tests the claim."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.reproductions.paper import Paper as Paper
    from downriver.reproductions.paper import catalogue as catalogue
    from downriver.reproductions.paper import evidence as evidence
    from downriver.reproductions.paper import find as find
    from downriver.reproductions.reproduce import reproduce as reproduce

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"downriver.reproductions.paper:{name}" for name in ("Paper", "catalogue", "evidence", "find")}
    | {"reproduce": "downriver.reproductions.reproduce:reproduce"},
)
