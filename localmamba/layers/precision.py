"""Where half precision would do harm."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32; one in float64 stays as it is."""
    return x if x.dtype == torch.float64 else x.float()


def saturate(x: Tensor) -> Tensor:
    """Keeps float16 finite where float32 would be: what is beyond its range becomes its largest."""
    return x.clamp(-65504.0, 65504.0) if x.dtype == torch.float16 else x
