"""Neural parts that several methods share and no paper owns."""

from downriver.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"downriver.nn.similarity:{name}" for name in ("cka", "parc", "rsa")}
    | {name: f"downriver.nn.preference:{name}" for name in ("dpo_loss", "nll_anchor", "sequence_logprobs")}
    | {"linear_head": "downriver.nn.heads:linear_head", "logits_at": "downriver.nn.selected_logits:logits_at"},
)
