"""Train: one loop for every method that changes weights, on the Hugging Face ``Trainer``; any budget, exact cost."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.training.engine import fine_tune as fine_tune
    from downriver.training.rows import TokenRows as TokenRows
    from downriver.training.trainer import Term as Term

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Term": "downriver.training.trainer:Term",
        "TokenRows": "downriver.training.rows:TokenRows",
        "fine_tune": "downriver.training.engine:fine_tune",
    },
)
