"""Compress: make one model cheaper to serve, by sparse activations, linear attention or shorter sequences."""

from downriver.core.lazy import attach

METHODS: dict[str, str] = {}
"""Functions ``(model, *, ...)`` that a study's YAML may name."""

__getattr__, __dir__, __all__ = attach(__name__, METHODS | {})
