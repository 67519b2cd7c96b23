"""Compress: make one model cheaper to serve, by sparse activations, linear attention or shorter sequences."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.compress.cats import SparsityReport as SparsityReport
    from downriver.compress.cats import cats as cats
    from downriver.compress.cats import gate_sparsity as gate_sparsity
    from downriver.compress.hedgehog import attention_fidelity as attention_fidelity
    from downriver.compress.hedgehog import hedgehog as hedgehog

METHODS = {"cats": "downriver.compress.cats:cats", "hedgehog": "downriver.compress.hedgehog:hedgehog"}
"""Functions ``(model, *, ...)`` or ``(model, task, *, ...)`` that a study's YAML may name."""

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "attention_fidelity": "downriver.compress.hedgehog:attention_fidelity",
        "SparsityReport": "downriver.compress.cats:SparsityReport",
        "gate_sparsity": "downriver.compress.cats:gate_sparsity",
    },
)
