"""Gathers and scatters tokens along scan orders in PyTorch, and the dtype of sums."""

import torch
from torch import Tensor

from ..scan_orders import PADDING


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64 and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gathers [B, L, D] or [B, K, L, D] by `index` [K, P] to [B, K, P, D], zeros at padding."""
    if x.dim() == 3:
        x = x[:, None].expand(-1, index.shape[0], -1, -1)
    steps = index.clamp(min=0).long()[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
    return x.gather(2, steps) * (index != PADDING)[None, :, :, None]


def scatter_tokens(y: Tensor, index: Tensor, length: int) -> Tensor:
    """Scatters [B, K, P, D] by `index` [K, P] to [B, K, L, D], padding dropped."""
    spill = torch.where(index == PADDING, length, index).long()
    steps = spill[None, :, :, None].expand_as(y)
    out = y.new_zeros(y.shape[0], y.shape[1], length + 1, y.shape[3])
    return out.scatter(2, steps, y)[:, :, :length]


def scan_major(batch: int, directions: int, steps: int, channels: int, like: Tensor) -> Tensor:
    """Allocates [B, K, P, D], in memory [K, B, P, D]: a batched product over K needs no copy."""
    return like.new_empty((directions, batch, steps, channels)).transpose(0, 1)
