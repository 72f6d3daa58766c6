"""The depthwise convolution in differentiable PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.registration import vjp
from .._common.tokens import accumulation_dtype


def depthwise_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `ops.depthwise_conv` in any floating dtype."""
    dtype, size = accumulation_dtype(x.dtype), weight.shape[-1]
    height, width, channels = x.shape[1:]
    tokens = F.pad(x.to(dtype), (0, 0) + 2 * (size // 2, size // 2))
    y = x.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
    for i in range(size):
        for j in range(size):
            tap = weight[:, 0, i, j].to(dtype)
            y = y + tap * tokens[:, i : i + height, j : j + width]
    y = F.silu(y)
    if x.dtype == torch.float16:  # as everywhere, a float16 output saturates
        y = y.clamp(-65504.0, 65504.0)
    return y.to(x.dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return depthwise_conv_reference(x, weight, bias).contiguous()


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    return vjp(depthwise_conv_reference, (x, weight, bias), dy)
