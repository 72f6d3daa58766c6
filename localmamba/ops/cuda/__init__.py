"""Triton and CUDA C++ kernels: the backend for CUDA tensors (see `ops/backends.py`)."""

from .align import align_weights
from .conv import conv_backward, conv_forward
from .depthwise_conv import depthwise_backward, depthwise_forward
from .join_backward import attend_backward, merge_backward, pool_backward
from .merge import merge_forward
from .norm import norm_backward, norm_forward
from .pool import pool_forward
from .scan import scan_backward, scan_forward
from .select_layers import select_forward
from .select_layers_backward import select_backward

__all__ = [
    "align_weights",
    "attend_backward",
    "conv_backward",
    "conv_forward",
    "depthwise_backward",
    "depthwise_forward",
    "merge_backward",
    "merge_forward",
    "norm_backward",
    "norm_forward",
    "pool_backward",
    "pool_forward",
    "scan_backward",
    "scan_forward",
    "select_backward",
    "select_forward",
]
