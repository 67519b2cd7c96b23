"""Edit single facts in the weights of a language model: fine-tuning, ROME, consistent ROME and MEMIT."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.adapt.edit.apply import EditResult as EditResult
    from downriver.adapt.edit.apply import apply_edit as apply_edit
    from downriver.adapt.edit.covariance import key_covariance as key_covariance
    from downriver.adapt.edit.ft import Ft as Ft
    from downriver.adapt.edit.memit import Memit as Memit
    from downriver.adapt.edit.projections import projections as projections
    from downriver.adapt.edit.requests import Request as Request
    from downriver.adapt.edit.requests import recalls as recalls
    from downriver.adapt.edit.rome import Rome as Rome
    from downriver.adapt.edit.rome import UnstableEdit as UnstableEdit

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "EditResult": "downriver.adapt.edit.apply:EditResult",
        "Ft": "downriver.adapt.edit.ft:Ft",
        "Memit": "downriver.adapt.edit.memit:Memit",
        "Request": "downriver.adapt.edit.requests:Request",
        "Rome": "downriver.adapt.edit.rome:Rome",
        "UnstableEdit": "downriver.adapt.edit.rome:UnstableEdit",
        "apply_edit": "downriver.adapt.edit.apply:apply_edit",
        "key_covariance": "downriver.adapt.edit.covariance:key_covariance",
        "projections": "downriver.adapt.edit.projections:projections",
        "recalls": "downriver.adapt.edit.requests:recalls",
    },
)
