"""Scores of documents: quality rules, n-gram importance, losses, classifiers, judges, and the table that keeps them."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.data.score.classifier import ClassifierScorer as ClassifierScorer
    from downriver.data.score.dsir import DSIRScorer as DSIRScorer
    from downriver.data.score.lint import LexiconScorer as LexiconScorer
    from downriver.data.score.lint import PycodestyleScorer as PycodestyleScorer
    from downriver.data.score.lint import RegexPIIScorer as RegexPIIScorer
    from downriver.data.score.loss import LossScorer as LossScorer
    from downriver.data.score.rubric import RubricScorer as RubricScorer
    from downriver.data.score.rules import RuleScorer as RuleScorer
    from downriver.data.score.scorer import Scorer as Scorer
    from downriver.data.score.table import ScoreTable as ScoreTable

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ClassifierScorer": "downriver.data.score.classifier:ClassifierScorer",
        "DSIRScorer": "downriver.data.score.dsir:DSIRScorer",
        "LexiconScorer": "downriver.data.score.lint:LexiconScorer",
        "LossScorer": "downriver.data.score.loss:LossScorer",
        "PycodestyleScorer": "downriver.data.score.lint:PycodestyleScorer",
        "RegexPIIScorer": "downriver.data.score.lint:RegexPIIScorer",
        "RubricScorer": "downriver.data.score.rubric:RubricScorer",
        "RuleScorer": "downriver.data.score.rules:RuleScorer",
        "ScoreTable": "downriver.data.score.table:ScoreTable",
        "Scorer": "downriver.data.score.scorer:Scorer",
    },
)
