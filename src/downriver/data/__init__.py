"""Choose what a model learns from: mixtures of domains, fitted on small runs and proposed for the large one."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.data.annotate.magpie import Annotator as Annotator
    from downriver.data.annotate.magpie import HeuristicAnnotator as HeuristicAnnotator
    from downriver.data.condition.annotate import annotate as annotate
    from downriver.data.condition.control_tokens import ControlTokens as ControlTokens
    from downriver.data.condition.encode import encode as encode
    from downriver.data.condition.metadata import MetadataFormatter as MetadataFormatter
    from downriver.data.condition.pack import Packer as Packer
    from downriver.data.condition.prompt_template import PromptTemplate as PromptTemplate
    from downriver.data.condition.prompt_template import k_shot as k_shot
    from downriver.data.documents import read_documents as read_documents
    from downriver.data.documents import write_documents as write_documents
    from downriver.data.mix.batch import BatchMixtureSampler as BatchMixtureSampler
    from downriver.data.mix.batch import BatchMixtureSpace as BatchMixtureSpace
    from downriver.data.mix.damo import DaMo as DaMo
    from downriver.data.mix.propose import Mixture as Mixture
    from downriver.data.mix.propose import propose as propose
    from downriver.data.mix.regress import CrossValidation as CrossValidation
    from downriver.data.mix.regress import MixtureRegressor as MixtureRegressor
    from downriver.data.mix.sampler import MixtureSampler as MixtureSampler
    from downriver.data.mix.sampler import MixtureStream as MixtureStream
    from downriver.data.mix.space import MixtureSpace as MixtureSpace
    from downriver.data.mix.space import sample_mixtures as sample_mixtures
    from downriver.data.mix.tasks import TaskMixture as TaskMixture
    from downriver.data.score.classifier import ClassifierScorer as ClassifierScorer
    from downriver.data.score.dsir import DSIRScorer as DSIRScorer
    from downriver.data.score.lint import LexiconScorer as LexiconScorer
    from downriver.data.score.lint import PycodestyleScorer as PycodestyleScorer
    from downriver.data.score.lint import RegexPIIScorer as RegexPIIScorer
    from downriver.data.score.loss import LossScorer as LossScorer
    from downriver.data.score.rubric import RubricScorer as RubricScorer
    from downriver.data.score.rules import RuleScorer as RuleScorer
    from downriver.data.score.table import ScoreTable as ScoreTable
    from downriver.data.select.curate import Curator as Curator
    from downriver.data.select.curate import TaskBalance as TaskBalance
    from downriver.data.synth.context import ContextMixer as ContextMixer
    from downriver.data.synth.context import counterfactual as counterfactual
    from downriver.data.synth.failure import FailureExplorer as FailureExplorer
    from downriver.data.synth.failure import FewShotPrompt as FewShotPrompt
    from downriver.data.synth.failure import improve as improve
    from downriver.data.synth.failure import warm_up as warm_up

METHODS = {"k_shot": "downriver.data.condition.prompt_template:k_shot"}

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "Annotator": "downriver.data.annotate.magpie:Annotator",
        "BatchMixtureSampler": "downriver.data.mix.batch:BatchMixtureSampler",
        "BatchMixtureSpace": "downriver.data.mix.batch:BatchMixtureSpace",
        "ClassifierScorer": "downriver.data.score.classifier:ClassifierScorer",
        "ContextMixer": "downriver.data.synth.context:ContextMixer",
        "ControlTokens": "downriver.data.condition.control_tokens:ControlTokens",
        "CrossValidation": "downriver.data.mix.regress:CrossValidation",
        "Curator": "downriver.data.select.curate:Curator",
        "DSIRScorer": "downriver.data.score.dsir:DSIRScorer",
        "DaMo": "downriver.data.mix.damo:DaMo",
        "FailureExplorer": "downriver.data.synth.failure:FailureExplorer",
        "FewShotPrompt": "downriver.data.synth.failure:FewShotPrompt",
        "HeuristicAnnotator": "downriver.data.annotate.magpie:HeuristicAnnotator",
        "LexiconScorer": "downriver.data.score.lint:LexiconScorer",
        "LossScorer": "downriver.data.score.loss:LossScorer",
        "MetadataFormatter": "downriver.data.condition.metadata:MetadataFormatter",
        "Mixture": "downriver.data.mix.propose:Mixture",
        "MixtureRegressor": "downriver.data.mix.regress:MixtureRegressor",
        "MixtureSampler": "downriver.data.mix.sampler:MixtureSampler",
        "MixtureSpace": "downriver.data.mix.space:MixtureSpace",
        "MixtureStream": "downriver.data.mix.sampler:MixtureStream",
        "Packer": "downriver.data.condition.pack:Packer",
        "PromptTemplate": "downriver.data.condition.prompt_template:PromptTemplate",
        "PycodestyleScorer": "downriver.data.score.lint:PycodestyleScorer",
        "RegexPIIScorer": "downriver.data.score.lint:RegexPIIScorer",
        "RubricScorer": "downriver.data.score.rubric:RubricScorer",
        "RuleScorer": "downriver.data.score.rules:RuleScorer",
        "ScoreTable": "downriver.data.score.table:ScoreTable",
        "TaskBalance": "downriver.data.select.curate:TaskBalance",
        "TaskMixture": "downriver.data.mix.tasks:TaskMixture",
        "annotate": "downriver.data.condition.annotate:annotate",
        "counterfactual": "downriver.data.synth.context:counterfactual",
        "encode": "downriver.data.condition.encode:encode",
        "improve": "downriver.data.synth.failure:improve",
        "propose": "downriver.data.mix.propose:propose",
        "read_documents": "downriver.data.documents:read_documents",
        "sample_mixtures": "downriver.data.mix.space:sample_mixtures",
        "warm_up": "downriver.data.synth.failure:warm_up",
        "write_documents": "downriver.data.documents:write_documents",
    },
)
