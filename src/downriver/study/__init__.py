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
    from downriver.study.compose import load as load
    from downriver.study.ledger import Failure as Failure
    from downriver.study.ledger import Ledger as Ledger
    from downriver.study.study import Result as Result
    from downriver.study.study import Study as Study
    from downriver.study.study import study as study

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"downriver.study.block:{name}" for name in ("Arm", "shared")}
    | {name: f"downriver.study.study:{name}" for name in ("Result", "Study", "study")}
    | {name: f"downriver.study.claims:{name}" for name in ("Claim", "Verdict", "above", "below", "better", "keeps")}
    | {name: f"downriver.study.ledger:{name}" for name in ("Failure", "Ledger")}
    | {"load": "downriver.study.compose:load"},
)
