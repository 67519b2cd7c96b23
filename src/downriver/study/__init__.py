"""Declare, run, resume, spread, store and compare: arms × seeds under one budget, each cell measured once."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.study.block import Arm as Arm
    from downriver.study.block import shared as shared
    from downriver.study.claims import Claim as Claim
    from downriver.study.claims import Verdict as Verdict
    from downriver.study.claims import above as above
    from downriver.study.claims import below as below
    from downriver.study.claims import better as better
    from downriver.study.claims import keeps as keeps
    from downriver.study.cocktail import CocktailDesign as CocktailDesign
    from downriver.study.cocktail import cocktail_report as cocktail_report
    from downriver.study.cocktail import cocktail_study as cocktail_study
    from downriver.study.cocktail import recommend as recommend
    from downriver.study.compare_peft import compare_peft as compare_peft
    from downriver.study.compose import load as load
    from downriver.study.ingredients import Ingredient as Ingredient
    from downriver.study.ingredients import instruction_cocktail as instruction_cocktail
    from downriver.study.ledger import Failure as Failure
    from downriver.study.ledger import Ledger as Ledger
    from downriver.study.study import Result as Result
    from downriver.study.study import Study as Study
    from downriver.study.study import study as study
    from downriver.study.transfer_law import TransferLawStudy as TransferLawStudy

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"downriver.study.block:{name}" for name in ("Arm", "shared")}
    | {name: f"downriver.study.study:{name}" for name in ("Result", "Study", "study")}
    | {name: f"downriver.study.claims:{name}" for name in ("Claim", "Verdict", "above", "below", "better", "keeps")}
    | {
        name: f"downriver.study.cocktail:{name}"
        for name in ("CocktailDesign", "cocktail_report", "cocktail_study", "recommend")
    }
    | {name: f"downriver.study.ingredients:{name}" for name in ("Ingredient", "instruction_cocktail")}
    | {name: f"downriver.study.ledger:{name}" for name in ("Failure", "Ledger")}
    | {
        "TransferLawStudy": "downriver.study.transfer_law:TransferLawStudy",
        "compare_peft": "downriver.study.compare_peft:compare_peft",
        "load": "downriver.study.compose:load",
    },
)
