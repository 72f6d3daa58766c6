"""Causal depthwise convolution along scan orders, with SiLU."""

from .op import causal_conv

__all__ = ["causal_conv"]
