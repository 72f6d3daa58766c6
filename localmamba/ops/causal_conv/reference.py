"""The causal convolution along scan orders in differentiable PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from .._common.registration import vjp
from .._common.tokens import accumulation_dtype, gather_tokens


def causal_conv_reference(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    """Computes `ops.causal_conv` in any floating dtype."""
    dtype = accumulation_dtype(x.dtype)
    width = weight.shape[2]
    tokens = F.pad(gather_tokens(x.to(dtype), index), (0, 0, width - 1, 0))
    u = bias.to(dtype)[:, None]
    for tap in range(width):
        u = u + weight[:, None, :, tap].to(dtype) * tokens[:, :, tap : tap + index.shape[1]]
    return F.silu(u).to(x.dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    """Computes [B, K, P, D], in memory [K, B, P, D] as the kernels do."""
    u = causal_conv_reference(x, weight, bias, index)
    return u.transpose(0, 1).contiguous().transpose(0, 1)


def backward(
    du: Tensor, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor
) -> list[Tensor | None]:
    return vjp(
        lambda x, weight, bias: causal_conv_reference(x, weight, bias, index), (x, weight, bias), du
    )
