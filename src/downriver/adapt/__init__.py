"""Adapt: train a pretrained model to a task, wholly or in part, under a budget."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.adapt.engine import fine_tune as fine_tune
    from downriver.adapt.full import full as full
    from downriver.adapt.linear_probe import linear_probe as linear_probe
    from downriver.adapt.lora import lora as lora
    from downriver.adapt.lora import merge_adapter as merge_adapter
    from downriver.adapt.trainer import Term as Term

METHODS = {
    "full": "downriver.adapt.full:full",
    "linear_probe": "downriver.adapt.linear_probe:linear_probe",
    "lora": "downriver.adapt.lora:lora",
}

__getattr__, __dir__, __all__ = attach(
    __name__,
    METHODS
    | {
        "Term": "downriver.adapt.trainer:Term",
        "fine_tune": "downriver.adapt.engine:fine_tune",
        "merge_adapter": "downriver.adapt.lora:merge_adapter",
    },
)
