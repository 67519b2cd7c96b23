"""Pretrain: learn from rows without labels, and know when that saves labels."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.pretrain.latent import ContrastivePretrainer as ContrastivePretrainer
    from downriver.pretrain.latent import FactorPretrainer as FactorPretrainer
    from downriver.pretrain.latent import MixturePretrainer as MixturePretrainer
    from downriver.pretrain.latent import TwoPhase as TwoPhase
    from downriver.pretrain.latent import informativeness as informativeness
    from downriver.pretrain.pretraining_advantage import advantage_study as advantage_study
    from downriver.pretrain.pretraining_advantage import bound as bound
    from downriver.pretrain.pretraining_advantage import labels_saved as labels_saved

METHODS: dict[str, str] = {}

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "ContrastivePretrainer": "downriver.pretrain.latent:ContrastivePretrainer",
        "FactorPretrainer": "downriver.pretrain.latent:FactorPretrainer",
        "MixturePretrainer": "downriver.pretrain.latent:MixturePretrainer",
        "TwoPhase": "downriver.pretrain.latent:TwoPhase",
        "advantage_study": "downriver.pretrain.pretraining_advantage:advantage_study",
        "bound": "downriver.pretrain.pretraining_advantage:bound",
        "informativeness": "downriver.pretrain.latent:informativeness",
        "labels_saved": "downriver.pretrain.pretraining_advantage:labels_saved",
    },
)
