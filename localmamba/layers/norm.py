"""Norms in one kernel: statistics in float32, output in the dtype that the next layer reads.

Under autocast they return its dtype, where PyTorch's return float32 and the next layer casts.
"""

import torch
from torch import Tensor, nn

from ..ops import token_norm

torch.fx.wrap("token_norm")


class RMSNorm(nn.Module):
    """Divides tokens by their root mean square, without subtracting a mean.

    Statistics are float32 at least and the result has the dtype of the weight (of autocast, under
    it), so a model cast to bfloat16 keeps an exact residual stream.

    Args:
        dim: Channels, the last axis of the input.
        eps: Added to the mean square.
        device: Device of the weight.
        dtype: Dtype of the weight.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = None  # for `residual_norm`, which takes one

    def forward(self, x: Tensor) -> Tensor:
        """[..., L, C] -> [..., L, C] in the dtype of the weight (of autocast, under it)."""
        return token_norm(x, self.weight, None, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """PyTorch's layer norm of the last axis, with weight and bias.

    Args:
        dim: Channels, the last axis of the input.
        eps: Added to the variance.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., L, C] -> [..., L, C] in the dtype of the weight (of autocast, under it)."""
        return token_norm(x, self.weight, self.bias, self.eps)
