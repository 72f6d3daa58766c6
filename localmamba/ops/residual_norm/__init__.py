"""Norm of the residual stream: scale, add, rotate, normalize in one pass."""

from .op import residual_norm, token_norm

__all__ = ["residual_norm", "token_norm"]
