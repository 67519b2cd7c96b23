"""Compress: make one model cheaper to serve, by sparse activations, linear attention or shorter sequences."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.compress.cats import SparsityReport as SparsityReport
    from downriver.compress.cats import cats as cats
    from downriver.compress.cats import gate_sparsity as gate_sparsity
    from downriver.compress.hedgehog import attention_fidelity as attention_fidelity
    from downriver.compress.hedgehog import hedgehog as hedgehog
    from downriver.compress.token_merging import TokenMerge as TokenMerge
    from downriver.compress.token_merging import add_token_merging as add_token_merging
    from downriver.compress.token_merging import restore_token_merging as restore_token_merging

METHODS = {"cats": "downriver.compress.cats:cats", "hedgehog": "downriver.compress.hedgehog:hedgehog"}
"""Functions ``(model, *, ...)`` or ``(model, task, *, ...)`` that a study's YAML may name."""

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "attention_fidelity": "downriver.compress.hedgehog:attention_fidelity",
        "SparsityReport": "downriver.compress.cats:SparsityReport",
        "TokenMerge": "downriver.compress.token_merging:TokenMerge",
        "add_token_merging": "downriver.compress.token_merging:add_token_merging",
        "gate_sparsity": "downriver.compress.cats:gate_sparsity",
        "restore_token_merging": "downriver.compress.token_merging:restore_token_merging",
    },
)
