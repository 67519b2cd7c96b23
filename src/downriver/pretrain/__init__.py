"""Pretrain: learn from rows without labels, and know when that saves labels."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.pretrain.conditional_pretraining import conditional_pretraining as conditional_pretraining
    from downriver.pretrain.feedback import AWR as AWR
    from downriver.pretrain.feedback import MLE as MLE
    from downriver.pretrain.feedback import RWR as RWR
    from downriver.pretrain.feedback import Conditional as Conditional
    from downriver.pretrain.feedback import Filtered as Filtered
    from downriver.pretrain.feedback import Objective as Objective
    from downriver.pretrain.feedback import Unlikelihood as Unlikelihood
    from downriver.pretrain.latent import ContrastivePretrainer as ContrastivePretrainer
    from downriver.pretrain.latent import FactorPretrainer as FactorPretrainer
    from downriver.pretrain.latent import MixturePretrainer as MixturePretrainer
    from downriver.pretrain.latent import TwoPhase as TwoPhase
    from downriver.pretrain.latent import informativeness as informativeness
    from downriver.pretrain.meco import MeCoSchedule as MeCoSchedule
    from downriver.pretrain.meco import meco as meco
    from downriver.pretrain.pretraining_advantage import advantage_study as advantage_study
    from downriver.pretrain.pretraining_advantage import bound as bound
    from downriver.pretrain.pretraining_advantage import labels_saved as labels_saved
    from downriver.pretrain.prompt_continued_pretraining import PCP as PCP
    from downriver.pretrain.prompt_continued_pretraining import continued_pretrain as continued_pretrain
    from downriver.pretrain.prompt_continued_pretraining import pcp_corpus as pcp_corpus
    from downriver.pretrain.prompt_continued_pretraining import tapt_corpus as tapt_corpus

METHODS = {
    "conditional_pretraining": "downriver.pretrain.conditional_pretraining:conditional_pretraining",
    "meco": "downriver.pretrain.meco:meco",
}

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "AWR": "downriver.pretrain.feedback:AWR",
        "Conditional": "downriver.pretrain.feedback:Conditional",
        "ContrastivePretrainer": "downriver.pretrain.latent:ContrastivePretrainer",
        "FactorPretrainer": "downriver.pretrain.latent:FactorPretrainer",
        "Filtered": "downriver.pretrain.feedback:Filtered",
        "MLE": "downriver.pretrain.feedback:MLE",
        "MeCoSchedule": "downriver.pretrain.meco:MeCoSchedule",
        "MixturePretrainer": "downriver.pretrain.latent:MixturePretrainer",
        "Objective": "downriver.pretrain.feedback:Objective",
        "PCP": "downriver.pretrain.prompt_continued_pretraining:PCP",
        "RWR": "downriver.pretrain.feedback:RWR",
        "TwoPhase": "downriver.pretrain.latent:TwoPhase",
        "Unlikelihood": "downriver.pretrain.feedback:Unlikelihood",
        "advantage_study": "downriver.pretrain.pretraining_advantage:advantage_study",
        "bound": "downriver.pretrain.pretraining_advantage:bound",
        "continued_pretrain": "downriver.pretrain.prompt_continued_pretraining:continued_pretrain",
        "informativeness": "downriver.pretrain.latent:informativeness",
        "labels_saved": "downriver.pretrain.pretraining_advantage:labels_saved",
        "pcp_corpus": "downriver.pretrain.prompt_continued_pretraining:pcp_corpus",
        "tapt_corpus": "downriver.pretrain.prompt_continued_pretraining:tapt_corpus",
    },
)
