"""Adapt: train a pretrained model to a task, wholly or in part, under a budget."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.adapt.alignguard_lora import AlignGuard as AlignGuard
    from downriver.adapt.alignguard_lora import alignguard_lora as alignguard_lora
    from downriver.adapt.alignguard_lora import alignment_drift as alignment_drift
    from downriver.adapt.alignguard_lora import task_fisher as task_fisher
    from downriver.adapt.alignguard_lora import update_norm as update_norm
    from downriver.adapt.alignment_recovery import RecoveryResult as RecoveryResult
    from downriver.adapt.alignment_recovery import recover_alignment as recover_alignment
    from downriver.adapt.bitfit import bitfit as bitfit
    from downriver.adapt.bottleneck import BottleneckConfig as BottleneckConfig
    from downriver.adapt.bottleneck import Bottlenecked as Bottlenecked
    from downriver.adapt.bottleneck import load_bottleneck as load_bottleneck
    from downriver.adapt.distill_weighted import MultiSourceDistiller as MultiSourceDistiller
    from downriver.adapt.distill_weighted import distill_nearest as distill_nearest
    from downriver.adapt.distill_weighted import distill_weighted as distill_weighted
    from downriver.adapt.distill_weighted import task_weights as task_weights
    from downriver.adapt.edit.apply import EditResult as EditResult
    from downriver.adapt.edit.apply import apply_edit as apply_edit
    from downriver.adapt.edit.covariance import key_covariance as key_covariance
    from downriver.adapt.edit.requests import recalls as recalls
    from downriver.adapt.fish_mask import fish_mask as fish_mask
    from downriver.adapt.fisher import FisherSubspace as FisherSubspace
    from downriver.adapt.fixmatch import fixmatch as fixmatch
    from downriver.adapt.full import full as full
    from downriver.adapt.kaft import kaft as kaft
    from downriver.adapt.lambda_sweep import lambda_sweep as lambda_sweep
    from downriver.adapt.linear_probe import linear_probe as linear_probe
    from downriver.adapt.lora import lora as lora
    from downriver.adapt.lora import merge_adapter as merge_adapter
    from downriver.adapt.loramoe import LoRAMoE as LoRAMoE
    from downriver.adapt.loramoe import LoRAMoEConfig as LoRAMoEConfig
    from downriver.adapt.loramoe import add_loramoe as add_loramoe
    from downriver.adapt.loramoe import balance_term as balance_term
    from downriver.adapt.loramoe import loramoe as loramoe
    from downriver.adapt.loramoe import merge_static as merge_static
    from downriver.adapt.loramoe import routing_report as routing_report
    from downriver.adapt.loramoe_files import load_loramoe as load_loramoe
    from downriver.adapt.loramoe_files import to_peft_adapters as to_peft_adapters
    from downriver.adapt.multi_teacher import SourceModel as SourceModel
    from downriver.adapt.opt_iml import InstructionPacker as InstructionPacker
    from downriver.adapt.opt_iml import opt_iml as opt_iml
    from downriver.adapt.peft_advisor import Advice as Advice
    from downriver.adapt.peft_advisor import advise as advise
    from downriver.adapt.peft_advisor import read_comparison as read_comparison
    from downriver.adapt.peft_advisor import read_ledger as read_ledger
    from downriver.adapt.peft_catalogue import catalogue as catalogue
    from downriver.adapt.peft_catalogue import method as method
    from downriver.adapt.peft_tuning import peft as peft
    from downriver.adapt.prompt_ft import PromptClassifier as PromptClassifier
    from downriver.adapt.subnetwork import subnetwork_only as subnetwork_only
    from downriver.adapt.subnetwork import train_subnetwork as train_subnetwork
    from downriver.adapt.unsupervised_prompts import UnsupervisedPromptLearner as UnsupervisedPromptLearner
    from downriver.adapt.with_terms import WithTerms as WithTerms
    from downriver.training.engine import fine_tune as fine_tune
    from downriver.training.trainer import Term as Term

METHODS = {
    "alignguard_lora": "downriver.adapt.alignguard_lora:alignguard_lora",
    "bitfit": "downriver.adapt.bitfit:bitfit",
    "distill_nearest": "downriver.adapt.distill_weighted:distill_nearest",
    "distill_weighted": "downriver.adapt.distill_weighted:distill_weighted",
    "full": "downriver.adapt.full:full",
    "linear_probe": "downriver.adapt.linear_probe:linear_probe",
    "lora": "downriver.adapt.lora:lora",
    "loramoe": "downriver.adapt.loramoe:loramoe",
    "peft": "downriver.adapt.peft_tuning:peft",
}

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "Advice": "downriver.adapt.peft_advisor:Advice",
        "AlignGuard": "downriver.adapt.alignguard_lora:AlignGuard",
        "BottleneckConfig": "downriver.adapt.bottleneck:BottleneckConfig",
        "Bottlenecked": "downriver.adapt.bottleneck:Bottlenecked",
        "EditResult": "downriver.adapt.edit.apply:EditResult",
        "FisherSubspace": "downriver.adapt.fisher:FisherSubspace",
        "InstructionPacker": "downriver.adapt.opt_iml:InstructionPacker",
        "LoRAMoE": "downriver.adapt.loramoe:LoRAMoE",
        "LoRAMoEConfig": "downriver.adapt.loramoe:LoRAMoEConfig",
        "MultiSourceDistiller": "downriver.adapt.distill_weighted:MultiSourceDistiller",
        "PromptClassifier": "downriver.adapt.prompt_ft:PromptClassifier",
        "RecoveryResult": "downriver.adapt.alignment_recovery:RecoveryResult",
        "SourceModel": "downriver.adapt.multi_teacher:SourceModel",
        "UnsupervisedPromptLearner": "downriver.adapt.unsupervised_prompts:UnsupervisedPromptLearner",
        "Term": "downriver.training.trainer:Term",
        "WithTerms": "downriver.adapt.with_terms:WithTerms",
        "add_loramoe": "downriver.adapt.loramoe:add_loramoe",
        "advise": "downriver.adapt.peft_advisor:advise",
        "alignment_drift": "downriver.adapt.alignguard_lora:alignment_drift",
        "apply_edit": "downriver.adapt.edit.apply:apply_edit",
        "balance_term": "downriver.adapt.loramoe:balance_term",
        "catalogue": "downriver.adapt.peft_catalogue:catalogue",
        "fine_tune": "downriver.training.engine:fine_tune",
        "fish_mask": "downriver.adapt.fish_mask:fish_mask",
        "fixmatch": "downriver.adapt.fixmatch:fixmatch",
        "kaft": "downriver.adapt.kaft:kaft",
        "key_covariance": "downriver.adapt.edit.covariance:key_covariance",
        "lambda_sweep": "downriver.adapt.lambda_sweep:lambda_sweep",
        "load_bottleneck": "downriver.adapt.bottleneck:load_bottleneck",
        "load_loramoe": "downriver.adapt.loramoe_files:load_loramoe",
        "merge_adapter": "downriver.adapt.lora:merge_adapter",
        "merge_static": "downriver.adapt.loramoe:merge_static",
        "method": "downriver.adapt.peft_catalogue:method",
        "opt_iml": "downriver.adapt.opt_iml:opt_iml",
        "read_comparison": "downriver.adapt.peft_advisor:read_comparison",
        "read_ledger": "downriver.adapt.peft_advisor:read_ledger",
        "recalls": "downriver.adapt.edit.requests:recalls",
        "recover_alignment": "downriver.adapt.alignment_recovery:recover_alignment",
        "routing_report": "downriver.adapt.loramoe:routing_report",
        "subnetwork_only": "downriver.adapt.subnetwork:subnetwork_only",
        "task_fisher": "downriver.adapt.alignguard_lora:task_fisher",
        "train_subnetwork": "downriver.adapt.subnetwork:train_subnetwork",
        "task_weights": "downriver.adapt.distill_weighted:task_weights",
        "to_peft_adapters": "downriver.adapt.loramoe_files:to_peft_adapters",
        "update_norm": "downriver.adapt.alignguard_lora:update_norm",
    },
)
