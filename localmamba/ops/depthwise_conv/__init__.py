"""Depthwise convolution over a map of tokens, with SiLU."""

from .op import depthwise_conv

__all__ = ["depthwise_conv"]
