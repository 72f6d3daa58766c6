"""Scan orders and the kernels that read tokens along them: arrays in and out (see README.md)."""

from .causal_conv import causal_conv
from .combine import combine_directions, pool_directions, scattn_combine
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
from .selective_scan import s6_branches, selective_scan

__all__ = [
    "CANDIDATES",
    "PADDING",
    "ScanOrder",
    "causal_conv",
    "check_directions",
    "combine_directions",
    "depthwise_conv",
    "list_directions",
    "pool_directions",
    "register_direction",
    "residual_norm",
    "s6_branches",
    "scan_index",
    "scan_order",
    "scattn_combine",
    "selective_scan",
    "token_norm",
]
