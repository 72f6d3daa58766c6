"""Guards for half precision."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Casts to float32; float64 stays as it is."""
    return x if x.dtype == torch.float64 else x.float()


def saturate(x: Tensor) -> Tensor:
    """Clamps float16 to its finite range; clamped elements get zero gradient.

    Kernels clamp their outputs themselves. With a gradient through the clamp, the largest finite
    value would stand for all beyond it, and gradients would be too large by what was cut off.
    """
    if x.dtype != torch.float16:
        return x
    largest = 65504.0
    return torch.where(x.abs() < largest, x, x.detach().clamp(-largest, largest))
