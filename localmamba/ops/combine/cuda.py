"""The GPU kernels of the combination of directions (Triton)."""

from .cuda_backward import combine_backward, pool_backward, scattn_backward
from .cuda_merge import combine_forward
from .cuda_pool import pool_forward
from .cuda_select import weights_forward
from .cuda_select_backward import weights_backward

__all__ = [
    "combine_backward",
    "combine_forward",
    "pool_backward",
    "pool_forward",
    "scattn_backward",
    "weights_backward",
    "weights_forward",
]
