"""Choose what a model learns from: mixtures of domains, fitted on small runs and proposed for the large one."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.data.mix.propose import Mixture as Mixture
    from downriver.data.mix.propose import propose as propose
    from downriver.data.mix.regress import CrossValidation as CrossValidation
    from downriver.data.mix.regress import MixtureRegressor as MixtureRegressor
    from downriver.data.mix.space import MixtureSpace as MixtureSpace
    from downriver.data.mix.space import sample_mixtures as sample_mixtures

METHODS: dict[str, str] = {}

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CrossValidation": "downriver.data.mix.regress:CrossValidation",
        "Mixture": "downriver.data.mix.propose:Mixture",
        "MixtureRegressor": "downriver.data.mix.regress:MixtureRegressor",
        "MixtureSpace": "downriver.data.mix.space:MixtureSpace",
        "propose": "downriver.data.mix.propose:propose",
        "sample_mixtures": "downriver.data.mix.space:sample_mixtures",
    },
)
