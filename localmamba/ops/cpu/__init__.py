"""The CPU kernels, in Numba, behind the interface of `ops.backends`: float32 inside.

SCAttn's two small linear layers are PyTorch's.
"""

from ..backends import attend_in_parts, cast_weights
from ..reference_backend import select_backward, select_forward
from .conv import conv_backward, conv_forward
from .depthwise_conv import depthwise_backward, depthwise_forward
from .merge import merge_backward, merge_forward
from .norm import norm_backward, norm_forward
from .pool import pool_backward, pool_forward
from .scan import scan_backward, scan_forward

attend_backward = attend_in_parts(merge_backward, select_backward, pool_backward)
align_weights = cast_weights

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
