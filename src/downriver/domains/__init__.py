"""Domains: whole systems of one field, assembled from the rooms."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.domains.bitext import MatchedBitext as MatchedBitext
    from downriver.domains.caption import GraftedVLM as GraftedVLM

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "GraftedVLM": "downriver.domains.caption:GraftedVLM",
        "MatchedBitext": "downriver.domains.bitext:MatchedBitext",
    },
)
