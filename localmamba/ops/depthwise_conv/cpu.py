"""CPU implementation of the depthwise convolution with SiLU: PyTorch's (oneDNN), in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.registration import in_dtypes


def _maps(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the inputs in float32, the map as PyTorch's convolutions take it, [B, D, H, W]."""
    bias = bias if bias is None else bias.float()
    return x.float().permute(0, 3, 1, 2), weight.float(), bias


def _before_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    y = F.silu(_before_silu(*_maps(x, weight, bias)), inplace=True).permute(0, 2, 3, 1)
    y = y.clamp_(-65504.0, 65504.0) if x.dtype == torch.float16 else y
    return y.to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    inputs, channels, padding = (x, weight, bias), x.shape[3], weight.shape[-1] // 2
    if x.numel() == 0:
        return [i if i is None else torch.zeros_like(i) for i in inputs]
    x, weight, bias = _maps(x.contiguous(), weight, bias)  # else each of the two copies it
    pre = _before_silu(x, weight, bias)
    dy = dy.float().permute(0, 3, 1, 2)
    dpre = torch.ops.aten.silu_backward.grad_input(dy, pre, grad_input=pre)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dpre, x, weight, None if bias is None else [channels],
        (1, 1), (padding, padding), (1, 1), False, (0, 0), channels,
        (True, True, bias is not None),
    )  # fmt: skip
    return in_dtypes((dx.permute(0, 2, 3, 1), dweight, dbias), inputs)
