"""Make data: queries on which a model fails, judged, paired and answered; contexts that contradict its memory."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.data.synth.context import ContextMixer as ContextMixer
    from downriver.data.synth.context import ContextPrompt as ContextPrompt
    from downriver.data.synth.context import counterfactual as counterfactual
    from downriver.data.synth.diversity import near_duplicates as near_duplicates
    from downriver.data.synth.diversity import self_bleu as self_bleu
    from downriver.data.synth.dpo import dpo as dpo
    from downriver.data.synth.dpo import sft as sft
    from downriver.data.synth.failure import Exploration as Exploration
    from downriver.data.synth.failure import FailureExplorer as FailureExplorer
    from downriver.data.synth.failure import FailureResult as FailureResult
    from downriver.data.synth.failure import FewShotPrompt as FewShotPrompt
    from downriver.data.synth.failure import improve as improve
    from downriver.data.synth.failure import warm_up as warm_up
    from downriver.data.synth.judges import ClassifierJudge as ClassifierJudge
    from downriver.data.synth.judges import EntropyJudge as EntropyJudge
    from downriver.data.synth.judges import ExactMatch as ExactMatch
    from downriver.data.synth.judges import GuardJudge as GuardJudge
    from downriver.data.synth.judges import NumberMatch as NumberMatch
    from downriver.data.synth.judges import PairwiseJudge as PairwiseJudge

_HERE = "downriver.data.synth"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"{_HERE}.context:{name}" for name in ("ContextMixer", "ContextPrompt", "counterfactual")}
    | {name: f"{_HERE}.diversity:{name}" for name in ("near_duplicates", "self_bleu")}
    | {name: f"{_HERE}.dpo:{name}" for name in ("dpo", "sft")}
    | {
        name: f"{_HERE}.failure:{name}"
        for name in ("Exploration", "FailureExplorer", "FailureResult", "FewShotPrompt", "improve", "warm_up")
    }
    | {
        name: f"{_HERE}.judges:{name}"
        for name in ("ClassifierJudge", "EntropyJudge", "ExactMatch", "GuardJudge", "NumberMatch", "PairwiseJudge")
    },
)
