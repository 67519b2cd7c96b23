"""Backbones: load a real checkpoint, or build a small one of any modality."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.models.builtin import builtin_names as builtin_names
    from downriver.models.chat import ChatModel as ChatModel
    from downriver.models.chat import Completion as Completion
    from downriver.models.chat import HFChat as HFChat
    from downriver.models.chat import LogLikelihood as LogLikelihood
    from downriver.models.chat import OpenAIChat as OpenAIChat
    from downriver.models.chat import ScriptedChat as ScriptedChat
    from downriver.models.chat import SpendingLimit as SpendingLimit
    from downriver.models.compute_graph import ComputeGraph as ComputeGraph
    from downriver.models.compute_graph import compute_graph as compute_graph
    from downriver.models.hat import HATConfig as HATConfig
    from downriver.models.hat import HATForCausalLM as HATForCausalLM
    from downriver.models.hat import HATForSequenceClassification as HATForSequenceClassification
    from downriver.models.hat import HATStreamTokenizer as HATStreamTokenizer
    from downriver.models.hat import HATTokenizer as HATTokenizer
    from downriver.models.hat import flops_per_byte as flops_per_byte
    from downriver.models.images import ImageProcessor as ImageProcessor
    from downriver.models.load import load as load
    from downriver.models.masked_diffusion import MaskedDiffusionConfig as MaskedDiffusionConfig
    from downriver.models.masked_diffusion import MaskedDiffusionLM as MaskedDiffusionLM
    from downriver.models.masked_diffusion import diffusion_objective as diffusion_objective
    from downriver.models.mixture import MixtureConfig as MixtureConfig
    from downriver.models.mixture import MixtureForCausalLM as MixtureForCausalLM
    from downriver.models.mixture_export import export_mixture as export_mixture
    from downriver.models.model import Model as Model
    from downriver.models.quantised import quantised as quantised
    from downriver.models.rope import critical_dim as critical_dim
    from downriver.models.rope import extend_context as extend_context
    from downriver.models.rope import ntk_scale as ntk_scale
    from downriver.models.small import small as small
    from downriver.models.small import small_language_model as small_language_model
    from downriver.models.sparse_decoding import sparse_decoding as sparse_decoding
    from downriver.models.tokenizers import bpe_tokenizer as bpe_tokenizer
    from downriver.models.tokenizers import byte_tokenizer as byte_tokenizer
    from downriver.models.tokenizers import word_tokenizer as word_tokenizer
    from downriver.models.word_split import WordSplitter as WordSplitter

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ComputeGraph": "downriver.models.compute_graph:ComputeGraph",
        "HATConfig": "downriver.models.hat:HATConfig",
        "HATForCausalLM": "downriver.models.hat:HATForCausalLM",
        "HATForSequenceClassification": "downriver.models.hat:HATForSequenceClassification",
        "HATStreamTokenizer": "downriver.models.hat_stream:HATStreamTokenizer",
        "HATTokenizer": "downriver.models.hat_tokenizer:HATTokenizer",
        "ImageProcessor": "downriver.models.images:ImageProcessor",
        "MaskedDiffusionConfig": "downriver.models.masked_diffusion:MaskedDiffusionConfig",
        "MaskedDiffusionLM": "downriver.models.masked_diffusion:MaskedDiffusionLM",
        "MixtureConfig": "downriver.models.mixture:MixtureConfig",
        "MixtureForCausalLM": "downriver.models.mixture:MixtureForCausalLM",
        "Model": "downriver.models.model:Model",
        "WordSplitter": "downriver.models.word_split:WordSplitter",
        "bpe_tokenizer": "downriver.models.tokenizers:bpe_tokenizer",
        "builtin_names": "downriver.models.builtin:builtin_names",
        "byte_tokenizer": "downriver.models.tokenizers:byte_tokenizer",
        "compute_graph": "downriver.models.compute_graph:compute_graph",
        "critical_dim": "downriver.models.rope:critical_dim",
        "diffusion_objective": "downriver.models.masked_diffusion:diffusion_objective",
        "export_mixture": "downriver.models.mixture_export:export_mixture",
        "extend_context": "downriver.models.rope:extend_context",
        "flops_per_byte": "downriver.models.hat:flops_per_byte",
        "load": "downriver.models.load:load",
        "ntk_scale": "downriver.models.rope:ntk_scale",
        "quantised": "downriver.models.quantised:quantised",
        "small": "downriver.models.small:small",
        "small_language_model": "downriver.models.small:small_language_model",
        "sparse_decoding": "downriver.models.sparse_decoding:sparse_decoding",
        "word_tokenizer": "downriver.models.tokenizers:word_tokenizer",
    }
    | {
        name: f"downriver.models.chat:{name}"
        for name in (
            "ChatModel",
            "Completion",
            "HFChat",
            "LogLikelihood",
            "OpenAIChat",
            "ScriptedChat",
            "SpendingLimit",
        )
    },
)
