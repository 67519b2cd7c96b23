"""Rank: which pretrained model to start from, told by its features on your data before anything is fine-tuned."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.rank.aio_p import ArchPredictor as ArchPredictor
    from downriver.rank.aio_p import LabelScaler as LabelScaler
    from downriver.rank.aio_p import search_smaller as search_smaller
    from downriver.rank.bank import FeatureBank as FeatureBank
    from downriver.rank.ped import PED as PED
    from downriver.rank.rank import Agreement as Agreement
    from downriver.rank.rank import Ranking as Ranking
    from downriver.rank.rank import agreement as agreement
    from downriver.rank.rank import fine_tuning_seconds as fine_tuning_seconds
    from downriver.rank.rank import rank_models as rank_models
    from downriver.rank.rank import with_plasticity as with_plasticity
    from downriver.rank.scores import gbc as gbc
    from downriver.rank.scores import hscore as hscore
    from downriver.rank.scores import knn as knn
    from downriver.rank.scores import leep as leep
    from downriver.rank.scores import linear_probe as linear_probe
    from downriver.rank.scores import logme as logme
    from downriver.rank.scores import nce as nce
    from downriver.rank.scores import nleep as nleep
    from downriver.rank.scores import score as score
    from downriver.rank.scores import sfda as sfda
    from downriver.rank.scores import transrate as transrate

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Agreement": "downriver.rank.rank:Agreement",
        "ArchPredictor": "downriver.rank.aio_p:ArchPredictor",
        "FeatureBank": "downriver.rank.bank:FeatureBank",
        "LabelScaler": "downriver.rank.aio_p:LabelScaler",
        "PED": "downriver.rank.ped:PED",
        "Ranking": "downriver.rank.rank:Ranking",
        "agreement": "downriver.rank.rank:agreement",
        "fine_tuning_seconds": "downriver.rank.rank:fine_tuning_seconds",
        "rank_models": "downriver.rank.rank:rank_models",
        "search_smaller": "downriver.rank.aio_p:search_smaller",
        "with_plasticity": "downriver.rank.rank:with_plasticity",
    }
    | {
        name: f"downriver.rank.scores:{name}"
        for name in (
            "gbc",
            "hscore",
            "knn",
            "leep",
            "linear_probe",
            "logme",
            "nce",
            "nleep",
            "score",
            "sfda",
            "transrate",
        )
    },
)
