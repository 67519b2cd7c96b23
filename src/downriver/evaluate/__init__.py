"""What a model can do: metrics, predictions, retrieval, and what was kept of what it could do before."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.evaluate.evaluate import evaluate as evaluate
    from downriver.evaluate.predict import Predictions as Predictions
    from downriver.evaluate.predict import predict as predict
    from downriver.evaluate.retention import retention as retention
    from downriver.evaluate.retrieval import half_document_retrieval as half_document_retrieval

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Predictions": "downriver.evaluate.predict:Predictions",
        "evaluate": "downriver.evaluate.evaluate:evaluate",
        "half_document_retrieval": "downriver.evaluate.retrieval:half_document_retrieval",
        "predict": "downriver.evaluate.predict:predict",
        "retention": "downriver.evaluate.retention:retention",
    },
)
