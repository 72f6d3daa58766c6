"""Scan orders and the kernels that read tokens along them: arrays in and out (see README.md)."""

from .attend import attend_branches
from .branches import s6_branches
from .causal_conv import causal_conv
from .depthwise_conv import depthwise_conv
from .residual_norm import residual_norm, token_norm
from .scan_orders import (
    CANDIDATES,
    PADDING,
    ScanOrder,
    check_directions,
    list_directions,
    register_direction,
    scan_index,
    scan_order,
)
from .scattn import merge_branches, pool_branches
from .selective_scan import selective_scan

__all__ = [
    "CANDIDATES",
    "PADDING",
    "ScanOrder",
    "attend_branches",
    "causal_conv",
    "check_directions",
    "depthwise_conv",
    "list_directions",
    "merge_branches",
    "pool_branches",
    "register_direction",
    "residual_norm",
    "s6_branches",
    "scan_index",
    "scan_order",
    "selective_scan",
    "token_norm",
]
