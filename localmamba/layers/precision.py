"""Where half precision would do harm."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32; one in float64 stays as it is."""
    return x if x.dtype == torch.float64 else x.float()


def saturate(x: Tensor) -> Tensor:
    """Keeps float16 finite where float32 would be: what is beyond its range becomes its largest.

    What has become so passes no gradient. Kernels saturate their outputs by themselves: there the
    largest value stands for all beyond it, and a gradient as if nothing had been cut off would be
    too large by as much as was cut off.
    """
    if x.dtype != torch.float16:
        return x
    largest = 65504.0
    return torch.where(x.abs() < largest, x, x.detach().clamp(-largest, largest))
