"""Condition: what stands before a text, what of a row is learnt, and how rows fill blocks."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.data.condition.annotate import annotate as annotate
    from downriver.data.condition.annotate import keep_aligned as keep_aligned
    from downriver.data.condition.annotate import segments as segments
    from downriver.data.condition.control_tokens import ControlTokens as ControlTokens
    from downriver.data.condition.control_tokens import misalignment_report as misalignment_report
    from downriver.data.condition.control_tokens import sample_aligned as sample_aligned
    from downriver.data.condition.control_tokens import segment_rows as segment_rows
    from downriver.data.condition.encode import Encoded as Encoded
    from downriver.data.condition.encode import Part as Part
    from downriver.data.condition.encode import encode as encode
    from downriver.data.condition.encode import encode_all as encode_all
    from downriver.data.condition.generate import continue_ids as continue_ids
    from downriver.data.condition.metadata import MetadataFormatter as MetadataFormatter
    from downriver.data.condition.metadata import condition as condition
    from downriver.data.condition.metadata import generate as generate
    from downriver.data.condition.metadata import host as host
    from downriver.data.condition.metadata import sweep_metadata as sweep_metadata
    from downriver.data.condition.metadata import text_loss as text_loss
    from downriver.data.condition.pack import Packer as Packer
    from downriver.data.condition.pack import cu_seqlens as cu_seqlens
    from downriver.data.condition.pack import document_mask as document_mask
    from downriver.data.condition.pack import isolated as isolated
    from downriver.data.condition.pack import isolates as isolates
    from downriver.data.condition.prompt_template import PromptTemplate as PromptTemplate
    from downriver.data.condition.prompt_template import encode_parts as encode_parts
    from downriver.data.condition.prompt_template import k_shot as k_shot

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ControlTokens": "downriver.data.condition.control_tokens:ControlTokens",
        "Encoded": "downriver.data.condition.encode:Encoded",
        "MetadataFormatter": "downriver.data.condition.metadata:MetadataFormatter",
        "Packer": "downriver.data.condition.pack:Packer",
        "Part": "downriver.data.condition.encode:Part",
        "PromptTemplate": "downriver.data.condition.prompt_template:PromptTemplate",
        "annotate": "downriver.data.condition.annotate:annotate",
        "condition": "downriver.data.condition.metadata:condition",
        "continue_ids": "downriver.data.condition.generate:continue_ids",
        "cu_seqlens": "downriver.data.condition.pack:cu_seqlens",
        "document_mask": "downriver.data.condition.pack:document_mask",
        "encode": "downriver.data.condition.encode:encode",
        "encode_all": "downriver.data.condition.encode:encode_all",
        "encode_parts": "downriver.data.condition.prompt_template:encode_parts",
        "generate": "downriver.data.condition.metadata:generate",
        "host": "downriver.data.condition.metadata:host",
        "isolated": "downriver.data.condition.pack:isolated",
        "isolates": "downriver.data.condition.pack:isolates",
        "k_shot": "downriver.data.condition.prompt_template:k_shot",
        "keep_aligned": "downriver.data.condition.annotate:keep_aligned",
        "misalignment_report": "downriver.data.condition.control_tokens:misalignment_report",
        "sample_aligned": "downriver.data.condition.control_tokens:sample_aligned",
        "segment_rows": "downriver.data.condition.control_tokens:segment_rows",
        "segments": "downriver.data.condition.annotate:segments",
        "sweep_metadata": "downriver.data.condition.metadata:sweep_metadata",
        "text_loss": "downriver.data.condition.metadata:text_loss",
    },
)
